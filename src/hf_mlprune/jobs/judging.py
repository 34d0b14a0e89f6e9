"""Labelled rows of a file, as an export of a fine-tuned model is judged by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict

from ..exporting.metric import IGNORED, ComputeMetrics
from ..families import read_config
from ..reports.folder import JOB, read_stored
from .classes import are_unnamed, class_names
from .data import read_any_splits
from .preparing import TASKS, load_tokenizer, longest_row, tokenized
from .splits import rows_to_judge
from .tasks import Regression, Task, TextClassification

ROWS_OF_BATCH = 64


@dataclass(frozen=True)
class Labelled:
    """What :func:`~hf_mlprune.export` takes to measure the quality; its fields are that function's arguments.

    Attributes:
        data: batches with labels.
        compute_metrics: as for the Trainer.
        metric: which of its figures counts.
    """

    data: list[Mapping[str, Any]]
    compute_metrics: ComputeMetrics
    metric: str

    @property
    def arguments(self) -> dict[str, Any]:
        """As keywords of the function."""
        return {"data": self.data, "compute_metrics": self.compute_metrics, "metric": self.metric}


def read_labelled(
    model: str, data: str, columns: Mapping[str, str] | None = None, max_length: int | None = None
) -> Labelled:
    """Read the rows that a fine-tuned model is judged by.

    Args:
        model: its folder or hub name. Its architecture says which task it is for.
        data: as for :func:`~hf_mlprune.jobs.prune`. Of several splits the first test with labels is taken.
        columns: role -> column, where the columns have other names. By default those of the job that wrote
            the model, as far as the data have them.
        max_length: most tokens of a row; by default that of the job that wrote the model, or of the task.

    Raises:
        ValueError: a model without a head for a task, or data that do not fit.
        OSError: model or data cannot be read.
    """
    config = read_config(model, "folder: expected that of a model")
    kind = _task_of(config)
    splits = read_any_splits(data)
    first, job = next(iter(splits.values())), (read_stored(model, JOB) or {}).get("job", {})
    usual = {role: name for role, name in job.get("columns", {}).items() if name in first.column_names}
    task = kind(first, {**usual, **(columns or {})})
    rows = rows_to_judge(splits, task.label_column)
    # Where there is nothing to train on, tasks read the one split as both.
    both = task.prepare(DatasetDict({"train": rows, "test": rows}))
    test = DatasetDict({"test": both["test"]})
    tokenizer = load_tokenizer(model, task)
    length = longest_row(max_length or job.get("max_length"), task, tokenizer, config)
    tokens = task.keep(test, tokenized(task, test, tokenizer, length))["test"]
    if task.labels is not None:
        tokens = _as_of_model(tokens, task.labels, config)
        # Figures depend on how many classes there are.
        task.labels = class_names(config)
    collate = task.collator(tokenizer)
    batches = [
        collate([tokens[place] for place in range(first, min(first + ROWS_OF_BATCH, len(tokens)))])
        for first in range(0, len(tokens), ROWS_OF_BATCH)
    ]
    return Labelled(batches, task.compute_metrics, task.metrics[0])


def _task_of(config: Any) -> type[Task]:
    """The task that a model has a head for."""
    architecture = (config.architectures or ["none"])[0]
    if config.problem_type == "multi_label_classification":
        raise ValueError(
            "data: expected a model with one class per row, got one with several; call export from "
            "Python, with a compute_metrics of your own"
        )
    judged = {name: kind for name, kind in TASKS.items() if not kind.teaches_itself}
    for kind in judged.values():
        if architecture.endswith(kind.auto.__name__.removeprefix("AutoModel")):
            # Classes and numbers for texts have the same head.
            return Regression if kind is TextClassification and _is_number(config) else kind
    heads = ", ".join(judged)
    raise ValueError(
        f"data: expected a model that was fine-tuned for one of {heads}, got a {architecture}, "
        "whose quality cannot be told from a table; leave the data out"
    )


def _is_number(config: Any) -> bool:
    """Whether a model of texts puts out a number in place of classes."""
    return bool(config.problem_type == "regression" or config.num_labels == 1)


def _as_of_model(tokens: Dataset, names: list[str], config: Any) -> Dataset:
    """Rows whose labels are counted as the model counts its classes: a table may lack some of them."""
    known = class_names(config)
    if set(names) <= set(known):
        places = [known.index(name) for name in names]
    elif all(name.isdigit() and int(name) < len(known) for name in names):
        places = [int(name) for name in names]
    elif are_unnamed(known) and len(names) == len(known):
        places = list(range(len(names)))
    else:
        unknown = sorted(set(names) - set(known))
        raise ValueError(
            f"data: expected the classes of the model ({', '.join(known[:8])}) or their numbers, got "
            f"{unknown[:5]}, too; take these rows out, or name another column as in --column label=NAME"
        )

    def renumbered(row: dict[str, Any]) -> dict[str, Any]:
        labels = row["labels"]
        if isinstance(labels, list):
            return {"labels": [IGNORED if place < 0 else places[place] for place in labels]}
        return {"labels": places[labels]}

    return tokens.map(renumbered, load_from_cache_file=False)
