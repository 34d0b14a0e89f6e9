"""What every engine has in common: how a model gets into it, and how it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .source import Inputs, Source

Outputs = dict[str, "np.ndarray[Any, Any]"]
#: Layer -> names of the nodes of a graph that have its weights.
Layers = Mapping[str, Sequence[str]]
#: A loaded export: inputs by name to outputs by name.
Runner = Callable[[Inputs], Outputs]


@dataclass(frozen=True)
class Engine:
    """One way of serving.

    Attributes:
        packages: that must be installed to write and to run it.
        write: writes a model into a folder, and says which layers of it int8 can leave alone.
        load: of a folder and a number of threads, what runs it.
        keeps_blocks: whether it runs block-sparse layers as such.
    """

    packages: tuple[str, ...]
    write: Callable[[Source, Path], Layers]
    load: Callable[[Path, int], Runner]
    keeps_blocks: bool = False


def reference(source: Source) -> Runner:
    """A model in torch as a runner."""

    def run(inputs: Inputs) -> Outputs:
        with torch.inference_mode():
            return flat_outputs(source.module(**inputs))

    return run


def flat_outputs(outputs: Mapping[str, Any]) -> Outputs:
    """The tensors of a model's output by the names that an export gives them."""
    found: Outputs = {}
    for name, value in outputs.items():
        if isinstance(value, Tensor):
            found[name] = value.numpy()
        elif isinstance(value, (tuple, list)):
            found |= {f"{name}.{i}": part.numpy() for i, part in enumerate(value) if isinstance(part, Tensor)}
    return found
