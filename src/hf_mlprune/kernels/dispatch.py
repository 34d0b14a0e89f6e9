"""Which of a model's block-sparse layers the native operation serves, and why not the others."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..modeling.block_sparse import BlockSparseLinear
from .operation import WHY_NOT, instruction_set, is_transformed, product

#: Rows of W that the native code computes at once: a lower block costs as much as one of 16 rows.
STRIP_ROWS = 16
#: Share of the matrix up to which the native code is the faster one, idle lanes included (docs/kernel.md):
#: torch multiplies bfloat16 by instructions of its own where the processor has them, native code as float32.
CROSSOVER = {torch.float32: 1.0, torch.bfloat16: 0.5}

logger = logging.get_logger(__name__)


def why_dense(linear: BlockSparseLinear) -> str:
    """Why a layer is multiplied as a dense matrix on the CPU; empty if the native operation serves it."""
    if WHY_NOT:
        return WHY_NOT
    if not len(linear.weight):
        return "it has no blocks, only its bias"
    # Others have made it a function of something else (torch.nn.utils.parametrize and prune).
    if "weight" not in linear._parameters or "bias" not in linear._parameters:
        return "its weight or bias is computed from something else"
    if linear.weight.dtype not in CROSSOVER:
        return f"the native code has no {linear.weight.dtype}"
    return _why_slower(linear, linear.weight.dtype)


def _why_slower(linear: BlockSparseLinear, dtype: torch.dtype) -> str:
    blocks, columns, rows = linear.weight.shape
    whole = linear.in_features * linear.out_features
    # Idle lanes of the processor's vectors included.
    computed = blocks * -(-rows // STRIP_ROWS) * STRIP_ROWS * columns
    if computed > whole * CROSSOVER[dtype]:
        low = f", as blocks of {rows} rows fill {STRIP_ROWS}" if rows < STRIP_ROWS else ""
        most = f"{CROSSOVER[dtype]:g} is the most that is faster in {dtype}"
        return f"{computed / whole:.2f} of the matrix would be computed{low}; {most}"
    return ""


def explain(model: nn.Module) -> dict[str, int]:
    """How a model's block-sparse layers are multiplied on the CPU -> number of layers."""
    native = f"native ({instruction_set()})"
    layers = [module for module in model.modules() if isinstance(module, BlockSparseLinear)]
    reasons = (why_dense(layer) for layer in layers)
    return dict(Counter(f"dense: {reason}" if reason else native for reason in reasons))


def _to_onnx() -> bool:
    """Whether an ONNX file is being made, which cannot hold the operation; a program of torch.export can."""
    # The last question takes the longest.
    return (
        torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    ) and torch.onnx.is_in_onnx_export()


class NativeProduct:
    """What :class:`BlockSparseLinear` calls; see there."""

    def prepare(self, linear: BlockSparseLinear) -> tuple[torch.dtype, ...]:
        """Say once if there is no native code."""
        if WHY_NOT and not linear.training:
            logger.warning_once(f"block-sparse layers are multiplied as dense ones: {WHY_NOT}")
        return () if WHY_NOT else tuple(dtype for dtype in CROSSOVER if not _why_slower(linear, dtype))

    def multiply(self, linear: BlockSparseLinear, x: Tensor) -> Tensor | None:
        """The layer's output, or ``None`` where it is to be multiplied as a dense one."""
        # Not as attributes, which a module looks up in Python: four of them take longer than a small product.
        parameters, buffers = linear._parameters, linear._buffers
        # See `why_dense`.
        if "weight" not in parameters or "bias" not in parameters:
            return None
        weight: Tensor = parameters["weight"]  # type: ignore[assignment]
        bias = parameters["bias"]
        dtype = x.dtype
        if (
            not x.is_cpu
            or x.layout is not torch.strided
            or dtype is not weight.dtype
            or dtype not in linear._accelerated
            or torch.is_autocast_enabled("cpu")
            or is_transformed()
            or _to_onnx()
        ):
            return None
        return product(
            x,
            weight,
            buffers["crow_indices"],  # type: ignore[arg-type]
            buffers["col_indices"],  # type: ignore[arg-type]
            linear.in_features,
            weight.new_zeros(linear.out_features) if bias is None else bias,
            buffers["row_indices"],
            linear.scatter_size,
            linear.activation,
        )
