"""Methods that rank all units by importance per cost, and keep the first on a path to the target."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from ..schedule import Phase, cubic_target
from ..stage import Stage
from .base import Method, Pressure, Progress, S


class Ranking(Method[S]):
    """Keep what is most important per cost, on a cubic path to the target.

    All units of a stage compete in one ranking of score / cost: weights, or what else the target counts. If
    removed units are scored too, they can come back until masks are fixed.
    """

    @abstractmethod
    def score(self, stage: Stage, gradients: list[Tensor]) -> None:
        """Write the importance of all units that take part into their gates' ``scores``; return nothing.

        Args:
            stage: the gates that learn now.
            gradients: per gate, dL/dM, ``(active units,)`` fp32.
        """

    def learn(self, stage: Stage, gradients: list[Tensor], target: float, progress: Progress) -> Pressure:
        """See :meth:`Method.learn`."""
        returned: object = self.score(stage, gradients)
        if returned is not None:
            raise TypeError(
                f"{type(self).__name__}.score: expected it to write into `gate.scores[:active]` of every "
                f"gate, and to return nothing; it returned {type(returned).__name__}"
            )
        return Pressure(_target(target, progress))

    def select(self, stage: Stage, target: float, progress: Progress) -> list[Tensor]:
        """The highest ranked units that fit the share of this step."""
        return stage.fit(self.priorities(stage), _target(target, progress), final=False)

    def priorities(self, stage: Stage) -> list[Tensor]:
        """Score / cost of a unit."""
        return [
            gate.scores[:active].cpu().double() / costs.clamp(min=1)
            for gate, costs, active in zip(stage.gates, stage.costs, stage.active, strict=True)
        ]


class SquaredWeights(Ranking[S]):
    """A ranking by the squared weights that a unit owns."""

    def score(self, stage: Stage, gradients: list[Tensor]) -> None:
        """``S <- Σ w²`` over the weights that a unit owns; gradients take no part."""
        for gate, norms, active in zip(stage.gates, stage.squared_norms(), stage.active, strict=True):
            gate.scores[:active] = norms


def _target(target: float, progress: Progress) -> float:
    if progress.phase is Phase.WARMUP:
        return 1.0
    start, end = progress.schedule.bounds(progress.phase)
    return cubic_target(target, progress.step, start, end, progress.origin)
