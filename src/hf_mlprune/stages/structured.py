"""Heads, rows and whole modules: what they cost follows from the kept widths of each layer."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..budgets.base import by_group
from ..modeling.layout import GROUPS
from ..stage import Counter, Owned, Stage
from ..state import PruningState
from ..values import listed


class StructuredStage(Stage):
    """Heads, rows and whole modules: what they cost follows from the kept widths of each layer."""

    def __init__(self, state: PruningState) -> None:
        self.state = state
        self.layers = state.included()
        # Layer and group of each gate.
        self.groups = [
            (position, group)
            for position, index in enumerate(self.layers)
            for group in GROUPS
            if group in state.gates(index)
        ]
        self.gates = [state.gates(self.layers[position])[group] for position, group in self.groups]
        self.active = [gate.units for gate in self.gates]
        self.candidates = [
            torch.ones(gate.units, dtype=torch.bool) if gate.candidates is None else gate.candidates.cpu()
            for gate in self.gates
        ]
        self.minimum = state.config.minimum_units
        self.budget = state.budget()
        self.total, self.all_weights = self.budget.total, state.total_weights()
        # Of each gate in the flattened widths.
        self.cells = [position * len(GROUPS) + GROUPS.index(group) for position, group in self.groups]
        self.sizes = torch.tensor([gate.size for gate in self.gates], dtype=torch.int64)
        # Widths before this run, (layers, groups).
        self.widths = torch.tensor([[state.base[i].widths[group] for group in GROUPS] for i in self.layers])
        self.costs = [
            torch.full((gate.units,), gate.size * self._unit_cost(position, group), dtype=torch.float64)
            for gate, (position, group) in zip(self.gates, self.groups, strict=True)
        ]

    def _unit_cost(self, position: int, group: str) -> float:
        return self.budget.unit_cost(group, self.state.base[self.layers[position]].widths)

    def unreachable(self, share: float, least: float) -> str:
        """See :meth:`Stage.unreachable`."""
        name, value = self.state.config.target
        if name == "density":
            return super().unreachable(share, least)
        budget, exclude = self.budget, list(self.state.config.exclude)
        floor = budget.cost(least)
        obstacles = {
            f"{budget.obstacle} take {budget.describe(budget.fixed)}": budget.fixed,
            f"excluded layers {exclude} take {budget.describe(budget.excluded)}": budget.excluded,
            f"every layer keeps minimum_units={self.minimum} of each kind": self.minimum,
        }
        ways = {
            "ask for less": True,
            "exclude fewer layers": budget.excluded,
            "lower minimum_units": self.minimum,
            budget.advice: budget.advice,
        }
        return (
            f"{name}={value!r} cannot be reached: the least is {budget.describe(floor)} of "
            f"{budget.describe(budget.whole)} ({budget.whole / max(floor, 1):.2f}x at most), as "
            f"{listed(word for word, there in obstacles.items() if there)}; "
            f"{listed((word for word, there in ways.items() if there), 'or')}"
        )

    def fit(self, priorities: Sequence[Tensor], share: float, *, final: bool) -> list[Tensor]:
        """See :meth:`Stage.fit`; where ``final``, gates are landed on widths that pay.

        One site takes the rest of a budget that has one, so that it is met to one unit all the same.
        """
        keep = super().fit(priorities, share, final=final)
        available = self.available()
        pays = {
            index: widths
            for index, (_, group) in enumerate(self.groups)
            if self.gates[index].size == 1
            and (widths := self.budget.widths_that_pay(group, available[index])) is not None
        }
        if not final or not pays:
            return keep
        counts = [int(mask.sum()) for mask in keep]
        return self._in_groups(counts, pays, priorities, self.limit(share))

    def _in_groups(
        self,
        counts: list[int],
        pays: dict[int, Sequence[int]],
        priorities: Sequence[Tensor],
        limit: float,
    ) -> list[Tensor]:
        grouped, available = list(pays), self.available()
        for index in grouped:
            below = pays[index][bisect.bisect_right(pays[index], counts[index]) - 1]
            counts[index] = max(below, min(self.minimum, counts[index]))
        ranked = []
        for values, candidates in zip(priorities, self.candidates, strict=True):
            values = self._with_minimum(values, candidates)
            order = values.argsort(descending=True, stable=True)
            order = order[candidates[order]]
            ranked.append((values[order], order))

        def grow(index: int, units: int) -> bool:
            """Keep so many more units of a gate, if they are there and fit."""
            counts[index] += units
            if counts[index] <= available[index] and self.cost_of(counts) <= limit:
                return True
            counts[index] -= units
            return False

        def by_next_priority(among: Sequence[int]) -> list[int]:
            left = [index for index in among if counts[index] < available[index]]
            return sorted(left, key=lambda index: -float(ranked[index][0][counts[index]]))

        def to_next_group(index: int) -> int:
            widths = pays[index]
            return widths[bisect.bisect_right(widths, counts[index])] - counts[index]

        while any(grow(index, to_next_group(index)) for index in by_next_priority(grouped)):
            pass
        rest = by_next_priority(grouped) if self.budget.takes_rest else []
        for index in rest + by_next_priority([i for i in range(len(counts)) if rest or i not in pays]):
            while grow(index, 1):
                pass
        masks = [torch.zeros(active, dtype=torch.bool) for active in self.active]
        for mask, (_, order), count in zip(masks, ranked, counts, strict=True):
            mask[order[:count]] = True
        return masks

    def widths_of(self, counts: Sequence[int] | Tensor) -> Tensor:
        """Widths ``(layers, groups)`` if each gate keeps so many units."""
        widths = self.widths.flatten().clone()
        widths[self.cells] = torch.as_tensor(counts) * self.sizes
        return widths.view_as(self.widths)

    def cost_of(self, counts: Sequence[int] | Tensor) -> float:
        """Cost if each gate keeps so many units."""
        return float(self.budget.layer_costs(self.widths_of(counts)).sum())

    def kept_cost(self) -> float:
        """Cost under the present masks."""
        return self.cost_of([int(gate.keep.sum()) for gate in self.gates])

    def kept_share(self) -> float:
        """Cost under the present masks, as a share of the dense layers'."""
        return self.kept_cost() / self.total

    def weights(self) -> int:
        """See :meth:`Stage.weights`."""
        widths = self.widths_of([int(gate.keep.sum()) for gate in self.gates])
        return int(self.state.dense.weights(by_group(widths)).sum())

    def owned(self) -> list[list[Owned]]:
        """See :meth:`Stage.owned`: of a head in query, key, value and O, say."""
        found: dict[int, list[Owned]] = {id(gate): [] for gate in self.gates}
        for layer, (_, linears) in enumerate(self.state.modules_of):
            for name, linear in linears.items():
                for axis, side in enumerate((linear.masks.rows, linear.masks.columns)):
                    if side is not None:
                        found[id(side.gate)].append(
                            Owned(
                                name,
                                layer,
                                linear.weight,
                                partial(side.sum_units, axis=axis),
                                partial(side.spread, axis=axis),
                                linear.inputs if axis == 1 else None,
                            )
                        )
        return [found[id(gate)] for gate in self.gates]

    def ratio(self, keep_ratios: Sequence[Tensor]) -> Tensor:
        """``Σ_layers [3aAD + o·D·aA + f·F·D + g·D·f·F] / Σ_layers [4AD + 2FD]``, floored at one unit.

        Paper's remaining ratio for heads and rows; for BERT-base the reference code's over 144.
        """
        widths = self.widths.double()
        rows = []
        for position in range(len(self.layers)):
            row = list(widths[position])
            for ratio, gate, (p, group) in zip(keep_ratios, self.gates, self.groups, strict=True):
                if p == position:
                    # Costs are computed on the processor, wherever thresholds are; MPS has no float64.
                    units = (ratio.cpu().double() * gate.units).clamp(min=1.0)
                    row[GROUPS.index(group)] = units * gate.size
            rows.append(torch.stack(row))
        return self.budget.layer_costs(torch.stack(rows)).sum() / self.total

    def relative_target(self, density: float) -> float:
        """R is counted against the dense model: the density itself."""
        return density

    def _counter(self, gate_of: Tensor, unit_of: Tensor) -> Counter:
        return _StructuredCounter(self, gate_of)


class _StructuredCounter(Counter):
    def __init__(self, stage: StructuredStage, gate_of: Tensor) -> None:
        self.stage, self.gate_of, self.cells = stage, gate_of, stage.cells

    def _counts(self, prefix: int) -> Tensor:
        return torch.bincount(self.gate_of[:prefix], minlength=len(self.cells))

    def cost(self, prefix: int) -> float:
        return self.stage.cost_of(self._counts(prefix))

    def fill(self, prefix: int, limit: float) -> Tensor:
        widths = self.stage.widths_of(self._counts(prefix)).flatten()
        chosen: list[int] = []
        full: set[int] = set()
        for position in range(prefix, len(self.gate_of)):
            gate = int(self.gate_of[position])
            if gate in full:
                continue
            widths[self.cells[gate]] += self.stage.gates[gate].size
            cost = float(self.stage.budget.layer_costs(widths.view(-1, len(GROUPS))).sum())
            if cost <= limit:
                chosen.append(position)
            else:
                widths[self.cells[gate]] -= self.stage.gates[gate].size
                # Another unit of this gate costs the same or more: nothing else has shrunk.
                full.add(gate)
                if len(full) == len(self.cells):
                    break
        return torch.tensor(chosen, dtype=torch.int64)
