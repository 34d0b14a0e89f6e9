"""What a user asked of export, looked at before any work is done."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..encoders import most_tokens
from .report import REPORT_FILE
from .source import LABELS, Source, inputs_of


def target_of(folder: str | Path) -> Path:
    """Where an export is written, behind any links.

    Raises:
        FileExistsError: something else is there, or besides what an earlier export wrote; or a mounted disk.
        NotADirectoryError: what should hold it is no folder.
        PermissionError: nothing may be written there.
    """
    if not isinstance(folder, (str, Path)) or not str(folder):
        raise TypeError(f"folder: expected the path of a folder, got {folder!r}")
    target = Path(folder).resolve()
    if target == Path.cwd() or target in Path.cwd().parents:
        raise FileExistsError(
            f"folder: expected a new folder, got {target}, where this runs; name another one"
        )
    if target.is_mount():
        raise FileExistsError(
            f"folder: expected a folder that can be replaced, got {target}, where a disk is mounted; name a "
            "folder in it"
        )
    others = _others(target)
    if others:
        raise FileExistsError(
            f"folder: expected a new folder, or one that export wrote (with {REPORT_FILE}), got {target}, "
            f"which holds something else ({', '.join(others[:3])}); name another one"
        )
    above = next(path for path in target.parents if path.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"folder: expected a path in folders, got {target}, but {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"folder: expected to write in {above}, which is not allowed; name another one")
    return target


def _others(target: Path) -> list[str]:
    """What is in the place of an export and was not written by one."""
    if target.is_file():
        return ["a file"]
    names = {path.name for path in target.iterdir()} if target.is_dir() else set()
    try:
        written = json.loads((target / REPORT_FILE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, TypeError, KeyError):
        return sorted(names)
    return sorted(names - {REPORT_FILE, *written})


def check_numbers(latency: Sequence[tuple[int, int]], threads: int | None) -> None:
    """Refuse sizes and numbers of threads that are none.

    Raises:
        ValueError: what was expected.
    """
    if latency is not None and not (isinstance(latency, Sequence) and all(map(_is_size, latency))):
        raise ValueError(
            "latency: expected pairs of batch and tokens, each 1 or more, such as ((1, 128),), or () to "
            f"measure nothing, got {latency!r}"
        )
    if threads is not None and not _is_count(threads):
        raise ValueError(f"threads: expected 1 or more, or None for torch's number, got {threads!r}")


def _is_size(size: Any) -> bool:
    return isinstance(size, (tuple, list)) and len(size) == 2 and all(map(_is_count, size))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def read_batches(data: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The batches, of which all have labels or none has.

    Raises:
        TypeError: they are none.
        ValueError: there are none, or their labels differ.
    """
    if isinstance(data, (Mapping, str)) or not isinstance(data, Iterable):
        raise TypeError(
            "data: expected several batches, such as trainer.get_eval_dataloader() or [batch], got "
            f"{type(data).__name__}"
        )
    batches = list(data)
    if not batches:
        raise ValueError("data: expected batches, got none")
    labels = None
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise TypeError(
                "data: expected batches that are dicts of what the model is called with, got "
                f"{type(batch).__name__}"
            )
        found = [name for name in LABELS if name in batch]
        labels = found if labels is None else labels
        if found != labels:
            raise ValueError(
                f"data: expected {labels or 'no labels'} in every batch, got {found} in {number}"
            )
    return batches


def check_metric(
    batches: list[Mapping[str, Any]] | None,
    compute_metrics: Any,
    metric: str | None,
    max_drop: float | None,
    *,
    int8: bool,
) -> None:
    """Refuse a metric that cannot be taken, and a drop that nothing is held to.

    Raises:
        TypeError: the metric is no function.
        ValueError: there are no labels, the drop is none, or nothing is quantized.
    """
    if max_drop is not None:
        is_number = isinstance(max_drop, (int, float)) and not isinstance(max_drop, bool)
        if not is_number or math.isnan(max_drop) or max_drop < 0:
            raise ValueError(f"max_drop: expected points, 0 or more, got {max_drop!r}")
        if not int8:
            raise ValueError(f"max_drop: expected int8, which it is held to, got int8=False and {max_drop}")
    if compute_metrics is not None and not callable(compute_metrics):
        raise TypeError(
            "compute_metrics: expected a function as for the Trainer, got "
            f"{type(compute_metrics).__name__}; metric=... names one of its figures"
        )
    has_labels = batches is not None and any(name in batches[0] for name in LABELS)
    settings = {"compute_metrics": compute_metrics, "metric": metric, "max_drop": max_drop}
    given = next((name for name, value in settings.items() if value is not None), None)
    if given and not has_labels:
        got = "no data" if batches is None else f"batches with {sorted(batches[0])}"
        raise ValueError(f"{given}: expected data with labels ({', '.join(LABELS)}), got {got}")


def check_batches(source: Source, batches: Sequence[Mapping[str, Any]]) -> None:
    """Refuse batches that a model cannot take.

    Raises:
        ValueError: what was expected, and what came.
    """
    example = source.batch(1, 2)
    for batch in batches:
        for name, tensor in inputs_of(batch, source.names).items():
            if tensor.dim() != example[name].dim():
                raise ValueError(
                    f"data: expected {name} of {example[name].dim()} axes, first the batch, got "
                    f"shape {tuple(tensor.shape)}; a dataset of single examples must be batched, such as by "
                    "trainer.get_eval_dataloader(dataset)"
                )
            if source.encoder.family.takes_images:
                most, what = example[name].shape[-1], "pixels"
                fits = tensor.shape[1:] == example[name].shape[1:]
            else:
                most, what = most_tokens(source.encoder), "tokens"
                fits = 1 <= tensor.shape[-1] <= most
            if not fits or not len(tensor):
                raise ValueError(
                    f"data: expected {name} with rows of {most} {what} at most, "
                    f"got shape {tuple(tensor.shape)}"
                )
