"""Reweighted group lasso over structures and blocks (Li et al. 2020, arXiv:2009.08065)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..gates import Gate
from ..schedule import Phase
from ..stage import Owned, Stage
from ..values import check_number, check_whole_number
from .base import MethodSettings, Pressure, Progress
from .ranking import SquaredWeights


@dataclass(frozen=True)
class GroupLassoSettings(MethodSettings):
    """Settings of :class:`GroupLasso`.

    Attributes:
        lasso_weight: λ of the penalty, above 0.
        lasso_refreshes: how often the weights γ of the groups are computed anew in a phase, from 1 up.
        lasso_epsilon: ε in γ, above 0; of the scale of single weights.
    """

    lasso_weight: float = 1e-6
    lasso_refreshes: int = 4
    lasso_epsilon: float = 1e-3

    def check(self) -> None:
        """See :meth:`MethodSettings.check`."""
        for name in ("lasso_weight", "lasso_epsilon"):
            check_number(name, getattr(self, name), above=0)
        check_whole_number("lasso_refreshes", self.lasso_refreshes, at_least=1)


class GroupLasso(SquaredWeights[GroupLassoSettings]):
    """Shrink whole groups of weights, then prune those that became smallest, then train what is left.

    ``min L(W) + λ Σ_g p_g γ_g r_g`` with ``r_g = ‖W_g‖₂ / √p_g``, ``p_g`` the weights of group g and
    ``γ_g = 1 / (r_g + ε)``, computed anew at equal shares of the phase. Groups are the units of the level:
    heads, rows, blocks; rows of blocks are blocks of shape ``(1, n)``, columns of blocks ``(n, 1)``.
    """

    Settings = GroupLassoSettings
    has_penalty = True
    defaults: ClassVar = {"structured_fraction": 0.3, "block_fraction": 0.2}

    def prepare(self, gate: Gate) -> None:
        """Adds ``gamma`` ``(units,)`` fp32; 0 until it is first computed."""
        gate.register_buffer("gamma", torch.zeros_like(gate.scores))

    def reset(self, gate: Gate) -> None:
        """See :meth:`Method.reset`."""
        super().reset(gate)
        gate.get_buffer("gamma").zero_()

    def learn(self, stage: Stage, gradients: list[Tensor], target: float, progress: Progress) -> Pressure:
        """Add the gradient of the penalty to that of the weights."""
        self.score(stage, gradients)
        if progress.phase is Phase.WARMUP:
            return Pressure(1.0)
        owned, weight = stage.owned(), self.settings.lasso_weight
        value = 0.0
        for gate, active, matrices in zip(stage.gates, stage.active, owned, strict=True):
            sizes = group_sizes(matrices)
            mean = (gate.scores[:active] / sizes.clamp(min=1)).sqrt()
            gamma = gate.get_buffer("gamma")[:active]
            if self._is_due(gamma, progress):
                gamma.copy_(1 / (mean + self.settings.lasso_epsilon))
            value += float((weight * gamma * sizes * mean).sum())
            add_penalty_gradient(matrices, mean, weight * gamma)
        # Nothing is to go until the masks land.
        return Pressure(1.0, weight, value)

    def _is_due(self, gamma: Tensor, progress: Progress) -> bool:
        """Whether γ is to be computed anew: as the phase begins, and at equal shares of it."""
        start, end = progress.schedule.bounds(progress.phase)
        refreshes, done = self.settings.lasso_refreshes, progress.step - start
        passed = done * refreshes // (end - start) != (done - 1) * refreshes // (end - start)
        return passed or not bool(gamma.any())

    def select(self, stage: Stage, target: float, progress: Progress) -> list[Tensor]:
        """Everything stays until the masks land."""
        return [torch.ones(active, dtype=torch.bool) for active in stage.active]


def group_sizes(owned: Sequence[Owned]) -> Tensor:
    """Weights ``p_g`` of each unit of a gate, ``(units,)``."""
    return torch.stack([each.sum(torch.ones_like(each.weight, dtype=torch.float32)) for each in owned]).sum(0)


@torch.no_grad()
def add_penalty_gradient(owned: Sequence[Owned], means: Tensor, weights: Tensor) -> None:
    """Add ``d(Σ_g weights_g · p_g · r_g)/dW = weights_g · w / r_g`` to the gradient of each matrix.

    A group that is all 0 is at the minimum: its gradient is 0. Frozen matrices are left alone.
    """
    pull = torch.where(means > 0, weights / means.clamp(min=1e-12), 0.0)
    for each in owned:
        if each.weight.grad is not None:
            each.weight.grad.add_(each.spread(pull).to(each.weight.dtype) * each.weight)
