"""What a set of masks costs, and how much of it may stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def check_target(settings: Mapping[str, Any]) -> None:
    """Refuse settings without a target, with several, or with one that is out of its range.

    Raises:
        ValueError: says what was expected.
    """
    given = [name for name in BUDGETS if settings[name] is not None]
    if not given:
        raise ValueError(
            "density is missing: give the share of weights to keep, e.g. density=0.2, or another target: "
            f"{', '.join(BUDGETS)}"
        )
    if len(given) > 1:
        raise ValueError(f"expected one target, got {', '.join(given)}; leave out all but one")
    (name,) = given
    if "blocks" in settings["levels"] and not BUDGETS[name].has_blocks:
        raise ValueError(
            f"levels: expected no 'blocks' with {name}=, got {settings['levels']}; blocks need density="
        )
    BUDGETS[name].check(settings)


__all__ = ["BUDGETS", "Budget", "Sizes", "check_target"]
