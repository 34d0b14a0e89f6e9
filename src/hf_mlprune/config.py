"""Every setting of a pruning run, validated in one place."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from typing import Any

LEVELS = ("heads", "rows", "blocks")
ROW_SITES = ("attention_output", "fc1", "fc2")
METHODS = ("fisher", "magnitude", "mlpruning")
BLOCK_TEACHERS = ("step1", "teacher")

#: What a preset sets; a setting named by the user wins. The field defaults are the default preset.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "paper": {
        "method": "mlpruning",
        "levels": LEVELS,
        "row_sites": ROW_SITES,
        "warmup_fraction": 0.0,
        "structured_fraction": 0.45,
        "block_fraction": 0.45,
        "hidden_weight": 1.0,
        "attention_weight": 1.0,
        "block_teacher": "step1",
        "recovery_dropout": None,
    },
}


@dataclass(frozen=True)
class PruningConfig:
    """Settings of one pruning run. Use :meth:`create`, which applies the preset.

    Attributes:
        density: kept weights of the prunable linears / all of them, at the end; in ``(0, 1]``.
        preset: ``"default"`` or ``"paper"`` (MLPruning's formulas, arXiv:2105.14636v1).
        levels: any of ``"heads"``, ``"rows"``, ``"blocks"``; pruned in this order.
        row_sites: whose rows the level ``"rows"`` prunes: ``"fc1"``, ``"attention_output"``,
            ``"fc2"``. Rows of the last two are scattered back into the residual.
        block_shape: ``(rows, columns)`` of a block.
        exclude: indices of layers to leave alone, of every encoder that is pruned; they are not counted
            in any density.
        encoder: paths of the encoders to prune within a model that has several, or of the modules that hold
            one each. Each is pruned to the density.
        structured_density: density after heads and rows, from which blocks go on; ``None`` derives
            it (see :meth:`first_target`).
        minimum_units: units that every group keeps; 0 lets a layer lose all its heads or FFN rows.
        method: ``"mlpruning"`` (learned scores and top-k thresholds), or one ranking of all units by
            importance per weight, on a schedule: ``"fisher"`` (Fisher importance) or ``"magnitude"`` (squared
            weights).
        warmup_fraction: share of the steps that train dense, before any pruning.
        structured_fraction: share of the steps in which heads and rows are pruned.
        block_fraction: share of the steps in which blocks are pruned. Masks are fixed after it.
        score_learning_rate: peak step size of scores and thresholds; ``None`` derives it from the
            number of steps (method ``"mlpruning"``).
        threshold_init: initial threshold θ; kept ratio ``sigmoid(θ / temperature)``.
        temperature: T of the kept ratio; 1 is the reference code's.
        lambda_max: λ_max of the adaptive regularizer.
        importance_decay: decay per step of the moving average of squared mask gradients, in
            ``[0, 1)`` (method ``"fisher"``).
        task_weight: weight of the task loss when there is a teacher; the distillation losses have
            the rest.
        hidden_weight: weight of the hidden-state term within the distillation losses.
        attention_weight: weight of the attention term; other than 0 switches student and teacher
            to eager attention while training.
        distillation_temperature: softmax temperature of the logits term.
        block_teacher: who teaches the block phase: ``"step1"`` (the model as it was after heads and
            rows) or ``"teacher"``.
        recovery_dropout: probability of dropout in the encoder, once masks are final and if there is a
            teacher, in ``[0, 1]``; ``None`` leaves the model's own.
        stall_steps: steps without a change of density in a pruning phase after which to warn.
    """

    density: float
    preset: str = "default"
    levels: tuple[str, ...] = ("heads", "rows")
    row_sites: tuple[str, ...] = ("fc1",)
    block_shape: tuple[int, int] = (16, 16)
    exclude: tuple[int, ...] = ()
    encoder: tuple[str, ...] = ()
    structured_density: float | None = None
    minimum_units: int = 1
    method: str = "fisher"
    warmup_fraction: float = 0.05
    structured_fraction: float = 0.2
    block_fraction: float = 0.15
    score_learning_rate: float | None = None
    threshold_init: float = 10.0
    temperature: float = 1.0
    lambda_max: float = 20000.0
    importance_decay: float = 0.98
    task_weight: float = 0.1
    hidden_weight: float = 1.0
    attention_weight: float = 0.0
    distillation_temperature: float = 2.0
    block_teacher: str = "teacher"
    recovery_dropout: float | None = 0.0
    stall_steps: int = 200
    created: InitVar[bool] = False

    @classmethod
    def create(cls, density: float, preset: str = "default", **settings: Any) -> PruningConfig:
        """Settings of a preset, with those named by the caller on top.

        Raises:
            ValueError: an unknown preset or setting, a value out of its range, or one without effect.
        """
        if preset not in PRESETS:
            raise ValueError(f"preset: expected one of {sorted(PRESETS)}, got {preset!r}")
        known = {field.name for field in dataclasses.fields(cls)}
        for name in settings:
            if name not in known:
                raise ValueError(f"unknown pruning setting {name!r}; known are {sorted(known)}")
        config = cls(density=density, preset=preset, created=True, **{**PRESETS[preset], **settings})
        config._check_effect(settings)
        return config

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningConfig:
        """Read what :meth:`to_dict` wrote; see :meth:`create` for errors."""
        if "density" not in data:
            raise ValueError("density is missing: give the share of weights to keep, e.g. density=0.2")
        return cls.create(**data)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, every value concrete."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    def __post_init__(self, created: bool) -> None:
        if self.preset != "default" and not created:
            raise ValueError(
                f"preset: use PruningConfig.create(density, preset={self.preset!r}), which applies it"
            )
        for field in dataclasses.fields(self):
            # Of NumPy, say; JSON knows none of these.
            value = getattr(self, field.name)
            if isinstance(value, numbers.Real) and not isinstance(value, (bool, int, float)):
                object.__setattr__(self, field.name, float(value))
        if isinstance(self.encoder, str):
            object.__setattr__(self, "encoder", (self.encoder,))
        for name in ("levels", "row_sites", "block_shape", "exclude", "encoder"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, (list, tuple)):
                raise ValueError(f"{name}: expected a list, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        _check_fraction("density", self.density, zero=False)
        _check_choices("levels", self.levels, LEVELS)
        _check_choices("row_sites", self.row_sites, ROW_SITES)
        _check_choices("method", (self.method,), METHODS)
        _check_choices("block_teacher", (self.block_teacher,), BLOCK_TEACHERS)
        if not (self.structured or self.blocks):
            raise ValueError(
                f"levels: expected at least one of {LEVELS}, and row_sites for rows, got "
                f"{self.levels} with row_sites={self.row_sites}"
            )
        if len(self.block_shape) != 2 or not all(
            type(side) is int and 1 <= side <= 4096 for side in self.block_shape
        ):
            raise ValueError(
                "block_shape: expected two whole numbers from 1 to 4096 (rows, columns), "
                f"got {self.block_shape!r}"
            )
        if not all(type(index) is int and index >= 0 for index in self.exclude):
            raise ValueError(f"exclude: expected layer indices from 0 up, got {self.exclude!r}")
        if not all(isinstance(path, str) and path for path in self.encoder):
            raise ValueError(f"encoder: expected paths such as 'text_model', got {self.encoder!r}")
        if self.structured_density is not None:
            _check_fraction("structured_density", self.structured_density, zero=False)
            if self.structured_density < self.density:
                raise ValueError(
                    f"structured_density: expected at least density={self.density}, "
                    f"got {self.structured_density}"
                )
        self._check_numbers()

    def _check_numbers(self) -> None:
        for name in ("warmup_fraction", "structured_fraction", "block_fraction", "task_weight"):
            _check_fraction(name, getattr(self, name))
        pruning = self.warmup_fraction + self.structured_fraction + self.block_fraction
        if pruning >= 1:
            raise ValueError(
                "warmup_fraction + structured_fraction + block_fraction: expected less than 1, so "
                f"that steps are left with the final masks, got {pruning:g}"
            )
        for name in ("hidden_weight", "attention_weight"):
            _check_number(name, getattr(self, name), at_least=0)
        for name in ("temperature", "lambda_max", "distillation_temperature"):
            _check_number(name, getattr(self, name), above=0)
        if self.score_learning_rate is not None:
            _check_number("score_learning_rate", self.score_learning_rate, above=0)
        _check_number("threshold_init", self.threshold_init)
        _check_number("importance_decay", self.importance_decay, at_least=0)
        if self.importance_decay >= 1:
            raise ValueError(f"importance_decay: expected less than 1, got {self.importance_decay}")
        if self.recovery_dropout is not None:
            _check_fraction("recovery_dropout", self.recovery_dropout)
        for name, least in (("minimum_units", 0), ("stall_steps", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}: expected a whole number from {least} up, got {value!r}")

    def _check_effect(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings of a level or method that is not used, unless they are what they are anyway."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for needed, (is_met, names) in {
            "the level 'blocks'": (self.blocks, ("structured_density", "block_shape")),
            "the level 'rows'": ("rows" in self.levels, ("row_sites",)),
            "the method 'fisher'": (self.method == "fisher", ("importance_decay",)),
            "the method 'mlpruning'": (
                self.method == "mlpruning",
                ("score_learning_rate", "threshold_init", "temperature", "lambda_max"),
            ),
        }.items():
            for name in names if not is_met else ():
                usual = PRESETS[self.preset].get(name, defaults[name])
                if name in settings and getattr(self, name) != usual:
                    raise ValueError(f"{name}: has no effect here, it needs {needed}; leave it out")

    @property
    def structured(self) -> bool:
        """Whether heads or rows are pruned."""
        return "heads" in self.levels or ("rows" in self.levels and bool(self.row_sites))

    @property
    def blocks(self) -> bool:
        """Whether blocks are pruned."""
        return "blocks" in self.levels

    @property
    def step1_teaches(self) -> bool:
        """Whether the model as it was after heads and rows teaches the blocks."""
        return self.structured and self.blocks and self.block_teacher == "step1"

    def first_target(self) -> float:
        """Density that heads and rows are pruned to.

        With blocks to follow: ``structured_density``, else half of the weights as in the paper's
        recipe (0.5 x 0.4), else the square root of a density of which one half is not a factor.
        """
        if not self.blocks:
            return self.density
        if self.structured_density is not None:
            return self.structured_density
        return 0.5 if self.density <= 0.25 else math.sqrt(self.density)


def _check_number(
    name: str, value: Any, *, at_least: float | None = None, above: float | None = None
) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name}: expected at least {at_least}, got {value}")
    if above is not None and value <= above:
        raise ValueError(f"{name}: expected more than {above}, got {value}")


def _check_fraction(name: str, value: Any, *, zero: bool = True) -> None:
    _check_number(name, value)
    if value > 1 or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name}: expected a value in {'[' if zero else '('}0, 1], got {value}")


def _check_choices(name: str, values: tuple[Any, ...], choices: tuple[str, ...]) -> None:
    for value in values:
        if value not in choices:
            raise ValueError(f"{name}: expected any of {choices}, got {value!r}")
    if len(set(values)) != len(values):
        raise ValueError(f"{name}: expected each at most once, got {values}")
