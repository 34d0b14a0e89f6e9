"""What one `train()` of the stock Trainer holds besides the run, and the checks before it."""

from __future__ import annotations

import inspect
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from .anatomy import find_encoder
from .attaching import attach, auto_class_name, kinds_of
from .card import model_card
from .carrier import TARGETS, Distiller
from .config import PruningConfig
from .distill import Teacher, load_teacher
from .files import write_folder
from .latency import Latency, measure_latency
from .loop import is_attached, pruning_state
from .masked import PruningState
from .reporting import Report
from .resuming import STEP1_TEACHER, find_step1_teacher
from .shrinking import Batch, shrunk_copy

#: Whether Trainer's smoothed loss is one over all items of a step; in transformers 5.0 it is a mean per
#: micro-batch, which nobody divides by their number.
SMOOTHED_OVER_ITEMS = "num_items_in_batch" in inspect.signature(LabelSmoother.__call__).parameters

#: Inputs that models of transformers can do without; there is no loss then.
LOSS_INPUTS = (*TARGETS, "num_items_in_batch")


@dataclass
class Session:
    """What one callback holds for one model besides the run; never saved.

    Attributes:
        model: the student.
        teacher: as the user gave it, loaded and checked.
        distiller: hooks of the distillation, if there is a teacher.
        batches: the last inputs of the model, without :data:`LOSS_INPUTS` if it is of transformers, by
            whether it was training.
    """

    model: PreTrainedModel
    teacher: Teacher | None
    distiller: Distiller | None = None
    batches: dict[bool, Batch] = field(default_factory=dict)
    _handle: RemovableHandle | None = None

    def begin(self, args: TrainingArguments) -> None:
        """Hang in the hooks of a run; in its block phase, taught by what the step-1 model was."""
        self.watch()
        config = pruning_state(self.model).config
        teacher = self.teacher
        if teacher is not None and config.step1_teaches and past_step1(pruning_state(self.model)):
            teacher = load_teacher(find_step1_teacher(args), self.model, config)
        self.distiller = Distiller(
            self.model,
            teacher,
            config,
            autocast_dtype=torch.bfloat16 if args.bf16 else None,
            accumulation=args.gradient_accumulation_steps,
            processes=args.world_size if args.average_tokens_across_devices else 1,
            smoothed=args.label_smoothing_factor > 0 and not SMOOTHED_OVER_ITEMS,
        )
        self.distiller.install()

    def teach_by_step1(self, output_dir: Path, *, write: bool) -> None:
        """Go on with the model as it is after heads and rows as teacher, and write it for a resumed run."""
        assert self.distiller is not None
        self.close()
        copy = shrunk_copy(self.model, list(self.batches.values()))
        if write:
            write_folder(output_dir / STEP1_TEACHER, copy.save_pretrained)
        self.distiller.teacher = load_teacher(copy, self.model, pruning_state(self.model).config)
        self.watch()
        self.distiller.install()

    def watch(self) -> None:
        """Remember the model's last inputs."""
        self._handle = self.model.register_forward_pre_hook(self._remember, with_kwargs=True)

    def close(self) -> None:
        """Take all hooks out."""
        if self.distiller is not None:
            self.distiller.remove()
        if self._handle is not None:
            self._handle.remove()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _remember(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs)
        given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        # A module of the script's own may need its labels.
        left_out = LOSS_INPUTS if isinstance(module, PreTrainedModel) else ()
        self.batches[module.training] = {
            name: value.detach()
            for name, value in given.items()
            if isinstance(value, torch.Tensor) and name not in left_out
        }


def open_session(
    model: PreTrainedModel, wanted: PruningConfig | None, teacher: str | PreTrainedModel | None
) -> Session:
    """Load and check the teacher, and attach masks to a model that has none.

    Args:
        model: dense, pruned, or with masks.
        wanted: the settings; those of the model's masks, if ``None``.
        teacher: a model, a folder or a hub name.

    Raises:
        ValueError: there are no settings, or the model has masks of others.
        TypeError: the step-1 model of a class of the user's own is to teach.
    """
    attached = pruning_state(model).config if is_attached(model) else None
    config = wanted or attached
    if config is None:
        raise ValueError("density is missing: give PruningCallback(density=0.2), or a model with masks")
    if attached is not None and attached != config:
        before, after = attached.to_dict(), config.to_dict()
        differing = [f"{name}={before[name]!r}" for name in before if before[name] != after[name]]
        raise ValueError(
            f"the model has masks already, of other settings than the callback ({', '.join(differing)}): "
            "load the model anew, or give the callback no settings to use the model's"
        )
    if teacher is not None and config.step1_teaches and kinds_of(model) is None:
        raise TypeError(
            f"block_teacher='step1': expected a stock class, got {type(model).__name__}, whose "
            "step-1 model a resumed run could not load again; set block_teacher='teacher'"
        )
    # Before the model is changed: a teacher that is refused leaves it as it was.
    loaded = None if teacher is None else load_teacher(teacher, model, config)
    if attached is None:
        attach(model, config)
    return Session(model, loaded)


def note(model: PreTrainedModel, found: Report) -> None:
    """Hand a pruned model its report, card and tags, which it is saved and pushed with."""
    model.pruning_report = found.to_dict()
    kinds = kinds_of(model)
    if kinds is not None:
        model.pruning_card = model_card(found, auto_class_name(kinds))
        model.add_model_tags(["pruning", "hf-mlprune"])


def past_step1(pruning: PruningState) -> bool:
    """Whether head and row masks are final."""
    return int(pruning.landed) >= 1


def landed(pruning: PruningState) -> bool:
    """Whether all masks are final."""
    return int(pruning.landed) >= 2


def measure(model: PreTrainedModel, session: Session) -> list[Latency]:
    """Latency of one and of 32 sequences as long as the last batch's, up to 128 tokens."""
    lengths = [batch["input_ids"].shape[-1] for batch in session.batches.values() if "input_ids" in batch]
    length = min(128, max(lengths, default=128))
    measured = [measure_latency(model, batch, length, rounds=30, budget_seconds=5.0) for batch in (1, 32)]
    return [row for row in measured if row is not None]


def check_optimizer(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that does not train this model.

    Raises:
        ValueError: a trainable encoder weight is not in it.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [
        name for name, p in find_encoder(model)[1].named_parameters() if p.requires_grad and id(p) not in held
    ]
    if missing:
        raise ValueError(
            f"expected every trainable encoder weight in the optimizer, but {len(missing)} are not "
            f"there, e.g. {missing[0]!r}: it was made for another model, or before this one was "
            "shrunk; make a new Trainer (or optimizer) for this model"
        )


def _is_set(name: str) -> bool:
    """Whether `accelerate launch` set a switch in the environment."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "y", "t", "on")


def check_writable(folder: Path) -> None:
    """Refuse, before the first step, a folder that the report could not be written to.

    Raises:
        OSError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"output_dir: expected a folder that can be written, got {folder} ({error}); training would end "
            "without its report and checkpoints"
        ) from error


def check_arguments(args: TrainingArguments) -> None:
    """Refuse ways of training that masks do not work in.

    Raises:
        ValueError: fp16, DeepSpeed, FSDP or DataParallel, with what to use instead.
    """
    if args.fp16:
        raise ValueError(
            "fp16=True: mask gradients would be scaled by the loss scaler; use bf16=True, or neither"
        )
    launched = [name for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP") if _is_set(name)]
    if args.deepspeed or args.fsdp or launched:
        raise ValueError(
            "DeepSpeed and FSDP shard the weights that masks multiply, which is not supported: use "
            "one process, or DistributedDataParallel (`torchrun`)"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"expected one GPU per process, got {args.n_gpu} in one (DataParallel): start with "
            "`torchrun --nproc_per_node=...`, or set CUDA_VISIBLE_DEVICES"
        )
