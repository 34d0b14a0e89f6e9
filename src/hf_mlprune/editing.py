"""Edits of a model that happen as a whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def edited(model: nn.Module) -> Iterator[None]:
    """Put a model back as it was if the block raises anything, Ctrl-C included.

    Each module gets back its class, attributes, children, parameters, buffers and hooks as the same objects,
    and its buffers their values. Values of parameters are not copied, so edits make new parameters instead
    of writing into old ones.
    """
    before = _snapshots(model)
    try:
        yield
    except BaseException:
        _restore(before)
        raise


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """As :func:`edited`, but put the model back in any case."""
    before = _snapshots(model)
    try:
        yield
    finally:
        _restore(before)


def _snapshots(model: nn.Module) -> list[_Snapshot]:
    return [_Snapshot(module) for module in model.modules()]


def _restore(snapshots: list[_Snapshot]) -> None:
    for snapshot in snapshots:
        snapshot.restore()


class _Snapshot:
    """One module without its children."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.model_class = type(module)
        self.attributes = dict(vars(module))
        self.contents = {name: _copy(value) for name, value in self.attributes.items()}
        self.buffers = [
            (buffer, buffer.detach().clone())
            for buffer in module._buffers.values()
            if isinstance(buffer, Tensor) and not buffer.is_meta
        ]

    def restore(self) -> None:
        self.module.__class__ = self.model_class
        attributes = vars(self.module)
        attributes.clear()
        attributes.update(self.attributes)
        for name, content in self.contents.items():
            # The same dict or list as before, with what it held then: handles of hooks refer to it.
            value = attributes[name]
            if isinstance(content, list):
                value[:] = content
            elif content is not None:
                value.clear()
                value.update(content)
        for buffer, value in self.buffers:
            with torch.no_grad():
                buffer.copy_(value)


def _copy(value: Any) -> Any:
    """What a plain container holds; ``None`` for everything else."""
    return value.copy() if isinstance(value, (dict, list, set)) else None
