"""The two stages of pruning as budgets over gates: heads and rows, then blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from .budgets.weights import block_weights
from .gates import Gate
from .masked import MaskedLinear
from .modeling.layout import GROUPS
from .state import PruningState

#: Dense products of many tokens are slower where outputs are no multiple of 8 (docs/architecture.md); the
#: block-sparse one computes 16 rows at once.
ROW_GROUP = 16
#: Sites of fewer rows are landed row by row: a group would be too coarse a unit.
GROUPED_FROM = 32 * ROW_GROUP


class Stage(ABC):
    """Gates that are decided together, and what their masks cost.

    Attributes:
        gates: in a fixed order; all tensors over gates and units below follow it.
        live: units of each gate that take part; the leading ones.
        costs: per gate, weights that each unit frees if it alone goes, ``(live units,)``.
        floor: units that each gate keeps whatever their importance.
        total: weights of all prunable linears of the dense model; the denominator of density.
    """

    gates: list[Gate]
    live: list[int]
    costs: list[Tensor]
    floor: int
    total: int

    @abstractmethod
    def weights(self) -> int:
        """Kept weights under the present masks."""

    @abstractmethod
    def ratio(self, keep_ratios: Sequence[Tensor]) -> Tensor:
        """The paper's remaining ratio R of this stage, differentiable in the keep ratios."""

    @abstractmethod
    def _counter(self, gate_of: Tensor, unit_of: Tensor) -> _Counter:
        """Costs of keeping the first p of a sequence of units, and of more on top."""

    @abstractmethod
    def relative_target(self, density: float) -> float:
        """The target t of this stage's R that makes the whole model have this density."""

    def density(self) -> float:
        """Kept weights / all weights of the prunable linears."""
        return self.weights() / self.total

    def fit(self, priorities: Sequence[Tensor], density: float, *, fill: bool) -> list[Tensor]:
        """Keep the units of highest priority that fit a density.

        Args:
            priorities: per gate, ``(live units,)``; comparable across gates.
            density: most weights to keep, as a share of ``total``.
            fill: after the first unit that does not fit, go on to lower ones that do.

        Returns:
            Per gate, bool ``(live units,)``. Equal priorities keep the lower index.

        Raises:
            ValueError: the units that every gate keeps cost more than this density.
        """
        order, counter = self._rank(priorities)
        least = sum(min(self.floor, live) for live in self.live)
        limit = self.limit(density)
        if counter.weights(least) > limit:
            raise ValueError(
                f"density {density:g} cannot be reached: what is always kept (minimum_units="
                f"{self.floor}, sites that are not pruned) is "
                f"{counter.weights(least) / self.total:.4f} of the weights; raise the density, or "
                "prune more levels or row_sites"
            )
        prefix = _bisect(counter, least, len(order), limit)
        chosen = order[:prefix]
        if fill:
            chosen = torch.cat([chosen, order[counter.fill(prefix, limit)]])
        keep = torch.zeros(len(order), dtype=torch.bool)
        keep[chosen] = True
        return list(torch.split(keep, self.live))

    def limit(self, density: float) -> int:
        """Most weights that a density allows."""
        return int(density * self.total + 1e-6)

    def least_density(self) -> float:
        """Density of what is always kept."""
        _, counter = self._rank([torch.zeros(live) for live in self.live])
        return counter.weights(sum(min(self.floor, live) for live in self.live)) / self.total

    def _rank(self, priorities: Sequence[Tensor]) -> tuple[Tensor, _Counter]:
        """Units of all gates by falling priority, those of the floor first, and what they cost."""
        flat = torch.cat([self._with_floor(values) for values in priorities])
        order = flat.argsort(descending=True, stable=True)
        gate_of = torch.repeat_interleave(torch.arange(len(self.live)), torch.tensor(self.live))
        unit_of = torch.cat([torch.arange(live) for live in self.live])
        return order, self._counter(gate_of[order], unit_of[order])

    def _with_floor(self, values: Tensor) -> Tensor:
        values = values.detach().double().cpu().clone()
        top = values.argsort(descending=True, stable=True)[: self.floor]
        values[top] = torch.inf
        return values


class _Counter(ABC):
    """Kept weights of the first p of a sequence of units."""

    @abstractmethod
    def weights(self, prefix: int) -> int: ...

    @abstractmethod
    def fill(self, prefix: int, limit: int) -> Tensor:
        """Positions behind the prefix that still fit, taken greedily."""


def _bisect(counter: _Counter, low: int, high: int, limit: int) -> int:
    """The longest prefix whose weights do not exceed the limit; weights grow with it."""
    while low < high:
        middle = (low + high + 1) // 2
        if counter.weights(middle) <= limit:
            low = middle
        else:
            high = middle - 1
    return low


class StructuredStage(Stage):
    """Heads and rows: weights are products of kept widths."""

    def __init__(self, state: PruningState) -> None:
        self.state = state
        self.layers = state.included()
        # Layer and group of each gate.
        self.places = [
            (position, group)
            for position, index in enumerate(self.layers)
            for group in GROUPS
            if group in state.gates(index)
        ]
        self.gates = [state.gates(self.layers[position])[group] for position, group in self.places]
        self.live = [gate.units for gate in self.gates]
        self.floor = state.config.minimum_units
        self.total = state.total_weights()
        # Of each gate in the flattened widths.
        self.cells = [position * len(GROUPS) + GROUPS.index(group) for position, group in self.places]
        # Widths before this run, (layers, groups).
        self.widths = torch.tensor([[state.base[i].widths[group] for group in GROUPS] for i in self.layers])
        self.costs = [
            torch.full((gate.units,), self._unit_cost(position, group), dtype=torch.float64)
            for gate, (position, group) in zip(self.gates, self.places, strict=True)
        ]

    def _unit_cost(self, position: int, group: str) -> float:
        return float(self.state.dense.unit_weights(group, self.state.base[self.layers[position]].widths))

    def fit(self, priorities: Sequence[Tensor], density: float, *, fill: bool) -> list[Tensor]:
        """See :meth:`Stage.fit`; where ``fill``, rows of large sites are kept in groups of 16.

        One site takes the rest, so that the density is met to one unit all the same.
        """
        keep = super().fit(priorities, density, fill=fill)
        grouped = [
            index
            for index, (_, group) in enumerate(self.places)
            if group != "heads" and self.live[index] >= GROUPED_FROM
        ]
        if not fill or not grouped:
            return keep
        counts = [int(mask.sum()) for mask in keep]
        return self._in_groups(counts, grouped, priorities, self.limit(density))

    def _in_groups(
        self, counts: list[int], grouped: list[int], priorities: Sequence[Tensor], limit: int
    ) -> list[Tensor]:
        for index in grouped:
            counts[index] = max(counts[index] // ROW_GROUP * ROW_GROUP, min(self.floor, counts[index]))
        ranked = [self._with_floor(values).sort(descending=True, stable=True) for values in priorities]

        def grow(index: int, units: int) -> bool:
            """Keep so many more units of a gate, if they are there and fit."""
            counts[index] += units
            if counts[index] <= self.live[index] and self.weights_of(counts) <= limit:
                return True
            counts[index] -= units
            return False

        def by_next_priority(among: Sequence[int]) -> list[int]:
            left = [index for index in among if counts[index] < self.live[index]]
            return sorted(left, key=lambda index: -float(ranked[index].values[counts[index]]))

        def to_next_group(index: int) -> int:
            return ROW_GROUP - counts[index] % ROW_GROUP

        while any(grow(index, to_next_group(index)) for index in by_next_priority(grouped)):
            pass
        for index in by_next_priority(grouped) + by_next_priority(range(len(counts))):
            while grow(index, 1):
                pass
        masks = [torch.zeros(live, dtype=torch.bool) for live in self.live]
        for mask, order, count in zip(masks, ranked, counts, strict=True):
            mask[order.indices[:count]] = True
        return masks

    def widths_of(self, counts: Sequence[int] | Tensor) -> Tensor:
        """Widths ``(layers, groups)`` if each gate keeps so many units."""
        widths = self.widths.flatten().clone()
        widths[self.cells] = torch.as_tensor(counts)
        return widths.view_as(self.widths)

    def weights_of(self, counts: Sequence[int] | Tensor) -> int:
        """Kept weights if each gate keeps so many units."""
        return int(self.layer_weights(self.widths_of(counts)).sum())

    def layer_weights(self, widths: Tensor) -> Tensor:
        """Weights of each layer for widths ``(layers, groups)``."""
        return self.state.dense.weights(dict(zip(GROUPS, widths.unbind(-1), strict=True)))

    def weights(self) -> int:
        """See :meth:`Stage.weights`."""
        return self.weights_of([int(gate.keep.sum()) for gate in self.gates])

    def ratio(self, keep_ratios: Sequence[Tensor]) -> Tensor:
        """``Σ_layers [3aAD + o·D·aA + f·F·D + g·D·f·F] / Σ_layers [4AD + 2FD]``, floored at one unit.

        Paper's remaining ratio for heads and rows; for BERT-base the reference code's over 144.
        """
        widths = self.widths.double()
        rows = []
        for position in range(len(self.layers)):
            row = list(widths[position])
            for ratio, gate, (p, group) in zip(keep_ratios, self.gates, self.places, strict=True):
                if p == position:
                    row[GROUPS.index(group)] = (ratio.double() * gate.units).clamp(min=1.0)
            rows.append(torch.stack(row))
        return self.layer_weights(torch.stack(rows)).sum() / self.total

    def relative_target(self, density: float) -> float:
        """R is counted against the dense model: the density itself."""
        return density

    def _counter(self, gate_of: Tensor, unit_of: Tensor) -> _Counter:
        return _StructuredCounter(self, gate_of)


class _StructuredCounter(_Counter):
    def __init__(self, stage: StructuredStage, gate_of: Tensor) -> None:
        self.stage, self.gate_of, self.cells = stage, gate_of, stage.cells

    def _counts(self, prefix: int) -> Tensor:
        return torch.bincount(self.gate_of[:prefix], minlength=len(self.cells))

    def weights(self, prefix: int) -> int:
        return self.stage.weights_of(self._counts(prefix))

    def fill(self, prefix: int, limit: int) -> Tensor:
        widths = self.stage.widths_of(self._counts(prefix)).flatten()
        weights = self.weights(prefix)
        chosen: list[int] = []
        full: set[int] = set()
        for position in range(prefix, len(self.gate_of)):
            gate = int(self.gate_of[position])
            if gate in full:
                continue
            widths[self.cells[gate]] += 1
            more = int(self.stage.layer_weights(widths.view(-1, len(GROUPS))).sum())
            if more <= limit:
                weights = more
                chosen.append(position)
            else:
                widths[self.cells[gate]] -= 1
                # Another unit of this gate costs the same or more: nothing else has shrunk.
                full.add(gate)
                if len(full) == len(self.cells):
                    break
        assert weights <= limit
        return torch.tensor(chosen, dtype=torch.int64)


class BlockStage(Stage):
    """Blocks of what heads and rows left: weights are sums of block sizes."""

    def __init__(self, state: PruningState, linears: Sequence[tuple[Gate, MaskedLinear]]) -> None:
        self.gates = [gate for gate, _ in linears]
        self.total = state.total_weights()
        shape = state.config.block_shape
        self.costs = [block_weights(linear.kept_shape(), shape).flatten().double() for _, linear in linears]
        self.live = [len(costs) for costs in self.costs]
        self.matrix_weights = sum(float(costs.sum()) for costs in self.costs)
        # A matrix may lose all its blocks: its rows stay and emit their biases.
        self.floor = 0

    def weights(self) -> int:
        """See :meth:`Stage.weights`."""
        return int(
            sum(
                float(costs[gate.keep[:live].cpu()].sum())
                for gate, costs, live in zip(self.gates, self.costs, self.live, strict=True)
            )
        )

    def ratio(self, keep_ratios: Sequence[Tensor]) -> Tensor:
        """``Σ k_j n_j / Σ n_j`` over the weights of the shrunk matrices (paper, block step)."""
        sizes = [float(costs.sum()) for costs in self.costs]
        terms = [ratio.double().sum() * n for ratio, n in zip(keep_ratios, sizes, strict=True)]
        return torch.stack(terms).sum() / max(1.0, self.matrix_weights)

    def relative_target(self, density: float) -> float:
        """R is counted against the shrunk matrices: density / measured R1, at most 1."""
        return min(1.0, density * self.total / max(1.0, self.matrix_weights))

    def _counter(self, gate_of: Tensor, unit_of: Tensor) -> _Counter:
        offsets = torch.tensor([0, *self.live]).cumsum(0)
        return _BlockCounter(torch.cat(self.costs).long()[offsets[gate_of] + unit_of])


class _BlockCounter(_Counter):
    def __init__(self, costs: Tensor) -> None:
        self.costs = costs
        self.cumulated = torch.cat([costs.new_zeros(1), costs.cumsum(0)])

    def weights(self, prefix: int) -> int:
        return int(self.cumulated[prefix])

    def fill(self, prefix: int, limit: int) -> Tensor:
        left = limit - self.weights(prefix)
        chosen: list[int] = []
        for position in range(prefix, len(self.costs)):
            cost = int(self.costs[position])
            if cost <= left:
                chosen.append(position)
                left -= cost
            if left <= 0:
                break
        return torch.tensor(chosen, dtype=torch.int64)
