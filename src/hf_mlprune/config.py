"""Every setting of a pruning run, validated in one place."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from types import NoneType
from typing import Any

from .budgets import BUDGETS, check_densities, check_last, check_target, named_target
from .levels import (
    LEVELS,
    ROW_SITES,
    check_block_shape,
    check_levels,
    check_places,
    prunes_structures,
    unused_settings,
)
from .methods import (
    METHODS,
    Method,
    MethodSettings,
    check_method,
    find_method,
    name_of,
    setting_names,
    split_settings,
)
from .values import check_choices, check_fraction, check_number, check_whole_number

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

    Exactly one of ``density``, ``speedup``, ``latency``, ``size`` and ``multiply_adds`` is the target. Blocks
    are pruned to a density only.

    Attributes:
        density: kept weights of the prunable linears / all of them, at the end; in ``(0, 1]``.
        speedup: how many times as fast as the dense encoder, above 1. Times are measured on this machine
            when the run begins.
        latency: maximum time of one forward pass of the encoder, such as ``"12 ms"``.
        size: maximum size of the model's file, such as ``"30 MB"``. This includes the embeddings, and
            depends on the model's dtype.
        multiply_adds: multiply-adds of the encoder / those of the dense one, for a sequence of ``length``, in
            ``(0, 1]``.
        targets: several values of the target: one run gives a model for each of them. The first value is for
            the largest model. The last one, for the smallest model, is the target of the run. The values are
            densities if no target is named. Not possible with blocks.
        batch: number of sequences, or images, in the forward pass that is timed for ``speedup`` and
            ``latency``.
        length: tokens per sequence, also for multiply-adds. ``None`` takes that of a ``latency_table``, else
            the median of the training data if it is a `datasets.Dataset`, else 128. For images the number is
            given by the model.
        threads: threads of the timed forward pass; ``None`` for as many as torch has, or as the table says.
        latency_table: file with times for another engine or machine, of the same batch; see
            :mod:`hf_mlprune.exporting.table`. ``None`` measures in torch as the run begins.
        preset: ``"default"`` or ``"paper"`` (MLPruning's formulas, arXiv:2105.14636v1).
        levels: any of ``"heads"``, ``"rows"``, ``"blocks"``; blocks are pruned after the others.
            ``"attention"``, in place of ``"heads"``, removes all heads of a layer at once; ``"ffn"`` removes
            all its FC1 rows.
        row_sites: the matrices whose rows are pruned by the level ``"rows"``:
            ``"fc1"``, ``"attention_output"``,
            ``"fc2"``. Rows of the last two are scattered back into the residual.
        block_shape: ``(rows, columns)`` of a block.
        exclude: indices of layers to leave alone, of every encoder that is pruned; they are not counted
            in any density.
        encoder: paths of the encoders to prune, if the model has several; or paths of modules that contain
            one encoder each. Each encoder is pruned to this density.
        structured_density: density after heads and rows are pruned, before blocks are pruned; ``None``
            computes it (see :meth:`first_target`).
        minimum_units: units that every group keeps; 0 lets a layer lose all its heads or FFN rows.
        method: how importance is learned: a name of :data:`hf_mlprune.methods.METHODS`, or a subclass of
            :class:`~hf_mlprune.methods.Method`. Stored by name.
        method_settings: the method's own settings. They are passed, and saved, together with the settings
            here.
        warmup_fraction: share of the steps that train dense, before any pruning.
        structured_fraction: share of the steps in which heads and rows are pruned.
        block_fraction: share of the steps in which blocks are pruned. Masks are fixed after it.
        task_weight: weight of the task loss if there is a teacher; the weight of the distillation losses is
            1 minus this.
        hidden_weight: weight of the hidden-state term within the distillation losses.
        attention_weight: weight of the attention term; other than 0 switches student and teacher
            to eager attention while training.
        distillation_temperature: softmax temperature of the logits term.
        block_teacher: the teacher in the block phase: ``"step1"`` (the model as it was after heads and
            rows) or ``"teacher"``.
        recovery_dropout: dropout probability in the encoder after masks are final, if there is a teacher; in
            ``[0, 1]``. ``None`` keeps the dropout of the model.
        stall_steps: warn after so many steps of a pruning phase without a change of density.
    """

    density: float | None = None
    preset: str = "default"
    speedup: float | None = None
    latency: str | None = None
    size: str | None = None
    multiply_adds: float | None = None
    targets: tuple[Any, ...] = ()
    batch: int = 1
    length: int | None = None
    threads: int | None = None
    latency_table: str | None = None
    levels: tuple[str, ...] = ("heads", "rows")
    row_sites: tuple[str, ...] = ("fc1",)
    block_shape: tuple[int, int] = (16, 16)
    exclude: tuple[int, ...] = ()
    encoder: tuple[str, ...] = ()
    structured_density: float | None = None
    minimum_units: int = 1
    method: str = "fisher"
    method_settings: MethodSettings | None = None
    warmup_fraction: float = 0.05
    structured_fraction: float = 0.2
    block_fraction: float = 0.15
    task_weight: float = 0.1
    hidden_weight: float = 1.0
    attention_weight: float = 0.0
    distillation_temperature: float = 2.0
    block_teacher: str = "teacher"
    recovery_dropout: float | None = 0.0
    stall_steps: int = 200
    created: InitVar[bool] = False

    @classmethod
    def create(cls, density: float | None = None, preset: str = "default", **settings: Any) -> PruningConfig:
        """Settings of a preset, with those named by the caller on top.

        Raises:
            ValueError: an unknown preset or setting, a value out of its range, or one without effect.
        """
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(f"preset: expected one of {sorted(PRESETS)}, got {preset!r}")
        targets = settings.get("targets")
        named = density is not None or any(settings.get(name) is not None for name in BUDGETS)
        if isinstance(targets, (list, tuple)) and targets and not named:
            check_densities(targets)
            density = targets[-1]
        chosen = settings.get("method", PRESETS[preset].get("method", cls.method))
        method = find_method(chosen) if isinstance(chosen, str) else chosen
        settings = {**settings, "method": name_of(method)}
        check_method(method, cls.run_settings())
        usual = {**method.defaults, **PRESETS[preset]}
        own, settings = split_settings(method, settings, cls.run_settings())
        given = method.Settings(**{name: _plain(value) for name, value in own.items()})
        config = cls(
            density=density, preset=preset, method_settings=given, created=True, **{**usual, **settings}
        )
        config._check_effect(settings, usual)
        return config

    @classmethod
    def run_settings(cls) -> list[str]:
        """Names of the settings that do not belong to one method."""
        return [field.name for field in dataclasses.fields(cls) if field.name != "method_settings"]

    @classmethod
    def all_settings(cls) -> list[str]:
        """Names of the settings of a run and of this package's methods."""
        return [*cls.run_settings(), *(name for method in METHODS.values() for name in setting_names(method))]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningConfig:
        """Read what :meth:`to_dict` wrote; see :meth:`create` for errors."""
        targets = list(data.get("targets") or ())
        name = named_target(data)
        if name is not None and data[name] in targets[:-1]:
            # Of the report of a model that its run did not end with.
            whole = cls.create(**{**data, name: targets[-1]})
            return whole.with_target(targets.index(data[name]))
        return cls.create(**data)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, every value concrete."""
        assert self.method_settings is not None
        values = {name: getattr(self, name) for name in self.run_settings()}
        values |= dataclasses.asdict(self.method_settings)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def __post_init__(self, created: bool) -> None:
        if self.preset != "default" and not created:
            raise ValueError(
                f"preset: use PruningConfig.create(density, preset={self.preset!r}), which applies it"
            )
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        if isinstance(self.encoder, str):
            object.__setattr__(self, "encoder", (self.encoder,))
        if isinstance(self.latency_table, os.PathLike):
            object.__setattr__(self, "latency_table", os.fspath(self.latency_table))
        if self.latency_table is not None and not isinstance(self.latency_table, str):
            raise ValueError(f"latency_table: expected a file, got {self.latency_table!r}")
        for name in ("levels", "row_sites", "block_shape", "exclude", "encoder", "targets"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)):
                raise ValueError(f"{name}: expected a list, got {value!r}")
            object.__setattr__(self, name, tuple(map(_plain, value)))
        self._check_target()
        check_levels(self.levels, self.row_sites)
        check_block_shape(self.block_shape)
        check_places(self.exclude, self.encoder)
        check_choices("block_teacher", (self.block_teacher,), BLOCK_TEACHERS)
        if self.structured_density is not None and self.density is not None:
            check_fraction("structured_density", self.structured_density, zero=False)
            if self.structured_density < self.density:
                raise ValueError(
                    f"structured_density: expected at least density={self.density}, "
                    f"got {self.structured_density}"
                )
        self._check_numbers()
        self._check_method()

    def _check_target(self) -> None:
        check_target(vars(self))
        for setting in ("batch", "length", "threads"):
            value = getattr(self, setting)
            if value is not None or setting == "batch":
                check_whole_number(setting, value, at_least=1)

    def _check_method(self) -> None:
        method = find_method(self.method)
        if self.method_settings is None:
            object.__setattr__(self, "method_settings", method.Settings())
        if type(self.method_settings) is not method.Settings:
            raise ValueError(
                f"method_settings: expected {method.Settings.__name__} of the method {self.method!r}, got "
                f"{type(self.method_settings).__name__}"
            )
        for name, value in vars(self.method_settings).items():
            if not isinstance(value, (str, int, float, NoneType)):
                raise ValueError(
                    f"{name}: expected a number or a string, as methods' settings are, got {value!r}"
                )
        self.method_settings.check()
        if method.levels is not None and not set(self.levels) <= set(method.levels):
            raise ValueError(
                f"levels: expected any of {method.levels} with the method {self.method!r}, got {self.levels}"
            )

    def _check_numbers(self) -> None:
        for name in ("warmup_fraction", "structured_fraction", "block_fraction", "task_weight"):
            check_fraction(name, getattr(self, name))
        pruning = self.warmup_fraction + self.structured_fraction + self.block_fraction
        if pruning >= 1:
            raise ValueError(
                "warmup_fraction + structured_fraction + block_fraction: expected less than 1, so "
                f"that steps are left with the final masks, got {pruning:g}"
            )
        for name in ("hidden_weight", "attention_weight"):
            check_number(name, getattr(self, name), at_least=0)
        check_number("distillation_temperature", self.distillation_temperature, above=0)
        if self.recovery_dropout is not None:
            check_fraction("recovery_dropout", self.recovery_dropout)
        for name, least in (("minimum_units", 0), ("stall_steps", 1)):
            check_whole_number(name, getattr(self, name), at_least=least)

    def _check_effect(self, settings: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
        """Refuse settings of a level that is not used, unless they are what they are anyway."""
        target, _ = self.target
        check_last(vars(self), target)
        for name, needed in unused_settings(target, self.levels, self.row_sites).items():
            expected = usual.get(name, getattr(type(self), name))
            if name in settings and getattr(self, name) != expected:
                raise ValueError(f"{name}: has no effect here, it needs {needed}; leave it out")

    @property
    def target(self) -> tuple[str, Any]:
        """Name and value of the target."""
        name = named_target(vars(self))
        assert name is not None
        return name, getattr(self, name)

    def with_target(self, index: int) -> PruningConfig:
        """The settings with another of several targets; as they are, if there is one."""
        if not self.targets:
            return self
        return dataclasses.replace(self, created=True, **{self.target[0]: self.targets[index]})

    @property
    def goal(self) -> str:
        """The target, for people."""
        name, value = self.target
        return f"{value:g}" if name == "density" else f"{name}={value}"

    @property
    def measures_times(self) -> bool:
        """Whether times are measured on this machine as the run begins."""
        return "latency_table" in BUDGETS[self.target[0]].uses and self.latency_table is None

    @property
    def structured(self) -> bool:
        """Whether heads, rows or whole modules are pruned."""
        return prunes_structures(self.levels, self.row_sites)

    @property
    def blocks(self) -> bool:
        """Whether blocks are pruned."""
        return "blocks" in self.levels

    @property
    def step1_teaches(self) -> bool:
        """Whether the model as it was after heads and rows teaches the blocks."""
        return self.structured and self.blocks and self.block_teacher == "step1"

    def make_method(self) -> Method[Any]:
        """The method with its settings."""
        return find_method(self.method)(self.method_settings)

    def first_target(self) -> float:
        """Density to which heads and rows are pruned, if the target is a density.

        If blocks are pruned afterwards: ``structured_density`` if it is given; else 0.5, as in the paper's
        recipe (0.5 x 0.4), for densities up to 0.25; else the square root of the density.
        """
        assert self.density is not None
        if not self.blocks:
            return self.density
        if self.structured_density is not None:
            return self.structured_density
        return 0.5 if self.density <= 0.25 else math.sqrt(self.density)


def _plain(value: Any) -> Any:
    """A number of NumPy, say, as one of Python: JSON knows none of the others."""
    if isinstance(value, numbers.Integral) and not isinstance(value, (bool, int)):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, int, float)):
        return float(value)
    return value
