"""How a unit's importance is learned, and how it decides which units stay."""

from __future__ import annotations

from ..config import PruningConfig
from .base import Method
from .fisher import FisherRanking
from .magnitude import MagnitudeRanking
from .mlpruning import LearnedThresholds

METHODS: dict[str, type[Method]] = {
    "fisher": FisherRanking,
    "magnitude": MagnitudeRanking,
    "mlpruning": LearnedThresholds,
}


def make_method(config: PruningConfig) -> Method:
    """The method that a config names."""
    return METHODS[config.method](config)


__all__ = ["FisherRanking", "LearnedThresholds", "MagnitudeRanking", "Method", "make_method"]
