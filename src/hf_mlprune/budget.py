"""Pure functions of counts and shapes: kept weights, multiply-adds.

Everything here takes plain numbers or tensors alike, so that the same formula is counted and
differentiated.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from .modeling.structure import ROLES, LayerSizes, LayerStructure, grid_shape

Number = TypeVar("Number", float, Tensor)


def layer_weights(
    columns: int, attention: Number, attention_output: Number, fc1: Number, fc2: Number
) -> Number:
    """Weights of one layer with these widths: ``3·A·D + o·A + f·D + g·f``.

    With ``a·A``, ``o·D``, ``f·F`` and ``g·D`` for the widths this is the numerator of the paper's
    remaining ratio for heads and rows; for BERT-base, its sum over 144 D² (reference code).

    Args:
        columns: D, inputs of query, key, value and FC1.
        attention: kept heads x head size.
        attention_output: kept rows of O.
        fc1: kept rows of FC1.
        fc2: kept rows of FC2.
    """
    return 3 * attention * columns + attention_output * attention + fc1 * columns + fc2 * fc1


def structure_weights(kept: LayerStructure, sizes: LayerSizes) -> int:
    """Weights of one layer with its structure, blocks not considered."""
    shapes = (kept.linear_shape(role, sizes) for role in ROLES)
    return sum(rows * columns for rows, columns in shapes)


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


def attention_multiply_adds(width: int, batch: int, length: int) -> int:
    """Multiply-adds of scores and context of one layer: two products of ``length² x width``."""
    return 2 * batch * length * length * width
