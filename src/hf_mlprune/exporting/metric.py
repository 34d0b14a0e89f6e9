"""The user's metric of a model as an engine runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import EvalPrediction

from .engine import Outputs, Runner
from .source import LABELS, inputs_of

#: As for the Trainer: predictions and labels to figures.
ComputeMetrics = Callable[[EvalPrediction], Mapping[str, float]]
#: The label of what does not count, as transformers' losses have it.
IGNORED = -100


@dataclass(frozen=True)
class Judge:
    """How an export is judged on labelled data.

    Attributes:
        batches: with inputs and labels.
        names: of the model's inputs.
        compute_metrics: as for the Trainer; accuracy if it is left out.
        metric: which of its figures counts, larger being better; its only one if it is left out.
    """

    batches: Sequence[Mapping[str, Any]]
    names: tuple[str, ...]
    compute_metrics: ComputeMetrics | None
    metric: str | None

    @property
    def has_labels(self) -> bool:
        """Whether there is something to judge by."""
        return any(name in self.batches[0] for name in LABELS)

    def score(self, run: Runner) -> float:
        """The metric.

        Raises:
            ValueError: the metric cannot be told from what was given.
        """
        predictions, labels = [], []
        for batch in self.batches:
            predictions.append(_predictions(run(inputs_of(batch, self.names))))
            labels.append(tuple(np.asarray(batch[name]) for name in LABELS if name in batch))
        found = EvalPrediction(
            predictions=_joined(predictions),
            label_ids=_joined(labels),
        )
        return self._chosen(accuracy(found) if self.compute_metrics is None else self.compute_metrics(found))

    def _chosen(self, figures: Mapping[str, float]) -> float:
        name = self.metric
        if name is None and len(figures) == 1:
            name = next(iter(figures))
        if name is None or name not in figures:
            raise ValueError(
                f"metric: expected which of {sorted(figures)} counts, got {self.metric!r}; pass metric=..."
            )
        return float(figures[name])


def accuracy(found: EvalPrediction) -> dict[str, float]:
    """Share of right classes, of those that count.

    Raises:
        ValueError: the labels are no classes.
    """
    logits, labels = found.predictions, found.label_ids
    # Two of each for spans: where they start, and where they end.
    several = isinstance(logits, tuple) and isinstance(labels, tuple)
    pairs = list(zip(logits, labels, strict=True)) if several else [(logits, labels)]
    right: Any = True
    for scores, wanted in pairs:
        if isinstance(scores, tuple) or not np.issubdtype(np.asarray(wanted).dtype, np.integer):
            raise ValueError(
                "metric: expected classes as labels and one output of logits; pass compute_metrics=..."
            )
        right = right & (scores.argmax(axis=-1) == wanted)
    return {"accuracy": float(right[np.asarray(pairs[0][1]) != IGNORED].mean())}


def points(metric: float) -> float:
    """A metric in points: hundredths where it lies between -1 and 1, else what it is."""
    return metric * 100 if abs(metric) <= 1 else metric


def _predictions(outputs: Outputs) -> tuple[np.ndarray[Any, Any], ...]:
    return tuple(value for name, value in outputs.items() if "." not in name)


def _joined(rows: Iterable[tuple[np.ndarray[Any, Any], ...]]) -> Any:
    """Arrays of all batches; rows of tokens are filled up to the longest."""
    columns = [_concatenated(column) for column in zip(*rows, strict=True)]
    return columns[0] if len(columns) == 1 else tuple(columns)


def _concatenated(parts: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    shape = tuple(max(part.shape[axis] for part in parts) for axis in range(1, parts[0].ndim))
    filled = []
    for part in parts:
        wider = [(0, 0), *((0, most - size) for most, size in zip(shape, part.shape[1:], strict=True))]
        filled.append(np.pad(part, wider, constant_values=IGNORED))
    return np.concatenate(filled)
