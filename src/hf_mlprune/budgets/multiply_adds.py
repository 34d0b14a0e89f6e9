"""Multiply-adds, as what masks cost."""

from __future__ import annotations


def attention_multiply_adds(width: int, batch: int, length: int) -> int:
    """Multiply-adds of scores and context of one layer: two products of ``length² x width``."""
    return 2 * batch * length * length * width
