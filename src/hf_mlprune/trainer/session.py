"""What one `train()` of the stock Trainer holds besides the run."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from ..attaching import attach
from ..calls import Call
from ..config import PruningConfig
from ..distillation.hooks import Distiller
from ..distillation.teacher import Teacher, fingerprint, load_teacher
from ..editing import edited
from ..families import head_of
from ..files import write_folder
from ..goals import check_reachable
from ..loop import cooldown
from ..reports.card import CardFacts
from ..reports.counting import report
from ..reports.report import Report
from ..run import current_run
from ..shrinking import ShrinkError, ShrinkReport, rehearse, shrunk_copy
from ..state import is_attached, pruning_states
from .measuring import measure
from .publishing import Publisher, note
from .resuming import STEP1_TEACHER, find_step1_teacher

logger = logging.getLogger(__name__)

#: Whether Trainer's smoothed loss is one over all items of a step; in transformers 5.0 it is a mean per
#: micro-batch, which nobody divides by their number.
SMOOTHED_OVER_ITEMS = "num_items_in_batch" in inspect.signature(LabelSmoother.__call__).parameters


@dataclass
class Session:
    """What one callback holds for one model besides the run; never saved.

    Attributes:
        model: the student.
        teacher: as the user gave it, loaded and checked.
        teacher_fingerprint: which teacher that is.
        distiller: hooks of the distillation, if there is a teacher.
        calls: the last call of the model, by whether it was training.
        longest: most tokens of a sequence in any call since the run began or was resumed; ``None`` if no call
            had tokens.
        report: on the pruned model, once there is one.
        publisher: what its card says.
    """

    model: nn.Module
    teacher: Teacher | None
    teacher_fingerprint: str | None
    distiller: Distiller | None = None
    calls: dict[bool, Call] = field(default_factory=dict)
    longest: int | None = None
    epoch_began: int = 0
    report: Report | None = None
    publisher: Publisher = field(default_factory=Publisher)
    _rehearsed: set[bool] = field(default_factory=set)
    _handle: RemovableHandle | None = None
    _rates: list[tuple[dict[str, Any], Any]] = field(default_factory=list)

    def begin(
        self, args: TrainingArguments, *, without_labels: bool = False, rows_without_labels: bool = False
    ) -> None:
        """Register the hooks of a run; in its block phase, taught by what the step-1 model was.

        Args:
            args: of the run.
            without_labels: see :class:`~hf_mlprune.distillation.hooks.Distiller`.
            rows_without_labels: see there; of the interrupted run, if one is resumed.
        """
        self._rehearsed = set()
        # Of a run that failed, say of too large a batch.
        self.calls.clear()
        self.longest = None
        self.watch()
        pruning = pruning_states(self.model)[0]
        config, teacher = pruning.config, self.teacher
        if teacher is not None and config.step1_teaches and pruning.structured_is_final:
            teacher = load_teacher(find_step1_teacher(args), self.model, config)
        self.distiller = Distiller(
            self.model,
            teacher,
            config,
            # `accelerate launch` sets the second alone.
            autocast_dtype=torch.bfloat16 if args.bf16 or args.mixed_precision == "bf16" else None,
            accumulation=args.gradient_accumulation_steps,
            processes=args.world_size if args.average_tokens_across_devices else 1,
            smoothed=args.label_smoothing_factor > 0 and not SMOOTHED_OVER_ITEMS,
            without_labels=without_labels,
            rows_without_labels=rows_without_labels,
        )
        self.distiller.install()

    @property
    def rows_without_labels(self) -> bool:
        """Whether a row without a label was met."""
        return self.distiller is not None and self.distiller.rows_without_labels

    def release(self) -> None:
        """Let go of the teacher and of the last batches: after its run nobody needs them."""
        self.teacher = self.distiller = None
        self.calls.clear()

    def teach_by_step1(self, output_dir: Path, *, write: bool) -> None:
        """Go on with the model as it is after heads and rows as teacher, and write it for a resumed run."""
        assert self.distiller is not None
        assert isinstance(self.model, PreTrainedModel)
        with self.without_hooks():
            copy, _ = shrunk_copy(self.model, list(self.calls.values()))
            if write:
                write_folder(output_dir / STEP1_TEACHER, copy.save_pretrained)
            self.distiller.teacher = load_teacher(copy, self.model, pruning_states(self.model)[0].config)

    @contextmanager
    def without_hooks(self) -> Iterator[None]:
        """Take all hooks out for a while, in which the model can be copied."""
        self.close()
        try:
            yield
        finally:
            self.watch()
            if self.distiller is not None:
                self.distiller.install()

    def cool_down(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the next update with a smaller step, if the model of a target is soon to be written."""
        factor = cooldown(self.model)
        if factor == 1:
            return
        # Some optimizers take steps of their own size, and have None there.
        groups = [group for group in optimizer.param_groups if group["lr"] is not None]
        self._rates = [(group, group["lr"]) for group in groups]
        for group, rate in self._rates:
            group["lr"] = factor * rate

    def warm_up(self) -> None:
        """Give the optimizer its own learning rates back: those of the run's schedule."""
        for group, rate in self._rates:
            group["lr"] = rate
        self._rates = []

    def rehearse(self) -> None:
        """Export the model as it will be at the end, with every second unit removed, and take that back.

        Once for training calls, and once for calls in evaluation when there has been one.

        Raises:
            ShrinkError: the export would fail, or would not be right.
        """
        # A script may call parts of the model only: random tokens then serve.
        new = set(self.calls or [True]) - self._rehearsed
        if not new:
            return
        self._rehearsed |= new
        training = True in new

        def inspect_export(done: ShrinkReport) -> None:
            found = report(self.model, shrunk=done, settings=settings)
            note(self.model, found, CardFacts())
            json.dumps(found.to_dict())
            if training:
                measure(
                    self.model,
                    self.longest,
                    settings,
                    rounds=1,
                    budget_seconds=0.0,
                    shapes=((1, 8),),
                )

        settings = pruning_states(self.model)[0].config
        try:
            if training and (settings.targets or settings.step1_teaches):
                # A copy is made on the way.
                with self.without_hooks():
                    deepcopy(self.model)
            rehearse(self.model, [self.calls[mode] for mode in new if mode in self.calls], inspect_export)
        except (torch.OutOfMemoryError, MemoryError):
            logger.warning(
                "pruning: the export was not rehearsed, because small and masked layers do not fit into "
                "memory side by side; at the end of training they must"
            )
        except Exception as error:
            raise ShrinkError(
                f"the export at the end of training would fail, as its rehearsal did: {error}"
            ) from error

    def watch(self) -> None:
        """Remember the model's last calls."""
        self._handle = self.model.register_forward_pre_hook(self._remember, with_kwargs=True)

    def close(self) -> None:
        """Take all hooks out."""
        if self.distiller is not None:
            self.distiller.remove()
        if self._handle is not None:
            self._handle.remove()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _remember(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        call = self.calls[module.training] = Call.remember(args, kwargs)
        # Batches of like lengths follow each other, so the last one says little.
        length = call.length()
        if length is not None:
            self.longest = max(length, self.longest or 0)


def open_session(model: nn.Module, wanted: PruningConfig | None, teacher: str | nn.Module | None) -> Session:
    """Load and check the teacher, and attach masks to a model that has none.

    Args:
        model: dense, pruned, or with masks.
        wanted: the settings; those of the model's masks, if ``None``.
        teacher: a model, a folder or a hub name.

    Raises:
        ValueError: there are no settings, or the model has masks of others.
        TypeError: the step-1 model of a class of the user's own is to teach.
    """
    attached = pruning_states(model)[0].config if is_attached(model) else None
    config = wanted or attached
    if config is None:
        raise ValueError("density is missing: give PruningCallback(density=0.2), or a model with masks")
    if attached is not None and attached != config:
        before, after = attached.to_dict(), config.to_dict()
        # Another method has other settings.
        differing = [f"{name}={value!r}" for name, value in before.items() if value != after.get(name)]
        raise ValueError(
            f"the model has masks already, of other settings than the callback ({', '.join(differing)}): "
            "load the model anew, or give the callback no settings to use the model's"
        )
    if teacher is not None and config.step1_teaches and head_of(model) is None:
        raise TypeError(
            f"block_teacher='step1': expected a class of transformers, got {type(model).__name__}, whose "
            "step-1 model a resumed run could not load again; set block_teacher='teacher'"
        )
    # Before the model is changed: a teacher that is refused leaves it as it was.
    loaded = None if teacher is None else load_teacher(teacher, model, config)
    if attached is None:
        with edited(model):
            for state in attach(model, config):
                if config.density is not None:
                    # Other costs are measured as the run begins.
                    check_reachable(state)
    return Session(model, loaded, None if loaded is None else fingerprint(loaded.model))


def forget_best(model: nn.Module, state: TrainerState) -> None:
    """Forget the best metric and the best checkpoint until a model has reached its last target.

    So no checkpoint of it can be the best one at the end, and early stopping, which compares with the best
    metric, counts nothing until all masks are final.
    """
    if not all(current_run(pruning).is_pruned for pruning in pruning_states(model)):
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def use_evaluation_weights(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer that trains other weights than it evaluates (schedule-free) bring in the latter.

    Trainer brings the others back before the next step.
    """
    evaluate = getattr(optimizer, "eval", None)
    if callable(evaluate):
        evaluate()
