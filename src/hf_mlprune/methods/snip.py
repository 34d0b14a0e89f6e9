"""Spectral-normalized identity prior (Lin et al. 2020, arXiv:2010.01791).

The abstract fixes: residual modules are pushed to the identity; those whose function norm is under a
threshold are removed; spectral normalization keeps norms comparable. All else here is a reconstruction; see
docs/method.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..gates import Gate
from ..processes import average_over_processes
from ..schedule import Phase
from ..stage import Owned, Stage
from ..values import check_number
from .base import MethodSettings, Progress
from .ranking import Ranking

#: Matrices that a residual module has at most.
MOST_MATRICES = 8
#: Of the power method, each step anew: the bound needs no exact norm.
ITERATIONS = 6
#: Tokens of a batch that function norms are taken over, at most.
MOST_TOKENS = 512
#: Spectral norms are bounded after every so many updates, which change them little.
BOUND_EVERY = 8


@dataclass(frozen=True)
class IdentityPriorSettings(MethodSettings):
    """Settings of :class:`IdentityPrior`.

    Attributes:
        identity_weight: λ of the prior, from 0 up.
        norm_decay: decay per step of the moving average of function norms, in ``[0, 1)``.
        spectral_share: how far the spectral norm of each matrix is brought to the median of its kind over the
            layers, in ``[0, 1]``; 0 leaves it alone.
    """

    identity_weight: float = 1e-2
    norm_decay: float = 0.95
    spectral_share: float = 1.0

    def check(self) -> None:
        """See :meth:`MethodSettings.check`."""
        check_number("identity_weight", self.identity_weight, at_least=0)
        check_number("norm_decay", self.norm_decay, at_least=0, below=1)
        check_number("spectral_share", self.spectral_share, at_least=0)
        if self.spectral_share > 1:
            raise ValueError(f"spectral_share: expected at most 1, got {self.spectral_share}")


class IdentityPrior(Ranking[IdentityPriorSettings]):
    """Push residual modules to the identity, and remove those that come closest.

    A module's function F is what it adds to the residual stream. A unit's norm is ``ρ = mean over tokens of
    ‖F(x)‖₂ / √D``; ``λ Σ ρ`` is added to the loss, with the gradient of the module's last matrix. A removed
    module adds nothing: its norm only falls, so it does not come back.
    """

    Settings = IdentityPriorSettings
    levels = ("heads", "attention", "ffn")
    defaults: ClassVar = {"levels": ("heads", "ffn"), "minimum_units": 0}
    needs_inputs = True

    def prepare(self, gate: Gate) -> None:
        """Adds ``spectral_start`` ``(8,)`` fp32: the norm of each matrix as the pruning begins."""
        gate.register_buffer("spectral_start", gate.scores.new_zeros(MOST_MATRICES))

    def reset(self, gate: Gate) -> None:
        """See :meth:`Method.reset`."""
        super().reset(gate)
        gate.get_buffer("spectral_start").zero_()

    def score(self, stage: Stage, gradients: list[Tensor]) -> None:
        """``S <- decay · S + (1 - decay) · ρ``, and the gradient of the prior."""
        decay = self.settings.norm_decay
        for gate, active, owned in zip(stage.gates, stage.active, stage.owned(), strict=True):
            (last,) = [each for each in owned if each.inputs is not None]
            norms, gradient = function_norms(last, active)
            average_over_processes(norms)
            gate.scores[:active].mul_(decay).add_(norms, alpha=1 - decay)
            if last.weight.grad is not None:
                average_over_processes(gradient)
                last.weight.grad.add_(gradient.to(last.weight.dtype), alpha=self.settings.identity_weight)

    def priorities(self, stage: Stage) -> list[Tensor]:
        """The function norm: the target sets its threshold."""
        return [
            gate.scores[:active].cpu().double()
            for gate, active in zip(stage.gates, stage.active, strict=True)
        ]

    def after_update(self, stage: Stage, progress: Progress) -> None:
        """Bound spectral norms: ``W <- W / max(1, σ(W) / c)``.

        c goes from a matrix's own norm to the median of its kind over the layers, as the phase goes on.
        """
        due = progress.step % BOUND_EVERY == 0
        if progress.phase is Phase.WARMUP or not self.settings.spectral_share or not due:
            return
        bound_spectral_norms(stage, self.settings.spectral_share * (1 - (1 - progress.share) ** 3))


@torch.no_grad()
def function_norms(last: Owned, units: int) -> tuple[Tensor, Tensor]:
    """``ρ = mean_t ‖x_u W_uᵀ‖₂ / √D`` of what each unit puts through its module's last matrix.

    Args:
        last: the matrix ``(D, columns)``, with its inputs ``(tokens, columns)``.
            Units own equal ranges of columns.
        units: how many.

    Returns:
        ρ ``(units,)`` fp32, and dΣρ/dW ``(D, columns)`` with the inputs held fixed.
    """
    assert last.inputs is not None
    weight = last.weight.float().view(len(last.weight), units, -1)
    tokens = last.inputs.reshape(-1, last.inputs.shape[-1])
    # A mean over part of the tokens is one over all of them, as far as a moving average is concerned.
    tokens = tokens[:: -(-len(tokens) // MOST_TOKENS)]
    inputs = tokens.float().reshape(-1, units, weight.shape[2])
    scale = 1 / (len(inputs) * len(weight) ** 0.5)
    # d‖x Wᵀ‖/dW = W x xᵀ / ‖x Wᵀ‖
    if weight.shape[2] < len(weight):
        # ‖x Wᵀ‖² = x (Wᵀ W) xᵀ: the small square is cheaper than the product.
        gram = torch.einsum("dus,dut->ust", weight, weight)
        through = torch.einsum("nus,ust->nut", inputs, gram)
        norms = (through * inputs).sum(2).clamp(min=0).sqrt()
        moment = torch.einsum("nus,nut->ust", inputs * _inverse(norms), inputs)
        gradient = torch.einsum("dus,ust->dut", weight, moment)
    else:
        through = torch.einsum("nus,dus->nud", inputs, weight)
        norms = through.norm(dim=2)
        gradient = torch.einsum("nud,nus->dus", through * _inverse(norms), inputs)
    return norms.sum(0) * scale, gradient.reshape(last.weight.shape) * scale


def _inverse(norms: Tensor) -> Tensor:
    """1 over each, 0 of 0; ``(tokens, units, 1)``."""
    return torch.where(norms > 0, 1 / norms.clamp(min=1e-12), 0.0).unsqueeze(2)


@torch.no_grad()
def spectral_norm(weight: Tensor) -> Tensor:
    """σ(W) by the power method, from the largest row; not above the true one."""
    weight = weight.float()
    right = weight[weight.norm(dim=1).argmax()]
    for _ in range(ITERATIONS):
        left = weight @ (right / right.norm().clamp(min=1e-12))
        right = weight.T @ (left / left.norm().clamp(min=1e-12))
    norm: Tensor = right.norm()
    return norm


@torch.no_grad()
def bound_spectral_norms(stage: Stage, share: float) -> None:
    """Bring the spectral norms of large matrices a share of the way to the median of their kind."""
    starts: dict[str, list[Tensor]] = {}
    found = list(zip(stage.gates, stage.owned(), strict=True))
    for gate, owned in found:
        start = gate.get_buffer("spectral_start")
        for index, each in enumerate(owned):
            if not start[index]:
                start[index] = spectral_norm(each.weight)
            starts.setdefault(each.name, []).append(start[index])
    medians = {name: torch.stack(norms).median() for name, norms in starts.items()}
    for gate, owned in found:
        for first, each in zip(gate.get_buffer("spectral_start"), owned, strict=False):
            bound = first + share * (torch.minimum(medians[each.name], first) - first)
            if not each.weight.requires_grad:
                # Frozen by the user.
                continue
            # A matrix of zeros has no norm to bound.
            each.weight.div_(
                (spectral_norm(each.weight) / bound.clamp(min=1e-12)).clamp(min=1).to(each.weight)
            )
