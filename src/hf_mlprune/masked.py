"""Linears whose masks are learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .budgets.weights import block_weights
from .gates import Gate, GateOf
from .learning import LearningLinear, Places, put, take


@dataclass(frozen=True)
class Kept:
    """The part of a linear that is computed once masks are final; the parameters keep their size.

    Attributes:
        rows: places of the rows, int64, increasing; ``None`` for all.
        columns: places of the columns, of which alone there are inputs; ``None`` for all.
        scatter: whether outputs are written to their rows' places among zeros.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    scatter: bool = False

    def of(self, weight: Tensor) -> Tensor:
        """That part of a matrix ``(rows, columns)``."""
        return take(take(weight, 0, self.rows), 1, self.columns)


@dataclass(frozen=True)
class Masks:
    """The gates of one linear.

    Attributes:
        rows: gate of its rows, if they are pruned.
        columns: gate of its columns, if the layer before is pruned; only the block grid needs it.
        blocks: gate of the blocks of what rows and columns leave.
        block_shape: ``(rows, columns)``.
        layout: see :meth:`MaskedLinear.block_layout`; kept while rows and columns are final.
        kept: what is computed; everything, masks multiplied, if ``None``.
    """

    rows: GateOf | None
    columns: GateOf | None
    blocks: Gate | None
    block_shape: tuple[int, int]
    layout: tuple[Tensor, Tensor] | None = None
    kept: Kept | None = None


class MaskedLinear(nn.Linear):
    """A linear whose rows and blocks are multiplied by masks; cast in place from ``nn.Linear``."""

    masks: Masks
    #: Whether training passes leave their inputs in :attr:`inputs`, for a method that asks for them.
    keep_inputs: bool = False
    inputs: Tensor | None = None

    @classmethod
    def cast(cls, linear: nn.Linear, masks: Masks) -> None:
        """Turn a linear into a masked one, keeping its identity and its parameters'."""
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear.masks = masks

    def kept_shape(self) -> tuple[int, int]:
        """Rows and columns that the row and column gates leave."""
        rows, columns = self.masks.rows, self.masks.columns
        return (
            int(rows.keep().sum()) if rows else self.out_features,
            int(columns.keep().sum()) if columns else self.in_features,
        )

    def live_blocks(self) -> tuple[Tensor, Tensor]:
        """Weights of each block of the kept rows and columns, int64, and whether it stays, bool.

        Both flat, grid row by grid row. A linear whose blocks are not pruned is one block that stays.
        """
        gate, shape = self.masks.blocks, self.kept_shape()
        if gate is None:
            return torch.tensor([shape[0] * shape[1]]), torch.ones(1, dtype=torch.bool)
        costs = block_weights(shape, self.masks.block_shape).flatten()
        return costs, gate.keep[: len(costs)].cpu()

    def block_layout(self) -> tuple[Tensor, Tensor]:
        """One-hot maps from the block grid, laid over kept rows and columns, to the matrix.

        Returns:
            ``(rows, grid rows)`` and ``(grid columns, columns)`` of what is computed; removed rows and
            columns map to no block, so that ``first @ grid mask @ second`` is the mask of single weights.
        """
        sides = []
        for gate, length, block in zip(
            (self.masks.rows, self.masks.columns),
            (self.out_features, self.in_features),
            self.masks.block_shape,
            strict=True,
        ):
            device = self.weight.device
            keep = gate.keep() if gate else torch.ones(length, dtype=torch.bool, device=device)
            block_of = (keep.cumsum(0) - 1).clamp(min=0) // block
            blocks = -(-int(keep.sum()) // block)
            sides.append(functional.one_hot(block_of, max(blocks, 1))[:, :blocks] * keep[:, None])
        dtype, kept = self.weight.dtype, self.masks.kept or Kept()
        first, second = take(sides[0], 0, kept.rows), take(sides[1].T, 1, kept.columns)
        return first.to(dtype), second.contiguous().to(dtype)

    def sum_blocks(self, values: Tensor) -> Tensor:
        """Sum a tensor of the weight's shape over each block of the kept rows and columns.

        Returns:
            ``(blocks,)`` fp32, grid row by grid row.
        """
        first, second = self.masks.layout or self.block_layout()
        kept = (self.masks.kept or Kept()).of(values).float()
        return (first.T.float() @ kept @ second.T.float()).flatten()

    def spread_blocks(self, values: Tensor) -> Tensor:
        """Give every weight the value of its block, ``(blocks,)``; 0 to those of removed rows and columns."""
        first, second = self.masks.layout or self.block_layout()
        grid = values.view(first.shape[1], second.shape[0])
        kept = self.masks.kept or Kept()
        spread = first.to(grid.dtype) @ grid @ second.to(grid.dtype)
        return put(spread, self.weight.shape, (kept.rows, kept.columns))

    def _block_mask(self) -> Tensor | None:
        gate = self.masks.blocks
        mask = gate.current() if gate else None
        if mask is None:
            return None
        in_step = self.training and self.masks.layout is not None
        first, second = self.masks.layout if in_step and self.masks.layout else self.block_layout()
        grid = mask[: first.shape[1] * second.shape[0]].view(first.shape[1], second.shape[0])
        return first @ grid.to(first.dtype) @ second

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``; biases go with their rows.

        Where :attr:`Masks.kept` says so, only kept features come in and are put out.
        """
        if self.keep_inputs and self.training:
            self.inputs = x.detach()
        if self._learns():
            return self._learn(x)
        masks, kept = self.masks, self.masks.kept or Kept()
        weight: Tensor = kept.of(self.weight)
        bias: Tensor = self.bias
        if kept.rows is not None:
            bias = bias if bias is None else take(bias, 0, kept.rows)
        elif masks.rows is not None and (rows := masks.rows.current()) is not None:
            rows = rows.to(weight.dtype)
            weight = weight * rows[:, None]
            bias = bias if bias is None else bias * rows
        blocks = self._block_mask()
        if blocks is not None:
            weight = weight * blocks
        y = functional.linear(x, weight, bias)
        if kept.scatter and kept.rows is not None:
            return y.new_zeros(*y.shape[:-1], self.out_features).index_copy(-1, kept.rows.to(y.device), y)
        return y

    def _learns(self) -> bool:
        """Whether masks of rows or columns learn, and nothing else is in the way."""
        masks = self.masks
        learning = any(side is not None and side.learns for side in (masks.rows, masks.columns))
        # Which units are kept depends on values, which a compiled graph does not see.
        if not (learning and self.training) or torch.compiler.is_compiling():
            return False
        return masks.kept is None and (masks.blocks is None or masks.blocks.current() is None)

    def _learn(self, x: Tensor) -> Tensor:
        rows, columns = self.masks.rows, self.masks.columns
        places = Places(
            rows=rows.places() if rows else None,
            removed=rows.zeros() if rows else None,
            columns=columns.places() if columns else None,
            computed=rows.computed() if rows else None,
        )
        mask = rows.current() if rows else None
        return LearningLinear.apply(x, self.weight, self.bias, mask, places)  # type: ignore[no-any-return, no-untyped-call]
