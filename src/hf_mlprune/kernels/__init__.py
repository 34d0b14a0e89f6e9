"""Block-sparse products at the speed of their arithmetic; importing this serves `BlockSparseLinear`."""

from __future__ import annotations

from ..modeling.block_sparse import BlockSparseLinear
from .dispatch import NativeProduct, explain, why_dense
from .operation import block_sparse_linear, instruction_set

__all__ = ["block_sparse_linear", "explain", "instruction_set", "why_dense"]

BlockSparseLinear.accelerator = NativeProduct()
