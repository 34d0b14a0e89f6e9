"""int8 within a drop of the user's metric: which layers are quantized, and which are left alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers.utils import logging

from .engine import Layers, Runner
from .metric import Judge, is_within
from .source import Inputs

logger = logging.get_logger(__name__)

#: Writes an int8 model in which the named nodes stay float: from a folder, into a folder.
Quantize = Callable[[Path, Path, Sequence[str]], None]


@dataclass(frozen=True)
class Int8Result:
    """What int8 did to a model.

    Attributes:
        recipe: how it was quantized; ``"none"`` if no int8 was within the allowed drop.
        float_layers: layers that stay float, as they hurt.
        hurt: layer -> largest difference of an output if that layer alone is quantized, over the largest
            entry; the worst first. Empty if none had to be looked for.
        difference: largest difference of an output from the float model, over the largest entry.
        metric: of the float model, of this one; ``None`` without labels.
        max_drop: in points, that was allowed.
    """

    recipe: str
    float_layers: tuple[str, ...]
    hurt: dict[str, float]
    difference: float
    metric: tuple[float, float] | None
    max_drop: float


@dataclass(frozen=True)
class Gate:
    """How int8 is made and judged in one engine.

    Attributes:
        recipe: its name.
        layers: what can be left float.
        quantize: see :data:`Quantize`.
        load: runs what it wrote.
        batches: inputs that outputs are compared on.
        judge: the user's metric, if there are labels.
        max_drop: points that it may lose.
    """

    recipe: str
    layers: Layers
    quantize: Quantize
    load: Callable[[Path], Runner]
    batches: Sequence[Inputs]
    judge: Judge | None
    max_drop: float

    def apply(self, floats: Path, folder: Path) -> Int8Result:
        """Write the int8 model that loses no more than is allowed, or the float one.

        Layers that differ most when they alone are quantized are left float, one, then two, then four, ...,
        then all but one, until the metric is within the drop.

        Args:
            floats: folder of the float model.
            folder: an empty one.
        """
        expected = self.load(floats)
        before = self.judge.score(expected) if self.judge else None
        found = self._attempt(floats, folder, (), {}, expected, before)
        if self.judge is None and not np.isfinite(found.difference):
            raise ValueError(
                "int8: expected finite outputs of the quantized model, got others; give data with labels, so "
                "that the layers that hurt stay float"
            )
        if self._passes(found):
            return found
        hurt = self._sensitivity(floats, folder, expected)
        logger.warning_once(
            f"int8 loses more than {self.max_drop:g} points; it hurts most in {list(hurt)[:4]}"
        )
        # The last: all but the layer that hurts least.
        for count in sorted({*(2**power for power in range(len(hurt).bit_length())), len(hurt) - 1}):
            if 0 < count < len(hurt):
                found = self._attempt(floats, folder, tuple(hurt)[:count], hurt, expected, before)
                if self._passes(found):
                    return found
        _replace(floats, folder)
        assert before is not None
        return Int8Result("none", tuple(hurt), hurt, 0.0, (before, before), self.max_drop)

    def _attempt(
        self,
        floats: Path,
        folder: Path,
        float_layers: tuple[str, ...],
        hurt: dict[str, float],
        expected: Runner,
        before: float | None,
    ) -> Int8Result:
        _clear(folder)
        self.quantize(floats, folder, [node for name in float_layers for node in self.layers[name]])
        run = self.load(folder)
        metric = None if self.judge is None or before is None else (before, self.judge.score(run))
        return Int8Result(
            self.recipe, float_layers, hurt, _difference(run, expected, self.batches), metric, self.max_drop
        )

    def _passes(self, found: Int8Result) -> bool:
        return found.metric is None or is_within(*found.metric, self.max_drop)

    def _sensitivity(self, floats: Path, folder: Path, expected: Runner) -> dict[str, float]:
        """Layer -> difference if it alone is quantized, the largest first."""
        found = {}
        for name in self.layers:
            _clear(folder)
            self.quantize(
                floats, folder, [n for other in self.layers if other != name for n in self.layers[other]]
            )
            found[name] = _difference(self.load(folder), expected, self.batches)
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def _difference(run: Runner, expected: Runner, batches: Sequence[Inputs]) -> float:
    largest = 0.0
    for batch in batches:
        found, wanted = run(batch), expected(batch)
        for name, value in found.items():
            if not np.isfinite(value).all():
                return float("inf")
            scale = float(np.abs(wanted[name]).max(initial=0.0)) or 1.0
            largest = max(largest, float(np.abs(value - wanted[name]).max(initial=0.0)) / scale)
    return largest


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _replace(floats: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(floats, folder)
