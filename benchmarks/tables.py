"""How results are written as tables of Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table; numbers to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body)).replace("| --- |", "|---|")


def signed(value: float) -> str:
    """A change, with its sign."""
    return f"{value:+.1f}".replace("-", "−")
