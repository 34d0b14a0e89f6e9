"""The two stages of pruning as budgets over gates: heads and rows, then blocks. Both land exactly."""

from __future__ import annotations

from .blocks import BlockStage
from .structured import ROW_GROUP, StructuredStage

__all__ = ["ROW_GROUP", "BlockStage", "StructuredStage"]
