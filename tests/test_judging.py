"""A table of labelled rows judges a model of any task as the job did that pruned it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import AutoModel, AutoModelForSequenceClassification

from hf_mlprune.exporting.engine import reference
from hf_mlprune.exporting.metric import Judge
from hf_mlprune.exporting.source import read_source
from hf_mlprune.jobs import prune
from hf_mlprune.jobs.judging import Labelled, read_labelled
from support.command import run
from test_jobs import COLUMNS, PAIRS, job_of, questions_of, rows_of, write

TAGGED = [
    {
        "tokens": row["review"].split(),
        "tags": [row["topic"] if word.isalpha() else "number" for word in row["review"].split()],
    }
    for row in rows_of(40)
]
TASKS = {
    "text-classification": (rows_of(), COLUMNS),
    "regression": (PAIRS, {"label": "score"}),
    "token-classification": (TAGGED, {}),
    "question-answering": (questions_of(40), {}),
}


def score(folder: Path, found: Labelled) -> float:
    source = read_source(str(folder), None)
    judge = Judge(found.data, source.names, found.compute_metrics, found.metric)
    return judge.score(reference(source))


@pytest.mark.parametrize("task", TASKS)
def test_a_table_gives_the_figure_that_the_job_reported(task, tiny_bert, tmp_path):
    rows, columns = TASKS[task]
    data, test = write(rows, tmp_path / "rows.jsonl"), write(rows[::3], tmp_path / "test.jsonl")
    job = job_of(tiny_bert, tmp_path, data, test=test, task=task, columns=columns, max_length=64)
    reported = prune(job).pruned_metrics
    # Columns and length are those of the job.
    found = read_labelled(job.out, test)
    assert score(tmp_path / "out", found) == pytest.approx(reported[found.metric], abs=1e-4)
    assert max(batch["input_ids"].shape[1] for batch in found.data) <= job.max_length


def test_what_is_asked_for_comes_before_what_the_job_had(tiny_bert, tmp_path):
    data = write(rows_of(60), tmp_path / "rows.jsonl")
    job = job_of(tiny_bert, tmp_path, data, task="text-classification", columns=COLUMNS, max_length=12)
    prune(job)
    renamed = [{"text": row["review"], "label": row["topic"]} for row in rows_of(12)]
    other = write(renamed, tmp_path / "renamed.jsonl")
    longest = [
        max(batch["input_ids"].shape[1] for batch in read_labelled(job.out, other, max_length=length).data)
        for length in (None, 8)
    ]
    assert longest[0] <= 12
    assert longest[1] == 8


@pytest.fixture(scope="module")
def classifier(tiny_bert, tmp_path_factory) -> Path:
    """A model of three classes."""
    folder = tmp_path_factory.mktemp("classifier")
    names = ["weather", "sport", "money"]
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_bert, num_labels=3, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
    )
    shutil.copytree(tiny_bert, folder, dirs_exist_ok=True)
    model.save_pretrained(folder)
    return folder


def test_labels_are_counted_as_the_model_counts_its_classes(classifier, tmp_path):
    # The table lacks a class, and has the others in another order.
    found = read_labelled(str(classifier), write(rows_of(), tmp_path / "two.csv"), COLUMNS)
    labels = [int(label) for batch in found.data for label in batch["labels"]]
    assert labels[:4] == [1, 2, 1, 2]
    assert len(labels) == 60


def test_numbers_are_the_numbers_of_the_classes(classifier, tmp_path):
    rows = [{**row, "topic": 1 + (row["topic"] == "money")} for row in rows_of()]
    found = read_labelled(str(classifier), write(rows, tmp_path / "numbers.csv"), COLUMNS)
    assert [int(label) for label in found.data[0]["labels"][:4]] == [1, 2, 1, 2]


def test_a_row_without_a_class_is_refused(classifier, tmp_path):
    features = Features({"review": Value("string"), "topic": ClassLabel(names=["sport", "money"])})
    rows = {"review": ["a goal", "a bank", "a word"], "topic": [0, 1, -1]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="data: expected a class in every row, got 1 rows without one"):
        read_labelled(str(classifier), str(tmp_path / "rows.parquet"), COLUMNS)


def test_a_model_with_several_classes_per_row_is_refused(tiny_bert, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_bert, num_labels=3, problem_type="multi_label_classification"
    )
    model.save_pretrained(tmp_path / "model")
    data = write(rows_of(), tmp_path / "mine.csv")
    with pytest.raises(ValueError, match="data: expected a model with one class per row, got one with sev"):
        read_labelled(str(tmp_path / "model"), data, COLUMNS)


def test_the_test_of_several_splits_is_taken(classifier, tmp_path):
    write(rows_of(), tmp_path / "train.csv")
    write(rows_of(10), tmp_path / "test.csv")
    found = read_labelled(str(classifier), str(tmp_path), COLUMNS)
    assert sum(len(batch["labels"]) for batch in found.data) == 10
    # Nothing is measured on what a model was trained on without a word.
    (tmp_path / "test.csv").rename(tmp_path / "later.csv")
    with pytest.raises(
        ValueError, match=r"data: expected a split test, .*, got \['later', 'train'\]; name the"
    ):
        read_labelled(str(classifier), str(tmp_path), COLUMNS)
    (tmp_path / "train.csv").rename(tmp_path / "validation.csv")
    found = read_labelled(str(classifier), str(tmp_path), COLUMNS)
    assert sum(len(batch["labels"]) for batch in found.data) == 60


def test_rows_of_another_model_are_refused(classifier, tiny_bert, tmp_path):
    strange = [{**row, "topic": "art" if i % 2 else "sport"} for i, row in enumerate(rows_of())]
    with pytest.raises(ValueError, match=r"data: expected the classes of the model \(weather, .* \['art'\]"):
        read_labelled(str(classifier), write(strange, tmp_path / "art.csv"), COLUMNS)
    AutoModel.from_pretrained(tiny_bert).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="data: expected a model that was fine-tuned for one of text-class"):
        read_labelled(str(tmp_path / "encoder"), str(tmp_path / "art.csv"), COLUMNS)


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_the_command_holds_int8_to_the_metric(engine, classifier, tmp_path):
    data = write(rows_of(), tmp_path / "mine.csv")
    words = ("--to", engine, "--int8", "--threads", 1, "--column", "text=review", "--column", "label=topic")
    found = json.loads(
        run("export", classifier, "--out", tmp_path / "x", *words, "--data", data, "--max-drop", 2, "--json")
    )
    before, after = found["int8"]["metric"]
    assert before - after <= 2
    assert 0 < before <= 100
    assert found["int8"]["recipe"] != "none"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--column", "text=review", "--int8"), "error: column: expected --data, whose columns it names"),
        (("--data", "{data}"), "error: data: expected --int8, which is held to the metric"),
        (("--data", "none.csv", "--int8"), "error: data: expected a file or folder, got none.csv"),
        (("--int8", "--max-drop", "1"), "error: max_drop: expected data with labels"),
        (("--int8", "--data", "none.csv", "--to", "coreml"), "error: to: expected one of"),
        (("--int8", "--data", "none.csv", "--threads", "0"), "error: threads: expected 1 or more"),
    ],
)
def test_words_that_do_not_fit_are_refused(words, message, classifier, tmp_path):
    data = write(rows_of(), tmp_path / "mine.csv")
    given = [word.format(data=data) for word in words]
    said = run("export", classifier, "--out", tmp_path / "x", *given, code=1)
    assert message in " ".join(said.split())
    assert not (tmp_path / "x").exists()
