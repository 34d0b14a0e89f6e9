"""What a job is given: tables with faults, models of other heads, tokenizers of other words."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    EvalPrediction,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
)

from hf_mlprune.jobs import Job
from hf_mlprune.jobs.classes import with_classes
from hf_mlprune.jobs.data import read_splits
from hf_mlprune.jobs.job import interrupted
from hf_mlprune.jobs.preparing import describe, longest_row, prepare
from hf_mlprune.jobs.sentences import check_sentence_package
from hf_mlprune.jobs.splits import divide
from hf_mlprune.jobs.tasks import Embeddings, TextClassification
from hf_mlprune.jobs.token_classification import TokenClassification
from hf_mlprune.jobs.words import as_in_text, word_tokenizer
from hf_mlprune.methods import MagnitudeRanking
from test_jobs import job_of, rows_of, write


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mine.csv", "text,label\nhello, my friend,1\ngood bye,0\n"),
        ("mine.csv", "text\nGood, bye\nHello\n"),
        ("mine.csv", "text;label\nhello; my friend;1\n"),
        ("mine.tsv", "text\tlabel\nhello\tmy friend\t1\n"),
    ],
)
def test_a_row_with_more_fields_than_the_header_is_refused(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"expected as many fields in each row .* quotation marks"):
        read_splits(str(tmp_path / name), None)


def test_a_column_of_pandas_that_the_header_names_is_one_like_others(tmp_path):
    (tmp_path / "mine.csv").write_text("__index_level_0__,text,label\n3,a,1\n4,b,0\n")
    assert read_splits(str(tmp_path / "mine.csv"), None)["train"]["text"] == ["a", "b"]


def test_only_the_columns_of_the_task_are_wanted_of_a_test():
    splits = {
        "train": Dataset.from_dict({"id": [1], "text": ["a"]}),
        "given test": Dataset.from_dict({"text": ["b"]}),
    }
    assert divide(splits, seed=0, columns=["text"])["test"]["text"] == ["b"]
    with pytest.raises(ValueError, match=r"test: expected the columns of the data, got none named \['id'\]"):
        divide(splits, seed=0, columns=["id", "text"])


NUMBERED = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("missing", [-1, None])
def test_numbered_classes_are_there_in_every_row(split, missing):
    labels = {"train": [0, 1, 1], "test": [1, 0]}
    labels[split][-1] = missing
    rows = {name: {"text": ["a"] * len(some), "label": some} for name, some in labels.items()}
    data = DatasetDict({name: Dataset.from_dict(columns, NUMBERED) for name, columns in rows.items()})
    with pytest.raises(ValueError, match=rf"expected a class in every row, got 1 rows .* \({split}\)"):
        with_classes(data, "label")


@pytest.mark.parametrize("labels", [["yes", "no "], ["1", "0"], [1, 0], [1.0, 0.0]])
def test_a_test_of_another_file_counts_as_the_numbered_classes_do(labels):
    train = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, NUMBERED)
    data = DatasetDict(train=train, test=Dataset.from_dict({"text": ["c", "d"], "label": labels}))
    found, names = with_classes(data, "label")
    assert names == ["no", "yes"]
    assert found["test"]["label"] == [1, 0]
    assert found["test"]["text"] == ["c", "d"]


@pytest.mark.parametrize(
    ("names", "kind", "labels", "expected"),
    [
        (["1", "2", "3", "4", "5"], None, ["1", "2", "4"], [0, 1, 3]),
        (["1", "2", "3", "4", "5"], ["1", "2", "3"], [0, 1, 2], [0, 1, 2]),
        (["1", "0"], None, ["1", "0", "1"], [0, 1, 0]),
        (["no", "yes"], ["yes", "no"], [0, 1, 0], [1, 0, 1]),
    ],
)
@pytest.mark.parametrize("of_words", [False, True])
def test_classes_are_told_by_their_names_first(names, kind, labels, expected, of_words):
    def rows(values, kind):
        values = [[value] for value in values] if of_words else values
        columns = {
            ("tokens" if of_words else "text"): [["a"] if of_words else "a"] * len(values),
            "label": values,
        }
        found = Dataset.from_dict(columns)
        if kind is None:
            return found
        feature = ClassLabel(names=kind)
        return found.cast_column("label", List(feature) if of_words else feature)

    data = DatasetDict(train=rows(list(range(len(names))), names), test=rows(labels, kind))
    task = (TokenClassification if of_words else TextClassification)(data["train"], {})
    found = task.prepare(data)["test"]["label"]
    assert [value[0] if of_words else value for value in found] == expected
    assert task.labels == names


def test_numbered_classes_of_a_test_are_names_where_the_training_examples_have_these():
    train = Dataset.from_dict({"text": ["a", "b"], "label": ["no", "yes"]})
    test = Dataset.from_dict({"text": ["c", "d"], "label": [0, 1]}, NUMBERED)
    found, names = with_classes(DatasetDict(train=train, test=test), "label")
    assert (names, found["test"]["label"]) == (["no", "yes"], [0, 1])


@pytest.mark.parametrize("tag", [None, -1])
def test_a_word_without_a_class_is_refused(tag):
    feature = Features({"tokens": List(Value("string")), "tags": List(Value("int64"))})
    rows = Dataset.from_dict({"tokens": [["a", "b"]], "tags": [[1, tag]]}, feature)
    with pytest.raises(ValueError, match="expected a class for every word"):
        TokenClassification(rows, {}).prepare(DatasetDict(train=rows, test=rows))


def test_a_class_that_the_numbered_ones_lack_is_refused():
    train = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, NUMBERED)
    data = DatasetDict(train=train, test=Dataset.from_dict({"text": ["c"], "label": ["maybe"]}))
    with pytest.raises(ValueError, match=r"got \['maybe'\], too"):
        with_classes(data, "label")


def test_whole_numbers_are_the_same_classes_with_a_point():
    train = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    data = DatasetDict(train=train, test=Dataset.from_dict({"text": ["c"], "label": [1.0]}))
    found, names = with_classes(data, "label")
    assert (names, found["test"]["label"]) == (["0", "1"], [1])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["question", "sentence", "label"], ("question", "sentence")),
        (["question", "context", "label"], ("question", "context")),
        (["query", "passage", "label"], ("query", "passage")),
        (["sentence1", "sentence2", "label"], ("sentence1", "sentence2")),
        (["sentence", "label"], ("sentence", None)),
        (["text", "context", "label"], ("text", None)),
        (["text", "sentence", "label"], ("text", None)),
    ],
)
def test_both_texts_of_usual_pairs_are_found(names, expected):
    columns = TextClassification(Dataset.from_dict({name: ["a"] for name in names}), {}).columns
    assert (columns["text"], columns.get("text2")) == expected


@pytest.mark.parametrize(
    ("task", "kind", "classes"),
    [
        ("text-classification", "multi_label_classification", 2),
        ("text-classification", "regression", 1),
        ("text-classification", "regression", 2),
        ("regression", "single_label_classification", 2),
        ("regression", None, 3),
    ],
)
def test_a_model_of_another_head_is_fine_tuned(task, kind, classes, tiny_bert, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_bert, num_labels=classes, problem_type=kind
    )
    base.config.id2label = {0: "money", 1: "sport", 2: "other"} if classes > 1 else {0: "LABEL_0"}
    base.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).write_bytes((tiny_bert / name).read_bytes())
    rows = [{**row, "topic": float(len(row["review"]))} if task == "regression" else row for row in rows_of()]
    job = job_of(tmp_path / "base", tmp_path, write(rows, tmp_path / "mine.jsonl"), task=task)
    prepared = prepare(job)
    assert prepared.fine_tune
    # Steps of the model are timed.
    assert describe(prepared)["about minutes"] >= 0
    config = prepared.model(job.model).config
    assert config.problem_type == ("regression" if task == "regression" else "single_label_classification")


def byte_level(folder, kind):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["hello world of the words"] * 9, trainer)
    if kind == "roberta":
        tokenizer.save(str(folder / "all.json"))
        model = json.loads((folder / "all.json").read_text())["model"]
        RobertaTokenizer(
            vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]]
        ).save_pretrained(folder)
    else:
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>"
        ).save_pretrained(folder)
    BertConfig().save_pretrained(folder)


@pytest.mark.parametrize("kind", ["roberta", "other"])
def test_words_are_cut_as_in_a_text(kind, tmp_path):
    byte_level(tmp_path, kind)
    tokenizer = word_tokenizer(str(tmp_path))
    tokenizer.save_pretrained(tmp_path / "saved")
    for each in (tokenizer, word_tokenizer(str(tmp_path / "saved"))):
        found = each(["hello", "world"], is_split_into_words=True).tokens()
        assert found == each(" hello world").tokens()
        assert "Ġworld" in found


def test_the_tokenizer_of_a_bert_stays_as_it_is(tiny_bert):
    tokenizer = word_tokenizer(str(tiny_bert))
    assert tokenizer.init_kwargs.get("add_prefix_space") is not True
    assert as_in_text(tokenizer, [["the", "goal"]]) == [["the", "goal"]]


@pytest.mark.parametrize("words", [["the", "of"], ["pra", "pra"]])
def test_words_of_a_pipeline_that_cannot_be_told_have_their_blanks(words, tmp_path):
    tokenizer = Tokenizer(models.BPE())
    # As Gemma's.
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<s>", "<pad>", "<unk>"]
    tokenizer.train_from_iterator(
        ["the of the pra"] * 9, trainers.BpeTrainer(special_tokens=special, show_progress=False)
    )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    made.save_pretrained(tmp_path)
    BertConfig().save_pretrained(tmp_path)
    told = word_tokenizer(str(tmp_path))
    (found,) = as_in_text(told, [words])
    assert told(found, is_split_into_words=True).tokens() == told(" ".join(words)).tokens()


def test_a_sentence_transformer_needs_its_package_before_any_work(tmp_path, monkeypatch):
    check_sentence_package(str(tmp_path))
    (tmp_path / "modules.json").write_text("[]")
    check_sentence_package(str(tmp_path))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match="pip install sentence-transformers"):
        check_sentence_package(str(tmp_path))


@pytest.mark.parametrize("settings", [{"levels": ("heads", "rows")}, {"method": MagnitudeRanking}])
def test_a_record_of_a_job_is_that_job(settings):
    job = Job("model", "data.csv", "out", settings={"density": 0.3, **settings})
    assert job.differences(json.loads(json.dumps(job.to_dict()))) == []


def test_after_ctrl_c_the_advice_fits_what_is_there(tmp_path):
    job = Job("model", "data.csv", str(tmp_path), settings={"density": 0.3})
    assert "before any training" in interrupted(job)
    (tmp_path / "_work").mkdir()
    (tmp_path / "_work" / "job.json").write_text("{}")
    assert "with --resume goes on" in interrupted(job)


def test_rows_are_no_longer_than_the_model_has_positions():
    rows = Dataset.from_dict({"text": ["a"]})
    task, config = Embeddings(rows, {}), BertConfig(max_position_embeddings=64)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    assert longest_row(None, task, tokenizer, config) == 64
    assert longest_row(32, task, tokenizer, config) == 32


def test_a_dry_run_counts_examples_and_what_is_cut(tiny_bert, tmp_path):
    rows = [{"text": "goal " * (4 + index % 5), "label": index % 2} for index in range(40)]
    data = write(rows, tmp_path / "mine.jsonl")
    found = describe(prepare(job_of(tiny_bert, tmp_path, data, columns={}, max_length=8)))
    # 7 and 8 words are cut: 6 fit between the two special tokens.
    share = sum(len(row["text"].split()) > 6 for row in rows) / len(rows)
    assert abs(float(found["tokens"]["examples cut at 8"].rstrip("%")) / 100 - share) < 0.1
    assert sum(found["examples"].values()) == 40


def test_figures_are_of_the_logits_where_a_model_puts_out_more():
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    task = TextClassification(rows, {})
    task.labels = ["0", "1"]
    found = EvalPrediction(predictions=(np.eye(2), (np.zeros((2, 3)),)), label_ids=np.array([0, 1]))
    assert task.compute_metrics(found)["accuracy"] == 100
    words = TokenClassification(Dataset.from_dict({"tokens": [["a"]], "tags": [["x"]]}), {})
    found = EvalPrediction(predictions=(np.eye(2)[None], ()), label_ids=np.array([[0, -100]]))
    assert words.compute_metrics(found)["accuracy"] == 100
