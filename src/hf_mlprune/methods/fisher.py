"""The default preset's method: a ranking by Fisher importance."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..stage import Stage
from ..values import check_number
from .base import MethodSettings
from .ranking import Ranking


@dataclass(frozen=True)
class FisherSettings(MethodSettings):
    """Settings of :class:`FisherRanking`.

    Attributes:
        importance_decay: decay per step of the moving average of squared mask gradients, in ``[0, 1)``.
    """

    importance_decay: float = 0.98

    def check(self) -> None:
        """See :meth:`MethodSettings.check`."""
        check_number("importance_decay", self.importance_decay, at_least=0, below=1)


class FisherRanking(Ranking[FisherSettings]):
    """Keep what costs the loss most to lose.

    A unit's score is the moving average of its squared mask gradient, an estimate of the Fisher
    information of its mask.
    """

    Settings = FisherSettings

    def score(self, stage: Stage, gradients: list[Tensor]) -> None:
        """``S <- decay · S + (1 - decay) · (dL/dM)²``."""
        decay = self.settings.importance_decay
        for gate, gradient, active in zip(stage.gates, gradients, stage.active, strict=True):
            gate.scores[:active].mul_(decay).add_(gradient.square(), alpha=1 - decay)
