"""Which of a model's block-sparse layers the native operation serves, and why not the others."""

from __future__ import annotations

from collections import Counter
from functools import cache

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..modeling.block_sparse import BlockSparseLinear
from .operation import DTYPES, WHY_NOT, block_sparse_linear, instruction_set, packed

#: Rows of W that the native code computes at once: a lower block costs as much as one of 16 rows.
STRIP_ROWS = 16

logger = logging.get_logger(__name__)


def why_dense(linear: BlockSparseLinear) -> str:
    """Why a layer is multiplied as a dense matrix on the CPU; empty if the native operation serves it."""
    weight = linear.weight
    return _why_dense(weight.dtype, tuple(weight.shape), linear.in_features * linear.out_features)


# Asked at every call, where at one token it would be felt.
@cache
def _why_dense(dtype: torch.dtype, shape: tuple[int, ...], whole: int) -> str:
    if WHY_NOT:
        return WHY_NOT
    if dtype not in DTYPES:
        return f"the native code has no {dtype}"
    blocks, rows, columns = shape
    # Idle lanes of the processor's vectors included.
    computed = blocks * -(-rows // STRIP_ROWS) * STRIP_ROWS * columns
    # Up to there dense was no faster on average (docs/kernel.md).
    if computed > whole:
        low = f", as blocks of {rows} rows fill {STRIP_ROWS}" if rows < STRIP_ROWS else ""
        return f"{computed / whole:.2f} of the matrix would be computed{low}"
    return ""


def explain(model: nn.Module) -> dict[str, int]:
    """How a model's block-sparse layers are multiplied on the CPU -> number of layers."""
    native = f"native ({instruction_set()})"
    layers = [module for module in model.modules() if isinstance(module, BlockSparseLinear)]
    reasons = (why_dense(layer) for layer in layers)
    return dict(Counter(f"dense: {reason}" if reason else native for reason in reasons))


class NativeProduct:
    """What :class:`BlockSparseLinear` calls; see there."""

    def prepare(self, linear: BlockSparseLinear) -> None:
        """Lay a layer's blocks out for the native code, once; say once if there is none.

        In training mode, too: it must not happen between two steps of an optimizer.
        """
        if WHY_NOT and not linear.training:
            logger.warning_once(f"block-sparse layers are multiplied as dense ones: {WHY_NOT}")
        if not linear.weight.transpose(1, 2).is_contiguous():
            linear.weight.data = packed(linear.weight.data)

    def multiply(self, linear: BlockSparseLinear, x: Tensor) -> Tensor | None:
        """The layer's output, or ``None`` where it is to be multiplied as a dense one."""
        if (
            x.device.type != "cpu"
            or x.dtype is not linear.weight.dtype
            or torch.is_autocast_enabled("cpu")
            or why_dense(linear)
        ):
            return None
        return block_sparse_linear(
            x,
            linear.matrix(),
            linear.bias,
            row_indices=linear.row_indices,
            scatter_size=linear.scatter_size,
            activation=linear.activation,
        )
