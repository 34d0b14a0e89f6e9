"""How a unit's worth is learned, and how it decides which units stay."""

from __future__ import annotations

from ..config import PruningConfig
from .base import Method
from .mlpruning import LearnedThresholds
from .ranking import ImportanceRanking


def make_method(config: PruningConfig) -> Method:
    """The method that a config names."""
    if config.method == "thresholds":
        return LearnedThresholds(config)
    return ImportanceRanking(config)


__all__ = ["ImportanceRanking", "LearnedThresholds", "Method", "make_method"]
