"""Modules that stand where a layer, or a part of one, was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .block_sparse import row_places, scatter_rows


class Applied(nn.Module):
    """Stands where an activation was that the linear before it applies now."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """The input."""
        return x


class NoHeads(nn.Module):
    """Stands where the heads of a layer were: hands on what no layer behind it reads.

    Not called anything with "Attention": transformers reads the source of a module's file and
    takes a class of that name for a hand-written attention, which cannot be switched.
    """

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        """The input, and no attention weights."""
        return hidden_states, None


class EmptyLinear(nn.Module):
    """Stands where a linear lost all its rows or columns: its bias at every token, or zeros.

    Args:
        rows: rows of the matrix that is left.
        columns: columns of it; one of the two is 0.
        size: output features: ``rows``, or more of them if there are none to write.
        bias: whether there is a bias, ``(rows,)``.
    """

    weight: Tensor
    bias: nn.Parameter | None

    def __init__(self, rows: int, columns: int, size: int, *, bias: bool) -> None:
        super().__init__()
        self.size = size
        # Without elements. A stock class that is pointed at the checkpoint meets another size here; without
        # this key it would give the layer new weights and go on.
        self.register_buffer("weight", torch.empty(rows, columns))
        self.register_parameter("bias", nn.Parameter(torch.zeros(rows)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., any)`` to ``(..., size)``."""
        shape = (*x.shape[:-1], self.size)
        return x.new_zeros(shape) if self.bias is None else self.bias.expand(shape)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"size={self.size}, bias={self.bias is not None}"


class RowScatter(nn.Module):
    """Writes kept features to their places among zeros, then applies the module that stood here.

    So the linear before it is one like any other, whose output is as wide as its bias.

    Args:
        module: what stood behind the linear (a dropout).
        rows: place of each kept feature, increasing.
        size: features of the output.
    """

    row_indices: Tensor

    def __init__(self, module: nn.Module, rows: tuple[int, ...], size: int) -> None:
        super().__init__()
        self.module = module
        self.rows = rows
        self.size = size
        # In no checkpoint: the structure in config.json says it.
        self.register_buffer("row_indices", row_places(rows), persistent=False)

    @property
    def p(self) -> Any:
        """That of the dropout."""
        return self.module.p

    @p.setter
    def p(self, value: float) -> None:
        self.module.p = value  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """``(..., rows)`` to ``(..., size)``."""
        y: Tensor = self.module(scatter_rows(x, self.row_indices, self.size))
        return y

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"rows={len(self.rows)}, size={self.size}"
