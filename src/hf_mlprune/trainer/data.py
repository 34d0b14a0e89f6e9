"""What is known of the data of a run before it begins."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import TrainingArguments
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


def typical_length(dataloader: Any) -> int | None:
    """Median number of tokens of a row, padding aside.

    Args:
        dataloader: of the training data.

    Returns:
        ``None`` where it is not known: the data are no `datasets.Dataset` with a column ``input_ids``.
    """
    dataset = getattr(dataloader, "dataset", None)
    # Without that package there is none of its data.
    if not is_datasets_available():
        return None
    import datasets

    if not isinstance(dataset, datasets.Dataset) or "input_ids" not in dataset.column_names:
        return None
    if not len(dataset):
        return None
    rows = range(0, len(dataset), -(-len(dataset) // SAMPLED_ROWS))
    column = "attention_mask" if "attention_mask" in dataset.column_names else "input_ids"
    values = dataset.with_format(None).select(rows)[column]
    return int(np.median([np.sum(row) if column == "attention_mask" else len(row) for row in values]))
