"""How fast a pruned model is: what its report says of time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..budgets import BUDGETS
from ..budgets.time import TimeBudget
from ..config import PruningConfig
from ..encoders import inspect_encoders
from ..reports.counting import report
from ..reports.latency import Latency, measure_latency
from ..reports.report import Report
from ..shrinking import ShrinkReport
from ..timing import using_threads

#: Sequences and most tokens of each that every run is measured at.
USUAL_SHAPES = ((1, 128), (32, 128))


def measure(
    model: nn.Module,
    longest: int | None,
    settings: PruningConfig,
    *,
    length: int | None = None,
    shapes: Sequence[tuple[int, int]] | None = None,
    rounds: int = 30,
    budget_seconds: float = 5.0,
) -> list[Latency]:
    """Latency of batches of sequences, as long as those of the run if these were shorter.

    Args:
        model: a pruned model.
        longest: most tokens of a sequence in the run; ``None`` if it is not known.
        settings: of the run.
        length: tokens of the sequences that the target is counted for, if that is a time.
        shapes: sequences and most tokens of each; ``None`` for what the run was pruned for, if that is a
            time, and two usual ones.
        rounds: see :func:`~hf_mlprune.reports.latency.measure_latency`.
        budget_seconds: the same, per shape.
    """
    wanted = [(batch, min(most, longest or most)) for batch, most in shapes or USUAL_SHAPES]
    if shapes is None and length is not None and BUDGETS[settings.target[0]] is TimeBudget:
        wanted = list(dict.fromkeys([(settings.batch, length), *wanted]))
    with using_threads(settings.threads):
        measured = [
            measure_latency(encoder, batch, tokens, rounds=rounds, budget_seconds=budget_seconds)
            for encoder in inspect_encoders(model, settings.encoder)
            for batch, tokens in wanted
        ]
    return [row for row in measured if row is not None]


def measured_report(
    model: nn.Module,
    longest: int | None,
    done: ShrinkReport,
    settings: PruningConfig,
    length: int | None,
    predicted_speedup: float | None,
    reached: str | None,
) -> Report:
    """The report of a model that was shrunk just now, with times.

    Args:
        model: pruned.
        longest: most tokens of a sequence in the run; ``None`` if it is not known.
        done: what the shrink did.
        settings: of the run, with the target of this model.
        length: see :func:`measure`.
        predicted_speedup: by the table of times.
        reached: cost of the model, if the target is not its density.
    """
    return report(
        model,
        shrunk=done,
        latency=measure(model, longest, settings, length=length),
        settings=settings,
        length=length,
        predicted_speedup=predicted_speedup,
        reached=reached,
    )
