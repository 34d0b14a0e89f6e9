"""The per-step calls of a pruning run; `PruningCallback` makes them, and so can a custom loop.

start(model, max_steps)
for step, batch in enumerate(batches, start=1):
    model(**batch).loss.backward()
    collect(model)                  # before optimizer.step()
    optimizer.step(); optimizer.zero_grad()
    advance(model, step)
shrink(model)
"""

from __future__ import annotations

from torch import nn

from .costs import measure_costs
from .editing import edited
from .goals import cost_share
from .run import begin, current_run, learn, move
from .schedule import make_schedules
from .state import is_attached, pruning_states


def start(model: nn.Module, max_steps: int, step: int = 0, *, length: int | None = None) -> None:
    """Begin a run anew, or take it up again after ``step`` completed steps.

    Args:
        model: a model with masks, its buffers as they were after that step.
        max_steps: optimizer steps of the whole run, from 20 up.
        step: completed optimizer steps; with 0 all units are kept at first.
        length: tokens of a typical row of the data. It is used if the target depends on it and the settings
            do not give it.

    Raises:
        ValueError: the run is too short, a number of steps is invalid, the density cannot be reached, or the
            masks in the model do not belong to this step. The model is not changed.
    """
    states = pruning_states(model)
    if type(max_steps) is not int or type(step) is not int or not 0 <= step <= max_steps:
        raise ValueError(
            f"start: expected whole numbers with 0 <= step <= max_steps, got {step!r}, {max_steps!r}"
        )
    schedules = make_schedules(states[0].config, max_steps)
    with edited(model):
        if step == 0:
            measure_costs(model, states, length)
        for state in states:
            begin(state, schedules, step)


def collect(model: nn.Module) -> None:
    """Learn from the gradients of one optimizer step; call it after backward, before the update.

    Raises:
        RuntimeError: no gradient reached the masks since the last call.
        FloatingPointError: a mask gradient is not finite.
    """
    for state in pruning_states(model):
        learn(state)


def advance(model: nn.Module, step: int) -> None:
    """Set the masks for the next step; call it after the update.

    Masks of a stage become final, exactly within its target, with the last step of its phase, so
    that an evaluation or a checkpoint right after it sees them.

    Args:
        model: a model with masks.
        step: completed optimizer steps; one more than at the last call.

    Raises:
        ValueError: the step is not the next one.
        RuntimeError: masks learn, but `collect` was not called in this step.
    """
    for state in pruning_states(model):
        move(state, step)


def finished_target(model: nn.Module, step: int) -> int | None:
    """Index of the target that the model has just reached; call this right before `advance`.

    This is the time to keep a copy: ``copy = deepcopy(model); shrink(copy)``. The model of the last target is
    the one that the run ends with.

    Args:
        model: a model with masks.
        step: completed optimizer steps, as for :func:`advance`.

    Returns:
        ``None`` at all other steps.
    """
    run = current_run(pruning_states(model)[0])
    return run.index if run.ends_at(step) else None


def cooldown(model: nn.Module) -> float:
    """Factor for the learning rate of the next update, in ``(0, 1]``; other than 1 with several targets only.

    It falls towards the end of each target but the last. At the end of the last target, only the schedule of
    the run lowers the learning rate.
    """
    return current_run(pruning_states(model)[0]).cooldown()


def is_running(model: nn.Module) -> bool:
    """Whether a run was begun on a model."""
    return is_attached(model) and pruning_states(model)[0].run is not None


def figures(model: nn.Module) -> dict[str, float]:
    """Current values of the run; for several encoders, their mean.

    Returns:
        ``density``, ``density_target``, ``pruning_phase`` (a number that prints as a name), and values of
        the method: ``lambda`` and ``penalty`` of a regularizer, the mean ``threshold``. If the target is none
        of weights, ``cost`` and ``cost_target`` stand in place of ``density_target``: shares of the time,
        bytes or multiply-adds of the pruned layers.
    """
    states = pruning_states(model)
    runs = [current_run(state) for state in states]
    weights = [state.total_weights() for state in states]

    def mean(values: list[float]) -> float:
        return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)

    found: dict[str, float] = {"density": mean([run.density for run in runs])}
    target = mean([run.pressure.target for run in runs])
    if states[0].config.density is not None:
        found["density_target"] = target
    else:
        found |= {"cost": mean([cost_share(state) for state in states]), "cost_target": target}
    found["pruning_phase"] = runs[0].phase
    if runs[0].method.has_penalty:
        found["lambda"] = mean([run.pressure.lambda_ for run in runs])
        found["penalty"] = mean([run.pressure.penalty for run in runs])
    gates = [gate for run in runs if run.stage is not None for gate in run.stage.gates]
    return found | (runs[0].method.figures(gates) if gates else {})


def densities_of_layers(model: nn.Module) -> list[float]:
    """Kept weights over all of each layer that is pruned, of all encoders in their order."""
    return [density for state in pruning_states(model) for density in state.layer_densities()]
