"""Modules that stand where a layer, or a part of one, was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .block_sparse import row_places, scatter_rows


class FusedActivation(nn.Module):
    """Stands where an activation was that the linear before it applies now."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """The input."""
        return x


class NoHeads(nn.Module):
    """Stands where the heads of a layer were.

    Not called anything with "Attention": transformers reads the source of a module's file and
    takes a class of that name for a hand-written attention, which cannot be switched.

    Args:
        output: the linear behind the heads where it is a part of what this module replaces, and its name
            there. Without one, the input is handed on, which no layer behind it reads.
    """

    def __init__(self, output: tuple[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.output_name = None if output is None else output[0]
        if output is not None:
            self.add_module(*output)

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        """What is put out without heads, and no attention weights."""
        if self.output_name is None:
            return hidden_states, None
        return self.get_submodule(self.output_name)(hidden_states), None


class EmptyLinear(nn.Module):
    """Stands where a linear lost all its rows or columns: its bias at every token, or zeros.

    Args:
        rows: rows of the matrix that is left.
        columns: columns of it; one of the two is 0.
        size: output features: ``rows``, or more of them if there are none to write.
        bias: whether there is a bias, ``(rows,)``.
        scatter: if given, the place of each row among the output features.
    """

    weight: Tensor
    bias: nn.Parameter | None
    row_indices: Tensor

    def __init__(
        self, rows: int, columns: int, size: int, *, bias: bool, scatter: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        self.size = size
        self.rows = scatter
        # Without elements. A stock class that is pointed at the checkpoint meets another size here; without
        # this key it would give the layer new weights and go on.
        self.register_buffer("weight", torch.empty(rows, columns))
        self.register_parameter("bias", nn.Parameter(torch.zeros(rows)) if bias else None)
        places = None if scatter is None else row_places(scatter)
        self.register_buffer("row_indices", places, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., any)`` to ``(..., size)``."""
        if self.bias is None:
            return x.new_zeros(*x.shape[:-1], self.size)
        bias = self.bias if self.rows is None else scatter_rows(self.bias, self.row_indices, self.size)
        return bias.expand(*x.shape[:-1], self.size)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"size={self.size}, bias={self.bias is not None}"


class ScatteredLinear(nn.Linear):
    """A linear that writes its rows to their places among zeros.

    For layers without a module behind the linear that could do it (see :class:`RowScatter`).

    Args:
        in_features: columns.
        rows: place of each row of the weight, increasing.
        size: features of the output.
        bias: whether there is a bias, ``(rows,)``.
    """

    row_indices: Tensor

    def __init__(self, in_features: int, rows: tuple[int, ...], size: int, *, bias: bool) -> None:
        super().__init__(in_features, len(rows), bias=bias)
        self.rows = rows
        self.size = size
        # In no checkpoint: the structure in config.json says it.
        self.register_buffer("row_indices", row_places(rows), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., size)``."""
        return scatter_rows(super().forward(x), self.row_indices, self.size)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"{super().extra_repr()}, size={self.size}"


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


class Selection(nn.Module):
    """Takes some entries of one axis.

    Args:
        rows: their places, increasing.
        dim: the axis.
    """

    row_indices: Tensor

    def __init__(self, rows: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.rows = rows
        self.dim = dim
        self.register_buffer("row_indices", row_places(rows), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The input with fewer entries."""
        return x.index_select(self.dim, self.row_indices)
