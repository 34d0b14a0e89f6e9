"""Rows of a file, a folder or a data set of the hub, by their splits."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset, load_from_disk

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
#: Files that `save_to_disk` of one split, or of several, leaves in its folder.
SAVED = ("state.json", "dataset_dict.json")
#: What pandas makes of the first field of rows that have more than the header.
INDEX = "__index_level_0__"
#: A test that the user named.
GIVEN = "given test"


def read_splits(data: str, test: str | None) -> dict[str, Dataset]:
    """All splits that there are, ``train`` among them.

    Args:
        data: a file, a folder with one file per split (``train.csv``, ``test.csv``) or of
            ``save_to_disk``, or a name of the hub, with a configuration behind a colon if it has several
            (``glue:mrpc``).
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


def read_any_splits(data: str) -> dict[str, Dataset]:
    """All splits that there are; see :func:`read_splits`."""
    return _read(data, "data")


def _read(source: str, argument: str) -> dict[str, Dataset]:
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, argument)
    if path.is_file():
        return {"train": _read_file(path, argument)}
    if path.suffix.lower() in READERS or path.is_absolute() or source.startswith((".", "~")):
        raise FileNotFoundError(f"{argument}: expected a file or folder, got {source}, where nothing is")
    name, _, configuration = source.partition(":")
    return dict(load_dataset(name, configuration or None))


def _read_folder(folder: Path, argument: str) -> dict[str, Dataset]:
    if any((folder / name).is_file() for name in SAVED):
        found = load_from_disk(folder)
        return {"train": found} if isinstance(found, Dataset) else dict(found)
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in READERS:
            continue
        if file.stem in files:
            raise ValueError(
                f"{argument}: expected one file for each split in {folder}, got {files[file.stem].name} and "
                f"{file.name}; name one of them"
            )
        files[file.stem] = file
    if not files:
        raise ValueError(
            f"{argument}: expected files such as train.csv in {folder} ({', '.join(READERS)}), got none"
        )
    if "train" not in files and len(files) == 1:
        files = {"train": next(iter(files.values()))}
    return {name: _read_file(file, argument) for name, file in files.items()}


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
