"""Multiply-adds, as what masks cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..modeling.layout import DenseLayer
from ..values import check_fraction
from .base import Budget, by_group


def attention_multiply_adds(width: int, batch: int, length: int) -> int:
    """Multiply-adds of scores and context of one layer: two products of ``length² x width``."""
    return 2 * batch * length * length * width


class MultiplyAddsBudget(Budget):
    """``multiply_adds=0.25``: of the encoder for one sequence of ``length`` tokens, over the dense one's."""

    unit = "multiply-adds"
    uses = ("length",)

    @classmethod
    def check(cls, settings: Mapping[str, Any]) -> None:
        """See :meth:`Budget.check`."""
        check_fraction("multiply_adds", settings["multiply_adds"], zero=False)

    @classmethod
    def leaves(cls, settings: Mapping[str, Any]) -> float:
        """See :meth:`Budget.leaves`."""
        return float(settings["multiply_adds"])

    @classmethod
    def tables(cls, dense: DenseLayer) -> dict[str, int]:
        """The tokens of a sequence."""
        return {"target_length": 1}

    def layer_costs(self, widths: Tensor) -> Tensor:
        """Of the linears, one for each weight and token, and of the attention."""
        dense, length = self.sizes.dense, int(self.sizes.measured["target_length"])
        kept = by_group(widths)
        attention = attention_multiply_adds(1, 1, length) * dense.span("heads")
        return dense.weights(kept) * length + kept["heads"] * attention

    def wanted(self) -> float:
        """See :meth:`Budget.wanted`."""
        return float(self.settings["multiply_adds"] * self.whole)

    def reached(self, cost: float) -> str:
        """See :meth:`Budget.reached`."""
        length = int(self.sizes.measured["target_length"])
        return f"{cost / self.whole:.4f} of the dense multiply-adds for {length} tokens"
