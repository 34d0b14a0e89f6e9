"""How results are written as tables of Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from accuracy_tasks import PLANS

#: As the tables have them, left to right and top to bottom.
TASKS = tuple(PLANS)
#: Of a file of results.
Line = dict[str, Any]


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table; numbers to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body)).replace("| --- |", "|---|")


def signed(value: float) -> str:
    """A change, with its sign."""
    return f"{value:+.1f}".replace("-", "−")


def standard_error(values: Sequence[float]) -> float | None:
    """Of their mean; ``None`` of a single one."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def change_with_error(change: float, error: float | None) -> str:
    """A mean change, and its standard error if there is one."""
    return signed(change) + (f" ± {error:.1f}" if error is not None else "")
