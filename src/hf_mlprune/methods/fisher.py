"""The default preset's method: a ranking by Fisher importance."""

from __future__ import annotations

from torch import Tensor

from ..stages import Stage
from .ranking import Ranking


class FisherRanking(Ranking):
    """Keep what costs the loss most to lose.

    A unit's score is the moving average of its squared mask gradient, an estimate of the Fisher
    information of its mask.
    """

    def score(self, stage: Stage, gradients: list[Tensor]) -> None:
        """``S <- decay · S + (1 - decay) · (dL/dM)²``."""
        decay = self.config.importance_decay
        for gate, gradient, active in zip(stage.gates, gradients, stage.active, strict=True):
            gate.scores[:active].mul_(decay).add_(gradient.square(), alpha=1 - decay)
