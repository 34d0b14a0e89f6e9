"""The seam between what is wanted of a model and what its masks may keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..modeling.layout import GROUPS, DenseLayer


@dataclass(frozen=True)
class Sizes:
    """What a budget needs to know of an encoder and the model around it.

    Attributes:
        dense: one dense layer.
        pruned: how many of its layers are pruned.
        excluded: widths of the others, ``(layers, groups)`` int64, groups as in ``GROUPS``.
        weight_bytes: bytes of one weight.
        biases: names of the matrices that have a bias.
        measured: what :func:`~hf_mlprune.costs.measure_costs` found: tables of int64 by name. Integers, as
            buffers of floats would change with the model's dtype; -1 stands where nothing was measured.
    """

    dense: DenseLayer
    pruned: int
    excluded: Tensor
    weight_bytes: int = 4
    biases: Collection[str] = ()
    measured: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """How many layers there are, pruned or not."""
        return self.pruned + len(self.excluded)

    @property
    def full(self) -> Tensor:
        """Widths of one dense layer, ``(1, groups)``."""
        return torch.tensor([[self.dense.units[group] for group in GROUPS]])


def by_group(widths: Tensor) -> dict[str, Tensor]:
    """Widths ``(layers, groups)`` as one tensor per group."""
    return dict(zip(GROUPS, widths.unbind(-1), strict=True))


#: Dense products of many tokens are slower where outputs are no multiple of 8 (docs/architecture.md); the
#: block-sparse one computes 16 rows at once.
ROW_GROUP = 16
#: Sites of fewer rows are landed row by row: a group would be too coarse a unit.
GROUPED_FROM = 32 * ROW_GROUP


class Budget(ABC):
    """What layers cost, and the most that the pruned ones may.

    Costs are additive over layers. The rest of the model costs :attr:`rest`, whatever the masks are.

    Attributes:
        sizes: of the encoder.
        settings: those of :class:`~hf_mlprune.config.PruningConfig`, by name.
        fixed: cost of what is no layer; :meth:`prepare` sets it.
        excluded: cost of the layers that are not pruned.
        total: cost of the pruned layers, dense.
        whole: cost of everything, dense.
    """

    #: Whether it counts blocks.
    has_blocks: ClassVar[bool] = False
    #: Matrices whose rows it can count; ``None`` for all.
    row_sites: ClassVar[tuple[str, ...] | None] = None
    #: Settings of a run that have an effect with it, and not with every target.
    uses: ClassVar[tuple[str, ...]] = ()
    #: Whether what widths that pay leave of it is spent row by row, on one site.
    takes_rest: ClassVar[bool] = True
    #: Unit of the cost, for people.
    unit: str
    #: What :attr:`fixed` is the cost of, in the plural; for people.
    obstacle: str = ""
    #: How it can be made smaller, in the imperative; for people.
    advice: str = ""

    def __init__(self, sizes: Sizes, settings: Mapping[str, Any]) -> None:
        self.sizes, self.settings = sizes, settings
        self.fixed = 0.0
        self.prepare()
        layer = float(self.layer_costs(sizes.full))
        self.total = layer * sizes.pruned
        self.whole = self.fixed + layer * sizes.layers
        self.excluded = float(self.layer_costs(sizes.excluded).sum())

    @property
    def rest(self) -> float:
        """Cost of what is not pruned, as it is."""
        return self.fixed + self.excluded

    @classmethod
    @abstractmethod
    def check(cls, settings: Mapping[str, Any]) -> None:
        """Refuse a target out of its range, and settings that do not go with it.

        Raises:
            ValueError: says what was expected.
        """

    @classmethod
    @abstractmethod
    def leaves(cls, settings: Mapping[str, Any]) -> float:
        """A number that grows with what a target leaves of a model; it compares targets of one kind."""

    @classmethod
    def tables(cls, dense: DenseLayer) -> dict[str, int]:
        """Names and lengths of the tables that must be measured."""
        return {}

    def prepare(self) -> None:  # noqa: B027  weights need nothing
        """Set what the costs are computed from, and :attr:`fixed`; the other costs follow from these."""

    @abstractmethod
    def layer_costs(self, widths: Tensor) -> Tensor:
        """Cost of each layer for widths ``(layers, groups)``; differentiable in float widths."""

    @abstractmethod
    def wanted(self) -> float:
        """Most that the whole may cost."""

    def cost(self, share: float) -> float:
        """Cost of everything, if so large a share of the pruned layers' dense cost is left."""
        return self.rest + share * self.total

    def share(self) -> float:
        """Share of the pruned layers' dense cost that may stay; not in ``(0, 1)`` if that cannot be."""
        return (self.wanted() - self.rest) / self.total

    def unit_cost(self, group: str, widths: Mapping[str, int]) -> float:
        """What a unit of a group costs at these widths, on average over the units of its layer."""
        rows = torch.tensor([[widths[name] for name in GROUPS]] * 2)
        rows[1, GROUPS.index(group)] = 0
        with_units, without = self.layer_costs(rows).tolist()
        return float(with_units - without) / max(1, widths[group])

    def widths_that_pay(self, group: str, most: int) -> Sequence[int] | None:
        """Widths of a group to land on, increasing, the last of them ``most``; ``None`` for all.

        Of large sites of rows, multiples of 16.
        """
        if group == "heads" or most < GROUPED_FROM:
            return None
        return sorted({*range(0, most, ROW_GROUP), most})

    def describe(self, cost: float) -> str:
        """The cost of a whole encoder or model, for people."""
        return f"{cost:.4g} {self.unit}"

    def reached(self, cost: float) -> str:
        """What a whole of this cost is over the dense one, for people."""
        return f"{self.describe(cost)} of {self.describe(self.whole)}"
