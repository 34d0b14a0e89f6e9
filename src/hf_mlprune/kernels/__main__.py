"""`python -m hf_mlprune.kernels`: what the native code does on this machine, measured."""

from __future__ import annotations

from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from ..modeling.block_sparse import BlockSparseMatrix
from ..timing import interleave
from .operation import WHY_NOT, block_sparse_linear, instruction_set

SHAPES = ((768, 768), (3072, 768), (384, 1536))
TOKENS = (1, 128, 4096)
DENSITY = 0.2


def main() -> None:
    """Time the native product against the dense one, or say why there is none."""
    console = Console()
    if WHY_NOT:
        console.print(f"block-sparse layers are multiplied as dense ones: {WHY_NOT}")
        return
    title = f"16x16 blocks, density {DENSITY}, {instruction_set()}, {torch.get_num_threads()} threads"
    table = Table("rows x columns", "tokens", "dense", "block-sparse", "times as fast", title=title)
    for rows, columns in SHAPES:
        weight, bias = torch.randn(rows, columns), torch.randn(rows)
        keep = torch.rand(rows // 16, columns // 16) < DENSITY
        matrix = BlockSparseMatrix.from_dense(weight, keep, (16, 16))
        for tokens in TOKENS:
            x = torch.randn(tokens, columns)
            with torch.inference_mode():
                timing = interleave(
                    [
                        partial(functional.linear, x, weight, bias),
                        partial(block_sparse_linear, x, matrix, bias),
                    ],
                    rounds=50,
                    budget_seconds=1.0,
                )
            dense, sparse = (f"{seconds * 1e3:.3f} ms" for seconds in timing.seconds)
            table.add_row(f"{rows} x {columns}", str(tokens), dense, sparse, f"{timing.ratios[1]:.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
