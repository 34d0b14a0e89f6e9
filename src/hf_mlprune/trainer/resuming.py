"""Which of a run's checkpoints can be resumed, and the checks before one is."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import PruningConfig
from ..modeling.checkpoint import stored_tensors

logger = logging.getLogger(__name__)

#: Written when blocks are taught by the step-1 model. The underscore keeps it out of hub uploads.
STEP1_TEACHER = "_step1_teacher"
#: sentence-transformers' list of the parts of a model.
SENTENCE_MODULES = "modules.json"
#: What Trainer writes beside the weights, in its order; those of torch are zip archives.
STATE_FILES = ("optimizer.pt", "scheduler.pt", "trainer_state.json")


def missing_parts(folder: Path) -> list[str]:
    """Files of a Trainer checkpoint that are missing, or were not written to their end."""
    missing = []
    places = [folder]
    if (folder / SENTENCE_MODULES).is_file() and not list(folder.glob("*.safetensors*")):
        # Several towers: each lies in a folder of its own.
        places = sorted({file.parent for file in folder.rglob("*.safetensors*")}) or places
    for place in places:
        try:
            stored_tensors(place, None, {"local_files_only": True})
        except (ValueError, OSError):
            missing.append((place / "model.safetensors").relative_to(folder).as_posix())
    missing += [name for name in STATE_FILES if not _is_whole(folder / name)]
    if not any(map(_is_whole, folder.glob("rng_state*.pth"))):
        missing.append("rng_state.pth")
    return missing


def _is_whole(path: Path) -> bool:
    if not path.is_file():
        return False
    if path.suffix != ".json":
        return zipfile.is_zipfile(path)
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint of a folder that a run can be resumed from; ``None`` if there is none.

    trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))
    """
    return next(
        (str(folder) for folder in _newest_first(Path(output_dir)) if not missing_parts(folder)), None
    )


def _newest_first(output_dir: Path) -> list[Path]:
    numbered = [
        (int(number), folder)
        for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (number := folder.name.rpartition("-")[2]).isdecimal() and folder.is_dir()
    ]
    return [folder for _, folder in sorted(numbered, reverse=True)]


def warn_of_incomplete(output_dir: Path) -> None:
    """Name a newest checkpoint that is incomplete: Trainer would resume from it, or fail at it."""
    newest = _newest_first(output_dir)[:1]
    missing = missing_parts(newest[0]) if newest else []
    if missing:
        logger.warning("%s", _incomplete(newest[0], missing))


def _incomplete(folder: Path, missing: list[str]) -> str:
    last = last_complete_checkpoint(folder.parent)
    advice = f"the last complete one is {last}" if last else "there is no complete one: start the run anew"
    return f"resume: checkpoint {folder} is incomplete ({', '.join(missing)}); {advice}"


def check_complete(args: TrainingArguments, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Refuse to go on from a checkpoint that Trainer loaded in part: it says nothing of what was missing.

    Args:
        args: of the run.
        optimizer: of the run, resumed.
        scheduler: of its learning rate. Trainer loads both, or none of them.

    Raises:
        ValueError: they are as new.
    """
    # SGD without momentum keeps nothing. A scheduler counts its steps; that of a metric may have none.
    by_metric = "metrics" in inspect.signature(scheduler.step).parameters
    if optimizer.state or by_metric or getattr(scheduler, "last_epoch", 1) > 0:
        return
    last = last_complete_checkpoint(args.output_dir)
    raise ValueError(
        "resume: the checkpoint is incomplete (optimizer.pt or scheduler.pt), so that the run would go on "
        "with a fresh optimizer; runs with save_only_model=True cannot be resumed. The last complete "
        f"checkpoint in {args.output_dir}: {last or 'none; start the run anew'}"
    )


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


def check_resumed(stored: Any, now: dict[str, Any], max_steps: int) -> None:
    """Refuse to take up a run with other settings than it was interrupted with.

    Teachers are compared by what they are, not by how they were given. A table of times may lie elsewhere:
    the checkpoint has its times.

    Args:
        stored: what the callback's ``state()`` was in the checkpoint.
        now: what it is.
        max_steps: optimizer steps of the whole run.

    Raises:
        ValueError: what was expected, as in the interrupted run, and what came.
    """
    if not isinstance(stored, dict) or "args" not in stored:
        raise ValueError("the checkpoint is not of a pruning run: start the run anew from its weights")
    earlier = {name: value for name, value in stored["args"].items() if name != "teacher"}
    # An earlier version may have written settings of other methods, or none that came later.
    with contextlib.suppress(ValueError):
        earlier = PruningConfig.from_dict(earlier).to_dict()
    compared = (set(earlier) | set(now["args"])) - {"teacher", "latency_table"}
    # Of another preset or method others of them differ, too.
    for name in sorted(compared, key=lambda name: (name != "preset", name != "method", name)):
        before, after = earlier.get(name), now["args"].get(name)
        if before != after:
            raise ValueError(f"resume: expected {name}={before!r} as in the interrupted run, got {after!r}")
    steps = stored["attributes"]["planned_steps"]
    if steps != max_steps:
        raise ValueError(
            f"resume: expected {steps} steps in all as in the interrupted run, got {max_steps}; "
            "phases are fractions of the run, so it cannot be made longer or shorter half-way"
        )
    before, after = (given["attributes"].get("teacher_fingerprint") for given in (stored, now))
    if before != after:
        if before and after:
            names = [given["args"].get("teacher") or "a module" for given in (stored, now)]
            raise ValueError(
                f"resume: expected the teacher of the interrupted run ({names[0]}), got one of other weights "
                f"({names[1]})"
            )
        had, has = ("a teacher" if given else "none" for given in (before, after))
        raise ValueError(
            f"resume: the interrupted run had {had}, this one has {has}; pass the same teacher again"
        )
