"""The seam between a pruning run and the way importance is learned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from ..config import PruningConfig
from ..gates import Gate
from ..schedule import Phase, Schedule
from ..stages import Stage


@dataclass(frozen=True)
class Progress:
    """Where a run is: ``step`` optimizer steps are completed, in ``phase`` of ``schedule``."""

    step: int
    phase: Phase
    schedule: Schedule


@dataclass(frozen=True)
class Pressure:
    """How hard a method pushes: its density target now, and the regularizer's λ and penalty."""

    target: float
    lambda_: float = 0.0
    penalty: float = 0.0


class Method(ABC):
    """Learns the importance of units from mask gradients, and selects those that stay.

    A method keeps no state of its own: what it learns are buffers of the gates, so that
    checkpoints hold it.
    """

    #: Whether a head's mask also multiplies query and key; its value alone decides its context.
    mask_queries_and_keys: bool

    def __init__(self, config: PruningConfig) -> None:
        self.config = config

    @abstractmethod
    def prepare(self, gate: Gate) -> None:
        """Register the buffers that the method needs on a new gate."""

    @abstractmethod
    def reset(self, gate: Gate) -> None:
        """Give a gate's buffers, ``keep`` and ``scores`` included, their initial values."""

    @abstractmethod
    def learn(self, stage: Stage, gradients: list[Tensor], target: float, progress: Progress) -> Pressure:
        """Learn from ``dL/dM`` of one optimizer step.

        Args:
            stage: the gates that learn now.
            gradients: per gate, ``(active units,)`` fp32.
            target: the stage's final density.
            progress: before this optimizer step.
        """

    @abstractmethod
    def select(self, stage: Stage, target: float, progress: Progress) -> list[Tensor]:
        """Keep masks for the next step: per gate, bool ``(active units,)``."""

    @abstractmethod
    def priorities(self, stage: Stage) -> list[Tensor]:
        """Order in which units are kept when masks land: per gate, ``(active units,)``."""
