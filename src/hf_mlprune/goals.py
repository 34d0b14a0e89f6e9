"""What a run is to reach: the target of each phase, the gates that learn it, and whether it was met."""

from __future__ import annotations

import dataclasses

import torch

from .schedule import Phase
from .stage import Stage
from .stages import BlockStage, StructuredStage
from .state import PruningState


def target_of(state: PruningState, phase: Phase, index: int = -1) -> float:
    """Share of the dense cost, of weights the density, at the end of the stage that learns in a phase.

    Args:
        state: of an encoder.
        phase: of the run.
        index: of the target, where there are several.
    """
    config = state.config.with_target(index)
    if config.density is None:
        return state.budget(config).share()
    if not config.structured or phase > Phase.STRUCTURED:
        return config.density
    if config.structured_density is not None or not config.blocks:
        return config.first_target()
    # Heads alone, say, cannot reach half of the weights: blocks then do the more.
    return max(config.first_target(), StructuredStage(state).least_share())


def stage_of(state: PruningState, phase: Phase) -> Stage | None:
    """The gates that learn in a phase; ``None`` once all masks are final.

    Block gates get the layout of what heads and rows left.
    """
    if phase is Phase.FINAL:
        return None
    if phase <= Phase.STRUCTURED and state.config.structured:
        return StructuredStage(state)
    if not state.config.blocks:
        return None
    pairs = [(linear.masks.blocks, linear) for linear in state.linears if linear.masks.blocks is not None]
    for _, linear in pairs:
        linear.masks = dataclasses.replace(linear.masks, layout=linear.block_layout())
    return BlockStage(state, pairs)


def origin_of(state: PruningState, phase: Phase, index: int) -> float:
    """Where the path to a target begins: at the one that masks landed on before, or at what there was."""
    if phase is Phase.BLOCKS and state.config.structured:
        # A model that was pruned before may have less than heads and rows are to leave.
        return min(base_share(state), target_of(state, Phase.STRUCTURED, index))
    if index:
        return target_of(state, phase, index - 1)
    # A model that was pruned before may be a little below its target, by less than a unit.
    return max(base_share(state), target_of(state, phase, index))


def base_share(state: PruningState) -> float:
    """Share of the dense cost of what masks were laid over; below 1 if the model was pruned before."""
    stage = StructuredStage(state)
    return min(1.0, float(stage.budget.layer_costs(stage.widths).sum()) / stage.total)


def is_within_target(state: PruningState) -> bool:
    """Whether the masks as they are meet the target of the run, of several the last."""
    density = state.config.density
    if density is not None:
        return state.density() <= density + 1e-9
    stage = StructuredStage(state)
    return stage.kept_cost() <= stage.limit(stage.budget.share())


def cost_share(state: PruningState) -> float:
    """Share of the pruned layers' dense cost that is left, in the budget of the run."""
    return StructuredStage(state).kept_share()


def predicted_speedup(state: PruningState) -> float | None:
    """How many times as fast the masked encoder will be, by the table of times; ``None`` without one."""
    if "rest_time" not in state.tables():
        return None
    stage = StructuredStage(state)
    budget = stage.budget
    return budget.whole / budget.cost(stage.kept_share())


def reached(state: PruningState) -> str | None:
    """What the masked encoder costs, as its target counts it; ``None`` if that is the density."""
    if state.config.density is not None:
        return None
    stage = StructuredStage(state)
    return stage.budget.reached(stage.budget.cost(stage.kept_share()))


def check_reachable(state: PruningState) -> None:
    """Refuse before the first step a density above the model's own, or below what is always kept.

    A model that was pruned to this density is a little below it, by less than a unit: it is only trained.

    Raises:
        ValueError: says what the most or the least is.
    """
    stage, density = stage_of(state, Phase.WARMUP), state.density()
    first = state.config.with_target(0)
    name, value = first.target
    assert stage is not None
    unit = max((float(costs.max()) for costs in stage.costs if len(costs)), default=0.0) / stage.total
    own = stage.kept_share() if isinstance(stage, StructuredStage) else density
    wanted = first.density if first.density is not None else state.budget(first).share()
    if wanted > own + unit + 1e-9:
        if name == "density":
            raise ValueError(f"density: expected at most the model's own, {density:.4f}, got {wanted}")
        assert isinstance(stage, StructuredStage)
        cost = stage.budget.describe(stage.budget.cost(own))
        raise ValueError(f"{name}: expected less than the model's own {cost}, got {value!r}")
    if isinstance(stage, StructuredStage):
        zeros = [torch.zeros(active) for active in stage.active]
        stage.fit(zeros, target_of(state, Phase.WARMUP), final=False)
