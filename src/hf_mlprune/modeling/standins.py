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
        if self.bias is None:
            return x.new_zeros(*x.shape[:-1], self.size)
        return self.bias.expand(*x.shape[:-1], self.size)

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


class OutputScatter(RowScatter):
    """Writes kept features to their places in what another module puts out, or in the first part of that.

    For linears without a module of their own behind them (see :class:`RowScatter`): it stands in the module
    that holds the linear, and is called by a hook of it.

    Args:
        rows: place of each kept feature, increasing.
        size: features of the output.
    """

    #: Name in the module that holds the linear.
    NAME = "output_scatter"

    def __init__(self, rows: tuple[int, ...], size: int) -> None:
        super().__init__(nn.Identity(), rows, size)

    def enter(self, holder: nn.Module) -> None:
        """Take the place behind a module."""
        holder.add_module(self.NAME, self)
        # Kept also because a pickled hook keeps its number, which another process gives to a hook of its own
        # unless a handle says that it is taken.
        self.handle = holder.register_forward_hook(scatter_output)

    @classmethod
    def leave(cls, holder: nn.Module) -> None:
        """Undo :meth:`enter`, if one is there."""
        old = dict(holder.named_children()).get(cls.NAME)
        if isinstance(old, cls):
            old.handle.remove()
            delattr(holder, cls.NAME)


def scatter_output(holder: nn.Module, inputs: object, output: Any) -> Any:
    """The forward hook of a module that holds an :class:`OutputScatter`."""
    scatter = holder.get_submodule(OutputScatter.NAME)
    return (scatter(output[0]), *output[1:]) if isinstance(output, tuple) else scatter(output)


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
