"""Everything of a job before its first step: data, columns, tokenizer, and whether to fine-tune."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import DatasetDict
from transformers import AutoTokenizer, PreTrainedModel

from ..attaching import attach
from ..families import FAMILIES, UNSUPPORTED, family_of, read_config
from ..latency_table import measured_table
from ..loop import start
from ..modeling.checkpoint import keep_present_names
from ..modeling.family import Family
from ..part_times import MEASURING
from ..processors import reading_processor
from ..trainer.data import typical_length
from .classes import are_unnamed, class_names, in_order
from .data import read_splits
from .plan import Job, Say
from .question_answering import QuestionAnswering
from .sentences import check_sentence_package
from .splits import divide
from .tasks import Embeddings, Regression, Task, TextClassification
from .token_classification import TokenClassification
from .words import word_tokenizer

#: Least steps, so that small data are learned and pruned as well.
LEAST_FINE_TUNING, LEAST_PRUNING = 200, 400
#: Models of so many features are fine-tuned with smaller steps.
LARGE = 512
#: Pruning takes larger steps than fine-tuning; not so large where this density or a higher one is asked for
#: (docs/accuracy.md has the measurements).
PRUNING_OVER_FINE_TUNING, WHERE_MUCH_STAYS, MUCH = 6, 2, 0.5
TIMED_STEPS = 3

TASKS: dict[str, type[Task]] = {
    "text-classification": TextClassification,
    "regression": Regression,
    "token-classification": TokenClassification,
    "question-answering": QuestionAnswering,
    "embeddings": Embeddings,
}


@dataclass(frozen=True)
class Prepared:
    """A job that can begin.

    Attributes:
        job: its arguments.
        task: with columns and classes.
        data: rows, splits ``train`` and ``test``.
        tokens: the same as a model reads them.
        tokenizer: of the model.
        longest: tokens at which examples are cut.
        fine_tune: whether to fine-tune first.
        why: why that is so.
        steps: of fine-tuning and of pruning.
        rates: learning rates of both.
    """

    job: Job
    task: Task
    data: DatasetDict
    tokens: DatasetDict
    tokenizer: Any
    longest: int
    fine_tune: bool
    why: str
    steps: tuple[int, int]
    rates: tuple[float, float]

    def model(self, folder: str) -> PreTrainedModel:
        """A model with the head of the task."""
        # A head of other classes is drawn anew: such a model is fine-tuned first.
        model: PreTrainedModel = self.task.auto.from_pretrained(
            folder, ignore_mismatched_sizes=self.fine_tune, **self.task.model_arguments()
        )
        # Else a checkpoint is written under the names of old files, which a resumed Trainer does not find.
        keep_present_names(model)
        return model


def prepare(job: Job) -> Prepared:
    """Read the data and look at the model.

    Raises:
        ValueError: an argument, or data that do not fit.
        TypeError: a model that cannot be pruned.
        OSError: model or data cannot be read.
    """
    if job.task not in TASKS:
        raise ValueError(f"task: expected one of {list(TASKS)}, got {job.task!r}")
    config = read_config(job.model, "model: expected a folder")
    _family_of(config)
    splits = read_splits(job.data, job.test)
    task = TASKS[job.task](splits["train"], job.columns)
    if task.teaches_itself:
        check_sentence_package(job.model)
    columns = task.columns.values()
    data = task.prepare(divide(splits, seed=job.seed, columns=columns, label=task.label_column))
    names = class_names(config)
    if task.labels is not None and task.label_column is not None and sorted(names) == sorted(task.labels):
        # As the model counts them: so it need not learn them anew.
        data, task.labels = in_order(data, task.label_column, task.labels, names), names
    tokenizer = load_tokenizer(job.model, task)
    longest = longest_row(job.max_length, task, tokenizer, config)
    tokens = task.keep(data, tokenized(task, data, tokenizer, longest))
    fine_tune, why = _must_fine_tune(job, task, config)
    size = len(tokens["train"])
    per_epoch = math.ceil(size / job.batch_size)
    steps = (
        job.fine_tune_steps or max(LEAST_FINE_TUNING, math.ceil(job.fine_tune_epochs * per_epoch)),
        job.steps or max(LEAST_PRUNING, math.ceil(job.epochs * per_epoch)),
    )
    rate = job.fine_tune_learning_rate or (5e-5 if config.hidden_size >= LARGE else 1e-4)
    density = job.config().with_target(0).density  # of several, the largest
    much = density is not None and density >= MUCH
    times = WHERE_MUCH_STAYS if much else PRUNING_OVER_FINE_TUNING
    rates = (rate, job.learning_rate or task.pruning_rate or times * rate)
    if not fine_tune:
        steps = (0, steps[1])
    return Prepared(job, task, data, tokens, tokenizer, longest, fine_tune, why, steps, rates)


def _family_of(config: Any) -> Family:
    """The family of a dense or pruned model.

    Raises:
        TypeError: it is of none.
    """
    family = family_of(config)
    if family is not None:
        return family
    why = UNSUPPORTED.get(config.model_type)
    raise TypeError(
        f"model: expected one of a known family ({', '.join(family.name for family in FAMILIES)}), got "
        f"{config.model_type!r}{f': {why}' if why else ''}"
    )


def tokenized(task: Task, data: DatasetDict, tokenizer: Any, length: int) -> DatasetDict:
    """Rows as a model reads them."""
    # Each split by itself: they may be of different formats.
    return DatasetDict(
        {
            name: part.map(
                partial(task.tokenize, tokenizer=tokenizer, max_length=length),
                batched=True,
                remove_columns=part.column_names,
                load_from_cache_file=False,
            )
            for name, part in data.items()
        }
    )


def load_tokenizer(source: str, task: Task) -> Any:
    """The tokenizer of a model, as the task needs it."""
    with reading_processor(source):
        return word_tokenizer(source) if task.reads_words else AutoTokenizer.from_pretrained(source)


def longest_row(max_length: int | None, task: Task, tokenizer: Any, config: Any) -> int:
    """Tokens at which examples are cut: those asked for, or the task's; at most what the model takes."""
    most = _family_of(config).config.config_fields.most_tokens(config)
    return int(min(max_length or task.max_length, tokenizer.model_max_length, most))


def _must_fine_tune(job: Job, task: Task, config: Any) -> tuple[bool, str]:
    """Whether the model was not fine-tuned on this task, and how that is known."""
    if task.teaches_itself:
        return False, "embeddings need none: the model is its own teacher"
    architecture = (config.architectures or ["none"])[0]
    ending = task.auto.__name__.removeprefix("AutoModel")
    has_head = architecture.endswith(ending)
    if job.fine_tune is False and not has_head:
        raise ValueError(
            f"fine_tune: expected a model with a head for the task {job.task!r} where it is not fine-tuned, "
            f"got a {architecture}; let it be fine-tuned"
        )
    if job.fine_tune is not None:
        return job.fine_tune, "as you say"
    if not has_head:
        return True, f"the model is a {architecture}, without a head for this task"
    names = class_names(config)
    kind, wanted = config.problem_type, task.model_arguments().get("problem_type")
    if wanted == "regression" and config.num_labels != 1:
        return True, f"the model is a {architecture} of classes, the data have numbers"
    if wanted == "single_label_classification" and kind not in (None, wanted):
        return True, f"the model was made for {kind.replace('_', ' ')}, the data have one class per row"
    if task.labels is not None and names != task.labels:
        if len(names) == len(task.labels) and are_unnamed(names):
            return False, f"the model is a {architecture} with {len(names)} unnamed classes"
        return True, f"the model's classes are {names[:5]}, those of the data {task.labels[:5]}"
    return False, f"the model is a {architecture} for these classes"


def check_reachable(prepared: Prepared, say: Say) -> dict[str, Any] | None:
    """Refuse a target that the model cannot be pruned to, before it is fine-tuned; times are measured for it.

    Args:
        prepared: the job.
        say: is told that times are measured.

    Returns:
        The table of these times, by which the run must count, too: measured again they differ. ``None`` if
        the target is none of time, or has a table already.

    Raises:
        ValueError: says what the least is, or how many steps it takes.
    """
    config = prepared.job.config()
    # Times are of the device that trains.
    model = prepared.model(prepared.job.model).to(PartialState().device)
    attach(model, config)
    if config.measures_times:
        say(MEASURING)
    start(model, prepared.steps[1], length=typical_length(prepared.tokens["train"]))
    return measured_table(model) if config.latency_table is None else None


def describe(prepared: Prepared) -> dict[str, Any]:
    """What would happen, in numbers; the time is that of a few steps of the dense model, times the steps."""
    job, tokens = prepared.job, prepared.tokens
    lengths = np.array([len(row) for row in tokens["train"]["input_ids"]])
    cut = _cut(prepared, lengths)
    seconds = _step_seconds(prepared)
    labels = prepared.task.labels
    rates = dict(zip(("fine-tuning", "pruning"), prepared.rates, strict=True))
    if not prepared.fine_tune:
        del rates["fine-tuning"]
    return {
        "model": job.model,
        "task": job.task,
        "target": "{}={}".format(*prepared.job.config().target),
        "examples": {name: len(part) for name, part in prepared.data.items()},
        "columns": prepared.task.columns,
        **({} if labels is None else {"classes": _classes_of(prepared, labels)}),
        "tokens": {
            "median": int(np.median(lengths)),
            "95 %": int(np.quantile(lengths, 0.95)),
            **({} if cut is None else {f"examples cut at {prepared.longest}": f"{cut:.1%}"}),
        },
        "fine-tuning": f"{prepared.steps[0]} steps" if prepared.fine_tune else "none",
        "because": prepared.why,
        "pruning": f"{prepared.steps[1]} steps",
        "batch size": job.batch_size,
        "learning rates": {name: float(f"{rate:g}") for name, rate in rates.items()},
        "device": "GPU" if torch.cuda.is_available() else "CPU",
        "about minutes": round(sum(prepared.steps) * seconds / 60, 1),
    }


def _cut(prepared: Prepared, lengths: np.ndarray[Any, Any]) -> float | None:
    """Share of the training examples that are longer than a row; ``None`` where windows lose nothing.

    Args:
        prepared: the job.
        lengths: tokens of each training example, ``(examples,)``.
    """
    if isinstance(prepared.task, QuestionAnswering):
        return None
    full = prepared.data["train"].select(np.flatnonzero(lengths >= prepared.longest))
    if not len(full):
        return 0.0
    whole = tokenized(prepared.task, DatasetDict({"train": full}), prepared.tokenizer, prepared.longest + 1)
    return sum(len(row) > prepared.longest for row in whole["train"]["input_ids"]) / len(lengths)


def _classes_of(prepared: Prepared, labels: list[str]) -> dict[str, Any]:
    """How many there are, and how many training examples, or words, of the largest and smallest."""
    values = prepared.data["train"][prepared.task.columns["label"]]
    of_words = isinstance(values[0], list)
    flat = [value for row in values for value in row] if of_words else list(values)
    counts = np.bincount(np.asarray(flat), minlength=len(labels))
    by_size = sorted(zip(labels, counts.tolist(), strict=True), key=lambda pair: -pair[1])
    few = by_size if len(by_size) <= 20 else [*by_size[:10], ("...", len(by_size) - 20), *by_size[-10:]]
    return {"number": len(labels), "words of each" if of_words else "examples of each": dict(few)}


def _step_seconds(prepared: Prepared) -> float:
    """Seconds of a dense step, forward and backward; the first one, which sets up, is not counted."""
    model = prepared.model(prepared.job.model).train()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    collate = prepared.task.collator(prepared.tokenizer)
    rows = prepared.tokens["train"]
    took = []
    for step in range(TIMED_STEPS + 1):
        places = [(step * prepared.job.batch_size + i) % len(rows) for i in range(prepared.job.batch_size)]
        batch: Mapping[str, torch.Tensor] = collate([rows[place] for place in places])
        began = time.perf_counter()
        out = model(**{name: x.to(model.device) for name, x in batch.items()})
        loss = out.loss if "loss" in out else out.last_hidden_state.square().mean()
        loss.backward()
        took.append(time.perf_counter() - began)
    return float(np.median(took[1:]))
