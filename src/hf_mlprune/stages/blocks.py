"""Blocks of what heads and rows left: weights are sums of block sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..budgets.weights import block_weights
from ..gates import Gate
from ..masked import MaskedLinear
from ..stage import Counter, Owned, Stage
from ..state import PruningState


class BlockStage(Stage):
    """Blocks of what heads and rows left: weights are sums of block sizes."""

    def __init__(self, state: PruningState, linears: Sequence[tuple[Gate, MaskedLinear]]) -> None:
        self.state = state
        self.gates = [gate for gate, _ in linears]
        self.linears = [linear for _, linear in linears]
        self.total = self.all_weights = state.total_weights()
        shape = state.config.block_shape
        self.costs = [block_weights(linear.kept_shape(), shape).flatten().double() for _, linear in linears]
        self.active = [len(costs) for costs in self.costs]
        self.candidates = [torch.ones(active, dtype=torch.bool) for active in self.active]
        self.matrix_weights = sum(float(costs.sum()) for costs in self.costs)
        # A matrix may lose all its blocks: its rows stay and emit their biases.
        self.minimum = 0

    def weights(self) -> int:
        """See :meth:`Stage.weights`."""
        return int(
            sum(
                float(costs[gate.keep[:active].cpu()].sum())
                for gate, costs, active in zip(self.gates, self.costs, self.active, strict=True)
            )
        )

    def owned(self) -> list[list[Owned]]:
        """See :meth:`Stage.owned`: of each gate, one matrix."""
        found = {
            id(linear): Owned(name, layer, linear.weight, linear.sum_blocks, linear.spread_blocks)
            for layer, (_, linears) in enumerate(self.state.modules_of)
            for name, linear in linears.items()
        }
        return [[found[id(linear)]] for linear in self.linears]

    def ratio(self, keep_ratios: Sequence[Tensor]) -> Tensor:
        """``Σ k_j n_j / Σ n_j`` over the weights of the shrunk matrices (paper, block step)."""
        sizes = [float(costs.sum()) for costs in self.costs]
        terms = [ratio.cpu().double().sum() * n for ratio, n in zip(keep_ratios, sizes, strict=True)]
        return torch.stack(terms).sum() / max(1.0, self.matrix_weights)

    def relative_target(self, density: float) -> float:
        """R is counted against the shrunk matrices: density / measured R1, at most 1."""
        return min(1.0, density * self.total / max(1.0, self.matrix_weights))

    def _counter(self, gate_of: Tensor, unit_of: Tensor) -> Counter:
        offsets = torch.tensor([0, *self.active]).cumsum(0)
        return _BlockCounter(torch.cat(self.costs).long()[offsets[gate_of] + unit_of])


class _BlockCounter(Counter):
    def __init__(self, costs: Tensor) -> None:
        self.costs = costs
        self.cumulated = torch.cat([costs.new_zeros(1), costs.cumsum(0)])

    def cost(self, prefix: int) -> float:
        return int(self.cumulated[prefix])

    def fill(self, prefix: int, limit: float) -> Tensor:
        left = int(limit) - int(self.cumulated[prefix])
        chosen: list[int] = []
        for position in range(prefix, len(self.costs)):
            cost = int(self.costs[position])
            if cost <= left:
                chosen.append(position)
                left -= cost
            if left <= 0:
                break
        return torch.tensor(chosen, dtype=torch.int64)
