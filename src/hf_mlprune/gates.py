"""Keep masks as gates: one per group of units that compete with one another.

No parameter is added to the model. A gate's mask enters the forward pass as a leaf tensor outside
the model's parameters, so that its gradient is neither clipped with the weights' nor seen by the
user's optimizer; scores and thresholds are buffers that the method updates from that gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Gate(nn.Module):
    """One group of units that compete with one another, and their keep mask.

    Attributes:
        size: heads or rows that one unit is.
        keep: bool ``(units,)``; 1 = stays.
        scores: fp32 ``(units,)``; the importance of a unit. Meaning and scale are the method's.
        candidates: bool ``(units,)``; units that may stay, where a run has several targets: those that the
            target before left.
        mask: leaf tensor equal to ``keep``, fp32 ``(units,)``; its gradient is dL/dM.
    """

    keep: Tensor
    scores: Tensor
    candidates: Tensor | None

    def __init__(self, units: int, device: torch.device, size: int = 1) -> None:
        super().__init__()
        self.units, self.size = units, size
        self.register_buffer("keep", torch.ones(units, dtype=torch.bool, device=device))
        # Of float32 whatever the model is: steps of scores and thresholds vanish in bfloat16.
        self.register_buffer("scores", torch.zeros(units, dtype=torch.float32, device=device))
        self.register_buffer("candidates", None)
        self.mask: Tensor | None = None
        self._units: tuple[Tensor, Tensor | None, tuple[int, int], tuple[Tensor, ...]] | None = None
        self.register_load_state_dict_pre_hook(_check_units)  # type: ignore[no-untyped-call]

    def _apply(self, fn: Any, recurse: bool = True) -> Gate:
        """As in torch (``.to(...)``), except that floating buffers stay of float32."""
        before = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self.get_buffer(name)
            if new.dtype is not old.dtype:
                setattr(self, name, old.to(new.device))
        if self.mask is not None and self.mask.device != self.keep.device:
            self.learn(True)
        return self

    def set_keep(self, keep: Tensor) -> None:
        """Set the mask of the leading units; those behind them (see block gates) stay kept."""
        keep = keep.to(self.keep.device)
        if self.candidates is not None:
            keep = keep & self.candidates[: len(keep)]
        self.keep[: len(keep)] = keep
        self.refresh()

    def refresh(self) -> None:
        """Bring the leaf mask up to ``keep``, which a checkpoint may have replaced."""
        if self.mask is not None:
            with torch.no_grad():
                self.mask.copy_(self.keep)

    def learn(self, learning: bool) -> None:
        """Start or stop collecting the gradient of the mask."""
        self.mask = self.keep.float().requires_grad_() if learning else None
        self.refresh()

    def current(self) -> Tensor | None:
        """The mask to multiply with, or ``None`` if every unit is kept and nothing is learned."""
        if self.training and self.mask is not None:
            return self.mask
        if torch.compiler.is_compiling():
            # Whether every unit is kept depends on values, which a graph does not see.
            return self.keep
        return None if self.open else self.keep

    @property
    def open(self) -> bool:
        """Whether every unit is kept."""
        return not len(self.kept_and_removed[1])

    @property
    def kept_and_removed(self) -> tuple[Tensor, Tensor]:
        """Indices of the units that are kept, and of the others."""
        kept, removed, _, _ = self._indices()
        return kept, removed

    @property
    def competing(self) -> tuple[Tensor, Tensor] | None:
        """Indices of the candidates, and of the removed ones of these; ``None`` if all units compete."""
        _, _, candidates, removed = self._indices()
        return None if len(candidates) == self.units else (candidates, removed)

    def _indices(self) -> tuple[Tensor, ...]:
        """Looked up again whenever mask or candidates were written or replaced."""
        keep, candidates = self.keep, self.candidates
        versions = (keep._version, -1 if candidates is None else candidates._version)
        found = self._units
        # The tensors themselves are held: another one may get the identity of one that is gone.
        if found is None or found[0] is not keep or found[1] is not candidates or found[2] != versions:
            may_stay = torch.ones_like(keep) if candidates is None else candidates
            masks = (keep, ~keep, may_stay, may_stay & ~keep)
            indices = tuple(mask.nonzero().flatten() for mask in masks)
            self._units = found = (keep, candidates, versions, indices)
        return found[3]


def _check_units(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *unused: object) -> None:
    """Say what a mask of another size means, before torch lists every tensor of that size."""
    keep = state_dict.get(f"{prefix}keep")
    assert isinstance(module, Gate)
    if keep is not None and len(keep) != module.units:
        raise ValueError(
            f"resume: expected {module.units} units in {prefix.rstrip('.')}, got {len(keep)}: the checkpoint "
            "is of a run with another block_shape, or of a model of other sizes"
        )


@dataclass(frozen=True)
class GateOf:
    """A gate seen from rows or columns of a matrix.

    Attributes:
        gate: the units.
        span: rows or columns that each of them owns, in each part.
        masked: for each equal part of the matrix, whether the mask multiplies it.
        heard: whether the outputs of removed units in other parts reach the loss.
    """

    gate: Gate
    span: int
    masked: tuple[bool, ...] = (True,)
    heard: bool = False

    @property
    def learns(self) -> bool:
        """Whether the gradient of the mask is wanted."""
        return self.gate.mask is not None

    def places(self) -> Tensor | None:
        """Rows or columns of all parts that get gradients, increasing; ``None`` for all."""
        if self.gate.open or self.heard:
            return None
        return self._places(self.gate.kept_and_removed[0], range(len(self.masked)))

    def computed(self) -> Tensor | None:
        """Rows of all parts whose units may stay, increasing; ``None`` for all."""
        competing = None if self.heard else self.gate.competing
        return None if competing is None else self._places(competing[0], range(len(self.masked)))

    def zeros(self) -> Tensor | None:
        """Rows that are computed and that the mask makes 0, increasing; ``None`` if there are none."""
        parts = [index for index, masked in enumerate(self.masked) if masked]
        competing = None if self.heard else self.gate.competing
        removed = self.gate.kept_and_removed[1] if competing is None else competing[1]
        return None if self.gate.open or not parts else self._places(removed, parts)

    def _places(self, units: Tensor, parts: Iterable[int]) -> Tensor:
        within = (units[:, None] * self.span + torch.arange(self.span, device=units.device)).flatten()
        return torch.cat([within + index * self.gate.units * self.span for index in parts])

    def keep(self) -> Tensor:
        """bool, one entry per row or column of all parts."""
        return self.gate.keep.repeat_interleave(self.span).repeat(len(self.masked))

    def sum_units(self, values: Tensor, axis: int) -> Tensor:
        """Sum a tensor of the matrix's shape over what each unit owns along an axis, ``(units,)``."""
        lines = values.sum(dim=1 - axis).view(-1, self.gate.units, self.span)
        return lines.sum(dim=(0, 2))

    def spread(self, values: Tensor, axis: int) -> Tensor:
        """Give each row, or column, of all parts the value of its unit, ``(rows, 1)`` or ``(1, columns)``."""
        lines = values.repeat_interleave(self.span).repeat(len(self.masked))
        return lines.unsqueeze(1 - axis)

    def current(self) -> Tensor | None:
        """As :meth:`Gate.current`, one entry per row or column; 1 in parts that are not multiplied."""
        mask = self.gate.current() if any(self.masked) else None
        if mask is None:
            return None
        mask = mask.repeat_interleave(self.span)
        if all(self.masked):
            return mask if len(self.masked) == 1 else mask.repeat(len(self.masked))
        return torch.cat([mask if masked else torch.ones_like(mask) for masked in self.masked])
