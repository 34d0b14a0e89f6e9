"""MLPruning (arXiv:2105.14636v1): learned scores, learned top-k thresholds, adaptive regularizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..gates import Gate
from ..schedule import Phase
from ..stage import Stage
from ..values import check_number
from .base import Method, MethodSettings, Pressure, Progress

#: Reference recipe (training README, QQP): 20 epochs of 11,370 steps, of which 11,000 warm up.
REFERENCE_STEPS = 227_400
REFERENCE_LEARNING_RATE = 1e-2
REFERENCE_WARMUP = 11_000 / REFERENCE_STEPS
#: Adam's, as in the reference recipe's AdamW; scores and thresholds have no weight decay.
ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8
#: λ never falls below the first of these; it is the second once the penalty is below the third.
LAMBDA_FLOOR = 50.0
LAMBDA_NEAR = 10.0
PENALTY_NEAR = 3e-4


def keep_ratio(threshold: Tensor, temperature: float) -> Tensor:
    """``k = sigmoid(θ / T)`` (reference code: T = 1)."""
    return torch.sigmoid(threshold / temperature)


def kept_units(ratio: float, units: int, floor: int) -> int:
    """``⌈k·n⌉``, at least ``floor`` and at most ``units``."""
    return min(units, max(floor, math.ceil(ratio * units)))


def top_k(scores: Tensor, count: int) -> Tensor:
    """Bool mask of the ``count`` highest scores; ties keep the lower index."""
    keep = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    keep[scores.argsort(descending=True, stable=True)[:count]] = True
    return keep


def penalty(ratio: Tensor, target: float) -> Tensor:
    """``(R - t)²`` while ``R > t``, else 0; 0 also for t = 1, which asks for no pruning."""
    if target >= 1:
        return ratio * 0
    return torch.clamp(ratio - target, min=0).square()


def adaptive_lambda(penalty_value: float, target: float, lambda_max: float) -> float:
    """``max(λ_max · penalty / (1 - t)², 50)``; 10 once the penalty is below 3e-4 (reference code)."""
    if target >= 1:
        return 0.0
    if penalty_value < PENALTY_NEAR:
        return LAMBDA_NEAR
    return max(lambda_max * penalty_value / (1 - target) ** 2, LAMBDA_FLOOR)


def score_learning_rate(steps: int) -> float:
    """Peak step size of scores and thresholds for a phase of this many steps.

    θ travels about 10 units on its way from its initial value, and Adam moves it about one step
    size a step. The rate is the paper's at the paper's number of steps and grows as steps become
    fewer, so that the target is reached at the same share of training. It is capped: Adam's momentum
    carries θ some ten steps beyond the target, where the one-sided penalty does not pull it back. A
    phase too short to travel at the cap gets the step size that it needs, and gets there later.
    """
    paced = REFERENCE_LEARNING_RATE * REFERENCE_STEPS / steps
    return min(paced, max(0.03, 30.0 / steps))


def rate_multiplier(step: int, steps: int) -> float:
    """Linear warm-up over the recipe's share of the phase, then linear decay to 0."""
    warmup = REFERENCE_WARMUP * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return max(0.0, (steps - step) / max(1.0, steps - warmup))


@dataclass(frozen=True)
class ThresholdSettings(MethodSettings):
    """Settings of :class:`LearnedThresholds`.

    Attributes:
        score_learning_rate: peak step size of scores and thresholds; ``None`` derives it from the number of
            steps.
        threshold_init: initial threshold θ; kept ratio ``sigmoid(θ / temperature)``.
        temperature: T of the kept ratio; 1 is the reference code's.
        lambda_max: λ_max of the adaptive regularizer.
    """

    score_learning_rate: float | None = None
    threshold_init: float = 10.0
    temperature: float = 1.0
    lambda_max: float = 20000.0

    def check(self) -> None:
        """See :meth:`MethodSettings.check`."""
        for name in ("temperature", "lambda_max"):
            check_number(name, getattr(self, name), above=0)
        if self.score_learning_rate is not None:
            check_number("score_learning_rate", self.score_learning_rate, above=0)
        check_number("threshold_init", self.threshold_init)


class LearnedThresholds(Method[ThresholdSettings]):
    """The paper's method: scores S, one threshold θ per group, straight-through gradients.

    ``dL/dS = dL/dM`` for every unit and ``dL/dθ = Σ dL/dM ∘ M`` from the loss (reference code),
    plus ``λ · d penalty/dθ`` through the sigmoid; both descend by Adam with their own step size.
    """

    Settings = ThresholdSettings
    #: Each threshold keeps a unit at least, so whole modules would all stay.
    levels = ("heads", "rows", "blocks")
    has_penalty = True
    mask_queries_and_keys = True

    def prepare(self, gate: Gate) -> None:
        """Adds ``threshold`` ``(1,)`` and Adam's moments, all fp32."""
        gate.register_buffer("threshold", gate.scores.new_zeros(1))
        for name, units in (("scores", gate.units), ("threshold", 1)):
            gate.register_buffer(f"{name}_average", gate.scores.new_zeros(units))
            gate.register_buffer(f"{name}_square_average", gate.scores.new_zeros(units))
        self.reset(gate)

    def reset(self, gate: Gate) -> None:
        """See :meth:`Method.reset`; all scores start at 0 (reference code)."""
        gate.keep.fill_(True)
        gate.get_buffer("threshold").fill_(self.settings.threshold_init)
        for name in ("scores", "scores_average", "scores_square_average"):
            gate.get_buffer(name).zero_()
        for name in ("threshold_average", "threshold_square_average"):
            gate.get_buffer(name).zero_()

    def figures(self, gates: Sequence[Gate]) -> dict[str, float]:
        """The mean of the thresholds θ."""
        values = [float(gate.get_buffer("threshold")) for gate in gates]
        return {"threshold": sum(values) / len(values)} if values else {}

    @torch.no_grad()
    def take_up(self, stage: Stage) -> None:
        """Give each θ the kept ratio that its gate landed on, and forget the moments of the way there."""
        for gate in stage.gates:
            # Of all and of no units the threshold would be infinite.
            ratio = gate.keep.cpu().double().mean().clamp(0.5 / gate.units, 1 - 0.5 / gate.units)
            gate.get_buffer("threshold").fill_(self.settings.temperature * float(torch.logit(ratio)))
            for name in ("scores", "threshold"):
                gate.get_buffer(f"{name}_average").zero_()
                gate.get_buffer(f"{name}_square_average").zero_()

    def learn(self, stage: Stage, gradients: list[Tensor], target: float, progress: Progress) -> Pressure:
        """One Adam step on scores and thresholds."""
        if progress.phase is Phase.WARMUP:
            return Pressure(1.0)
        relative = stage.relative_target(target)
        thresholds = [gate.get_buffer("threshold").detach().clone().requires_grad_() for gate in stage.gates]
        with torch.enable_grad():
            ratios = [keep_ratio(threshold, self.settings.temperature) for threshold in thresholds]
            loss = penalty(stage.ratio([ratio.squeeze() for ratio in ratios]), relative)
            pulls = torch.autograd.grad(loss, thresholds)
        value = float(loss.detach())
        lambda_ = adaptive_lambda(value, relative, self.settings.lambda_max)
        start, end = progress.schedule.bounds(progress.phase)
        step, steps = progress.step - start, end - start
        rate = self.settings.score_learning_rate or score_learning_rate(steps)
        rate *= rate_multiplier(step, steps)
        for gate, gradient, pull, active in zip(stage.gates, gradients, pulls, stage.active, strict=True):
            straight_through = (gradient * gate.keep[:active]).sum().view(1)
            _adam(gate, "scores", gradient, active, step, rate)
            _adam(gate, "threshold", straight_through + lambda_ * pull, 1, step, rate)
        return Pressure(target, lambda_, value)

    def select(self, stage: Stage, target: float, progress: Progress) -> list[Tensor]:
        """The ``⌈k·n⌉`` units of highest score of each gate."""
        if progress.phase is Phase.WARMUP or target >= 1:
            return [torch.ones(active, dtype=torch.bool) for active in stage.active]
        masks = []
        for gate, active, candidates in zip(stage.gates, stage.active, stage.candidates, strict=True):
            ratio = float(keep_ratio(gate.get_buffer("threshold"), self.settings.temperature))
            kept = min(kept_units(ratio, active, stage.minimum), int(candidates.sum()))
            scores = gate.scores[:active]
            masks.append(top_k(scores.masked_fill(~candidates.to(scores.device), -torch.inf), kept))
        return masks

    def priorities(self, stage: Stage) -> list[Tensor]:
        """How far all thresholds may fall together before a unit goes.

        The unit of rank r of n stays while ``sigmoid((θ + δ) / T) · n > r``, that is while
        ``δ > T·logit(r / n) - θ``; a common shift δ thus moves the masks along the path that the
        thresholds have learned, to the exact target.
        """
        found = []
        for gate, active, candidates in zip(stage.gates, stage.active, stage.candidates, strict=True):
            rank = torch.empty(active, dtype=torch.float64)
            # Those that an earlier target removed stand behind all others, as in `select`.
            scores = gate.scores[:active].cpu().masked_fill(~candidates.cpu(), -torch.inf)
            order = scores.argsort(descending=True, stable=True)
            rank[order] = torch.arange(active, dtype=torch.float64)
            threshold = float(gate.get_buffer("threshold"))
            found.append(threshold - self.settings.temperature * torch.logit(rank / active))
        return found


@torch.no_grad()
def _adam(gate: Gate, name: str, gradient: Tensor, active: int, step: int, rate: float) -> None:
    """Adam on the leading entries of a buffer; moments are buffers too, so that runs resume."""
    value = gate.get_buffer(name)[:active]
    average = gate.get_buffer(f"{name}_average")[:active]
    square = gate.get_buffer(f"{name}_square_average")[:active]
    gradient = gradient.to(value.dtype)
    average.lerp_(gradient, 1 - ADAM_BETAS[0])
    square.mul_(ADAM_BETAS[1]).addcmul_(gradient, gradient, value=1 - ADAM_BETAS[1])
    corrected = average / (1 - ADAM_BETAS[0] ** (step + 1))
    scale = (square / (1 - ADAM_BETAS[1] ** (step + 1))).sqrt() + ADAM_EPSILON
    value.sub_(rate * corrected / scale)
