"""Random pruning of structures: the floor that any method must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..stage import Stage
from ..values import check_whole_number
from .base import MethodSettings
from .ranking import Ranking


@dataclass(frozen=True)
class RandomSettings(MethodSettings):
    """Settings of :class:`RandomRanking`.

    Attributes:
        draw: which random order; any whole number from 0 up.
    """

    draw: int = 0

    def check(self) -> None:
        """See :meth:`MethodSettings.check`."""
        check_whole_number("draw", self.draw, at_least=0)


class RandomRanking(Ranking[RandomSettings]):
    """Keep what was drawn: each unit gets a random number once, uniform in (0, 1), times its cost."""

    Settings = RandomSettings

    def score(self, stage: Stage, gradients: list[Tensor]) -> None:
        """``S ~ uniform(0, 1) · cost``, the same at every step: the ranking divides by the cost."""
        generator = torch.Generator().manual_seed(self.settings.draw)
        for gate, costs, active in zip(stage.gates, stage.costs, stage.active, strict=True):
            drawn = torch.rand(active, generator=generator, dtype=torch.float64) * costs.clamp(min=1)
            gate.scores[:active] = drawn.to(gate.scores)
