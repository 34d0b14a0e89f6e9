"""The classes of a table's rows: their names, numbered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, concatenate_datasets
from datasets import Sequence as ListOf

#: More classes than this are no classes but numbers, or names that never repeat.
MOST_CLASSES = 1000


def with_classes(data: DatasetDict, label: str) -> tuple[DatasetDict, list[str]]:
    """Data whose label column holds the index of its class, and the classes' names.

    Raises:
        ValueError: there is one class only, or so many that they are no classes.
    """
    numbered = isinstance(data["train"].features[label], ClassLabel)
    for name, rows in data.items():
        values = list(rows[label])
        # Hub data sets have -1 where there is no class.
        empty = sum(value in (None, "") or (numbered and value == -1) for value in values)
        if empty:
            raise ValueError(
                f"data: expected a class in every row, got {empty} rows without one in {label!r} ({name}); "
                "take them out"
            )
        if any(isinstance(value, list) for value in values):
            raise ValueError(
                f"data: expected one class in every row, got lists in {label!r} ({name}); for a class of "
                "every word use --task token-classification, for several of a text the callback in a script "
                "of your own"
            )
        if any(isinstance(value, float) and value % 1 for value in values):
            raise ValueError(
                f"data: expected classes in the column {label!r}, got numbers with fractions; use --task "
                "regression, or name another column as in --column label=NAME"
            )
    return numbered_classes(data, label)


def numbered_classes(data: DatasetDict, label: str) -> tuple[DatasetDict, list[str]]:
    """Data whose label column holds indices of classes, one each or a list of them; and their names.

    Raises:
        ValueError: there is one class only, or so many that they are no classes; or no training example has
            one of the test.
    """
    feature = data["train"].features[label]
    kind = getattr(feature, "feature", feature)
    if isinstance(kind, ClassLabel):
        if not all(rows.features[label] == feature for rows in data.values()):
            data = _as_numbered(_all_named(data, label), label, kind)
        return data, list(kind.names)
    data = _all_named(data, label)
    found = {name: _names_in(rows, label) for name, rows in data.items()}
    names = _check_number_of(_sorted_names(set().union(*found.values())), label)
    _check_known(set(names) - {str(value) for value in found["train"]}, label)
    return _as_numbered(data, label, ClassLabel(names=names)), names


def _all_named(data: DatasetDict, label: str) -> DatasetDict:
    return DatasetDict({name: _named(rows, label) for name, rows in data.items()})


def _named(rows: Dataset, label: str) -> Dataset:
    """Rows whose numbered classes, one each or a list of them, stand there by their names."""
    feature = rows.features[label]
    kind = getattr(feature, "feature", feature)
    if not isinstance(kind, ClassLabel):
        return rows
    values = [_each(kind.int2str, value) for value in rows[label]]
    return _with_column(rows, label, values, Value("string") if kind is feature else ListOf(Value("string")))


def _as_numbered(data: DatasetDict, label: str, kind: ClassLabel) -> DatasetDict:
    """Data whose classes, one each or a list of them, are counted as the training examples count them.

    Args:
        data: with names; or with numbers, where a file has them in their place.
        label: column of the classes.
        kind: their names, in order.

    Raises:
        ValueError: a class is none of these.
    """
    found = DatasetDict()
    for name, rows in data.items():
        values = [_each(lambda value: str(_stripped(value)), value) for value in rows[label]]
        names = set(_flat(values))
        places = {each: index for index, each in enumerate(kind.names)}
        if not names <= set(places) and all(x.isdigit() and int(x) < len(places) for x in names):
            places = {str(index): index for index in range(len(places))}
        _check_known(names - set(places), label)
        feature = ListOf(Value("int64")) if values and isinstance(values[0], list) else kind
        found[name] = _with_column(rows, label, [_each(places.get, value) for value in values], feature)
    return found


def class_names(config: Any) -> list[str]:
    """Names of a model's classes, in its order."""
    return [str(config.id2label[place]) for place in sorted(config.id2label)]


def are_unnamed(names: list[str]) -> bool:
    """Whether classes have the names that transformers gives those that nobody named."""
    return names == [f"LABEL_{place}" for place in range(len(names))]


def in_order(data: DatasetDict, label: str, names: list[str], wanted: list[str]) -> DatasetDict:
    """Data whose classes, one each or a list of them, are counted in another order.

    Args:
        data: with classes counted as `names`.
        label: column of the classes.
        names: of the classes.
        wanted: the same names in the order to count them in.
    """
    places = [wanted.index(name) for name in names]
    found = DatasetDict()
    for name, rows in data.items():
        values = [_each(places.__getitem__, value) for value in rows[label]]
        one = isinstance(rows.features[label], ClassLabel)
        feature = ClassLabel(names=wanted) if one else ListOf(Value("int64"))
        found[name] = _with_column(rows, label, values, feature)
    return found


def _names_in(rows: Dataset, label: str) -> set[Any]:
    """The classes of rows, numbers as such, without blanks around them."""
    return {_stripped(one) for one in _flat(rows[label])}


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """Values, or the entries of those that are lists."""
    for value in values:
        yield from value if isinstance(value, list) else [value]


def _sorted_names(values: Iterable[Any]) -> list[str]:
    """Names of classes in order, numbers first: 10 behind 9. 9 in one file and "9" in another are one."""
    in_order = sorted(values, key=lambda value: (isinstance(value, str), value))
    return list(dict.fromkeys(map(str, in_order)))


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """A value changed, or each of a list."""
    return [change(each) for each in value] if isinstance(value, list) else change(value)


def _with_column(rows: Dataset, name: str, values: list[Any], feature: Any) -> Dataset:
    """Rows with another column in place of one."""
    column = Dataset.from_dict({name: values}, Features({name: feature}))
    return concatenate_datasets([rows.remove_columns(name), column], axis=1)


def _stripped(value: Any) -> Any:
    """A class as it is told apart: a blank around a name makes no other one, nor does the point in 1.0."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value.strip() if isinstance(value, str) else value


def _check_known(unknown: set[str], label: str) -> None:
    """Refuse classes that no training example has."""
    if unknown:
        raise ValueError(
            f"test: expected the classes of the training examples in {label!r}, got {sorted(unknown)[:5]}, "
            "too; no model can learn these: take the rows out, or add such rows to the data"
        )


def _check_number_of(names: list[str], label: str) -> list[str]:
    """Names of classes as they are; refuses one alone, and so many that they are no classes."""
    if not 2 <= len(names) <= MOST_CLASSES:
        raise ValueError(
            f"data: expected 2 to {MOST_CLASSES} classes in the column {label!r}, got {len(names)} different "
            "values; name another column as in --column label=NAME, or use --task regression"
        )
    return names
