"""Weights, as what masks cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..modeling.structure import grid_shape
from ..values import check_fraction
from .base import Budget, by_group


class WeightBudget(Budget):
    """``density=0.2``: kept weights of the prunable linears over all; excluded layers do not count."""

    unit = "weights"
    has_blocks = True

    @classmethod
    def check(cls, settings: Mapping[str, Any]) -> None:
        """See :meth:`Budget.check`."""
        check_fraction("density", settings["density"], zero=False)

    @classmethod
    def leaves(cls, settings: Mapping[str, Any]) -> float:
        """See :meth:`Budget.leaves`."""
        return float(settings["density"])

    def layer_costs(self, widths: Tensor) -> Tensor:
        """See :meth:`DenseLayer.weights`."""
        return self.sizes.dense.weights(by_group(widths))

    def wanted(self) -> float:
        """See :meth:`Budget.wanted`."""
        return float(self.settings["density"] * self.total + self.rest)

    def share(self) -> float:
        """The density itself."""
        return float(self.settings["density"])

    def unit_cost(self, group: str, widths: Mapping[str, int]) -> float:
        """See :meth:`DenseLayer.unit_weights`."""
        return float(self.sizes.dense.unit_weights(group, widths))


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
