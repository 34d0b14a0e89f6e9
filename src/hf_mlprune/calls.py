"""Calls of a model as they were made, and the tensors in what goes in and comes out, at any nesting."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """Arguments of one forward pass.

    Attributes:
        args: positional arguments; containers are copies, tensors are detached.
        kwargs: the same of keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def remember(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, copy: bool = False) -> Call:
        """Take over the arguments of a call; tensors share their memory with the caller's, unless copied."""

        def taken(_: str, tensor: Tensor) -> Tensor:
            return tensor.detach().clone() if copy else tensor.detach()

        return cls(*map_tensors(taken, (args, dict(kwargs))))

    def replay(self, model: nn.Module, dtype: torch.dtype) -> Any:
        """Make the call again, floating-point tensors cast to ``dtype``, past the hooks of the model itself.

        Past the autocast, too, that accelerate puts around ``forward``; it keeps the script's own beside it.
        """

        def cast(_: str, tensor: Tensor) -> Tensor:
            return tensor.to(dtype, copy=True) if tensor.is_floating_point() else tensor.clone()

        # Fresh containers and tensors each time: some models write into those they are called with.
        args, kwargs = map_tensors(cast, (self.args, self.kwargs))
        forward = vars(model).get("_original_forward", model.forward)
        return forward(*args, **kwargs)

    def length(self) -> int | None:
        """Tokens of the longest sequence in the call, ``None`` if there is no batch of tokens."""
        lengths = [
            tensor.shape[-1]
            for _, tensor in named_tensors((self.args, self.kwargs))
            if tensor.dim() >= 2 and not tensor.is_floating_point()
        ]
        return max(lengths, default=None)


def map_tensors(change: Callable[[str, Tensor], Any], value: Any, name: str = "") -> Any:
    """Change every tensor of a nested value.

    Args:
        change: what becomes of a tensor, by its name as in :func:`named_tensors`.
        value: tensors in mappings, lists, tuples, dataclasses and other objects with attributes.
        name: of the value itself.

    Returns:
        New containers of the same types; what holds no tensor may be the same object.
    """
    if isinstance(value, Tensor):
        return change(name, value)
    if isinstance(value, MutableMapping):
        changed = copy.copy(value)
        for key, item in value.items():
            changed[key] = map_tensors(change, item, _join(name, key))
        return changed
    if isinstance(value, (tuple, list)):
        items = [map_tensors(change, item, _join(name, key)) for key, item in _numbered(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    fields = _fields(value)
    if not fields:
        return value
    changed = copy.copy(value)
    for key, item in fields.items():
        # Past the dataclass's own `__setattr__`, which refuses where it is frozen.
        object.__setattr__(changed, key, map_tensors(change, item, _join(name, key)))
    return changed


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a nested value in a fixed order, named by keys, fields and positions: ``"a.0"``."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named_tensors(item, _join(name, key))
    elif isinstance(value, (tuple, list)):
        for key, item in _numbered(value):
            yield from named_tensors(item, _join(name, key))
    else:
        for key, item in _fields(value).items():
            yield from named_tensors(item, _join(name, key))


def _join(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def _numbered(value: tuple[Any, ...] | list[Any]) -> Iterator[tuple[object, Any]]:
    """Items by field of a named tuple, or by position."""
    return zip(getattr(value, "_fields", range(len(value))), value, strict=True)


def _fields(value: Any) -> dict[str, Any]:
    """Attributes that may hold tensors: a dataclass's fields, or another object's tensors."""
    if isinstance(value, (type, nn.Module)):
        return {}
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    attributes = getattr(value, "__dict__", {})
    return {name: item for name, item in attributes.items() if isinstance(item, Tensor)}
