"""The user's metric of a model as an engine runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from .engine import Outputs, Runner
from .source import LABELS, inputs_of

#: As for the Trainer: predictions and labels to figures.
ComputeMetrics = Callable[[EvalPrediction], Mapping[str, float]]
#: The label of what does not count, as transformers' losses have it.
IGNORED = -100
#: Of points, as differences of floats have them.
ROUNDING = 1e-9


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
            labels.append(_labels_of(batch))
        found = EvalPrediction(
            predictions=_joined(predictions),
            label_ids=_joined(labels),
        )
        return self._chosen(accuracy(found) if self.compute_metrics is None else self.compute_metrics(found))

    def check(self, run: Runner) -> None:
        """Refuse early a metric that cannot be taken.

        Accuracy is tried on the first batch; a function of the user's, which may expect them all, on all.

        Raises:
            TypeError: the function returns no figures.
            ValueError: see :func:`accuracy`; or the metric is another.
        """
        if not self.has_labels:
            return
        if self.compute_metrics is not None:
            self.score(run)
            return
        outputs = run(inputs_of(self.batches[0], self.names))
        found = _predictions(outputs)
        if not all(name.endswith("logits") for name in outputs if "." not in name):
            raise ValueError(
                f"data: expected logits to compare labels with, got a model that puts out {sorted(outputs)}; "
                "pass compute_metrics=..., or data without labels"
            )
        _pairs(_joined([found]), _joined([_labels_of(self.batches[0])]))
        if self.metric not in (None, "accuracy"):
            self._chosen({"accuracy": 0.0})

    def _chosen(self, figures: Mapping[str, float]) -> float:
        if not isinstance(figures, Mapping):
            raise TypeError(
                "compute_metrics: expected a function that returns a dict of figures, "
                f"got one that returns {type(figures).__name__}"
            )
        name = self.metric
        if name is None and len(figures) == 1:
            name = next(iter(figures))
        if name is None or name not in figures:
            raise ValueError(
                f"metric: expected which of {sorted(figures)} counts, got {self.metric!r}; pass metric=..."
            )
        figure = float(figures[name])
        if not np.isfinite(figure):
            raise ValueError(f"metric: expected {name} to be a number, got {figure}; look at labels in data")
        return figure


def accuracy(found: EvalPrediction) -> dict[str, float]:
    """Share of right classes, of those that count.

    Raises:
        ValueError: the labels are no classes, or none counts.
    """
    pairs = _pairs(found.predictions, found.label_ids)
    right: Any = True
    for scores, wanted in pairs:
        right = right & (scores.argmax(axis=-1) == wanted)
    counted = right[pairs[0][1] != IGNORED]
    if not counted.size:
        raise ValueError(f"data: expected labels, got only {IGNORED}, which does not count")
    return {"accuracy": float(counted.mean())}


def _pairs(logits: Any, labels: Any) -> list[tuple[Any, Any]]:
    """Logits and the classes that they are of."""
    # Two of each for spans: where they start, and where they end.
    several = isinstance(logits, tuple) and isinstance(labels, tuple)
    pairs = list(zip(logits, labels, strict=True)) if several else [(logits, labels)]
    for scores, wanted in pairs:
        if (
            len({values.shape for _, values in pairs if not isinstance(values, tuple)}) > 1
            or isinstance(scores, tuple)
            or isinstance(wanted, tuple)
            or not np.issubdtype(wanted.dtype, np.integer)
            or scores.shape[:-1] != wanted.shape
            or scores.shape[-1] < 2
        ):
            raise ValueError(
                "metric: expected one class as label of each row of logits, got logits of "
                f"{_shapes(scores)} and labels of {_shapes(wanted)}; pass compute_metrics=..."
            )
    return pairs


def _shapes(values: Any) -> str:
    if isinstance(values, tuple):
        return " and ".join(map(_shapes, values))
    return f"{values.dtype} {values.shape}"


def _labels_of(batch: Mapping[str, Any]) -> tuple[np.ndarray[Any, Any], ...]:
    return tuple(torch.as_tensor(batch[name]).detach().cpu().numpy() for name in LABELS if name in batch)


def points_lost(before: float, after: float) -> float:
    """What a metric lost, in points: hundredths if it lay between -1 and 1 before, else its own units."""
    return (before - after) * (100 if abs(before) <= 1 else 1)


def is_within(before: float, after: float, max_drop: float) -> bool:
    """Whether a metric lost no more than so many points."""
    # One row of 200 is half a point, but a little more than 0.5 as a difference of floats.
    return points_lost(before, after) <= max_drop + ROUNDING


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
