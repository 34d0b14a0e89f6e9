"""Time of an export against dense torch, and against the dense model in the same engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..encoders import tokens_of
from ..reports.latency import device_name
from ..timing import interleave, using_threads
from .engine import Runner
from .source import Source


@dataclass(frozen=True)
class ServingLatency:
    """One forward pass of several ways of serving, called in turn.

    Attributes:
        batch: sequences, or images.
        length: tokens per sequence; images have those of their size.
        threads: of every engine.
        processor: what it calls itself.
        seconds: way -> median.
        speedup: way -> median over rounds of its time over that of the export.
        rounds: rounds counted.
    """

    batch: int
    length: int
    threads: int
    processor: str
    seconds: dict[str, float]
    speedup: dict[str, float]
    rounds: int

    def __str__(self) -> str:
        """One line for people."""
        times = ", ".join(f"{seconds * 1e3:.1f} ms {way}" for way, seconds in self.seconds.items())
        over = ", ".join(f"{ratio:.2f}x over {way}" for way, ratio in self.speedup.items())
        return f"{self.batch} x {self.length} on {self.processor}, {self.threads} threads: {times} ({over})"


#: The name of what was exported among the ways.
EXPORT = "export"


def measure(
    source: Source,
    ways: Mapping[str, Runner],
    sizes: Sequence[tuple[int, int]],
    threads: int,
    *,
    rounds: int = 20,
    budget_seconds: float = 10.0,
) -> tuple[ServingLatency, ...]:
    """Time ways of serving one model in turn.

    Args:
        source: whose inputs they take.
        ways: name -> what runs it, already of so many threads; one is called :data:`EXPORT`.
        sizes: rows and tokens per row.
        threads: of torch, and to be named.
        rounds: at most this many rounds.
        budget_seconds: per size; no new round is begun after this long.
    """
    found = []
    with using_threads(threads):
        for rows, length in sizes:
            inputs = source.full_batch(rows, length)
            names = [EXPORT, *(name for name in ways if name != EXPORT)]
            calls = [partial(ways[name], inputs) for name in names]
            timing = interleave(calls, rounds=rounds, budget_seconds=budget_seconds)
            found.append(
                ServingLatency(
                    batch=rows,
                    length=tokens_of(source.encoder) or inputs["input_ids"].shape[-1],
                    threads=threads,
                    processor=device_name(torch.device("cpu")),
                    seconds=dict(zip(names, timing.seconds, strict=True)),
                    # interleave: the first over each.
                    speedup={
                        name: 1 / ratio for name, ratio in zip(names[1:], timing.ratios[1:], strict=True)
                    },
                    rounds=timing.rounds,
                )
            )
    return tuple(found)
