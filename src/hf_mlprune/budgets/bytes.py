"""Bytes of the model's file, as what masks cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..modeling.layout import DenseLayer
from ..values import parse_quantity
from .base import Budget, by_group

UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_size(text: str) -> float:
    """Bytes of ``"30 MB"``.

    Raises:
        ValueError: it is no size.
    """
    return parse_quantity(text, UNITS, f"size: expected a size such as '30 MB' ({', '.join(UNITS)})")


class BytesBudget(Budget):
    """``size="30 MB"``: of ``model.safetensors``, embeddings and all, in the dtype that the model has."""

    unit = "bytes"
    obstacle = "embeddings and all else that is not pruned"

    @classmethod
    def check(cls, settings: Mapping[str, Any]) -> None:
        """See :meth:`Budget.check`."""
        parse_size(settings["size"])

    @classmethod
    def leaves(cls, settings: Mapping[str, Any]) -> float:
        """See :meth:`Budget.leaves`."""
        return parse_size(settings["size"])

    @classmethod
    def tables(cls, dense: DenseLayer) -> dict[str, int]:
        """Bytes of all that is not a prunable linear."""
        return {"other_bytes": 1}

    def prepare(self) -> None:
        """See :meth:`Budget.prepare`."""
        self.rest = float(self.sizes.measured["other_bytes"])

    def layer_costs(self, widths: Tensor) -> Tensor:
        """Bytes of weights and biases of the prunable linears."""
        dense, kept = self.sizes.dense, by_group(widths)
        weights = dense.weights(kept)
        if self.sizes.has_biases:
            for name in dense.layout.matrices:
                weights = weights + dense.shape(name, kept)[0]
        return weights * self.sizes.weight_bytes

    def wanted(self) -> float:
        """See :meth:`Budget.wanted`."""
        return parse_size(self.settings["size"])

    def describe(self, cost: float) -> str:
        """See :meth:`Budget.describe`."""
        return f"{cost / 1e6:.1f} MB"
