"""A picture of what is left per layer, as text: no file has to travel beside the card."""

from __future__ import annotations

from collections.abc import Sequence

from ..modeling.structure import TITLES
from .report import LayerReport

WIDTH = 10
KEPT, GONE = "█", "░"
#: What a bar is called, and the field that it shows.
LEVELS = {**{title: group for group, title in TITLES.items()}, "blocks": "blocks", "weights": "weights"}


def bar(kept: int, total: int, width: int = WIDTH) -> str:
    """A bar of ``width`` characters; empty only if nothing is left, full only if nothing was removed."""
    filled = round(width * kept / total) if total else width
    if 0 < kept < total:
        filled = min(max(filled, 1), width - 1)
    return KEPT * filled + GONE * (width - filled)


def picture(layers: Sequence[LayerReport]) -> str:
    """One line per layer, one bar per level of which anything was removed, and one for all weights."""
    several = len({layer.encoder for layer in layers}) > 1
    columns = {
        "layer": [f"{layer.encoder} {layer.index}" if several else str(layer.index) for layer in layers]
    }
    for level, name in LEVELS.items():
        pairs: list[tuple[int, int]] = [getattr(layer, name) for layer in layers]
        if level == "weights" or any(kept < total for kept, total in pairs):
            columns[level] = [bar(*pair) for pair in pairs]
    widths = [max(len(title), *map(len, cells)) for title, cells in columns.items()]
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    return "\n".join(
        "  ".join([row[0].rjust(widths[0]), *map(str.ljust, row[1:], widths[1:])]).rstrip() for row in rows
    )
