"""What a set of masks costs, and how much of it may stay."""

from __future__ import annotations

from .base import Budget, Sizes
from .bytes import BytesBudget
from .multiply_adds import MultiplyAddsBudget
from .time import TimeBudget
from .weights import WeightBudget

#: Target in the settings -> what it counts.
BUDGETS: dict[str, type[Budget]] = {
    "density": WeightBudget,
    "speedup": TimeBudget,
    "latency": TimeBudget,
    "size": BytesBudget,
    "multiply_adds": MultiplyAddsBudget,
}

__all__ = ["BUDGETS", "Budget", "Sizes"]
