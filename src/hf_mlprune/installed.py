"""Packages that only some features need."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence


def check_installed(packages: Sequence[str], *, extra: str, needed_by: str) -> None:
    """Refuse what cannot work, before any work, with the command that brings it.

    Args:
        packages: by the names that they are imported by.
        extra: of this package, that has them.
        needed_by: what needs them; begins the message.

    Raises:
        ImportError: some of them are not installed.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f'{needed_by}: expected {", ".join(missing)} to be installed; pip install "hf-mlprune[{extra}]"'
        )
