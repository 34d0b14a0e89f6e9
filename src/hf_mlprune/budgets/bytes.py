"""Bytes of the model's file, as what masks cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..modeling.layout import DenseLayer
from ..values import parse_quantity
from .base import Budget, Sizes, by_group

UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_size(text: str) -> float:
    """Bytes of ``"30 MB"``.

    Raises:
        ValueError: it is no size.
    """
    return parse_quantity(text, UNITS, f"size: expected a size such as '30 MB' ({', '.join(UNITS)})")


class BytesBudget(Budget):
    """``size="30 MB"``: of ``model.safetensors``, embeddings and all, in the dtype that the model has.

    If several encoders are pruned, each counts as if all of them were pruned to the same share.
    """

    unit = "bytes"
    obstacle = "embeddings and all else that is not pruned"
    advice = "store fewer bytes per weight, as model.to(torch.bfloat16) does, or use a smaller vocabulary"

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
        """Bytes of all that is no linear of a pruned encoder, and of these linears, dense."""
        return {"other_bytes": 1, "linear_bytes": 1}

    def prepare(self) -> None:
        """See :meth:`Budget.prepare`."""
        self.fixed = float(self.sizes.measured["other_bytes"])
        # Bytes of all encoders for each byte of this one.
        self.all_encoders = float(self.sizes.measured["linear_bytes"]) / dense_bytes(self.sizes)

    def layer_costs(self, widths: Tensor) -> Tensor:
        """Bytes of weights and biases of the prunable linears, and their share of those of other encoders."""
        return linear_bytes(self.sizes, widths) * self.all_encoders

    def wanted(self) -> float:
        """See :meth:`Budget.wanted`."""
        return parse_size(self.settings["size"])

    def describe(self, cost: float) -> str:
        """See :meth:`Budget.describe`."""
        return f"{cost / 1e6:.2f} MB" if cost >= 1e6 else f"{cost / 1e3:.1f} kB"


def linear_bytes(sizes: Sizes, widths: Tensor) -> Tensor:
    """Bytes of weights and biases of the prunable linears of layers of widths ``(layers, groups)``."""
    dense, kept = sizes.dense, by_group(widths)
    weights = dense.weights(kept)
    for name in sizes.biases:
        weights = weights + dense.shape(name, kept)[0]
    return weights * sizes.weight_bytes


def dense_bytes(sizes: Sizes) -> int:
    """Bytes of all prunable linears of an encoder, dense, those of excluded layers too."""
    return int(linear_bytes(sizes, sizes.full)) * sizes.layers
