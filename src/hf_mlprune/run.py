"""One run on the masks of one encoder: from open masks to final ones."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .goals import check_reachable, cost_share, origin_of, stage_of, target_of
from .methods import Method
from .methods.base import Pressure, Progress
from .narrowing import compute_all, compute_kept
from .processes import average_over_processes
from .schedule import Phase, Schedule
from .stage import Stage
from .stages import StructuredStage
from .state import PruningState

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What one `start` sets up; rebuilt from the model's buffers when a run is resumed.

    Attributes:
        schedules: phase boundaries, for each target.
        index: of the present target.
        method: how importance is learned.
        step: completed optimizer steps.
        phase: present phase.
        target: share of the cost at the end of the present stage; of weights the density.
        origin: that of the target before; 1 for the first.
        stage: gates that learn now, or ``None`` once all masks are final.
        pressure: what the method last aimed at, its λ and penalty.
        density: present density.
        moved_at: last step at which the density changed.
        stall_reported: whether the user was told that it does not change.
        collected: whether this step's mask gradients were learned from.
    """

    schedules: tuple[Schedule, ...]
    index: int
    method: Method[Any]
    phase: Phase
    target: float
    origin: float
    stage: Stage | None
    pressure: Pressure
    density: float
    moved_at: int
    step: int
    stall_reported: bool = False
    collected: bool = False

    @property
    def schedule(self) -> Schedule:
        """Phase boundaries of the present target."""
        return self.schedules[self.index]

    @property
    def is_recovering(self) -> bool:
        """Whether something was removed for good, for the present target or one before."""
        return self.phase is Phase.FINAL or self.index > 0

    @property
    def is_pruned(self) -> bool:
        """Whether all masks are final, and those of the last target."""
        return self.phase is Phase.FINAL and self.index + 1 == len(self.schedules)

    def ends_at(self, step: int) -> bool:
        """Whether the model after so many steps is that of a target that others follow."""
        return step == self.schedule.end and self.index + 1 < len(self.schedules)

    def cooldown(self) -> float:
        """Factor of the optimizer's step size; 1, unless the model of a target is soon to be kept."""
        return self.schedule.cooldown(self.step) if self.index + 1 < len(self.schedules) else 1.0

    def progress(self) -> Progress:
        """Where the run is, for the method."""
        return Progress(self.step, self.phase, self.schedule, self.origin)


def current_run(state: PruningState) -> Run:
    """The run that `start` set up.

    Raises:
        ValueError: `start` was not called.
    """
    run = state.run
    if not isinstance(run, Run):
        raise ValueError("the run has not begun: call `start(model, max_steps)` before the first step")
    return run


def reset_state(state: PruningState) -> None:
    """Give all masks and what they learn from their initial values."""
    method = state.config.make_method()
    for gate in state.all_gates():
        method.reset(gate)
        if gate.candidates is not None:
            gate.candidates.fill_(True)
    state.landed.zero_()


def begin(state: PruningState, schedules: tuple[Schedule, ...], step: int) -> None:
    """Set up the run of one encoder; see :func:`~hf_mlprune.loop.start`."""
    config = state.config
    if step == 0:
        reset_state(state)
    index = next((i for i, each in enumerate(schedules) if step < each.end), len(schedules) - 1)
    phase = schedules[index].phase(step)
    expected = max(0, phase - Phase.STRUCTURED)
    if not config.structured:
        expected = max(expected, 1)
        state.landed.clamp_(min=1)
    landed = int(state.landed)
    if landed != expected:
        raise ValueError(
            f"after {step} of {schedules[-1].end} steps {expected} of 2 pruning stages should be final, but "
            f"the model's masks say {landed}: resume with the same number of steps and phase "
            "fractions as before, and start a new run from a dense or pruned model"
        )
    candidates = [gate.candidates for gate in state.all_gates() if gate.candidates is not None]
    if index == 0 and not all(bool(each.all()) for each in candidates):
        raise ValueError(
            f"after {step} of {schedules[-1].end} steps the first target should be at work, but the model's "
            "masks are those of a later one: resume with the same number of steps as before"
        )
    density = state.density()
    state.run = Run(
        schedules, index, config.make_method(), phase, 1.0, 1.0, None, Pressure(1.0), density, step, step
    )
    _enter(state, state.run, phase)
    if step == 0:
        check_reachable(state)


@torch.no_grad()
def learn(state: PruningState) -> None:
    """See :func:`~hf_mlprune.loop.collect`."""
    run = current_run(state)
    if run.stage is None:
        return
    gradients = _take_gradients(run.stage)
    if run.method.needs_inputs and all(linear.inputs is None for linear in state.linears):
        raise RuntimeError(
            f"method {state.config.method!r}: no training pass has left inputs of the pruned matrices; call "
            "the model in training mode between `start` and `collect`"
        )
    run.pressure = run.method.learn(run.stage, gradients, run.target, run.progress())
    run.collected = True
    for linear in state.linears:
        linear.inputs = None


@torch.no_grad()
def move(state: PruningState, step: int) -> None:
    """See :func:`~hf_mlprune.loop.advance`."""
    run = current_run(state)
    if step != run.step + 1:
        raise ValueError(f"advance: expected step {run.step + 1}, the next one, got {step!r}")
    if run.stage is not None and not run.collected:
        raise RuntimeError(
            "advance: the masks have learned nothing in this step; call `collect(model)` after "
            "`loss.backward()` and before the optimizer's step"
        )
    if run.ends_at(step):
        _go_on(state, run)
    run.step, run.collected = step, False
    phase = run.schedule.phase(step)
    if run.stage is not None:
        run.method.after_update(run.stage, run.progress())
    if phase >= Phase.BLOCKS and not state.structured_is_final:
        _land(state, run, Phase.STRUCTURED)
    if phase >= Phase.FINAL and not state.is_final:
        _land(state, run, Phase.BLOCKS)
    if phase is not run.phase:
        _enter(state, run, phase)
    elif run.stage is not None and phase is not Phase.WARMUP:
        _set_masks(run.stage, run.method.select(run.stage, run.target, run.progress()))
    if run.stage is not None:
        _watch(state, run, step)


def _go_on(state: PruningState, run: Run) -> None:
    """Take up the next target, which keeps units of the present one only."""
    for gate in state.all_gates():
        assert gate.candidates is not None
        gate.candidates.copy_(gate.keep)
    state.landed.fill_(0)
    run.index += 1
    run.method.take_up(StructuredStage(state))


def _enter(state: PruningState, run: Run, phase: Phase) -> None:
    compute_all(state)
    if phase > Phase.STRUCTURED:
        compute_kept(state)
    run.phase, run.moved_at, run.stall_reported = phase, run.step, False
    run.target = target_of(state, phase, run.index)
    run.origin = origin_of(state, phase, run.index)
    run.stage = stage_of(state, phase)
    learning = set(map(id, run.stage.gates)) if run.stage else set()
    for gate in state.all_gates():
        gate.learn(id(gate) in learning)
    if phase is Phase.FINAL:
        # While masks learn, the method says where its path is.
        run.pressure = Pressure(run.target)
    for linear in state.linears:
        linear.keep_inputs, linear.inputs = run.method.needs_inputs and run.stage is not None, None
    if phase is Phase.FINAL:
        for linear in state.linears:
            layout = linear.block_layout() if linear.masks.blocks else None
            linear.masks = dataclasses.replace(linear.masks, layout=layout)
    run.density = state.density()


def _land(state: PruningState, run: Run, phase: Phase) -> None:
    """Fix the masks of one stage at the largest density not above its target."""
    wanted = state.config.structured if phase is Phase.STRUCTURED else state.config.blocks
    if wanted:
        stage = stage_of(state, phase)
        assert stage is not None
        target = target_of(state, phase, run.index)
        _set_masks(stage, stage.fit(run.method.priorities(stage), target, final=True))
    state.landed.fill_(1 if phase is Phase.STRUCTURED else 2)


def _set_masks(stage: Stage, masks: list[Tensor]) -> None:
    for gate, keep in zip(stage.gates, masks, strict=True):
        gate.set_keep(keep)


def _take_gradients(stage: Stage) -> list[Tensor]:
    found = [gate.mask.grad if gate.mask is not None else None for gate in stage.gates]
    if stage.gates and all(gradient is None for gradient in found):
        raise RuntimeError(
            "no gradient reached the masks in this step: the loss does not come from this model's "
            "forward pass in training mode, or `collect` was called before `loss.backward()`"
        )
    flat = torch.cat(
        [
            gate.scores.new_zeros(active) if gradient is None else gradient[:active]
            for gate, gradient, active in zip(stage.gates, found, stage.active, strict=True)
        ]
    )
    for gate in stage.gates:
        if gate.mask is not None:
            gate.mask.grad = None
    # The masks are no parameters, so DDP does not average their gradients.
    average_over_processes(flat)
    if not bool(flat.isfinite().all()):
        raise FloatingPointError(
            "the gradient of the masks is not finite: the loss has diverged; lower the learning rate"
        )
    return list(torch.split(flat, stage.active))


def _watch(state: PruningState, run: Run, step: int) -> None:
    """Warn of masks that should change, but do not."""
    assert run.stage is not None
    density = run.stage.density()
    if density != run.density:
        run.density, run.moved_at, run.stall_reported = density, step, False
    if run.stall_reported or step - run.moved_at < state.config.stall_steps:
        return
    name, left = "density", density
    if state.config.density is None:
        name, left = "cost", cost_share(state)
    if left > run.pressure.target:
        run.stall_reported = True
        logger.warning(
            "pruning: %s has been %.4f for %d steps (target %.4f); what is above the target when the phase "
            "ends is removed at once: train for more steps, or give this phase a larger fraction of them",
            name,
            left,
            step - run.moved_at,
            run.pressure.target,
        )
