"""What one `train()` of the stock Trainer holds besides the run, and the checks before it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from .anatomy import find_encoder
from .carrier import Distiller
from .distill import Teacher
from .latency import Latency, measure_latency
from .masked import PruningState
from .shrinking import Batch

#: Written when blocks are taught by the step-1 model. The underscore keeps it out of hub uploads.
STEP1_TEACHER = "_step1_teacher"


#: Whether Trainer's smoothed loss is one over all items of a step; in transformers 5.0 it is a mean per
#: micro-batch, which nobody divides by their number.
SMOOTHED_OVER_ITEMS = "num_items_in_batch" in inspect.signature(LabelSmoother.__call__).parameters


@dataclass
class Session:
    """What one callback holds for one model besides the run; never saved.

    Attributes:
        model: the student.
        teacher: as the user gave it, loaded and checked.
        distiller: hooks of the distillation, if there is a teacher.
        batches: the last inputs of the model, without labels, by whether it was training.
    """

    model: PreTrainedModel
    teacher: Teacher | None
    distiller: Distiller | None = None
    batches: dict[bool, Batch] = field(default_factory=dict)
    _handle: RemovableHandle | None = None

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
        self.batches[module.training] = {
            name: value.detach()
            for name, value in given.items()
            if isinstance(value, torch.Tensor)
            and name not in ("labels", "start_positions", "end_positions", "num_items_in_batch")
        }


def past_step1(pruning: PruningState) -> bool:
    """Whether head and row masks are final."""
    return int(pruning.landed) >= 1


def landed(pruning: PruningState) -> bool:
    """Whether all masks are final."""
    return int(pruning.landed) >= 2


def find_step1_teacher(args: TrainingArguments) -> str:
    """Folder of the step-1 teacher that an interrupted run wrote.

    Raises:
        ValueError: it is not there.
    """
    folder = Path(args.output_dir) / STEP1_TEACHER
    if not folder.is_dir():
        raise ValueError(
            f"resume: expected the step-1 teacher in {folder}, which the interrupted run wrote; "
            "restore it, or resume from a checkpoint before the block phase"
        )
    return str(folder)


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


def check_arguments(args: TrainingArguments) -> None:
    """Refuse ways of training that masks do not work in.

    Raises:
        ValueError: fp16, DeepSpeed, FSDP or DataParallel, with what to use instead.
    """
    if args.fp16:
        raise ValueError(
            "fp16=True: mask gradients would be scaled by the loss scaler; use bf16=True, or neither"
        )
    if args.deepspeed or args.fsdp:
        raise ValueError(
            "DeepSpeed and FSDP shard the weights that masks multiply, which is not supported: use "
            "one process, or DistributedDataParallel (`torchrun`)"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"expected one GPU per process, got {args.n_gpu} in one (DataParallel): start with "
            "`torchrun --nproc_per_node=...`, or set CUDA_VISIBLE_DEVICES"
        )


def check_resumed(stored: Any, now: dict[str, Any], max_steps: int, *, taught: bool) -> None:
    """Refuse to take up a run with other settings than it was interrupted with.

    Args:
        stored: what the callback's ``state()`` was in the checkpoint.
        now: what it is.
        max_steps: optimizer steps of the whole run.
        taught: whether there is a teacher now.

    Raises:
        ValueError: what was expected, as in the interrupted run, and what came.
    """
    if not isinstance(stored, dict) or "args" not in stored:
        raise ValueError("the checkpoint is not of a pruning run: start the run anew from its weights")
    for name in sorted(set(stored["args"]) | set(now["args"])):
        before, after = stored["args"].get(name), now["args"].get(name)
        if before != after:
            raise ValueError(f"resume: expected {name}={before!r} as in the interrupted run, got {after!r}")
    steps = stored["attributes"]["planned_steps"]
    if steps != max_steps:
        raise ValueError(
            f"resume: expected {steps} steps in all as in the interrupted run, got {max_steps}; "
            "phases are fractions of the run, so it cannot be made longer or shorter half-way"
        )
    before = bool(stored["args"].get("teacher") or stored["attributes"]["taught_by_object"])
    if before != taught:
        had, has = ("a teacher" if given else "none" for given in (before, taught))
        raise ValueError(
            f"resume: the interrupted run had {had}, this one has {has}; pass the same teacher again"
        )
