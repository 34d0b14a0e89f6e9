"""The models of the earlier targets of a run that has several: written on the way."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import nn
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from ..config import PruningConfig
from ..files import write_folder, write_json
from ..modeling.pretrained import REPORT_FILE
from ..proof import fixed_random_state
from ..reports.report import print_end, report
from ..run import predicted_speedup
from ..shrinking import shrunk_copy
from ..state import pruning_states
from .session import Session, measure


def target_folder(output_dir: Path, settings: PruningConfig) -> Path:
    """Where the model of a target is written: ``density-0.5``, ``speedup-2``, ``latency-12-ms``."""
    name, value = settings.target
    return output_dir / re.sub(r"[^\w.]+", "-", f"{name}-{value}")


def check_folders(output_dir: Path, settings: PruningConfig) -> None:
    """Refuse, before the first step, names that are taken by files.

    Raises:
        NotADirectoryError: says which.
    """
    for index in range(len(settings.targets) - 1):
        folder = target_folder(output_dir, settings.with_target(index))
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(
                f"targets: expected {folder} to be a folder, or not to be there, as the model of that target "
                "is written to it; got a file"
            )


def write_target(
    session: Session,
    index: int,
    args: TrainingArguments,
    state: TrainerState,
    processing_class: Any,
) -> None:
    """Write a shrunk copy of the model, with report, card and tokenizer; training goes on with the model.

    Args:
        session: of the run, whose masks are those of the target.
        index: of the target.
        args: of the run.
        state: of the run.
        processing_class: Trainer's tokenizer or processor, if it has one.

    Raises:
        ShrinkError: the copy would not be right.
        OSError: it cannot be written.
    """
    pruning = pruning_states(session.model)[0]
    settings = pruning.config.with_target(index)
    # Nothing here is to change what the run draws.
    with session.without_hooks(), fixed_random_state(pruning.landed.device):
        predicted = predicted_speedup(pruning)
        copy, done = shrunk_copy(session.model, list(session.calls.values()))
        found = report(
            copy,
            shrunk=done,
            latency=measure(copy, session, settings, length=pruning.length),
            settings=settings,
            length=pruning.length,
            predicted_speedup=predicted,
        )
    session.publisher.describe(copy, found, args, state)
    folder = target_folder(Path(args.output_dir), settings)

    def write(partial: Path) -> None:
        _save(copy, partial)
        if not (partial / REPORT_FILE).is_file():
            write_json(partial / REPORT_FILE, found.to_dict())
        if processing_class is not None:
            processing_class.save_pretrained(partial)

    write_folder(folder, write)
    print_end(found, settings, saved=folder)


def _save(model: nn.Module, folder: Path) -> None:
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder)
    else:
        save_model(model, str(folder / "model.safetensors"))
