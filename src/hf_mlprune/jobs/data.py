"""Rows of a file, a folder or a data set of the hub, split into those to train on and those to test on."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from sklearn.model_selection import train_test_split

from .squad import squad_rows

#: "NA" and "None" are words like others; only an empty cell is empty.
CSV: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
#: Ending of a file -> how `datasets` reads it.
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", CSV),
    ".tsv": ("csv", {**CSV, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
#: What pandas makes of the first field of rows that have more than the header.
INDEX = "__index_level_0__"
#: Splits that a test is taken from, the first that is there and has labels.
TEST_SPLITS = ("test", "validation", "validation_matched", "valid", "val", "dev", "eval")
#: A test that the user named.
GIVEN = "given test"
#: Held-out rows where there is no test: this share, and at most so many.
HELD_OUT, MOST_HELD_OUT = 0.1, 2000


def read_splits(data: str, test: str | None) -> dict[str, Dataset]:
    """All splits that there are, ``train`` among them.

    Args:
        data: a file, a folder with one file per split (``train.csv``, ``test.csv``), or a name of the hub,
            with a configuration behind a colon if it has several (``glue:mrpc``).
        test: a file with the test examples, which are then the one other split.

    Raises:
        FileNotFoundError: there is no such file, and no such data set.
        ValueError: a file of another kind, or one without rows.
    """
    splits = _read(data, "data")
    if "train" not in splits:
        raise ValueError(f"data: expected a split 'train' in {data}, got {list(splits)}")
    if test is None:
        return splits
    found = _read(test, "test")
    return {"train": splits["train"], GIVEN: found["test"] if "test" in found else next(iter(found.values()))}


def divide(
    splits: dict[str, Dataset], *, seed: int, columns: Collection[str], label: str | None = None
) -> DatasetDict:
    """Rows to train on and to test on.

    Args:
        splits: what :func:`read_splits` found. Without a test that was given, one of theirs with labels is
            taken, or rows are held out.
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


def read_any_splits(data: str) -> dict[str, Dataset]:
    """All splits that there are; see :func:`read_splits`."""
    return _read(data, "data")


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


def _read(source: str, argument: str) -> dict[str, Dataset]:
    path = Path(source)
    if path.is_dir():
        files = {file.stem: file for file in sorted(path.iterdir()) if file.suffix.lower() in READERS}
        if not files:
            raise ValueError(
                f"{argument}: expected files such as train.csv in {source} ({', '.join(READERS)}), got none"
            )
        if "train" not in files and len(files) == 1:
            files = {"train": next(iter(files.values()))}
        return {name: _read_file(file, argument) for name, file in files.items()}
    if path.is_file():
        return {"train": _read_file(path, argument)}
    if path.suffix.lower() in READERS or path.is_absolute() or source.startswith((".", "~")):
        raise FileNotFoundError(f"{argument}: expected a file or folder, got {source}, where nothing is")
    name, _, configuration = source.partition(":")
    return dict(load_dataset(name, configuration or None))


def _read_file(file: Path, argument: str) -> Dataset:
    ending = file.suffix.lower()
    if ending not in READERS:
        raise ValueError(f"{argument}: expected a file of {', '.join(READERS)}, got {file}")
    if not file.stat().st_size:
        raise ValueError(f"{argument}: expected rows in {file}, got an empty file")
    reader, options = READERS[ending]
    if ending == ".csv":
        options = {**options, "sep": _separator(file)}
    if options.get("sep") == "\t" and _has_stray_quotes(file):
        options = {**options, "quoting": csv.QUOTE_NONE}
    if ending == ".json" and (rows := squad_rows(file)) is not None:
        return Dataset.from_list(rows)
    try:
        rows = load_dataset(reader, data_files=str(file), split="train", **options)
    except Exception as error:
        cause = error.__cause__ or error
        if "no data" in str(cause):
            raise ValueError(f"{argument}: expected rows in {file}, got a header only") from error
        if isinstance(cause, UnicodeError):
            raise ValueError(
                f"{argument}: expected text in UTF-8 in {file} ({cause}); save the file as UTF-8"
            ) from error
        raise ValueError(
            f"{argument}: expected {reader} in {file}, got what cannot be read: {cause}"
        ) from error
    if reader == "csv" and INDEX in rows.column_names and INDEX not in _header(file):
        raise ValueError(
            f"{argument}: expected as many fields in each row of {file} as its header has, got rows with "
            f"more; put texts that contain {options['sep']!r} into quotation marks"
        )
    return rows


def _separator(file: Path) -> str:
    """What stands between the columns of a header: a comma, if there is one."""
    header = _header(file)
    return next((mark for mark in ",\t;|" if mark in header), ",")


def _header(file: Path) -> str:
    """The first line of a table."""
    with file.open(encoding="utf-8", errors="replace") as stream:
        return stream.readline()


def _has_stray_quotes(file: Path) -> bool:
    """Whether quotation marks in a table with tabs are letters like others, as in GLUE's files.

    So it is if a cell begins with one, and the next one does not end that cell.
    """
    with file.open(encoding="utf-8", errors="replace", newline="") as stream:
        try:
            for _ in csv.reader(stream, delimiter="\t", strict=True):
                pass
        except csv.Error:
            return True
    return False


def _has_labels(rows: Dataset, label: str | None) -> bool:
    """Whether a split is labelled: test sets of the hub often hold -1."""
    if label is None or label not in rows.column_names:
        return label is None
    values = rows[:100][label]
    return any(value not in (-1, None) for value in values)


def _hold_out(rows: Dataset, seed: int, label: str | None) -> tuple[Dataset, Dataset]:
    size = min(MOST_HELD_OUT, max(1, round(HELD_OUT * len(rows))))
    if len(rows) < 2:
        raise ValueError(f"data: expected two rows or more to hold some out as a test, got {len(rows)}")
    values = rows[label] if label is not None else []
    classes = [str(value) for value in values]
    counts = Counter(classes) if values and isinstance(values[0], (str, int)) else Counter()
    # So many of each class as there are of it, where every class has a row for both sides.
    fits = 1 < len(counts) <= size and len(counts) <= len(rows) - size and min(counts.values()) > 1
    train, test = train_test_split(
        range(len(rows)), test_size=size, random_state=seed, stratify=classes if fits else None
    )
    return rows.select(sorted(train)), rows.select(sorted(test))


def find_columns(
    rows: Dataset, roles: dict[str, Sequence[str]], given: dict[str, str], optional: Sequence[str]
) -> dict[str, str]:
    """Which column has which role.

    Args:
        rows: with columns.
        roles: role -> usual names of its column, likely ones first.
        given: role -> column, as the user says.
        optional: roles that need not be there.

    Raises:
        ValueError: a role or column is not known, or a role has no column.
    """
    unknown = sorted(set(given) - set(roles))
    if unknown:
        raise ValueError(f"column: expected one of {list(roles)} for this task, got {unknown}")
    for role, name in given.items():
        if name not in rows.column_names:
            raise ValueError(f"column: expected one of {rows.column_names} for {role}, got {name!r}")
    if len(set(given.values())) < len(given):
        raise ValueError(f"column: expected another column for each role, got {given}")
    found = dict(given)
    by_lower = {name.strip().lower(): name for name in rows.column_names}
    for role, usual in roles.items():
        taken = set(found.values())
        column = next((by_lower[n] for n in usual if n in by_lower and by_lower[n] not in taken), None)
        if role not in found and column is not None:
            found[role] = column
    missing = [role for role in roles if role not in found and role not in optional]
    if missing:
        free = next((name for name in rows.column_names if name not in found.values()), "NAME")
        raise ValueError(
            f"column: no column of {rows.column_names} looks like {missing[0]!r}; say which it is, as in "
            f"--column {missing[0]}={free}; the first line of a CSV file must have the names of the columns"
        )
    return {role: found[role] for role in roles if role in found}
