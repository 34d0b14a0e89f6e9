"""What is known of the data of a run before it begins."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils import is_datasets_available

from ..distillation.hooks import TARGETS
from ..proof import fixed_random_state

#: What data collators take labels from.
LABEL_COLUMNS = ("label", "label_ids")
#: Parameters that say no name.
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
#: Rows that are looked at, at most.
SAMPLED_ROWS = 1000


def has_no_labels(model: nn.Module, dataloader: Any, args: TrainingArguments) -> bool:
    """Whether the data of a run are known to have no labels, by the names in their first row.

    Numbers under a name that the model does not take may be labels that the script's own loss reads.

    Args:
        model: what the data go to.
        dataloader: of the training data; rows that are no mappings are not known.
        args: may name the labels.
    """
    row = _first_row(getattr(dataloader, "dataset", None))
    labels = {*TARGETS, *LABEL_COLUMNS, *(args.label_names or ())}
    if row is None or labels & set(row):
        return False
    taken = inspect.signature(type(model).forward).parameters.values()
    names = {parameter.name for parameter in taken if parameter.kind not in VARIADIC} - {"self"}
    return not names or all(name in names or _is_text(value) for name, value in row.items())


def _first_row(dataset: Any) -> Mapping[str, Any] | None:
    """A row as the collator gets it, if it is a mapping; what is drawn on the way is drawn again later."""
    with fixed_random_state(torch.device("cpu")):
        try:
            if isinstance(dataset, IterableDataset):
                # Those of torch need not begin anew; those of `datasets` do.
                row = next(iter(dataset.take(1))) if hasattr(dataset, "take") else None
            else:
                row = dataset[0]
        except (LookupError, TypeError, StopIteration):
            # Empty, or of other keys than numbers.
            return None
    return row if isinstance(row, Mapping) else None


def _is_text(value: Any) -> bool:
    """Whether a value is a string, or lists of strings."""
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and all(map(_is_text, value)))


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
    # A mask of anything but 0 and 1 says nothing of lengths. Empty rows say nothing of those of the others.
    fits = all(type(length) is int and length >= 0 for length in lengths)
    lengths = [length for length in lengths if length]
    return int(np.median(lengths)) if fits and lengths else None


def _sequences(row: Any) -> list[Any]:
    """The lists of numbers in a row: one, or several where a row holds choices."""
    if not isinstance(row, list):
        raise TypeError
    nested = bool(row) and isinstance(row[0], list)
    return [found for part in row for found in _sequences(part)] if nested else [row]
