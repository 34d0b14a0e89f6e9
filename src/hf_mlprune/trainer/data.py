"""What is known of the data of a run before it begins."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils import is_datasets_available

from ..distillation.hooks import TARGETS

#: What data collators take labels from.
LABEL_COLUMNS = ("label", "label_ids")
#: Rows that are looked at, at most.
SAMPLED_ROWS = 1000


def has_no_labels(dataloader: Any, args: TrainingArguments) -> bool:
    """Whether the data of a run are known to have no labels.

    Args:
        dataloader: of the training data, with columns as those of `datasets`; others are not known.
        args: may name the labels.
    """
    columns = getattr(getattr(dataloader, "dataset", None), "column_names", None)
    labels = {*TARGETS, *LABEL_COLUMNS, *(args.label_names or ())}
    return isinstance(columns, list) and not labels & set(columns)


def micro_batches(args: TrainingArguments, state: TrainerState, dataloader: Any, first: int) -> int:
    """Micro-batches of the coming optimizer step: the last one of an epoch may have fewer than the others.

    Args:
        args: of the run.
        state: of the run.
        dataloader: of the training data.
        first: steps that were done when an epoch began.
    """
    usual = int(args.gradient_accumulation_steps)
    if usual == 1 or not has_length(dataloader):
        return usual
    batches: int = len(dataloader)
    steps = -(-batches // usual)
    is_last = (int(state.global_step) - first) % steps == steps - 1
    return batches - (steps - 1) * usual if is_last else usual


def typical_length(dataset: Any) -> int | None:
    """Median number of tokens of a sequence, padding aside.

    Args:
        dataset: the training data.

    Returns:
        ``None`` where it is not known: the data are no `datasets.Dataset` with lists of numbers in a column
        ``input_ids``.
    """
    # Without that package there is none of its data.
    if not is_datasets_available():
        return None
    import datasets

    if not isinstance(dataset, datasets.Dataset) or "input_ids" not in dataset.column_names:
        return None
    if not len(dataset):
        return None
    rows = range(0, len(dataset), -(-len(dataset) // SAMPLED_ROWS))
    sample = dataset.with_format(None).select(rows)
    masked = "attention_mask" in dataset.column_names
    try:
        lengths = [
            sum(sequence) if masked else len(sequence)
            for row in sample["attention_mask" if masked else "input_ids"]
            for sequence in _sequences(row)
        ]
    except TypeError:
        return None
    # A mask of anything but 0 and 1 says nothing of lengths.
    fits = bool(lengths) and all(type(length) is int and length > 0 for length in lengths)
    return int(np.median(lengths)) if fits else None


def _sequences(row: Any) -> list[Any]:
    """The lists of numbers in a row: one, or several where a row holds choices."""
    if not isinstance(row, list):
        raise TypeError
    return [found for part in row for found in _sequences(part)] if isinstance(row[0], list) else [row]
