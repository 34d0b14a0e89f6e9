"""A linear while its masks learn.

Removed units are computed forward, as their masks' gradients say whether they should come back. Nothing else
of them is: their weights get no gradient, and zeros are not multiplied. Units that an earlier target removed
cannot come back: their rows are not multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


@dataclass(frozen=True)
class Places:
    """Rows and columns of a matrix under masks that learn; int64, increasing; ``None`` for all.

    Attributes:
        rows: those that get gradients.
        removed: rows that are computed, and whose outputs are 0. They and ``rows`` need not be all: the query
            and key of a removed head are computed, and change nothing.
        columns: those whose inputs are not 0.
        computed: rows that are multiplied; the outputs of all others are 0.
    """

    rows: Tensor | None
    removed: Tensor | None
    columns: Tensor | None
    computed: Tensor | None = None


class LearningLinear(torch.autograd.Function):
    """``mask · (x Wᵀ + b)``, and the gradients of input, kept weights, kept biases and mask."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, places: Places
    ) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``.

        Args:
            ctx: torch's.
            x: 0 in all columns but ``places.columns``.
            weight: ``(out_features, in_features)``.
            bias: ``(out_features,)``.
            mask: ``(out_features,)``, 1 in what is kept and 0 elsewhere; only its gradient matters, and only
                of rows that are computed.
            places: what is kept.
        """
        inputs = x.reshape(-1, x.shape[-1])
        kept_inputs = take(inputs, 1, places.columns)
        used = take(take(weight, 1, places.columns), 0, places.computed)
        y = functional.linear(kept_inputs, used, None if bias is None else take(bias, 0, places.computed))
        y = put(y, torch.Size((len(y), len(weight))), (None, places.computed))
        unmasked = None
        if places.removed is not None:
            unmasked = y.index_select(1, places.removed)
            y.index_fill_(1, places.removed, 0.0)
        ctx.places, ctx.shape, ctx.dtype = places, x.shape, x.dtype
        out = y.view(*x.shape[:-1], y.shape[-1])
        # Outputs are kept only where the mask's gradient does not follow from those of weight and bias.
        _, of_weight, of_bias, of_mask, _ = ctx.needs_input_grad
        ctx.from_outputs = of_mask and not (of_weight and (bias is None or of_bias))
        # Under autocast products are computed in another dtype than inputs have.
        ctx.save_for_backward(
            kept_inputs.to(y.dtype), weight, bias, unmasked, out if ctx.from_outputs else None
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, bias and mask."""
        inputs, weight, bias, unmasked, out = ctx.saved_tensors
        places: Places = ctx.places
        of_x, of_weight, of_bias, of_mask, _ = ctx.needs_input_grad
        gradient = gradient.reshape(-1, gradient.shape[-1])
        kept = take(gradient, 1, places.rows)
        found: list[Tensor | None] = [None] * 5
        if of_x:
            product = kept @ take(weight, 0, places.rows).to(kept.dtype)
            found[0] = product.view(ctx.shape).to(ctx.dtype)
        from_gradients = of_mask and not ctx.from_outputs
        rows = torch.zeros((), dtype=torch.float32)
        if of_weight:
            product = (kept.T @ inputs).to(weight.dtype)
            if from_gradients:
                kept_weight = take(take(weight, 0, places.rows), 1, places.columns)
                rows = (product * kept_weight).sum(1, dtype=torch.float32)
            found[1] = put(product, weight.shape, (places.rows, places.columns))
        if of_bias:
            sums = kept.sum(0, dtype=weight.dtype)
            if from_gradients:
                rows = rows + (sums * take(bias, 0, places.rows)).float()
            found[2] = put(sums, weight.shape[:1], (places.rows,))
        if of_mask:
            # dL/dm = Σ_t dL/dy · y, in float32, as masks are; for kept rows that is <dL/dW, W> + dL/db · b.
            if ctx.from_outputs:
                of_units = (gradient * out.view_as(gradient)).sum(0, dtype=torch.float32)
            else:
                of_units = put(rows, weight.shape[:1], (places.rows,))
            if places.removed is not None:
                removed = gradient.index_select(1, places.removed).mul_(unmasked)
                of_units.index_copy_(0, places.removed, removed.sum(0, dtype=torch.float32))
            found[3] = of_units
        return tuple(found)


def take(matrix: Tensor, dim: int, places: Tensor | None) -> Tensor:
    """Entries of one dimension at their places, which may lie on another device; ``None`` for all."""
    return matrix if places is None else matrix.index_select(dim, places.to(matrix.device))


def put(values: Tensor, shape: torch.Size, places: tuple[Tensor | None, ...]) -> Tensor:
    """Values at their places along each dimension, among zeros."""
    for dim, at in reversed(list(enumerate(places))):
        if at is not None:
            wide = values.new_zeros(*values.shape[:dim], shape[dim], *values.shape[dim + 1 :])
            values = wide.index_copy_(dim, at, values)
    return values
