"""Is an export, as it lies on disk, the model it was made from?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .engine import Runner
from .source import SIZES, Inputs, Source

#: Largest difference of an output that is allowed in float32, over the largest entry of that output.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Proof:
    """What an export and its model said to the same inputs.

    Attributes:
        sizes: rows and tokens per row of the batches; images have the tokens of their size.
        difference: largest difference of any output, over the largest entry of that output.
    """

    sizes: tuple[tuple[int, int], ...]
    difference: float


def proof_batches(source: Source) -> list[Inputs]:
    """Random inputs of several sizes, some of them padded."""
    return [source.batch(rows, length) for rows, length in SIZES]


def compare(run: Runner, expected: Runner, batches: Sequence[Inputs]) -> Proof:
    """The largest difference of two ways of running a model.

    Raises:
        RuntimeError: an output has another name or shape, or entries that are no numbers.
    """
    largest, sizes = 0.0, []
    for batch in batches:
        found, wanted = run(batch), expected(batch)
        if not found or not found.keys() <= wanted.keys():
            raise RuntimeError(f"export: expected outputs of the names {sorted(wanted)}, got {sorted(found)}")
        for name, value in found.items():
            if value.shape != wanted[name].shape:
                raise RuntimeError(
                    f"export: expected {name} of the shape {wanted[name].shape}, got {value.shape}; batch or "
                    "length is not dynamic in this engine"
                )
            if not np.isfinite(value).all():
                raise RuntimeError(f"export: expected numbers in {name}, got entries that are none")
            scale = float(np.abs(wanted[name]).max(initial=0.0)) or 1.0
            largest = max(largest, float(np.abs(value - wanted[name]).max(initial=0.0)) / scale)
        shape = next(iter(batch.values())).shape
        sizes.append((int(shape[0]), int(shape[-1]) if len(shape) < 4 else 0))
    return Proof(tuple(sizes), largest)


def prove(run: Runner, expected: Runner, batches: Sequence[Inputs]) -> Proof:
    """Hold an export in float32 to its model.

    Raises:
        RuntimeError: see :func:`compare`; or they differ by more than :data:`TOLERANCE`.
    """
    proof = compare(run, expected, batches)
    if proof.difference > TOLERANCE:
        raise RuntimeError(
            f"export: expected outputs within {TOLERANCE:g} of the largest one, got a difference of "
            f"{proof.difference:.1e}; the engine computes something else, and nothing was written"
        )
    return proof
