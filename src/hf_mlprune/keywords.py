"""Settings of a run as keyword arguments of configs, where they stand among fields of any name."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any

from .budgets import TARGETED, named_target
from .config import PRESETS, PruningConfig
from .levels import unused_settings
from .methods import known_method, setting_names


def take_settings(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the settings of a pruning run out of keyword arguments."""
    names = set(PruningConfig.all_settings())
    # Of a class of the user's own. A field of a stored config may have this name, too, and any value.
    if (method := known_method(kwargs.get("method"))) is not None:
        names |= set(setting_names(method))
    return {name: kwargs.pop(name) for name in names & set(kwargs)}


def check_spelling(fields: Collection[str], names: Iterable[str]) -> None:
    """Refuse what is almost the name of a setting: configs keep any field, so nobody else would notice.

    Args:
        fields: of the stock config.
        names: keyword arguments that are no settings.

    Raises:
        ValueError: a name was meant to be a setting.
    """
    settings = PruningConfig.all_settings()
    for name in names:
        meant = difflib.get_close_matches(name, settings, n=1, cutoff=0.8)
        if meant and name not in fields:
            raise ValueError(f"unknown setting {name!r}: did you mean {meant[0]!r}?")


def with_settings(stored: dict[str, Any] | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Stored settings of a run with those named by the caller on top, every value concrete.

    Of the stored ones, those go that mean nothing beside the new: values of another preset or method, other
    targets, and what has no effect under the new target or levels.

    Raises:
        ValueError: as ``PruningConfig.create``, of the settings that the caller names.
    """
    stored = stored or {}
    gone: set[str] = set()
    before = known_method(stored.get("method"))
    if before is not None:
        usual = PruningConfig.create(1.0, stored.get("preset", "default"), method=before).to_dict()
        chosen = {"preset", "method"} & settings.keys()
        if any(settings[name] not in (usual[name], before) for name in chosen):
            # What differs from the usual was somebody's choice.
            gone |= {name for name in stored.keys() - {*TARGETED} if stored[name] == usual.get(name)}
            gone |= {"preset", "method"} & chosen
        left = {name: value for name, value in stored.items() if name not in gone} | settings
        usual_method = PRESETS.get(str(left.get("preset")), {}).get("method", PruningConfig.method)
        method = known_method(left.get("method", usual_method))
        if method is not None and method is not before:
            gone |= {*setting_names(before)}
    if settings.get("targets") or named_target(settings) is not None:
        gone |= {*TARGETED}
    stored = {name: value for name, value in stored.items() if name not in gone}
    both = {**stored, **settings}
    target = named_target(both) or "density"
    places = [both.get(name, ()) for name in ("levels", "row_sites")]
    if all(isinstance(place, (list, tuple)) for place in places):  # else it is refused below
        for name in unused_settings(target, *places).keys() & stored.keys() - settings.keys():
            del both[name]
    return PruningConfig.from_dict(both).to_dict()
