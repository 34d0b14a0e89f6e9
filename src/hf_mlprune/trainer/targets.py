"""The models of the earlier targets of a run that has several: written on the way."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

from ..config import PruningConfig
from ..files import write_into, write_json
from ..goals import predicted_speedup, reached
from ..modeling.pretrained import REPORT_FILE, PrunedMixin
from ..proof import fixed_random_state
from ..reports.report import print_end
from ..shrinking import shrunk_copy
from ..state import pruning_states
from .measuring import measured_report
from .saving import write_pruned
from .session import Session


def target_folder(output_dir: Path, settings: PruningConfig) -> Path:
    """Where the model of a target is written: ``density-0.5``, ``speedup-2``, ``latency-12-ms``."""
    name, value = settings.target
    return output_dir / re.sub(r"[^\w.]+", "-", f"{name}-{value}")


def check_targets(
    output_dir: Path, settings: PruningConfig, processing_class: Any, *, is_search: bool = False
) -> None:
    """Refuse, before the first step, what could not be written on the way.

    Args:
        output_dir: of the run, which can be written.
        settings: of the run.
        processing_class: Trainer's tokenizer or processor, if it has one.
        is_search: whether the run is a trial of a search for hyperparameters.

    Raises:
        ValueError: all trials of a search would write to the same folders.
        NotADirectoryError: a file has the name of a folder.
        Exception: whatever the tokenizer raises when it is saved.
    """
    if settings.targets and is_search:
        raise ValueError(
            f"targets: expected one target in hyperparameter_search, got {list(settings.targets)}: each "
            "trial would replace the models that the trials before it wrote on the way; search with the last "
            "target, then train with all of them"
        )
    if settings.targets and processing_class is not None:
        with tempfile.TemporaryDirectory(dir=output_dir) as trial:
            processing_class.save_pretrained(trial)
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
        predicted, cost = predicted_speedup(pruning), reached(pruning)
        calls = list(session.calls.values())
        copy, done = shrunk_copy(session.model, calls)
        found = measured_report(copy, session.longest, done, settings, pruning.length, predicted, cost)
    session.publisher.describe(copy, found, args, state)
    folder = target_folder(Path(args.output_dir), settings)
    if isinstance(copy, PrunedMixin):
        # With report and card. What else lies there is left alone.
        copy.save_pretrained(folder)
    else:
        write_into(folder, lambda partial: write_pruned(copy, partial))
        write_json(folder / REPORT_FILE, found.to_dict())
    if processing_class is not None:
        processing_class.save_pretrained(folder)
    print_end(found, settings, saved=folder)
