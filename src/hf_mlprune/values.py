"""Checks of single values, with one way to say what was expected and what came."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

#: A number, also as 1e-3 or .5, and a unit.
QUANTITY = r"\s*((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(\S+)\s*"


def listed(words: Iterable[str], last: str = "and") -> str:
    """``"a, b and c"``."""
    *most, final = words
    return f"{', '.join(most)} {last} {final}" if most else final


def check_number(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Refuse what is not a finite number of a range."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name}: expected at least {at_least}, got {value}")
    if above is not None and value <= above:
        raise ValueError(f"{name}: expected more than {above}, got {value}")
    if below is not None and value >= below:
        raise ValueError(f"{name}: expected less than {below}, got {value}")


def check_whole_number(name: str, value: Any, *, at_least: int) -> None:
    """Refuse what is not a whole number from a least one up."""
    if type(value) is not int or value < at_least:
        raise ValueError(f"{name}: expected a whole number from {at_least} up, got {value!r}")


def parse_quantity(text: Any, units: Mapping[str, float], expected: str) -> float:
    """A number above 0 times the unit behind it, of ``"30 MB"``.

    Args:
        text: what was given.
        units: unit -> what one of it is.
        expected: for the error.
    """
    match = re.fullmatch(QUANTITY, text) if isinstance(text, str) else None
    if match is None or match[2] not in units or not 0 < float(match[1]) < math.inf:
        unit = match[2] if match is not None else ""
        near = [each for each in units if each.lower() == unit.lower() and each != unit]
        raise ValueError(f"{expected}, got {text!r}" + (f"; did you mean {near[0]}?" if near else ""))
    return float(match[1]) * units[match[2]]


def check_fraction(name: str, value: Any, *, zero: bool = True) -> None:
    """Refuse what is not in ``[0, 1]``; without ``zero``, not in ``(0, 1]``."""
    check_number(name, value)
    if value > 1 or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name}: expected a value in {'[' if zero else '('}0, 1], got {value}")


def check_choices(name: str, values: tuple[Any, ...], choices: tuple[str, ...]) -> None:
    """Refuse what is not among the choices, or twice there."""
    for value in values:
        if value not in choices:
            raise ValueError(f"{name}: expected any of {choices}, got {value!r}")
    if len(set(values)) != len(values):
        raise ValueError(f"{name}: expected each at most once, got {values}")
