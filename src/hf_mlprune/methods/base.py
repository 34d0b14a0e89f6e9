"""The seam between a pruning run and the way importance is learned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from ..gates import Gate
from ..schedule import Phase, Schedule
from ..stage import Stage


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        step: completed optimizer steps.
        phase: present phase.
        schedule: of the present target.
        origin: share of the cost that was left as the schedule began: 1, or the target before.
    """

    step: int
    phase: Phase
    schedule: Schedule
    origin: float = 1.0

    @property
    def share(self) -> float:
        """Completed share of the phase, in ``[0, 1)``."""
        start, end = self.schedule.bounds(self.phase)
        return (self.step - start) / max(1, end - start)


@dataclass(frozen=True)
class Pressure:
    """How hard a method pushes: the share of the cost it aims at now, and the regularizer's λ and penalty."""

    target: float
    lambda_: float = 0.0
    penalty: float = 0.0


@dataclass(frozen=True)
class MethodSettings:
    """Settings of a method. A subclass is a frozen dataclass of numbers and strings, with defaults.

    Names of a run's settings are taken.
    """

    def check(self) -> None:
        """Refuse values out of their range.

        Raises:
            ValueError: says which setting, what was expected, what came.
        """


S = TypeVar("S", bound=MethodSettings)


class Method(ABC, Generic[S]):
    """Learns the importance of units, and selects those that stay.

    A method sees the gates of a stage, the gradients of their masks, and the matrices that their units own,
    with weights and gradients (``stage.owned()``). It keeps no state of its own: what it learns are buffers
    of the gates, so that checkpoints hold it. It is called under ``torch.no_grad``: what it computes of
    weights has no graph.

    Attributes:
        settings: values of :attr:`Settings`.
    """

    #: The settings of the method, which are given beside those of the run.
    Settings: ClassVar[type[MethodSettings]] = MethodSettings
    #: Settings of the run that differ from the usual ones under this method; presets and users go before.
    defaults: ClassVar[Mapping[str, Any]] = {}
    #: Levels that it can prune; ``None`` for all.
    levels: ClassVar[tuple[str, ...] | None] = None
    #: Whether a head's mask also multiplies query and key; its value alone decides its context.
    mask_queries_and_keys: ClassVar[bool] = False
    #: Whether it regularizes: λ and penalty are then logged.
    has_penalty: ClassVar[bool] = False
    #: Whether ``stage.owned()`` has inputs of the last training pass, each process its own.
    needs_inputs: ClassVar[bool] = False

    def __init__(self, settings: S) -> None:
        self.settings = settings

    def prepare(self, gate: Gate) -> None:
        """Register the buffers that the method needs on a new gate, beside ``keep`` and ``scores``."""

    def reset(self, gate: Gate) -> None:
        """Give a gate's buffers their initial values: ``keep`` all ones, ``scores`` all 0."""
        gate.keep.fill_(True)
        gate.scores.zero_()

    def take_up(self, stage: Stage) -> None:
        """Bring what was learned to the masks as they landed, when a run goes on to its next target.

        Args:
            stage: whose gates keep the units of the target before, its candidates.
        """

    @abstractmethod
    def learn(self, stage: Stage, gradients: list[Tensor], target: float, progress: Progress) -> Pressure:
        """Learn from one optimizer step, before the optimizer's update.

        Gradients of weights are there and may be changed: that is how a method regularizes. They are averaged
        over processes and clipped by then.

        Args:
            stage: the gates that learn now.
            gradients: per gate, dL/dM, ``(active units,)`` fp32.
            target: share of the cost at the end of the stage; of weights the density.
            progress: before this optimizer step.
        """

    def after_update(self, stage: Stage, progress: Progress) -> None:
        """Change weights after the optimizer's update, before masks are selected.

        Args:
            stage: the gates that learn now.
            progress: after this optimizer step.
        """

    def figures(self, gates: Sequence[Gate]) -> dict[str, float]:
        """What the log of a run should have besides density, target, λ and penalty."""
        return {}

    @abstractmethod
    def select(self, stage: Stage, target: float, progress: Progress) -> list[Tensor]:
        """Keep masks for the next step: per gate, bool ``(active units,)``.

        What is not among the stage's candidates is removed all the same.
        """

    @abstractmethod
    def priorities(self, stage: Stage) -> list[Tensor]:
        """Order in which units are kept when masks land: per gate, ``(active units,)``."""
