"""How a unit's importance is learned, and how it decides which units stay."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..values import listed
from .base import Method, MethodSettings
from .fisher import FisherRanking
from .group_lasso import GroupLasso
from .magnitude import MagnitudeRanking
from .mlpruning import LearnedThresholds
from .random import RandomRanking
from .ranking import Ranking
from .snip import IdentityPrior

#: Those of this package by name. Another one is given as a class.
METHODS: dict[str, type[Method[Any]]] = {
    "fisher": FisherRanking,
    "group-lasso": GroupLasso,
    "magnitude": MagnitudeRanking,
    "mlpruning": LearnedThresholds,
    "random": RandomRanking,
    "snip": IdentityPrior,
}


def name_of(method: type[Method[Any]]) -> str:
    """How settings name a method: its name in :data:`METHODS`, or ``module.Class`` of a user's own.

    Raises:
        TypeError: it is no method.
        ValueError: it could not be found again by that name.
    """
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise TypeError(f"method: expected a name or a subclass of Method, got {method!r}")
    for name, known in METHODS.items():
        if known is method:
            return name
    name = f"{method.__module__}.{method.__qualname__}"
    if _find_class(name) is not method:
        raise ValueError(
            f"method: expected a class at the top level of a module, where a resumed run finds it, got {name}"
        )
    return name


def check_method(method: type[Method[Any]], of_runs: Collection[str]) -> None:
    """Refuse a method that no run could use.

    Args:
        method: maybe of the user's own.
        of_runs: names of the settings of a run.

    Raises:
        ValueError: it lacks a function, its settings are none, or one of them has a name that is taken.
    """
    name, settings = method.__name__, method.Settings
    if inspect.isabstract(method):
        lacking = sorted(method.__abstractmethods__)
        raise ValueError(f"method: expected {name} to define {listed(lacking)}; see docs/add-a-method.md")
    if not (isinstance(settings, type) and issubclass(settings, MethodSettings) and _is_frozen(settings)):
        raise ValueError(
            f"method: expected {name}.Settings to be a frozen dataclass derived from MethodSettings, got "
            f"{settings!r}"
        )
    fields = dataclasses.fields(settings)
    if taken := sorted({field.name for field in fields} & {*of_runs, "method_settings"}):
        raise ValueError(
            f"method: expected other names for settings of {name}, as a run has settings of these: {taken}"
        )
    if unknown := sorted(set(method.defaults) - set(of_runs)):
        raise ValueError(f"method: expected settings of a run in the defaults of {name}, got {unknown}")


def _is_frozen(settings: type) -> bool:
    """Whether a class itself is a frozen dataclass."""
    parameters = vars(settings).get("__dataclass_params__")
    return parameters is not None and parameters.frozen


def find_method(name: str) -> type[Method[Any]]:
    """The method of a name. Modules of user's methods must be imported by then: names in files run no code.

    Raises:
        ValueError: there is none; says what there is.
    """
    found = known_method(name)
    if found is None:
        if "." in name:
            raise ValueError(
                f"method: {name} is a class of the user's own; import its module "
                f"{name.rpartition('.')[0]} before the settings are read"
            )
        small = name.lower()
        near = difflib.get_close_matches(small, METHODS, n=1) or [each for each in METHODS if small in each]
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"method: expected any of {tuple(METHODS)} or a subclass of Method, got {name!r}; {meant}"
            "see docs/method.md"
        )
    return found


def known_method(method: Any) -> type[Method[Any]] | None:
    """A class of the user's own as it is, or the method of a name; ``None`` if there is none."""
    if isinstance(method, str):
        return METHODS.get(method) or _find_class(method)
    return method if isinstance(method, type) and issubclass(method, Method) else None


def _find_class(name: str) -> type[Method[Any]] | None:
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module), attribute, None)
    return found if isinstance(found, type) and issubclass(found, Method) else None


def setting_names(method: type[Method[Any]]) -> list[str]:
    """Names of a method's own settings."""
    return [field.name for field in dataclasses.fields(method.Settings)]


def split_settings(
    method: type[Method[Any]], settings: Mapping[str, Any], of_runs: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split settings into a method's own and those of the run.

    Settings of other methods are left out if they are what they are anyway, as files of earlier versions have
    them.

    Raises:
        ValueError: nobody knows a setting, or it belongs to another method.
    """
    names = setting_names(method)
    others = {
        field.name: (name, field.default)
        for name, each in METHODS.items()
        for field in dataclasses.fields(each.Settings)
    }
    own, run = {}, {}
    for name, value in settings.items():
        if name in names:
            own[name] = value
        elif name in of_runs:
            run[name] = value
        elif name not in others:
            near = difflib.get_close_matches(name, [*of_runs, *names], n=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"unknown pruning setting {name!r}; {meant}known are {sorted([*of_runs, *names])}"
            )
        elif value != others[name][1]:
            raise ValueError(
                f"{name}: has no effect here, it needs the method {others[name][0]!r}; leave it out"
            )
    return own, run


__all__ = [
    "METHODS",
    "Method",
    "MethodSettings",
    "Ranking",
    "check_method",
    "find_method",
    "known_method",
    "name_of",
    "setting_names",
    "split_settings",
]
