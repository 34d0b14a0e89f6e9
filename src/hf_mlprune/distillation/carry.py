"""A second loss on the gradient of a tensor whose value stays what it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Once:
    """Whether the distillation loss of one forward pass has entered the gradients."""

    note: Callable[[], None]
    entered: bool = False


class Carry(torch.autograd.Function):
    """The carrier's value; its gradient weighted, and that of another loss added to the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        carrier: Tensor,
        aux: Tensor,
        carrier_weight: float,
        aux_weight: float,
        once: Once,
        is_loss: bool,
    ) -> Tensor:
        """The carrier's value.

        Args:
            ctx: torch's.
            carrier: what the loss is computed from, or the loss.
            aux: the other loss, scalar.
            carrier_weight: of the carrier's gradient.
            aux_weight: of the other loss.
            once: shared by all carriers of one forward pass.
            is_loss: whether the carrier is the loss, and not what a script makes one of.
        """
        ctx.weights, ctx.once, ctx.is_loss = (carrier_weight, aux_weight), once, is_loss
        # Not a view, which scripts could not change in place as they do a loss.
        return carrier.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The carrier's gradient weighted; that of the other loss at the first carrier that is reached."""
        carrier_weight, aux_weight = ctx.weights
        aux_gradient = None
        if not ctx.once.entered:
            ctx.once.entered = True
            ctx.once.note()
            # A loss is scaled as the script scales it; of other outputs the gradient says nothing about that.
            aux_gradient = aux_weight * (gradient if ctx.is_loss else gradient.new_ones(()))
        return carrier_weight * gradient, aux_gradient, None, None, None, None
