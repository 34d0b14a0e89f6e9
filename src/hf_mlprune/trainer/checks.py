"""What is checked of a model, an optimizer and training arguments before the first step."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import TrainingArguments

from ..families import find_encoders


def check_module(model: object) -> None:
    """Refuse what some trainers call a model and torch does not.

    Raises:
        TypeError: says what to prune instead.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a torch module to prune, got {type(model).__name__}, which only holds one: prune "
            "that one, by its own trainer (the body of a SetFitModel by SentenceTransformerTrainer), then "
            "put it into a new model"
        )


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, encoders: Sequence[str]) -> None:
    """Refuse an optimizer that does not train this model.

    Args:
        model: any module.
        optimizer: what trains it.
        encoders: paths of the encoders that are pruned; see ``find_encoders``.

    Raises:
        ValueError: a trainable encoder weight is not in it.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [
        name
        for _, _, encoder in find_encoders(model, encoders)
        for name, p in encoder.named_parameters()
        if p.requires_grad and id(p) not in held
    ]
    if missing:
        raise ValueError(
            f"expected every trainable encoder weight in the optimizer, but {len(missing)} are not "
            f"there, e.g. {missing[0]!r}: it was made for another model, or before this one was "
            "shrunk; make a new Trainer (or optimizer) for this model"
        )


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
    # Of the argument, or of `accelerate launch --mixed_precision fp16`, which sets the environment.
    if args.fp16 or args.mixed_precision == "fp16":
        given = "fp16=True" if args.fp16 else "mixed_precision fp16 (of accelerate)"
        raise ValueError(
            f"{given}: mask gradients would be scaled by the loss scaler; use bf16=True, or neither"
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


def _is_set(name: str) -> bool:
    """Whether `accelerate launch` set a switch in the environment."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "y", "t", "on")
