"""What a Trainer measured: of the dense model, and of the weights that a run ended with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: How Trainer calls what it measures on its evaluation data.
PREFIX = "eval_"
#: Our own figure in Trainer's log, and ends of names that say how long an evaluation took.
DENSITY = "eval_density"
_TIMES = ("_runtime", "_per_second", "_preparation_time", "_compilation_time")


@dataclass(frozen=True)
class Evaluations:
    """Metrics by their names, without Trainer's prefix.

    Attributes:
        before: of the model when it had all its weights, the last time it was evaluated so.
        before_step: optimizer step of that.
        after: of the weights that the run ended with.
    """

    before: Mapping[str, float] = field(default_factory=dict)
    before_step: int = 0
    after: Mapping[str, float] = field(default_factory=dict)


def metrics_of(entry: Mapping[str, Any]) -> dict[str, float]:
    """Finite metrics of one entry of Trainer's log."""
    return {
        name.removeprefix(PREFIX): float(value)
        for name, value in entry.items()
        if name.startswith(PREFIX)
        and name != DENSITY
        and not name.endswith(_TIMES)
        and isinstance(value, (int, float))
        and math.isfinite(value)
    }


def find_evaluations(
    history: Sequence[Mapping[str, Any]],
    *,
    step: int,
    ended: int,
    dense: Mapping[str, float] | None = None,
) -> Evaluations:
    """Metrics before and after pruning.

    Evaluations of weights that nobody has any more count for neither.

    Args:
        history: Trainer's log; entries of a run with the density of the model.
        step: optimizer step of the weights that the run ended with.
        ended: entries of the log when it ended; those behind are of the pruned model.
        dense: metrics of the model before the run.
    """
    before, before_step = dict(dense or {}), 0
    after: dict[str, float] = {}
    for index, entry in enumerate(history):
        found = metrics_of(entry)
        if not found:
            continue
        if index >= ended or entry["step"] == step:
            after |= found
        if index < ended and entry.get(DENSITY) == 1.0:
            # Several data sets are evaluated in several entries of one step.
            before = {**before, **found} if entry["step"] == before_step else found
            before_step = entry["step"]
    return Evaluations(before, before_step, after)
