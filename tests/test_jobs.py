"""Jobs: data of any kind, the columns of every task, and the whole way from a file to a pruned model."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    pipeline,
)

from hf_mlprune import report
from hf_mlprune.jobs import Job, prune
from hf_mlprune.jobs.data import find_columns, read_splits
from hf_mlprune.jobs.preparing import TASKS, describe, prepare
from hf_mlprune.jobs.question_answering import _best, word_f1
from hf_mlprune.jobs.showing import summary
from hf_mlprune.jobs.splits import divide
from hf_mlprune.reports.report import Report

WORDS = {"sport": "goal match team player coach", "money": "bank market share profit trade"}


def read_data(
    data: str, test: str | None, *, seed: int, label: str | None = None, columns: Sequence[str] = ()
) -> DatasetDict:
    return divide(read_splits(data, test), seed=seed, columns=columns, label=label)


def rows_of(count: int = 60) -> list[dict]:
    """Rows that a small model learns: words of two classes."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(count):
        label = list(WORDS)[index % 2]
        words = WORDS[label].split()
        text = " ".join(words[int(i)] for i in torch.randint(0, 5, (6,), generator=generator))
        rows.append({"review": f"{text} {index}", "topic": label})
    return rows


def write(rows: list[dict], file: Path) -> str:
    data = Dataset.from_list(rows)
    match file.suffix:
        case ".csv":
            data.to_csv(str(file), index=False)
        case ".tsv":
            data.to_csv(str(file), index=False, sep="\t")
        case ".parquet":
            data.to_parquet(str(file))
        case _:
            data.to_json(str(file))
    return str(file)


COLUMNS = {"text": "review", "label": "topic"}


def job_of(tiny_bert, folder: Path, data: str, **changes) -> Job:
    settings = changes.pop("settings", {"density": 0.4})
    return Job(
        **{
            "model": str(tiny_bert), "data": data, "out": str(folder / "out"), "settings": settings,
            "columns": COLUMNS, "steps": 24, "fine_tune_steps": 24, "batch_size": 8, "max_length": 16,
            **changes,
        }
    )  # fmt: skip


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_the_same_rows_come_out_of_every_kind_of_file(ending, tmp_path):
    found = read_data(write(rows_of(), tmp_path / f"mine{ending}"), None, seed=0, label="topic")
    assert {name: len(part) for name, part in found.items()} == {"train": 54, "test": 6}
    assert sorted((*found["train"]["review"], *found["test"]["review"])) == sorted(
        row["review"] for row in rows_of()
    )
    # So many of each class as there are of it, and the same rows each time.
    assert found["test"]["topic"].count("sport") == 3
    again = read_data(str(tmp_path / f"mine{ending}"), None, seed=0, label="topic")
    assert again["test"]["review"] == found["test"]["review"]


def test_quotation_marks_of_tables_with_tabs(tmp_path):
    # As GLUE has them: letters like others. pandas quotes what needs it.
    plain = ["review\ttopic", *(f'"{n} goals and a "match\tsport' for n in range(10)), '3" of snow\tmoney']
    (tmp_path / "glue.tsv").write_text("\n".join(plain), encoding="utf-8")
    found = read_splits(str(tmp_path / "glue.tsv"), None)["train"]
    assert len(found) == 11
    assert found["review"][0] == '"0 goals and a "match'
    rows = [{"review": 'a "goal"\tand\na match', "topic": "sport"}, {"review": "bank", "topic": "money"}]
    found = read_splits(write(rows, tmp_path / "quoted.tsv"), None)["train"]
    assert found["review"][0] == 'a "goal"\tand\na match'


def test_files_of_squad_are_read_as_they_are(tmp_path):
    answers = [{"text": "a bank", "answer_start": 5}, {"text": "bank", "answer_start": 7}]
    asked = {"id": "1", "question": "What is it?", "answers": answers}
    data = {"version": "1.1", "data": [{"paragraphs": [{"context": "It is a bank.", "qas": [asked, asked]}]}]}
    (tmp_path / "train.json").write_text(json.dumps(data), encoding="utf-8")
    found = read_splits(str(tmp_path / "train.json"), None)["train"]
    assert len(found) == 2
    assert found[0]["answers"] == {"text": ["a bank", "bank"], "answer_start": [5, 7]}
    assert (found[0]["question"], found[0]["context"]) == ("What is it?", "It is a bank.")


def test_classes_that_only_the_test_has_are_refused(tiny_bert, tmp_path):
    data = write(rows_of(), tmp_path / "rows.csv")
    unseen = [*rows_of(4), {"review": "rain again", "topic": "weather"}]
    test = write(unseen, tmp_path / "test.csv")
    with pytest.raises(
        ValueError, match=r"test: expected the classes of the training examples .* \['weather'\]"
    ):
        prepare(job_of(tiny_bert, tmp_path, data, test=test))
    words = [{"tokens": ["a", "goal"], "tags": ["O", "SPORT"]} for _ in range(12)]
    data = write(words, tmp_path / "words.jsonl")
    test = write([{"tokens": ["rain"], "tags": ["WEATHER"]}], tmp_path / "test.jsonl")
    with pytest.raises(ValueError, match=r"got \['WEATHER'\]"):
        prepare(job_of(tiny_bert, tmp_path, data, test=test, task="token-classification", columns={}))


@pytest.mark.parametrize(
    ("changes", "pruning"),
    [
        ({"settings": {"density": 0.49}}, 6e-4),
        ({"settings": {"density": 0.5}}, 2e-4),
        ({"settings": {"multiply_adds": 0.5}}, 6e-4),
        ({"settings": {"targets": [0.6, 0.4]}}, 2e-4),
        ({"settings": {"targets": [0.4, 0.3]}}, 6e-4),
        ({"settings": {"density": 0.5}, "fine_tune_learning_rate": 1e-5}, 2e-5),
        ({"settings": {"density": 0.5}, "learning_rate": 1e-3}, 1e-3),
    ],
)
def test_the_learning_rate_of_pruning(changes, pruning, tiny_bert, tmp_path):
    data = write(rows_of(), tmp_path / "rows.csv")
    prepared = prepare(job_of(tiny_bert, tmp_path, data, **changes))
    assert prepared.rates[1] == pytest.approx(pruning)


def test_blanks_around_the_name_of_a_class_make_no_other_class(tiny_bert, tmp_path):
    rows = rows_of()
    rows[0]["topic"], rows[1]["topic"] = " sport", "money "
    prepared = prepare(job_of(tiny_bert, tmp_path, write(rows, tmp_path / "rows.csv")))
    assert prepared.task.labels == ["money", "sport"]


def test_a_model_for_other_classes_is_fine_tuned_to_these(tiny_bert, tmp_path):
    first = job_of(tiny_bert, tmp_path, write(rows_of(), tmp_path / "rows.csv"))
    prune(first)
    others = [{**row, "topic": f"{row['topic']} {n % 4}"} for n, row in enumerate(rows_of())]
    data = write(others, tmp_path / "others.csv")
    model = str(tmp_path / "out" / "_dense")
    said = []
    done = prune(job_of(tiny_bert, tmp_path, data, model=model, out=str(tmp_path / "four")), say=said.append)
    assert any("the model's classes are ['money', 'sport'], those of the data" in line for line in said)
    assert AutoModelForSequenceClassification.from_pretrained(done.out).config.num_labels == 4


def test_classes_are_counted_as_the_model_counts_them(tiny_bert, tmp_path):
    prune(job_of(tiny_bert, tmp_path, write(rows_of(), tmp_path / "rows.csv")))
    dense = tmp_path / "out" / "_dense"
    config = json.loads((dense / "config.json").read_text())
    config |= {"id2label": {"0": "sport", "1": "money"}, "label2id": {"sport": 0, "money": 1}}
    (dense / "config.json").write_text(json.dumps(config))
    job = job_of(tiny_bert, tmp_path, str(tmp_path / "rows.csv"), model=str(dense), out=str(tmp_path / "two"))
    prepared = prepare(job)
    assert not prepared.fine_tune
    assert prepared.task.labels == ["sport", "money"]
    texts = {row["review"]: row["topic"] for row in rows_of()}
    for row in prepared.data["train"]:
        assert prepared.task.labels[row["topic"]] == texts[row["review"]]
    assert prepared.tokens["train"]["labels"][:] == prepared.data["train"]["topic"][:]
    assert prepared.model(str(dense)).config.id2label == {0: "sport", 1: "money"}


def test_numbered_tags_are_in_the_order_of_numbers(tiny_bert, tmp_path):
    rows = [{"tokens": ["a"] * 12, "tags": list(range(12))} for _ in range(20)]
    data = write(rows, tmp_path / "words.jsonl")
    prepared = prepare(job_of(tiny_bert, tmp_path, data, task="token-classification", columns={}))
    assert prepared.task.labels == [str(number) for number in range(12)]
    assert prepared.data["train"]["tags"][0] == list(range(12))


def test_a_model_without_a_head_must_be_fine_tuned(tiny_bert, tmp_path):
    data = write(questions_of(10), tmp_path / "questions.jsonl")
    job = job_of(tiny_bert, tmp_path, data, task="question-answering", columns={}, fine_tune=False)
    with pytest.raises(ValueError, match="fine_tune: expected a model with a head for the task"):
        prepare(job)


def test_splits_of_a_folder_and_a_test_of_its_own_are_taken(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write(rows_of(20), folder / "train.csv")
    write(rows_of(8), folder / "validation.csv")
    assert len(read_data(str(folder), None, seed=0, label="topic")["test"]) == 8
    unlabelled = [{**row, "topic": -1} for row in rows_of(6)]
    write(unlabelled, folder / "test.csv")
    # A test without labels is none.
    assert len(read_data(str(folder), None, seed=0, label="topic")["test"]) == 8
    own = write(rows_of(4), tmp_path / "own.jsonl")
    assert len(read_data(str(folder), own, seed=0, label="topic")["test"]) == 4
    assert len(read_data(str(folder), own, seed=0, label="topic")["train"]) == 20


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        (
            "none.csv",
            None,
            FileNotFoundError,
            r"data: expected a file or folder, got .*none.csv",
        ),
        ("a.csv", "", ValueError, "data: expected rows in .*a.csv, got an empty file"),
        ("a.csv", "text,label\n", ValueError, "data: expected rows in .*a.csv, got a header only"),
        (
            "a.csv",
            "text,label\nx,y\n",
            ValueError,
            "expected two rows or more to hold some out .*, got 1",
        ),
        (
            "a.xlsx",
            "x",
            ValueError,
            r"data: expected a file of .csv, .tsv, .* got .*a.xlsx",
        ),
        ("a.jsonl", "{not json", ValueError, "data: expected json in .*a.jsonl, got what cannot be read"),
    ],
)
def test_files_that_are_no_data_are_refused(name, content, error, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        read_data(str(tmp_path / name), None, seed=0)


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_the_header_says_what_stands_between_columns(mark, tmp_path):
    lines = [mark.join(row) for row in (["text", "label"], *[[f"a {i}", "NA"] for i in range(4)], ["", "b"])]
    (tmp_path / "mine.CSV").write_text("\n".join(lines), encoding="utf-8-sig")
    rows = read_data(str(tmp_path / "mine.CSV"), None, seed=0)
    found = [*rows["train"], *rows["test"]]
    # "NA" is a word, an empty cell is empty.
    assert sorted(row["label"] for row in found) == ["NA"] * 4 + ["b"]
    assert sum(row["text"] is None for row in found) == 1


def test_text_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "mine.csv").write_bytes("text,label\nschön,a\nschön,b\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"expected text in UTF-8 in .*mine.csv .*; save the file as UTF-8"):
        read_data(str(tmp_path / "mine.csv"), None, seed=0)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([True, False], ["False", "True"]),
        ([10, 9], ["9", "10"]),
        (["b", "a"], ["a", "b"]),
        ([2.0, 1.0], ["1", "2"]),
    ],
)
def test_labels_of_any_kind_are_classes(values, names):
    rows = Dataset.from_dict({"text": ["x"] * 6, "label": values * 3})
    task = TASKS["text-classification"](rows, {})
    found = task.prepare(DatasetDict({"train": rows, "test": rows}))
    assert task.labels == names
    expected = [str(value).removesuffix(".0") for value in values * 3]
    assert [names[index] for index in found["train"]["label"]] == expected


def test_words_without_labels_are_refused():
    rows = Dataset.from_dict({"tokens": [["a", "b"], ["c"]], "tags": [["x", "y"], ["x", "y"]]})
    task = TASKS["token-classification"](rows, {})
    with pytest.raises(
        ValueError, match="expected as many labels as words, got 1 words and 2 labels in row 1"
    ):
        task.prepare(DatasetDict({"train": rows, "test": rows}))


def test_models_of_all_targets_are_kept_and_measured(tiny_bert, tmp_path):
    rows = rows_of()
    rows[3]["review"] = None
    data, said = write(rows, tmp_path / "mine.csv"), []
    job = job_of(tiny_bert, tmp_path, data, settings={"targets": [0.6, 0.4]}, steps=40)
    found = prune(job, say=said.append)
    assert "note: 1 training examples have nothing in 'review'" in said
    assert set(found.others) == {"density-0.6"}
    assert set(found.others["density-0.6"]) == {"accuracy", "f1"}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", subfolder="density-0.6")
    assert 0.4 < report(model).density <= 0.6
    assert any(line.startswith("density-0.6: accuracy") for line in said)
    # Each card has the figures of its own model, and those of the dense one.
    for folder, metrics in (("density-0.6", found.others["density-0.6"]), (".", found.pruned_metrics)):
        card = (tmp_path / "out" / folder / "README.md").read_text()
        for name, value in metrics.items():
            row = f"| {name[:1].upper()}{name[1:]} | {found.dense_metrics[name]:.4g} | {value:.4g} |"
            assert row in card, card
    # Side by side, sizes and times, too.
    console = Console(width=200, file=io.StringIO())
    console.print(summary(found))
    shown = {line.split("│")[1].strip(): line for line in console.file.getvalue().splitlines() if "│" in line}
    assert re.findall(r"[\d.]+%", shown["weights of the encoder"]) == [
        "100%", f"{found.report.density:.1%}", f"{report(model).density:.1%}",
    ]  # fmt: skip
    assert len(re.findall(r"[\d,]{4,}", shown["parameters"])) == 3
    times = next(line for name, line in shown.items() if name.startswith("ms, 1 x"))
    assert times.count("x)") == 2


def test_a_job_of_several_targets_goes_on_after_its_end_failed(tiny_bert, tmp_path):
    data, in_the_way = write(rows_of(), tmp_path / "mine.csv"), tmp_path / "out" / "job.json"
    job = job_of(tiny_bert, tmp_path, data, settings={"targets": [0.6, 0.4]}, steps=40)

    def say(line):
        if line.startswith("density-0.6: accuracy"):
            in_the_way.mkdir()

    with pytest.raises(OSError, match=r"job\.json"):
        prune(job, say=say)
    in_the_way.rmdir()
    found = prune(job, resume=True)
    assert found.others["density-0.6"]["accuracy"] > 0
    for folder, most in (("density-0.6", 0.6), (".", 0.4)):
        record = json.loads((tmp_path / "out" / folder / "job.json").read_text())
        assert record["report"]["density"] <= most


@pytest.mark.parametrize(
    ("columns", "task", "expected"),
    [
        (["sentence", "label", "idx"], "text-classification", {"text": "sentence", "label": "label"}),
        (["Text", "Category"], "text-classification", {"text": "Text", "label": "Category"}),
        (["text", " label "], "text-classification", {"text": "text", "label": " label "}),
        (["sentence1", "sentence2", "label"], "text-classification",
         {"text": "sentence1", "text2": "sentence2", "label": "label"}),
        (["premise", "hypothesis", "score"], "regression",
         {"text": "premise", "text2": "hypothesis", "label": "score"}),
        (["id", "tokens", "ner_tags"], "token-classification", {"tokens": "tokens", "label": "ner_tags"}),
        (["title"], "embeddings", {"text": "title"}),
    ],
)  # fmt: skip
def test_columns_are_known_by_their_usual_names(columns, task, expected):
    rows = Dataset.from_dict({name: ["a"] for name in columns})
    kind = TASKS[task]
    assert find_columns(rows, kind.roles, {}, kind.optional) == expected


def test_columns_that_nobody_could_know_are_asked_for():
    rows = Dataset.from_dict({"a": ["x"], "b": ["y"]})
    roles = TASKS["text-classification"].roles
    with pytest.raises(ValueError, match=r"no column of \['a', 'b'\] looks like 'text'; .* --column text=a"):
        find_columns(rows, roles, {}, ("text2",))
    with pytest.raises(ValueError, match=r"looks like 'label'; .* --column label=b; the first line .* names"):
        find_columns(rows, roles, {"text": "a"}, ("text2",))
    with pytest.raises(ValueError, match=r"column: expected one of \['a', 'b'\] for text, got 'c'"):
        find_columns(rows, roles, {"text": "c"}, ())
    with pytest.raises(ValueError, match=r"column: expected one of \['text', .* got \['x'\]"):
        find_columns(rows, roles, {"x": "a"}, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "translation"}, "task: expected one of .*'text-classification'"),
        ({"columns": {"text": "topic", "label": "review"}}, "expected 2 to 1000 classes .* got 1200"),
        ({"columns": {"text": "topic", "label": "topic"}}, "column: expected another column for each role"),
        ({"columns": {"text": "topic", "label": "number"}}, "expected classes .* numbers with fractions"),
        ({"columns": {"text": "topic", "label": "hole"}}, "a class in every row, got .* rows without one"),
        ({"task": "regression", "columns": {"text": "topic", "label": "hole"}},
         "a number in every|expected numbers"),
        ({"settings": {"density": 0.01}}, "density 0.01 cannot be reached"),
        ({"settings": {"targets": [0.6, 0.4]}}, "for each of 2 targets, 40 in all, got 24"),
        ({"task": "regression"}, "data: expected numbers in the column 'topic' for regression"),
        ({"task": "regression", "columns": {"text": "review", "label": "same"}},
         "data: expected at least two different numbers in train"),
        ({"task": "token-classification", "columns": {"tokens": "review", "label": "topic"}},
         "data: expected lists in the column 'review', one entry per word, got str"),
    ],
)  # fmt: skip
def test_data_that_do_not_fit_a_task_are_refused_before_any_work(change, message, tiny_bert, tmp_path):
    # Every row another text: 1,200 of them are no classes.
    rows = rows_of(1200)
    for index, row in enumerate(rows):
        row |= {"number": index / 7, "same": 1.5, "hole": None if index % 3 == 0 else row["topic"]}
    data = write(rows, tmp_path / "mine.csv")
    with pytest.raises(ValueError, match=message):
        prune(job_of(tiny_bert, tmp_path, data, **change))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"density": 2}}, r"density: expected a value in \(0, 1\], got 2"),
        ({"steps": 5}, "steps: expected a whole number from 20 up, got 5"),
        ({"epochs": 0}, "epochs: expected more than 0, got 0"),
        ({"learning_rate": -1.0}, "learning_rate: expected more than 0"),
        ({"batch_size": 0}, "batch_size: expected a whole number from 1 up"),
    ],
)
def test_arguments_out_of_range_are_refused(change, message, tiny_bert, tmp_path):
    with pytest.raises(ValueError, match=message):
        job_of(tiny_bert, tmp_path, "mine.csv", **change)


def test_a_file_becomes_a_pruned_model_with_all_it_needs(tiny_bert, tmp_path):
    data, said = write(rows_of(), tmp_path / "mine.csv"), []
    found = prune(job_of(tiny_bert, tmp_path, data), say=said.append)
    out = tmp_path / "out"
    assert "columns: text=review, label=topic" in said[0]
    assert "classes: 'money', 'sport' (2)" in said[1]
    assert any("without a head for this task" in line for line in said)
    assert found.metric == "accuracy"
    assert found.pruned_metrics["accuracy"] >= 50
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.id2label == {0: "money", 1: "sport"}
    assert 0.3 < report(model).density <= 0.4
    assert pipeline("text-classification", model=str(out))("goal match")[0]["label"] in WORDS
    card = (out / "README.md").read_text()
    assert "accuracy" in card
    record = json.loads((out / "job.json").read_text())
    assert record["job"]["data"] == data
    assert Report.from_dict(record["report"]) == found.report
    assert json.loads((out / "trainer_state.json").read_text())["log_history"]
    # The dense model stays, what was needed on the way does not, and nothing is a pickle.
    assert AutoModelForSequenceClassification.from_pretrained(out / "_dense").config.id2label[1] == "sport"
    assert not (out / "_work").exists()
    assert not [file for file in out.rglob("*") if file.suffix in (".bin", ".pt", ".pth", ".pkl")]
    # A fine-tuned model is not fine-tuned again.
    again = prepare(job_of(out / "_dense", tmp_path, data))
    assert not again.fine_tune
    assert again.steps[0] == 0
    with pytest.raises(FileExistsError, match="out: expected a new or an empty folder"):
        prune(job_of(tiny_bert, tmp_path, data))
    with pytest.raises(FileNotFoundError, match=r"expected an interrupted job .* one that is finished"):
        prune(job_of(tiny_bert, tmp_path, data), resume=True)


def test_a_dry_run_says_what_would_happen_and_writes_nothing(tiny_bert, tmp_path):
    data = write(rows_of(), tmp_path / "mine.csv")
    found = describe(prepare(job_of(tiny_bert, tmp_path, data)))
    assert found["examples"] == {"train": 54, "test": 6}
    assert found["classes"] == {"number": 2, "examples of each": {"money": 27, "sport": 27}}
    assert found["target"] == "density=0.4"
    assert found["pruning"] == "24 steps"
    assert found["about minutes"] >= 0
    assert not (tmp_path / "out").exists()


PAIRS = [
    {"sentence1": f"{row['review']}", "sentence2": " ".join(WORDS[other].split()[:3]),
     "label": int(other == row["topic"]), "score": float(other == row["topic"]) + index / 100}
    for index, row in enumerate(rows_of(40)) for other in WORDS
]  # fmt: skip


@pytest.mark.parametrize("task", ["text-classification", "regression"])
def test_pairs_are_classified_and_rated(task, tiny_bert, tmp_path):
    label = {"regression": "score"}.get(task, "label")
    data = write(PAIRS, tmp_path / "pairs.jsonl")
    found = prune(job_of(tiny_bert, tmp_path, data, task=task, columns={"label": label}))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == (1 if task == "regression" else 2)
    assert set(found.pruned_metrics) == set(TASKS[task].metrics)
    assert set(found.dense_metrics) == set(TASKS[task].metrics)


def test_words_are_tagged(tiny_bert, tmp_path):
    rows = [
        {"tokens": row["review"].split(), "tags": [row["topic"] if word.isalpha() else "number"
                                                   for word in row["review"].split()]}
        for row in rows_of(40)
    ]  # fmt: skip
    data = write(rows, tmp_path / "tags.jsonl")
    found = prune(job_of(tiny_bert, tmp_path, data, task="token-classification", columns={}))
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    assert set(model.config.id2label.values()) == {"money", "sport", "number"}
    assert 0 <= found.pruned_metrics["f1"] <= 100


def questions_of(count: int) -> list[dict]:
    """Contexts longer than a window, whose answers lie anywhere in them; every fifth question has none."""
    rows = []
    for index in range(count):
        words = [f"word{(7 * index + place) % 50}" for place in range(60)]
        words[index % 60] = f"Answer {index}"
        context = " ".join(words)
        answer = {"text": [f"Answer {index}"], "answer_start": [context.index(f"Answer {index}")]}
        empty = {"text": [], "answer_start": []}
        rows.append(
            {
                "question": f"which {index}?",
                "context": context,
                "answers": empty if index % 5 == 4 else answer,
            }
        )
    return rows


def test_a_question_that_leaves_no_room_for_its_text_is_refused(tiny_bert, tmp_path):
    rows = questions_of(10)
    rows[3]["question"] = " ".join(["which"] * 50)
    data = write(rows, tmp_path / "questions.jsonl")
    job = job_of(tiny_bert, tmp_path, data, task="question-answering", columns={}, max_length=64)
    with pytest.raises(ValueError, match=r"max_length: expected room .* a question of 50: 'which which"):
        prepare(job)


def test_questions_are_answered_from_windows_of_long_contexts(tiny_bert, tmp_path):
    data = write(questions_of(40), tmp_path / "questions.jsonl")
    job = job_of(tiny_bert, tmp_path, data, task="question-answering", columns={}, max_length=64)
    prepared = prepare(job)
    assert len(prepared.tokens["train"]) > len(prepared.data["train"])
    # Told the right places, the figures are perfect.
    task, windows = prepared.task, prepared.tokens["test"]
    width = max(map(len, windows["input_ids"]))
    logits = torch.zeros(2, len(windows), width)
    for window, row in enumerate(windows):
        found = row["start_positions"] > 0
        logits[0, window, row["start_positions"]] = logits[1, window, row["end_positions"]] = (
            9 if found else 1
        )
    perfect = task.compute_metrics(SimpleNamespace(predictions=logits.numpy()))
    assert perfect == {"f1": 100, "exact_match": 100}
    found = prune(job)
    assert set(found.pruned_metrics) == {"f1", "exact_match"}
    assert AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out").config.architectures


@pytest.mark.parametrize("unanswered", [False, True])
def test_windows_without_the_answer_do_not_outvote_the_one_that_has_it(unanswered, tiny_bert, tmp_path):
    rows = questions_of(40)
    if not unanswered:
        rows = [row for row in rows if row["answers"]["text"]]
    data = write(rows, tmp_path / "questions.jsonl")
    prepared = prepare(
        job_of(tiny_bert, tmp_path, data, task="question-answering", columns={}, max_length=64)
    )
    windows = prepared.tokens["test"]
    logits = torch.zeros(2, len(windows), max(map(len, windows["input_ids"])))
    for window, row in enumerate(windows):
        # Windows without the answer are surest of their own label, the first token.
        sure = 3 if row["start_positions"] else 9
        logits[0, window, row["start_positions"]] = logits[1, window, row["end_positions"]] = sure
    found = prepared.task.compute_metrics(SimpleNamespace(predictions=logits.numpy()))
    assert found == {"f1": 100, "exact_match": 100}


def test_a_blank_at_the_end_of_an_answer_is_no_part_of_it(tiny_bert, tmp_path):
    rows = [
        {**row, "answers": {name: value[:] for name, value in row["answers"].items()}}
        for row in questions_of(20)
    ]
    for row in rows:
        row["answers"]["text"] = [f"{text} " for text in row["answers"]["text"]]
        row["context"] += " "
    found = []
    for kind in (questions_of(20), rows):
        data = write(kind, tmp_path / f"questions{len(found)}.jsonl")
        prepared = prepare(job_of(tiny_bert, tmp_path, data, task="question-answering", columns={}))
        found.append(prepared.tokens["train"]["end_positions"][:])
    assert found[0] == found[1]
    assert any(found[0])


def test_answers_that_are_not_where_they_should_be_are_refused(tiny_bert, tmp_path):
    rows = [{**row, "answers": {"text": ["x"], "answer_start": [0]}} for row in questions_of(10)]
    data = write(rows, tmp_path / "questions.jsonl")
    with pytest.raises(ValueError, match="data: expected the answer 'x' at character 0 of its context"):
        prepare(job_of(tiny_bert, tmp_path, data, task="question-answering", columns={}))
    rows = [{**row, "answers": "x"} for row in rows]
    data = write(rows, tmp_path / "others.jsonl")
    with pytest.raises(ValueError, match=r"data: expected \{'text': \[...\], 'answer_start': \[...\]\}"):
        prepare(job_of(tiny_bert, tmp_path, data, task="question-answering", columns={}))


@pytest.mark.parametrize(
    ("said", "right", "score"),
    [("The cat!", "cat", 1), ("a big cat", "cat", 2 / 3), ("dog", "cat", 0), ("", "", 1), ("dog", "", 0)],
)
def test_answers_are_compared_as_squad_does(said, right, score):
    assert word_f1(said, right) == pytest.approx(score)


@given(st.integers(0, 999), st.integers(2, 12))
def test_the_likeliest_span_is_that_of_all_spans(seed, count):
    generator = np.random.default_rng(seed)
    starts, ends = generator.normal(size=(2, count))
    question = int(generator.integers(1, count))
    offsets = [(-1, -1)] * question + [(10 * at, 10 * at + 5) for at in range(question, count)]
    best = (-np.inf, 0, 0)
    for first in range(question, count):
        for last in range(first, count):
            if starts[first] + ends[last] > best[0]:
                best = (starts[first] + ends[last], offsets[first][0], offsets[last][1])
    assert _best(starts, ends, offsets) == pytest.approx(best)


def test_embeddings_are_pruned_without_labels_and_stay_a_sentence_transformer(tiny_bert, tmp_path):
    source = tmp_path / "sentences"
    inner = Transformer(str(tiny_bert))
    pooling = Pooling(inner.get_embedding_dimension())
    SentenceTransformer(modules=[inner, pooling], device="cpu").save_pretrained(str(source))
    data = write([{"text": row["review"]} for row in rows_of()], tmp_path / "texts.csv")
    settings = {"targets": [0.6, 0.4]}
    found = prune(job_of(source, tmp_path, data, task="embeddings", columns={}, settings=settings, steps=40))
    assert 0 < found.pruned_metrics["agreement"] <= 100
    for folder, density in (("out", 0.4), ("out/density-0.6", 0.6)):
        model = SentenceTransformer(str(tmp_path / folder), device="cpu")
        assert model.encode(["goal match"]).shape == (1, 128)
        assert [type(part) for part in model] == [Transformer, Pooling]
        assert density - 0.1 < report(model[0].model).density <= density
        assert "of the encoder's weights are left" in (tmp_path / folder / "README.md").read_text()


JOB = """
import sys
sys.path[:0] = sys.argv[3:]
from pathlib import Path
from hf_mlprune.jobs import prune
from test_jobs import job_of
prune(job_of(sys.argv[1], Path(sys.argv[2]), sys.argv[2] + "/mine.csv", steps=60, fine_tune_steps=40),
      resume={resume}, say=lambda text: print(text, flush=True))
"""


def start_job(tiny_bert, folder, *, resume: bool) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", "-c", JOB.format(resume=resume), str(tiny_bert), str(folder),
               str(Path(__file__).parent), str(Path(__file__).parents[1] / "examples")]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def straight_job(tiny_bert, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight_job")
    write(rows_of(), folder / "mine.csv")
    running = start_job(tiny_bert, folder, resume=False)
    _, said = running.communicate(timeout=300)
    assert running.returncode == 0, said[-3000:]
    return folder / "out"


@pytest.mark.parametrize("stage", ["fine-tuning, ", "pruning to"])
def test_an_interrupted_job_goes_on_to_the_same_model(stage, straight_job, tiny_bert, tmp_path):
    data = write(rows_of(), tmp_path / "mine.csv")
    running = start_job(tiny_bert, tmp_path, resume=False)
    for line in running.stdout:
        if line.startswith(stage):
            break
    work = tmp_path / "out" / "_work" / ("fine-tuning" if stage.startswith("fine") else "pruning")
    while running.poll() is None and not any(work.glob("checkpoint-*")):
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=300)
    assert running.returncode == -signal.SIGINT or "KeyboardInterrupt" in said, said
    assert any(work.glob("checkpoint-*"))
    assert not (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(FileExistsError, match="holds an interrupted job; add --resume"):
        prune(job_of(tiny_bert, tmp_path, data))
    with pytest.raises(ValueError, match=r"as before, steps=60 \(got 24\)"):
        prune(job_of(tiny_bert, tmp_path, data, fine_tune_steps=40), resume=True)
    again = start_job(tiny_bert, tmp_path, resume=True)
    _, said = again.communicate(timeout=300)
    assert again.returncode == 0, said[-3000:]
    found, expected = (load_file(out / "model.safetensors") for out in (tmp_path / "out", straight_job))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_times_are_measured_once_for_the_check_and_the_run(tiny_bert, tmp_path):
    """Measured again after fine-tuning, a target that the first times allow might not be reached."""
    data = write(rows_of(), tmp_path / "mine.csv")
    found = prune(job_of(tiny_bert, tmp_path, data, settings={"speedup": 1.2, "length": 16}))
    file = tmp_path / "out" / "_latency_table.json"
    table = json.loads(file.read_text())
    assert (table["engine"], table["batch"], table["length"]) == ("torch", 1, 16)
    assert found.report.settings["latency_table"] == file.name
    # Another job counts by the same times, and has no table of its own.
    other = tmp_path / "other"
    other.mkdir()
    settings = {"speedup": 1.2, "length": 16, "latency_table": str(file)}
    second = prune(job_of(tmp_path / "out" / "_dense", other, data, settings=settings))
    # How much above depends on times of the machine: one unit of so small a model is much of it.
    assert second.report.predicted_speedup >= 1.2
    assert found.report.predicted_speedup >= 1.2
    assert not (other / "out" / file.name).exists()


def stopping_at(stage: str):
    """Ctrl-C as soon as a message begins so."""

    def say(text: str) -> None:
        if text.startswith(stage):
            raise KeyboardInterrupt

    return say


def test_a_job_that_ends_before_its_first_checkpoint_leaves_no_folder(tiny_bert, tmp_path):
    data = write(rows_of(), tmp_path / "mine.csv")
    job = job_of(tiny_bert, tmp_path, data, settings={"speedup": 1.1, "length": 16})
    with pytest.raises(KeyboardInterrupt):
        prune(job, say=stopping_at("fine-tuning, "))
    assert not Path(job.out).exists()
    # Other arguments may follow; an empty folder is no obstacle.
    other = job_of(tiny_bert, tmp_path, data, steps=30)
    Path(other.out).mkdir()
    assert prune(other).report.density < 0.5


def test_a_job_goes_on_after_its_folder_was_moved(tiny_bert, tmp_path):
    data = write(rows_of(), tmp_path / "mine.csv")
    job = job_of(tiny_bert, tmp_path, data)
    with pytest.raises(KeyboardInterrupt):
        prune(job, say=stopping_at("dense: "))
    moved = dataclasses.replace(job, out=f"{tmp_path}/else/where/")
    Path(moved.out).parent.mkdir()
    Path(job.out).rename(moved.out)
    found = prune(moved, resume=True)
    assert found.dense == str(Path(moved.out) / "_dense")
    assert found.report.density < 0.5


def test_there_must_be_something_to_resume(tiny_bert, tmp_path):
    data = write(rows_of(), tmp_path / "mine.csv")
    with pytest.raises(FileNotFoundError, match=r"resume: expected an interrupted job in .*, got none"):
        prune(job_of(tiny_bert, tmp_path, data), resume=True)


def test_a_model_that_cannot_be_pruned_is_refused_with_the_reason(tmp_path):
    (tmp_path / "albert").mkdir()
    (tmp_path / "albert" / "config.json").write_text('{"model_type": "albert"}')
    with pytest.raises(TypeError, match="got 'albert': its layers are one and the same"):
        prepare(job_of(tmp_path / "albert", tmp_path, "mine.csv"))


def test_labels_that_are_indices_of_named_classes_stay(tiny_bert, tmp_path):
    parts = DatasetDict({"train": Dataset.from_list(rows_of(30)), "test": Dataset.from_list(rows_of(8))})
    data = parts.class_encode_column("topic")
    task = TASKS["text-classification"](data["train"], COLUMNS)
    prepared = task.prepare(data)
    assert task.labels == ["money", "sport"]
    assert prepared["train"]["topic"][:2] == [1, 0]
