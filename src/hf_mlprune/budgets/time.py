"""Measured time, as what masks cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..modeling.layout import GROUPS, DenseLayer
from ..values import check_number, parse_quantity
from .base import Budget

#: Group of units -> table of the nanoseconds of its part of a layer, by kept units.
PARTS = {"heads": "attention_time", "fc1": "ffn_time"}
#: A width that takes so many times as long as a larger one is no width to land on; less is noise.
SLOWER = 1.1
UNITS = {"us": 1e3, "µs": 1e3, "ms": 1e6, "s": 1e9}


def parse_time(text: str) -> float:
    """Nanoseconds of ``"12 ms"``.

    Raises:
        ValueError: it is no time.
    """
    return parse_quantity(text, UNITS, "latency: expected a time such as '12 ms' (us, ms, s)")


class TimeBudget(Budget):
    """``speedup=3``, ``latency="12 ms"``: of a forward pass of the encoder, by a table of measured times."""

    unit = "ms"
    takes_rest = False
    #: The table of times has no entry for rows that are written back to the residual.
    row_sites = ("fc1",)
    uses = ("batch", "length", "threads", "latency_table")
    obstacle = "embeddings, layer norms and residuals"

    @classmethod
    def check(cls, settings: Mapping[str, Any]) -> None:
        """See :meth:`Budget.check`."""
        if settings["speedup"] is not None:
            check_number("speedup", settings["speedup"], above=1)
        else:
            parse_time(settings["latency"])

    @classmethod
    def leaves(cls, settings: Mapping[str, Any]) -> float:
        """See :meth:`Budget.leaves`."""
        return parse_time(settings["latency"]) if settings["speedup"] is None else -float(settings["speedup"])

    @classmethod
    def tables(cls, dense: DenseLayer) -> dict[str, int]:
        """Nanoseconds by kept units, those of all else, and the tokens that they are for."""
        times = {name: dense.units[group] + 1 for group, name in PARTS.items()}
        return {**times, "rest_time": 1, "target_length": 1}

    def prepare(self) -> None:
        """See :meth:`Budget.prepare`; times between measured widths are interpolated."""
        tables = {name: table.cpu() for name, table in self.sizes.measured.items()}
        self.fixed = float(tables["rest_time"])
        self.measured = {group: _usable(tables[name]) for group, name in PARTS.items()}
        self.times = {
            group: _interpolated(self.measured[group], tables[name].double()) for group, name in PARTS.items()
        }

    def layer_costs(self, widths: Tensor) -> Tensor:
        """Nanoseconds of attention and FFN."""
        found = [
            _look_up(self.times[group], widths[..., GROUPS.index(group)].double()) for group in self.times
        ]
        return found[0] + found[1]

    def wanted(self) -> float:
        """See :meth:`Budget.wanted`."""
        if self.settings.get("speedup") is not None:
            return self.whole / float(self.settings["speedup"])
        return parse_time(self.settings["latency"])

    def widths_that_pay(self, group: str, most: int) -> Sequence[int] | None:
        """Measured widths of which no larger one is as fast."""
        if group not in self.times:
            return None
        times = self.times[group]
        paying: list[int] = []
        for width in self.measured[group].tolist():
            while paying and times[paying[-1]] >= times[width]:
                paying.pop()
            if width <= most:
                paying.append(width)
        return sorted({*paying, most})

    def describe(self, cost: float) -> str:
        """See :meth:`Budget.describe`."""
        return f"{cost / 1e6:.2f} ms"

    def reached(self, cost: float) -> str:
        """See :meth:`Budget.reached`; by the table of times."""
        return f"predicted {self.whole / cost:.2f}x, {super().reached(cost)}"


def _usable(times: Tensor) -> Tensor:
    """Measured widths, without those that are clearly slower than a larger one."""
    found: list[int] = []
    for width in (times >= 0).nonzero().flatten().tolist():
        while found and times[found[-1]] > SLOWER * times[width]:
            found.pop()
        found.append(width)
    return torch.tensor(found)


def _interpolated(at: Tensor, times: Tensor) -> Tensor:
    """Times at all widths, from those at a few; the nearest that never fall as the width grows."""
    known = increasing(times[at])
    widths = torch.arange(len(times), dtype=torch.float64)
    right = torch.searchsorted(at, widths.long()).clamp(1, len(at) - 1)
    low, high = at[right - 1].double(), at[right].double()
    share = (widths - low) / (high - low)
    return known[right - 1] * (1 - share) + known[right] * share


def increasing(values: Tensor) -> Tensor:
    """The nearest non-decreasing values, by least squares (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values.tolist():
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (low, many), (high, more) = pools.pop(), pools.pop()
            pools.append(((low * many + high * more) / (many + more), many + more))
    means, counts = zip(*pools, strict=True)
    return torch.tensor(means, dtype=torch.float64).repeat_interleave(torch.tensor(counts))


def _look_up(times: Tensor, widths: Tensor) -> Tensor:
    low = widths.detach().floor().long().clamp(0, len(times) - 2)
    share = widths - low
    return times[low] * (1 - share) + times[low + 1] * share
