"""Gradual magnitude pruning (Zhu and Gupta, arXiv:1710.01878), of structures: the control everybody knows."""

from __future__ import annotations

from .base import MethodSettings
from .ranking import SquaredWeights


class MagnitudeRanking(SquaredWeights[MethodSettings]):
    """Keep what has the largest weights."""
