"""The default preset's method: one ranking of all units by importance per weight."""

from __future__ import annotations

from torch import Tensor

from ..gates import Gate
from ..schedule import Phase, cubic_target
from ..stages import Stage
from .base import Method, Pressure, Progress


class FisherRanking(Method):
    """Keep what costs the loss most to lose, per weight, on a cubic path to the target.

    A unit's score is the moving average of its squared mask gradient, an estimate of the Fisher
    information of its mask. All units of a stage compete in one ranking of score / weights freed.
    Gradients of removed units are seen too, so a unit can come back until masks are fixed.
    """

    mask_queries_and_keys = False

    def prepare(self, gate: Gate) -> None:
        """See :meth:`Method.prepare`."""

    def reset(self, gate: Gate) -> None:
        """See :meth:`Method.reset`."""
        gate.keep.fill_(True)
        gate.scores.zero_()

    def learn(self, stage: Stage, gradients: list[Tensor], target: float, progress: Progress) -> Pressure:
        """``S <- decay · S + (1 - decay) · (dL/dM)²``."""
        decay = self.config.importance_decay
        for gate, gradient, active in zip(stage.gates, gradients, stage.active, strict=True):
            gate.scores[:active].mul_(decay).add_(gradient.square(), alpha=1 - decay)
        return Pressure(self._target(stage, target, progress))

    def _target(self, stage: Stage, target: float, progress: Progress) -> float:
        if progress.phase is Phase.WARMUP:
            return 1.0
        start, end = progress.schedule.bounds(progress.phase)
        return cubic_target(target, progress.step, start, end)

    def select(self, stage: Stage, target: float, progress: Progress) -> list[Tensor]:
        """The highest ranked units that fit the density of this step."""
        return stage.fit(self.priorities(stage), self._target(stage, target, progress), final=False)

    def priorities(self, stage: Stage) -> list[Tensor]:
        """Score / weights freed."""
        return [
            gate.scores[:active].double().cpu() / costs.clamp(min=1)
            for gate, costs, active in zip(stage.gates, stage.costs, stage.active, strict=True)
        ]
