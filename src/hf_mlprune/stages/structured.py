"""Heads and rows: weights are products of kept widths."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..modeling.layout import GROUPS
from ..stage import Counter, Owned, Stage
from ..state import PruningState

#: Dense products of many tokens are slower where outputs are no multiple of 8 (docs/architecture.md); the
#: block-sparse one computes 16 rows at once.
ROW_GROUP = 16
#: Sites of fewer rows are landed row by row: a group would be too coarse a unit.
GROUPED_FROM = 32 * ROW_GROUP


class StructuredStage(Stage):
    """Heads and rows: weights are products of kept widths."""

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
        self.minimum = state.config.minimum_units
        self.total = state.total_weights()
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
        return float(self.state.dense.unit_weights(group, self.state.base[self.layers[position]].widths))

    def fit(self, priorities: Sequence[Tensor], density: float, *, final: bool) -> list[Tensor]:
        """See :meth:`Stage.fit`; where ``final``, rows of large sites are kept in groups of 16.

        One site takes the rest, so that the density is met to one unit all the same.
        """
        keep = super().fit(priorities, density, final=final)
        grouped = [
            index
            for index, (_, group) in enumerate(self.groups)
            if group != "heads" and self.active[index] >= GROUPED_FROM
        ]
        if not final or not grouped:
            return keep
        counts = [int(mask.sum()) for mask in keep]
        return self._in_groups(counts, grouped, priorities, self.limit(density))

    def _in_groups(
        self, counts: list[int], grouped: list[int], priorities: Sequence[Tensor], limit: int
    ) -> list[Tensor]:
        for index in grouped:
            counts[index] = max(counts[index] // ROW_GROUP * ROW_GROUP, min(self.minimum, counts[index]))
        ranked = [self._with_minimum(values).sort(descending=True, stable=True) for values in priorities]

        def grow(index: int, units: int) -> bool:
            """Keep so many more units of a gate, if they are there and fit."""
            counts[index] += units
            if counts[index] <= self.active[index] and self.weights_of(counts) <= limit:
                return True
            counts[index] -= units
            return False

        def by_next_priority(among: Sequence[int]) -> list[int]:
            left = [index for index in among if counts[index] < self.active[index]]
            return sorted(left, key=lambda index: -float(ranked[index].values[counts[index]]))

        def to_next_group(index: int) -> int:
            return ROW_GROUP - counts[index] % ROW_GROUP

        while any(grow(index, to_next_group(index)) for index in by_next_priority(grouped)):
            pass
        for index in by_next_priority(grouped) + by_next_priority(range(len(counts))):
            while grow(index, 1):
                pass
        masks = [torch.zeros(active, dtype=torch.bool) for active in self.active]
        for mask, order, count in zip(masks, ranked, counts, strict=True):
            mask[order.indices[:count]] = True
        return masks

    def widths_of(self, counts: Sequence[int] | Tensor) -> Tensor:
        """Widths ``(layers, groups)`` if each gate keeps so many units."""
        widths = self.widths.flatten().clone()
        widths[self.cells] = torch.as_tensor(counts) * self.sizes
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
                    units = (ratio.double() * gate.units).clamp(min=1.0)
                    row[GROUPS.index(group)] = units * gate.size
            rows.append(torch.stack(row))
        return self.layer_weights(torch.stack(rows)).sum() / self.total

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
            widths[self.cells[gate]] += self.stage.gates[gate].size
            more = int(self.stage.layer_weights(widths.view(-1, len(GROUPS))).sum())
            if more <= limit:
                weights = more
                chosen.append(position)
            else:
                widths[self.cells[gate]] -= self.stage.gates[gate].size
                # Another unit of this gate costs the same or more: nothing else has shrunk.
                full.add(gate)
                if len(full) == len(self.cells):
                    break
        assert weights <= limit
        return torch.tensor(chosen, dtype=torch.int64)
