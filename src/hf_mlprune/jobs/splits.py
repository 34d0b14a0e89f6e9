"""Which rows a job trains on, and which it tests on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from sklearn.model_selection import train_test_split

from .data import GIVEN

#: Splits that a test is taken from, the first that is there and has labels.
TEST_SPLITS = ("test", "validation", "validation_matched", "valid", "val", "dev", "eval")
#: Held-out rows where there is no test: this share, and at most so many.
HELD_OUT, MOST_HELD_OUT = 0.1, 2000


def divide(
    splits: dict[str, Dataset], *, seed: int, columns: Collection[str], label: str | None = None
) -> DatasetDict:
    """Rows to train on and to test on.

    Args:
        splits: what :func:`~hf_mlprune.jobs.data.read_splits` found. Without a test that was given, one of
            theirs with labels is taken, or rows are held out.
        seed: of held-out rows.
        columns: that the task reads.
        label: column that held-out rows are stratified by, if its values are classes.

    Returns:
        Splits ``train`` and ``test``.

    Raises:
        ValueError: there are no rows, or a split lacks a column.
    """
    train = splits["train"]
    named = _test_split(splits, label)
    if GIVEN in splits:
        held_out = splits[GIVEN]
    elif named is not None:
        held_out = splits[named]
    else:
        train, held_out = _hold_out(train, seed, label)
    for name, rows in (("data", train), ("test", held_out)):
        if not len(rows):
            raise ValueError(f"{name}: expected rows, got none")
    missing = sorted(set(columns) - set(held_out.column_names))
    if missing:
        raise ValueError(f"test: expected the columns of the data, got none named {missing}")
    return DatasetDict({"train": train, "test": held_out})


def rows_to_judge(splits: dict[str, Dataset], label: str | None) -> Dataset:
    """Rows to measure on where nothing is trained: the first test with labels, or the only split.

    Raises:
        ValueError: there is no such split, or it has no rows.
    """
    named = _test_split(splits, label)
    if named is None and len(splits) > 1:
        raise ValueError(
            f"data: expected a split {', '.join(TEST_SPLITS)} with labels, got {list(splits)}; name the file"
        )
    rows = next(iter(splits.values())) if named is None else splits[named]
    if not len(rows):
        raise ValueError("data: expected rows, got none")
    return rows


def _test_split(splits: dict[str, Dataset], label: str | None) -> str | None:
    return next((name for name in TEST_SPLITS if name in splits and _has_labels(splits[name], label)), None)


def _has_labels(rows: Dataset, label: str | None) -> bool:
    """Whether a split is labelled: test sets of the hub often hold -1, or answers of which there are none."""
    if label is None or label not in rows.column_names:
        return label is None
    return any(value not in (-1, None, "") and not _is_empty(value) for value in rows[:100][label])


def _is_empty(value: Any) -> bool:
    """Whether a label is a list, or are lists by name, without an entry."""
    return not any(value.values()) if isinstance(value, dict) else isinstance(value, list) and not value


def _hold_out(rows: Dataset, seed: int, label: str | None) -> tuple[Dataset, Dataset]:
    """Split rows at random. Each class keeps a row to train on: no model learns one that it never saw."""
    if len(rows) < 2:
        raise ValueError(f"data: expected two rows or more to hold some out as a test, got {len(rows)}")
    size = min(MOST_HELD_OUT, max(1, round(HELD_OUT * len(rows))))
    values = list(rows[label]) if label is not None else []
    kept = _one_of_each([_classes(value) for value in values], seed)
    free = [row for row in range(len(rows)) if row not in kept]
    if len(free) < size:
        # Nearly every row has a value of its own: these are no classes.
        free = list(range(len(rows)))
    test = free
    if len(free) > size:
        strata = _strata([values[row] for row in free] if values else [], size)
        _, test = train_test_split(free, test_size=size, random_state=seed, stratify=strata)
    return rows.select(sorted(set(range(len(rows))) - set(test))), rows.select(sorted(test))


def _classes(value: Any) -> set[str]:
    """The classes of a row, one or a list of them; none of a number or of an answer."""
    each = value if isinstance(value, list) else [value]
    return {str(one) for one in each} if all(isinstance(one, (str, int)) for one in each) else set()


def _one_of_each(classes: list[set[str]], seed: int) -> set[int]:
    """Rows, drawn at random, that hold each class at least once."""
    kept, seen = set(), set[str]()
    for row in np.random.default_rng(seed).permutation(len(classes)).tolist():
        if not classes[row] <= seen:
            kept.add(row)
            seen |= classes[row]
    return kept


def _strata(values: list[Any], size: int) -> list[str] | None:
    """What rows are stratified by, so that as many of each class are held out as there are of it.

    Args:
        values: of each row.
        size: number of rows to hold out.

    Returns:
        The class of each row; those of one row go with the largest. ``None`` if there are no classes, or
        more than rows on a side.
    """
    if not values or not isinstance(values[0], (str, int)):
        return None
    counts = Counter(map(str, values))
    largest = counts.most_common(1)[0][0]
    strata = [value if counts[value] > 1 else largest for value in map(str, values)]
    number = len(set(strata))
    return strata if 1 < number <= min(size, len(values) - size) else None
