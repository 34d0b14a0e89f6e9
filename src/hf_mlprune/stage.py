"""Gates that are decided together, and what their masks cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .gates import Gate


@dataclass(frozen=True)
class Owned:
    """What the units of one gate own of one matrix.

    Attributes:
        name: of the matrix in its layer: ``"query"``, ``"fc1"``, ...
        layer: index of the layer.
        weight: the matrix, ``(rows, columns)``.
        sum: sums a tensor of the weight's shape over the weights of each unit, to ``(units,)`` fp32.
        spread: gives every weight the value of its unit, from ``(units,)`` to what broadcasts to the weight;
            0 where no unit owns it.
        inputs: of the matrix in the last training pass, ``(..., columns)``; of matrices whose columns are
            owned, if the method needs them.
    """

    name: str
    layer: int
    weight: Tensor
    sum: Callable[[Tensor], Tensor]
    spread: Callable[[Tensor], Tensor]
    inputs: Tensor | None = None


class Stage(ABC):
    """Gates that are decided together, and what their masks cost.

    Attributes:
        gates: in a fixed order; all tensors over gates and units below follow it.
        active: units of each gate that take part; the leading ones.
        candidates: per gate, which of these may stay, bool ``(active units,)``; the others went with the
            target before.
        costs: per gate, what each unit frees if it alone goes, ``(active units,)``.
        minimum: units that each gate keeps whatever their importance.
        total: cost of the dense layers in the budget of the run; the denominator of a share. Of weights, all
            prunable weights of the dense model, so that the share is the density.
        all_weights: weights of all prunable linears of the dense model.
    """

    gates: list[Gate]
    active: list[int]
    candidates: list[Tensor]
    costs: list[Tensor]
    minimum: int
    total: float
    all_weights: int

    @abstractmethod
    def weights(self) -> int:
        """Kept weights under the present masks."""

    @abstractmethod
    def owned(self) -> list[list[Owned]]:
        """Per gate, the matrices of which its active units own weights."""

    @torch.no_grad()
    def squared_norms(self) -> list[Tensor]:
        """Per gate, Σ w² of all weights that each unit owns, ``(active units,)`` fp32."""
        return [
            torch.stack([each.sum(each.weight.float().square()) for each in owned]).sum(0)
            for owned in self.owned()
        ]

    @abstractmethod
    def ratio(self, keep_ratios: Sequence[Tensor]) -> Tensor:
        """The paper's remaining ratio R of this stage, differentiable in the keep ratios."""

    @abstractmethod
    def _counter(self, gate_of: Tensor, unit_of: Tensor) -> Counter:
        """Costs of keeping the first p of a sequence of units, and of more on top."""

    @abstractmethod
    def relative_target(self, density: float) -> float:
        """The target t of this stage's R that makes the whole model have this density."""

    def density(self) -> float:
        """Kept weights / all weights of the prunable linears."""
        return self.weights() / self.all_weights

    def fit(self, priorities: Sequence[Tensor], share: float, *, final: bool) -> list[Tensor]:
        """Keep the units of highest priority that fit a share of the dense cost.

        Args:
            priorities: per gate, ``(active units,)``; comparable across gates.
            share: most to keep, as a share of ``total``.
            final: whether masks are to land: after the first unit that does not fit, go on to lower ones
                that do.

        Returns:
            Per gate, bool ``(active units,)``. Equal priorities keep the lower index.

        Raises:
            ValueError: the units that every gate keeps cost more; or no unit at all fits, and nothing else
                would be left.
        """
        order, counter = self._rank(priorities)
        least, limit = self._least_units(), self.limit(share)
        if counter.cost(least) > limit:
            raise ValueError(self.unreachable(share, counter.cost(least) / self.total))
        prefix = _bisect(counter, least, len(order), limit)
        if not prefix and not counter.cost(0) and not len(counter.fill(0, limit)):
            raise ValueError(self.unreachable(share, counter.cost(1) / self.total))
        chosen = order[:prefix]
        if final:
            chosen = torch.cat([chosen, order[counter.fill(prefix, limit)]])
        keep = torch.zeros(sum(self.active), dtype=torch.bool)
        keep[chosen] = True
        return list(torch.split(keep, self.active))

    def unreachable(self, share: float, least: float) -> str:
        """Say that a share is below what is always kept."""
        return (
            f"density {share:g} cannot be reached: what is always kept (minimum_units={self.minimum}, one "
            f"unit at least, sites that are not pruned) is {least:.4f} of the weights; raise the density, "
            "prune more levels or row_sites, or lower minimum_units"
        )

    def limit(self, share: float) -> float:
        """Most that a share allows, rounding aside."""
        return share * self.total + 1e-6

    def least_share(self) -> float:
        """Share of what is always kept."""
        _, counter = self._rank([torch.zeros(active) for active in self.active])
        return counter.cost(self._least_units()) / self.total

    def available(self) -> list[int]:
        """Units of each gate that may stay."""
        return [int(candidates.sum()) for candidates in self.candidates]

    def _least_units(self) -> int:
        return sum(min(self.minimum, available) for available in self.available())

    def _rank(self, priorities: Sequence[Tensor]) -> tuple[Tensor, Counter]:
        """Candidates of all gates by falling priority, those always kept first, and what they cost."""
        flat = torch.cat(
            [self._with_minimum(*each) for each in zip(priorities, self.candidates, strict=True)]
        )
        order = flat.argsort(descending=True, stable=True)
        order = order[torch.cat(self.candidates)[order]]
        gate_of = torch.repeat_interleave(torch.arange(len(self.active)), torch.tensor(self.active))
        unit_of = torch.cat([torch.arange(active) for active in self.active])
        return order, self._counter(gate_of[order], unit_of[order])

    def _with_minimum(self, values: Tensor, candidates: Tensor) -> Tensor:
        values = values.detach().cpu().double()
        unknown = int(values[candidates].isnan().sum())
        if unknown:
            raise ValueError(
                f"method: expected the importance of every unit, got NaN for {unknown} of "
                f"{int(candidates.sum())} units of a group; does the method divide by 0?"
            )
        # Those always kept stand before units of infinite importance, too.
        values = values.clamp(max=torch.finfo(values.dtype).max)
        order = values.argsort(descending=True, stable=True)
        values[order[candidates[order]][: self.minimum]] = torch.inf
        return values


class Counter(ABC):
    """What the first p of a sequence of units cost."""

    @abstractmethod
    def cost(self, prefix: int) -> float:
        """Of the first ``prefix`` units."""

    @abstractmethod
    def fill(self, prefix: int, limit: float) -> Tensor:
        """Positions behind the prefix that still fit, taken greedily."""


def _bisect(counter: Counter, low: int, high: int, limit: float) -> int:
    """The longest prefix whose cost does not exceed the limit; costs grow with it."""
    while low < high:
        middle = (low + high + 1) // 2
        if counter.cost(middle) <= limit:
            low = middle
        else:
            high = middle - 1
    return low
