"""What a job is to do: its arguments, checked before any work."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import PruningConfig
from ..methods import name_of
from ..schedule import MINIMUM_STEPS
from ..values import check_number, check_whole_number

#: Is told how a job goes on.
Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """Arguments of :func:`hf_mlprune.jobs.prune`.

    Attributes:
        model: folder or hub name of the model to prune, fine-tuned on the task or not.
        data: a file (CSV, TSV, JSON lines, Parquet), a folder of files, or a data set of the hub.
        out: folder for the pruned model.
        task: a name of ``hf_mlprune.jobs.preparing.TASKS``.
        settings: the target and other settings of :class:`~hf_mlprune.config.PruningConfig`.
        test: file with the test examples.
        columns: role -> column name, if the columns have other names than the roles.
        fine_tune: whether to fine-tune before pruning; ``None`` decides by whether the model has these
            classes.
        epochs: passes over the data while pruning; there are 400 steps at least.
        fine_tune_epochs: passes over the data while fine-tuning; there are 200 steps at least.
        steps: number of pruning steps, instead of ``epochs``.
        fine_tune_steps: number of fine-tuning steps, instead of ``fine_tune_epochs``.
        batch_size: examples per step.
        learning_rate: of pruning; ``None`` takes six times that of fine-tuning, twice that for a density of
            0.5 or more (of several targets the first); 1e-3 for embeddings.
        fine_tune_learning_rate: ``None`` takes 1e-4, or 5e-5 for models of 512 features and more.
        max_length: maximum tokens per row; ``None`` means 128, or 384 for question answering.
        seed: seed of all random numbers.

    Raises:
        ValueError: an argument is out of its range, or a setting is unknown.
    """

    model: str
    data: str
    out: str
    task: str = "text-classification"
    settings: Mapping[str, Any] = field(default_factory=dict)
    test: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    fine_tune: bool | None = None
    epochs: float = 6.0
    fine_tune_epochs: float = 3.0
    steps: int | None = None
    fine_tune_steps: int | None = None
    batch_size: int = 32
    learning_rate: float | None = None
    fine_tune_learning_rate: float | None = None
    max_length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("epochs", self.epochs, above=0)
        check_number("fine_tune_epochs", self.fine_tune_epochs, above=0)
        check_whole_number("batch_size", self.batch_size, at_least=1)
        check_whole_number("seed", self.seed, at_least=0)
        for name, least in (("steps", MINIMUM_STEPS), ("fine_tune_steps", 1), ("max_length", 8)):
            if getattr(self, name) is not None:
                check_whole_number(name, getattr(self, name), at_least=least)
        for name in ("learning_rate", "fine_tune_learning_rate"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0)
        self.config()

    def config(self) -> PruningConfig:
        """The settings of the run."""
        return PruningConfig.create(**self.settings)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as it is read again."""
        settings = {name: name_of(x) if isinstance(x, type) else x for name, x in self.settings.items()}
        return dict(json.loads(json.dumps({**dataclasses.asdict(self), "settings": settings})))

    def differences(self, earlier: Mapping[str, Any]) -> list[str]:
        """What another job, in JSON form, has that this one has not; its folder may have moved."""
        now = {name: value for name, value in self.to_dict().items() if name != "out"}
        return [
            f"{name}={earlier.get(name)!r} (got {now[name]!r})"
            for name in now
            if now[name] != earlier.get(name)
        ]
