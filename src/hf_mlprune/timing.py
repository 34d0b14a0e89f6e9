"""Interleaved timing: variants are run in turn, so that a drifting machine slows all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Wall-clock times of variants that were run in turn.

    Attributes:
        seconds: median seconds per call, per variant.
        ratios: median over rounds of (first variant's time / this variant's), per variant.
        rounds: how many rounds were counted.
    """

    seconds: tuple[float, ...]
    ratios: tuple[float, ...]
    rounds: int


def interleave(
    variants: Sequence[Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    budget_seconds: float = float("inf"),
) -> Timing:
    """Time variants against one another.

    Args:
        variants: what to call; the first is the reference of the ratios.
        rounds: at most this many counted rounds, each calling every variant once.
        warmup: rounds not counted.
        clock: returns seconds; ``time.thread_time`` counts CPU time of one thread.
        budget_seconds: no new round is begun after this long, warm-up included; one is always counted.
    """
    began = clock()
    times: list[list[float]] = [[] for _ in variants]
    for index in range(-warmup, rounds):
        if index != 0 and clock() - began > budget_seconds:
            continue
        for variant, column in zip(variants, times, strict=True):
            start = clock()
            variant()
            if index >= 0:
                column.append(clock() - start)
    return Timing(
        seconds=tuple(statistics.median(column) for column in times),
        ratios=tuple(
            statistics.median(a / b for a, b in zip(times[0], column, strict=True)) for column in times
        ),
        rounds=len(times[0]),
    )


def synchronize(device: torch.device) -> None:
    """Wait for what a device has been told to do; the processor is done when a call returns."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """Torch's threads within the block; as they are, if ``None``."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
