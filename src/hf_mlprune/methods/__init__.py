"""How a unit's importance is learned, and how it decides which units stay."""

from __future__ import annotations

from ..config import PruningConfig
from .base import Method
from .fisher import FisherRanking
from .mlpruning import LearnedThresholds


def make_method(config: PruningConfig) -> Method:
    """The method that a config names."""
    if config.method == "mlpruning":
        return LearnedThresholds(config)
    return FisherRanking(config)


__all__ = ["FisherRanking", "LearnedThresholds", "Method", "make_method"]
