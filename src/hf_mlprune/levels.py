"""What a run may prune: levels, the matrices whose rows go, and the shape of blocks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from .budgets import BUDGETS
from .modeling.layout import GROUPS
from .modeling.structure import LONGEST_SIDE
from .values import check_choices, listed

LEVELS = ("heads", "rows", "blocks")
#: Levels whose units are whole modules of a layer.
MODULES = ("attention", "ffn")
ROW_SITES = ("attention_output", "fc1", "fc2")


def prunes_structures(levels: Collection[str], row_sites: Collection[str]) -> bool:
    """Whether heads, rows or whole modules are pruned."""
    whole = {"heads", *MODULES} & set(levels)
    return bool(whole) or ("rows" in levels and bool(row_sites))


def unused_settings(target: str, levels: Collection[str], row_sites: Collection[str]) -> dict[str, str]:
    """Settings that have no effect on a run, each with what it needs.

    Args:
        target: name of the target, of :data:`~hf_mlprune.budgets.BUDGETS`.
        levels: what is pruned.
        row_sites: matrices whose rows go.
    """
    blocks = "blocks" in levels
    of_budgets = {
        name: listed([f"{each}=" for each, budget in BUDGETS.items() if name in budget.uses], "or")
        for budget in BUDGETS.values()
        for name in budget.uses
        if name not in BUDGETS[target].uses
    }
    return of_budgets | {
        name: needed
        for needed, is_met, names in (
            ("the level 'blocks'", blocks, ("block_shape",)),
            (
                "blocks after heads or rows",
                blocks and prunes_structures(levels, row_sites),
                ("structured_density",),
            ),
            ("the level 'rows'", "rows" in levels, ("row_sites",)),
        )
        for name in names
        if not is_met
    }


def check_levels(levels: tuple[Any, ...], row_sites: tuple[Any, ...]) -> None:
    """Check what is pruned.

    Raises:
        ValueError: an unknown level or site, one that contains another, or nothing to prune.
    """
    check_choices("levels", levels, LEVELS + MODULES)
    check_choices("row_sites", row_sites, ROW_SITES)
    for whole, parts, taken in (
        ("attention", "heads", "heads" in levels),
        ("ffn", "rows of fc1", "rows" in levels and "fc1" in row_sites),
    ):
        if whole in levels and taken:
            raise ValueError(f"levels: expected {whole!r} or {parts}, got both")
    if not (prunes_structures(levels, row_sites) or "blocks" in levels):
        raise ValueError(
            f"levels: expected at least one of {LEVELS + MODULES}, and row_sites for rows, got "
            f"{levels} with row_sites={row_sites}"
        )


def check_gates(
    names: Collection[str], levels: tuple[str, ...], row_sites: tuple[str, ...], minimum_units: int
) -> None:
    """Check that the levels can remove something of a model.

    Args:
        names: groups and matrices that have units there: ``"heads"``, ``"fc1"``, ``"blocks_query"``, ...
        levels: what is pruned.
        row_sites: matrices whose rows go.
        minimum_units: units that each group keeps.

    Raises:
        ValueError: the model was pruned before and has nothing left of a level; every module is always kept.
    """
    module = next((level for level in levels if level in MODULES), None)
    if module is not None and minimum_units:
        raise ValueError(
            f"minimum_units: expected 0 with the level {module!r}, whose one unit is the whole module, "
            f"got {minimum_units}"
        )
    has_structures = not set(GROUPS).isdisjoint(names)
    for wanted, is_there, what in (
        (prunes_structures(levels, row_sites), has_structures, "heads, rows or modules"),
        ("blocks" in levels, not set(names) <= set(GROUPS), "blocks"),
    ):
        if wanted and not is_there:
            raise ValueError(
                f"levels: the model was pruned before and has no {what} left of {levels}; name what it has"
            )


def check_block_shape(shape: tuple[Any, ...]) -> None:
    """Check ``(rows, columns)`` of a block.

    Raises:
        ValueError: not two whole numbers, or one out of its range.
    """
    if len(shape) != 2 or not all(type(side) is int and 1 <= side <= LONGEST_SIDE for side in shape):
        raise ValueError(
            f"block_shape: expected two whole numbers from 1 to {LONGEST_SIDE} (rows, columns), got {shape!r}"
        )


def check_places(exclude: tuple[Any, ...], encoder: tuple[Any, ...]) -> None:
    """Check which layers are left alone, and which encoders are pruned.

    Raises:
        ValueError: what is no index of a layer, or no path.
    """
    if not all(type(index) is int and index >= 0 for index in exclude):
        raise ValueError(f"exclude: expected layer indices from 0 up, got {exclude!r}")
    if not all(isinstance(path, str) and path for path in encoder):
        raise ValueError(f"encoder: expected paths such as 'text_model', got {encoder!r}")
