"""Weights, as what masks cost."""

from __future__ import annotations

import torch
from torch import Tensor

from ..modeling.structure import grid_shape


def block_weights(shape: tuple[int, int], block_shape: tuple[int, int]) -> Tensor:
    """Real weights in each block of a matrix's grid, ``(grid rows, grid columns)`` int64.

    Edge blocks count only what lies inside the matrix.
    """
    grid = grid_shape(shape, block_shape)
    sides = [
        torch.full((count,), side, dtype=torch.int64) for count, side in zip(grid, block_shape, strict=True)
    ]
    for side, count, length, block in zip(sides, grid, shape, block_shape, strict=True):
        if count:
            side[-1] = length - (count - 1) * block
    return torch.outer(sides[0], sides[1])
