"""What a set of masks costs, and how much of it may stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def named_target(settings: Mapping[str, Any]) -> str | None:
    """Name of the target that settings have; of several the first, ``None`` if there is none."""
    return next((name for name in BUDGETS if settings.get(name) is not None), None)


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
    _check_counted(settings, name)
    for value in settings["targets"] or [settings[name]]:
        BUDGETS[name].check({**settings, name: value})
    _check_several(settings, name)


def check_densities(targets: Sequence[Any]) -> None:
    """Refuse values of several targets that can only be of another kind: times, sizes, speedups.

    Raises:
        ValueError: says how another target is named.
    """
    words = [value for value in targets if isinstance(value, str)]
    if words or any(isinstance(value, (int, float)) and value > 1 for value in targets):
        name, last = ("latency" if words else "speedup"), targets[-1]
        raise ValueError(
            f"targets: expected densities, in (0, 1], got {list(targets)}; for another target, all of "
            f"one kind, name it with its last value, too, as in {name}={last!r}"
        )


def check_last(settings: Mapping[str, Any], name: str) -> None:
    """Refuse a target that is not the last of several.

    Raises:
        ValueError: says what was expected.
    """
    targets, leaves = settings["targets"], BUDGETS[name].leaves
    if targets and leaves(settings) != leaves({**settings, name: targets[-1]}):
        unnamed = ", or to be left out" if name == "density" else ""
        raise ValueError(
            f"{name}: expected {targets[-1]!r}, the last of targets={list(targets)}{unnamed}, "
            f"got {settings[name]!r}"
        )


def _check_counted(settings: Mapping[str, Any], name: str) -> None:
    """Refuse to prune what a budget does not count."""
    budget, levels, sites = BUDGETS[name], settings["levels"], settings["row_sites"]
    counted = sites if budget.row_sites is None else tuple(s for s in sites if s in budget.row_sites)
    has_more = "rows" in levels and counted != sites
    more = f", row_sites={counted}" if has_more else ""
    if "blocks" in levels and not budget.has_blocks:
        left = tuple(level for level in levels if level != "blocks") or ("heads", "rows")
        raise ValueError(
            f"levels: expected no 'blocks' with {name}=, got {levels}; blocks need density=. "
            f"Give levels={left}{more}"
        )
    if has_more:
        raise ValueError(
            f"row_sites: expected any of {budget.row_sites} with {name}=, got {sites}; it counts no others"
        )


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
            f"got {list(targets)}"
        )
    if BUDGETS[name].leaves(settings) not in sizes:
        check_last(settings, name)


__all__ = [
    "BUDGETS",
    "TARGETED",
    "Budget",
    "Sizes",
    "check_densities",
    "check_last",
    "check_target",
    "named_target",
]
