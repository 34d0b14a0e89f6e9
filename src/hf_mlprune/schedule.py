"""Pure functions of (step, max_steps): the phase a run is in, and the density it should have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Protocol

MINIMUM_STEPS = 20
#: The first of several targets has so many times the steps of each other: its way is the longest.
FIRST_TARGET = 2


class Phase(IntEnum):
    """Phases of a run, in order."""

    WARMUP = 0
    STRUCTURED = 1
    BLOCKS = 2
    FINAL = 3

    def __str__(self) -> str:
        """As bars and logs show it; in JSON it is a number."""
        return ("warm-up", "heads and rows", "blocks", "recovery")[self]

    def __repr__(self) -> str:
        """As logs show it that are printed as they are."""
        return repr(str(self))


@dataclass(frozen=True)
class Schedule:
    """Phase boundaries on the way to one target, in optimizer steps of the run.

    Attributes:
        warmup_end: first step that prunes heads and rows.
        structured_end: first step with final head and row masks.
        blocks_end: first step with all masks final.
        end: first step after it.
        start: its first step: 0, or the end of the target before.
    """

    warmup_end: int
    structured_end: int
    blocks_end: int
    end: int
    start: int = 0

    def phase(self, step: int) -> Phase:
        """The phase after ``step`` completed optimizer steps."""
        return Phase((step >= self.warmup_end) + (step >= self.structured_end) + (step >= self.blocks_end))

    def bounds(self, phase: Phase) -> tuple[int, int]:
        """First step of a phase, and the first step after it."""
        edges = (self.start, self.warmup_end, self.structured_end, self.blocks_end, self.end)
        return edges[phase], edges[phase + 1]

    def cooldown(self, step: int) -> float:
        """Factor of the step size after ``step`` completed steps, in ``(0, 1]``.

        It falls to 0 in the second half of the steps with final masks, so that a model on the way is as well
        settled as one whose run ends there.
        """
        first = (self.blocks_end + self.end) // 2
        return min(1.0, (self.end - step) / max(1, self.end - first))


class PhaseShares(Protocol):
    """What a schedule needs of :class:`~hf_mlprune.config.PruningConfig`: see there."""

    @property
    def warmup_fraction(self) -> float:
        """Share of the warm-up."""

    @property
    def structured_fraction(self) -> float:
        """Share of heads and rows."""

    @property
    def block_fraction(self) -> float:
        """Share of blocks."""

    @property
    def structured(self) -> bool:
        """Whether heads and rows are pruned."""

    @property
    def blocks(self) -> bool:
        """Whether blocks are pruned."""

    @property
    def targets(self) -> Sequence[object]:
        """Targets of the run, if there are several."""


def make_schedules(config: PhaseShares, max_steps: int) -> tuple[Schedule, ...]:
    """Lay the phases over a run, once for each of its targets.

    Behind the warm-up the first target has half of the steps if there are three, two thirds of two; the
    others share the rest equally. Each has first steps that prune, then those with its final masks, in the
    proportion that a run with one target has.

    Raises:
        ValueError: there are less than 20 steps for a target.
    """
    count = max(1, len(config.targets))
    if max_steps < MINIMUM_STEPS * count:
        each = f" for each of {count} targets, {MINIMUM_STEPS * count} in all" if count > 1 else ""
        raise ValueError(
            f"max_steps: expected at least {MINIMUM_STEPS} optimizer steps to prune in{each}, got "
            f"{max_steps}; train longer, or accumulate fewer batches per step"
        )
    if count == 1:
        return (make_schedule(config, max_steps),)
    # Every target has a step that prunes, and one with its final masks.
    parts = FIRST_TARGET + count - 1
    warmup = min(round(config.warmup_fraction * max_steps), max_steps - 2 * parts)
    share = (config.structured_fraction + config.block_fraction) / (1 - config.warmup_fraction)
    edges = [
        warmup, *(warmup + round(i * (max_steps - warmup) / parts) for i in range(FIRST_TARGET, parts + 1))
    ]  # fmt: skip
    schedules: list[Schedule] = []
    for first, after in pairwise(edges):
        final = min(first + max(1, round(share * (after - first))), after - 1)
        schedules.append(Schedule(first, final, final, after, start=first if schedules else 0))
    return tuple(schedules)


def make_schedule(config: PhaseShares, max_steps: int) -> Schedule:
    """Lay the phases over a run with one target; every phase that prunes has at least one step."""
    structured, blocks = config.structured_fraction, config.block_fraction
    if not config.blocks:
        structured, blocks = structured + blocks, 0.0
    elif not config.structured:
        structured, blocks = 0.0, structured + blocks
    warmup_end = round(config.warmup_fraction * max_steps)
    structured_steps = max(1, round(structured * max_steps)) if config.structured else 0
    block_steps = max(1, round(blocks * max_steps)) if config.blocks else 0
    # The last step belongs to the final phase even where rounding gave it away.
    blocks_end = min(warmup_end + structured_steps + block_steps, max_steps - 1)
    structured_end = blocks_end - block_steps
    return Schedule(max(0, structured_end - structured_steps), structured_end, blocks_end, max_steps)


def cubic_target(target: float, step: int, start: int, end: int, origin: float = 1.0) -> float:
    """Density on a cubic path from ``origin`` at ``start`` to ``target`` at ``end``.

    ``t + (o - t) (1 - p)^3`` with ``p = (step - start) / (end - start)``.
    """
    progress = min(1.0, max(0.0, (step - start) / max(1, end - start)))
    return float(target + (origin - target) * (1 - progress) ** 3)
