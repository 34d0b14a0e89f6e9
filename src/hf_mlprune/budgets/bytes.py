"""Bytes of the model's file, as what masks cost."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..modeling.layout import GROUPS, DenseLayer
from .base import Budget

UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_size(text: str) -> float:
    """Bytes of ``"30 MB"``.

    Raises:
        ValueError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text) if isinstance(text, str) else None
    if match is None or match[2] not in UNITS or not float(match[1]):
        raise ValueError(f"size: expected a size such as '30 MB' ({', '.join(UNITS)}), got {text!r}")
    return float(match[1]) * UNITS[match[2]]


class BytesBudget(Budget):
    """``size="30 MB"``: of ``model.safetensors``, embeddings and all, in the dtype that the model has."""

    unit = "bytes"
    obstacle = "embeddings and all else that is not pruned"

    @classmethod
    def check(cls, settings: Mapping[str, Any]) -> None:
        """See :meth:`Budget.check`."""
        parse_size(settings["size"])

    @classmethod
    def tables(cls, dense: DenseLayer) -> dict[str, int]:
        """Bytes of all that is not a prunable linear."""
        return {"other_bytes": 1}

    def prepare(self) -> None:
        """See :meth:`Budget.prepare`."""
        self.rest = float(self.sizes.measured["other_bytes"])

    def layer_costs(self, widths: Tensor) -> Tensor:
        """Bytes of weights and biases of the prunable linears."""
        dense, by_group = self.sizes.dense, dict(zip(GROUPS, widths.unbind(-1), strict=True))
        weights = dense.weights(by_group)
        if self.sizes.has_biases:
            for name in dense.layout.matrices:
                weights = weights + dense.shape(name, by_group)[0]
        return weights * self.sizes.weight_bytes

    def wanted(self) -> float:
        """See :meth:`Budget.wanted`."""
        return parse_size(self.settings["size"])

    def describe(self, cost: float) -> str:
        """See :meth:`Budget.describe`."""
        return f"{cost / 1e6:.1f} MB"
