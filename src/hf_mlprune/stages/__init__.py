"""The two stages of pruning as budgets over gates: heads and rows, then blocks. Both land exactly."""

from __future__ import annotations

from .blocks import BlockStage
from .structured import StructuredStage

__all__ = ["BlockStage", "StructuredStage"]
