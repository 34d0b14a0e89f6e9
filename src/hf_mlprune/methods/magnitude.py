"""Gradual magnitude pruning (Zhu and Gupta, arXiv:1710.01878), of structures: the control everybody knows."""

from __future__ import annotations

from torch import Tensor

from ..stage import Stage
from .base import MethodSettings
from .ranking import Ranking


class MagnitudeRanking(Ranking[MethodSettings]):
    """Keep what has the largest weights."""

    def score(self, stage: Stage, gradients: list[Tensor]) -> None:
        """``S <- Σ w²`` over the weights that a unit owns; gradients take no part."""
        for gate, norms, active in zip(stage.gates, stage.squared_norms(), stage.active, strict=True):
            gate.scores[:active] = norms
