"""What a set of masks costs, and how much of it may stay."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
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

#: Settings that say what a run is pruned to.
TARGETED = (*BUDGETS, "targets")


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
    if isinstance(settings[name], (list, tuple)):
        raise ValueError(
            f"{name}: expected one value, got {settings[name]!r}; for several sizes from one run give "
            f"targets={list(settings[name])!r}"
        )
    if "blocks" in settings["levels"] and not BUDGETS[name].has_blocks:
        raise ValueError(
            f"levels: expected no 'blocks' with {name}=, got {settings['levels']}; blocks need density="
        )
    for value in settings["targets"] or [settings[name]]:
        BUDGETS[name].check({**settings, name: value})
    _check_several(settings, name)


def _check_several(settings: Mapping[str, Any], name: str) -> None:
    targets = settings["targets"]
    if not targets:
        return
    if "blocks" in settings["levels"]:
        raise ValueError(f"levels: expected no 'blocks' with several targets, got {settings['levels']}")
    sizes = [BUDGETS[name].leaves({**settings, name: value}) for value in targets]
    if len(sizes) < 2 or any(after >= before for before, after in pairwise(sizes)):
        raise ValueError(
            "targets: expected several, from the one that leaves most to the one that leaves least, "
            f"got {targets}"
        )
    if settings[name] not in targets:
        raise ValueError(f"{name}: expected one of targets={targets}, got {settings[name]!r}")


__all__ = ["BUDGETS", "TARGETED", "Budget", "Sizes", "check_target"]
