"""The classes of a table's rows: their names, numbered."""

from __future__ import annotations

from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, concatenate_datasets

#: More classes than this are no classes but numbers, or names that never repeat.
MOST_CLASSES = 1000


def with_classes(data: DatasetDict, label: str) -> tuple[DatasetDict, list[str]]:
    """Data whose label column holds the index of its class, and the classes' names.

    Raises:
        ValueError: there is one class only, or so many that they are no classes.
    """
    kind = data["train"].features[label]
    numbered = isinstance(kind, ClassLabel)
    for name, rows in data.items():
        # Hub data sets have -1 where there is no class.
        empty = sum(value in (None, "") or (numbered and value == -1) for value in rows[label])
        if empty:
            raise ValueError(
                f"data: expected a class in every row, got {empty} rows without one in {label!r} ({name}); "
                "take them out"
            )
    if numbered:
        return _as_numbered(data, label, kind), list(kind.names)
    values = {_stripped(value) for rows in data.values() for value in rows[label]}
    if any(isinstance(value, float) and not value.is_integer() for value in values):
        raise ValueError(
            f"data: expected classes in the column {label!r}, got numbers with fractions; use --task "
            "regression, or name another column as in --column label=NAME"
        )
    # Numbers in their order; "10" behind "9".
    names = check_number_of(
        [str(value) for value in sorted(values, key=lambda x: (isinstance(x, str), x))], label
    )
    check_known(set(names) - {str(_stripped(value)) for value in data["train"][label]}, label)
    places = {name: index for index, name in enumerate(names)}
    numbered = data.map(
        lambda row: {"class of the row": places[str(_stripped(row[label]))]},
        remove_columns=label,
        load_from_cache_file=False,
    )
    return numbered.rename_column("class of the row", label).cast_column(
        label, ClassLabel(names=names)
    ), names


def _as_numbered(data: DatasetDict, label: str, kind: ClassLabel) -> DatasetDict:
    """Data of which each split counts the classes as the training examples do, and not by name."""
    for name, rows in data.items():
        if rows.features[label] == kind:
            continue
        # Of another data set, or of a file: names, or numbers.
        theirs = rows.features[label]
        values = [theirs.int2str(x) for x in rows[label]] if isinstance(theirs, ClassLabel) else rows[label]
        names = [str(_stripped(value)) for value in values]
        if all(each.isdigit() and int(each) < len(kind.names) for each in names):
            names = [kind.names[int(each)] for each in names]
        check_known(set(names) - set(kind.names), label)
        column = Dataset.from_dict({label: [kind.str2int(each) for each in names]}, Features({label: kind}))
        data[name] = concatenate_datasets([rows.remove_columns(label), column], axis=1)
    return data


def _stripped(value: Any) -> Any:
    """A class as it is told apart: a blank around a name makes no other one, nor does the point in 1.0."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value.strip() if isinstance(value, str) else value


def check_known(unknown: set[str], label: str) -> None:
    """Refuse classes that no training example has."""
    if unknown:
        raise ValueError(
            f"test: expected the classes of the training examples in {label!r}, got {sorted(unknown)[:5]}, "
            "too; no model can learn these: take the rows out, or add such rows to the data"
        )


def check_number_of(names: list[str], label: str) -> list[str]:
    """Names of classes as they are; refuses one alone, and so many that they are no classes."""
    if not 2 <= len(names) <= MOST_CLASSES:
        raise ValueError(
            f"data: expected 2 to {MOST_CLASSES} classes in the column {label!r}, got {len(names)} different "
            "values; name another column as in --column label=NAME, or use --task regression"
        )
    return names
