"""The data of `accuracy.py`: six tasks, tokenized, with their metric.

A folder of data has one folder per task: `SST-2`, `CoLA`, `MRPC` (GLUE's files with a header), `banking77`,
`SQuAD` (version 1.1, in its JSON form) and `GoogleTN` (one JSON object per line: `tokens`, `class`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
)

from hf_mlprune.jobs.question_answering import plain_answer, word_f1
from hf_mlprune.jobs.squad import squad_rows

#: Of SST-2's training sentences, the first so many of a fixed order.
SST2_SENTENCES = 20_000
#: Share of the training rows that a held-back slice has.
HELD_BACK = 0.1
MOST_ANSWER_TOKENS = 30


@dataclass(frozen=True)
class Plan:
    """How a task is trained.

    Attributes:
        teacher_steps: of the fine-tune that the teacher is.
        steps: of pruning.
        dense_rate: learning rate of dense fine-tunes, the teacher among them; chosen on held-back rows.
        batch: examples per step.
        length: most tokens of a row.
    """

    teacher_steps: int
    steps: int
    dense_rate: float = 1e-4
    batch: int = 32
    length: int = 64


@dataclass(frozen=True)
class Task:
    """One task, ready to train on.

    Attributes:
        train: tokenized rows.
        test: tokenized rows that are reported; a slice of the training rows, if that was asked for.
        auto: the Auto class.
        labels: names of the classes; none where spans are answers.
        collator: of batches.
        metric: name of the primary metric.
        compute: predictions -> metrics, 0 to 100.
    """

    train: Dataset
    test: Dataset
    auto: Any
    labels: Sequence[str]
    collator: Any
    metric: str
    compute: Callable[[EvalPrediction], dict[str, float]]


def load_task(name: str, data: Path, tokenizer: PreTrainedTokenizerBase, *, held_back: bool) -> Task:
    """Read and tokenize a task.

    Args:
        name: of :data:`PLANS`.
        data: folder that holds the folder of the task.
        tokenizer: of the model.
        held_back: whether to measure on a slice of the training rows, which are not trained on then. For
            choosing settings.
    """
    return LOADERS[name](data / name, tokenizer, PLANS[name].length, held_back)


def _split(train: Dataset, test: Dataset, held_back: bool) -> tuple[Dataset, Dataset]:
    if not held_back:
        return train, test
    parts = train.train_test_split(test_size=HELD_BACK, seed=0)
    return parts["train"], parts["test"]


def _sequences(
    folder: Path, tokenizer: Any, length: int, held_back: bool, *, metric: str, test_file: str = "dev.tsv"
) -> Task:
    """One class for each row of one or two sentences."""
    splits, names = [], None
    for file in ("train.tsv", test_file):
        lines = (folder / file).read_text(encoding="utf-8").splitlines()
        *texts, last = lines[0].split("\t")
        if last != "label" or not 1 <= len(texts) <= 2:
            raise SystemExit(f"{folder / file}: expected one or two texts and a label, got {lines[0]!r}")
        rows = [line.split("\t") for line in lines[1:]]
        if file == "train.tsv" and folder.name == "SST-2":
            chosen = np.random.default_rng(0).permutation(len(rows))[:SST2_SENTENCES]
            rows = [rows[index] for index in chosen]
        *columns, labels = zip(*rows, strict=True)
        # Of the training rows: both splits have all of them.
        names = names or sorted(set(labels))
        tokens = tokenizer(*[list(column) for column in columns], truncation=True, max_length=length)
        splits.append(Dataset.from_dict({**tokens, "labels": [names.index(label) for label in labels]}))
    assert names is not None

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        found, wanted = prediction.predictions.argmax(-1), prediction.label_ids
        metrics = {"accuracy": accuracy_score(wanted, found)}
        if len(names) == 2:
            metrics |= {"f1": f1_score(wanted, found), "matthews": matthews_corrcoef(wanted, found)}
        return {name: 100 * float(value) for name, value in metrics.items()}

    train, test = _split(*splits, held_back)
    collator = DataCollatorWithPadding(tokenizer)
    return Task(train, test, AutoModelForSequenceClassification, names, collator, metric, compute)


def _tags(folder: Path, tokenizer: Any, length: int, held_back: bool) -> Task:
    """A class for each word; only its first token counts."""
    rows = {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text("utf-8").splitlines()]
        for split in ("train", "test")
    }
    names = sorted({tag for row in rows["train"] for tag in row["class"]})
    splits = []
    for split in rows.values():
        words = [row["tokens"] for row in split]
        tokens = tokenizer(words, is_split_into_words=True, truncation=True, max_length=length)
        labels = []
        for index, row in enumerate(split):
            places = tokens.word_ids(index)
            first = [place is not None and place not in places[:at] for at, place in enumerate(places)]
            labels.append(
                [
                    # A class that training rows lack cannot be told.
                    names.index(row["class"][place]) if counts and row["class"][place] in names else -100
                    for place, counts in zip(places, first, strict=True)
                ]
            )
        splits.append(Dataset.from_dict({**tokens, "labels": labels}))

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        counted = prediction.label_ids != -100
        found, wanted = prediction.predictions.argmax(-1)[counted], prediction.label_ids[counted]
        macro = f1_score(wanted, found, average="macro", labels=sorted(set(wanted.tolist())))
        return {"macro_f1": 100 * float(macro), "accuracy": 100 * float(accuracy_score(wanted, found))}

    train, test = _split(*splits, held_back)
    collator = DataCollatorForTokenClassification(tokenizer)
    return Task(train, test, AutoModelForTokenClassification, names, collator, "macro_f1", compute)


def _spans(folder: Path, tokenizer: Any, length: int, held_back: bool) -> Task:
    """Answers as spans; contexts that are too long are cut into parts that overlap."""
    questions = {split: _questions(folder / f"{split}.json") for split in ("train_part", "dev_a")}
    if held_back:
        parts = Dataset.from_list(questions["train_part"]).train_test_split(test_size=HELD_BACK, seed=0)
        questions = {"train_part": parts["train"].to_list(), "dev_a": parts["test"].to_list()}
    train, test = (_span_features(rows, tokenizer, length) for rows in questions.values())
    asked, parts_of = questions["dev_a"], test.to_list()

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        best: dict[int, tuple[float, str]] = {}
        for start, end, part in zip(*prediction.predictions, parts_of, strict=True):
            score, answer = _best_answer(start, end, part["offsets"], asked[part["question"]]["context"])
            best[part["question"]] = max(best.get(part["question"], (-np.inf, "")), (score, answer))
        pairs = [(best[index][1], row["answers"]) for index, row in enumerate(asked)]
        f1 = np.mean([max(word_f1(found, answer) for answer in wanted) for found, wanted in pairs])
        exact = np.mean(
            [any(plain_answer(a) == plain_answer(found) for a in wanted) for found, wanted in pairs]
        )
        return {"f1": 100 * float(f1), "exact_match": 100 * float(exact)}

    test = test.remove_columns(["offsets", "question"])
    train = train.remove_columns(["offsets", "question"])
    collator = DataCollatorWithPadding(tokenizer)
    return Task(train, test, AutoModelForQuestionAnswering, (), collator, "f1", compute)


def _questions(file: Path) -> list[dict[str, Any]]:
    rows = squad_rows(file)
    assert rows is not None, f"{file} has not SQuAD's form"
    return [
        {**row, "answers": row["answers"]["text"], "start": row["answers"]["answer_start"][0]} for row in rows
    ]


def _span_features(rows: Sequence[dict[str, Any]], tokenizer: Any, length: int) -> Dataset:
    tokens = tokenizer(
        [row["question"].strip() for row in rows],
        [row["context"] for row in rows],
        truncation="only_second",
        max_length=length,
        stride=length // 4,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    questions, starts, ends, offsets = tokens.pop("overflow_to_sample_mapping"), [], [], []
    for index, spans in enumerate(tokens.pop("offset_mapping")):
        row, of_context = rows[questions[index]], [part == 1 for part in tokens.sequence_ids(index)]
        spans = [span if inside else (-1, -1) for span, inside in zip(spans, of_context, strict=True)]
        first, last = row["start"], row["start"] + len(row["answers"][0])
        holding = [at for at, (begin, end) in enumerate(spans) if begin < last and end > first]
        whole = holding and spans[holding[0]][0] <= first and spans[holding[-1]][1] >= last
        starts.append(holding[0] if whole else 0)
        ends.append(holding[-1] if whole else 0)
        offsets.append(spans)
    found = {name: tokens[name] for name in tokens}
    return Dataset.from_dict(
        {
            **found,
            "start_positions": starts,
            "end_positions": ends,
            "offsets": offsets,
            "question": questions,
        }
    )


def _best_answer(start: Any, end: Any, offsets: Sequence[Any], context: str) -> tuple[float, str]:
    inside = np.array([begin >= 0 for begin, _ in offsets])
    start, end = start[: len(inside)], end[: len(inside)]  # the rest is padding
    scores = np.where(inside, start, -np.inf)[:, None] + np.where(inside, end, -np.inf)[None, :]
    # The end is not before the start, nor too far behind it.
    scores = np.where(np.tril(np.triu(np.ones_like(scores)), MOST_ANSWER_TOKENS - 1) > 0, scores, -np.inf)
    first, last = np.unravel_index(int(scores.argmax()), scores.shape)
    return float(scores[first, last]), context[offsets[first][0] : offsets[last][1]]


#: As the tables have them, left to right.
PLANS = {
    "SST-2": Plan(teacher_steps=1200, steps=1200),
    "banking77": Plan(teacher_steps=1200, steps=1200, dense_rate=3e-4),
    "MRPC": Plan(teacher_steps=350, steps=600, length=128),
    "CoLA": Plan(teacher_steps=1200, steps=1200),
    "SQuAD": Plan(teacher_steps=1000, steps=1200, batch=16, length=256),
    "GoogleTN": Plan(teacher_steps=1200, steps=1200, dense_rate=3e-4, length=96),
}
LOADERS: dict[str, Callable[[Path, Any, int, bool], Task]] = {
    "banking77": lambda *given: _sequences(*given, metric="accuracy", test_file="test.tsv"),
    "CoLA": lambda *given: _sequences(*given, metric="matthews"),
    "SST-2": lambda *given: _sequences(*given, metric="accuracy"),
    "MRPC": lambda *given: _sequences(*given, metric="f1", test_file="test.tsv"),
    "GoogleTN": _tags,
    "SQuAD": _spans,
}
