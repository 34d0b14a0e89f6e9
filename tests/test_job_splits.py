"""Which rows a job trains on and which it tests on: held-out rows, folders, splits without labels."""

from __future__ import annotations

from collections import Counter

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from hf_mlprune.jobs.classes import with_classes
from hf_mlprune.jobs.data import read_splits
from hf_mlprune.jobs.splits import divide, rows_to_judge
from hf_mlprune.jobs.tasks import Regression, TextClassification
from hf_mlprune.jobs.token_classification import TokenClassification
from test_jobs import rows_of, write

CLASSES = st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=60)


def held_out(labels: list, seed: int = 0) -> DatasetDict:
    """Rows by number, with some held out."""
    rows = Dataset.from_dict({"text": list(map(str, range(len(labels)))), "label": labels})
    found = divide({"train": rows}, seed=seed, columns=["text", "label"], label="label")
    assert sorted(map(int, [*found["train"]["text"], *found["test"]["text"]])) == list(range(len(labels)))
    assert len(found["test"]) == max(1, round(0.1 * len(labels)))
    return found


@given(labels=CLASSES, seed=st.integers(0, 5))
def test_every_class_that_is_held_out_is_trained_on(labels, seed):
    found = held_out(labels, seed)
    # Unless nearly every row has a class of its own.
    if len(labels) - len(set(labels)) >= len(found["test"]):
        assert set(found["test"]["label"]) <= set(found["train"]["label"])


@given(tags=st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4), min_size=10, max_size=40))
def test_every_tag_that_is_held_out_is_trained_on(tags):
    found = held_out(tags)
    known, asked = ({tag for row in found[name]["label"] for tag in row} for name in ("train", "test"))
    assert asked <= known


def test_a_class_of_one_row_does_not_keep_others_from_being_held_out_evenly():
    found = held_out(["once", *["yes", "no"] * 50])
    assert Counter(found["test"]["label"]) == {"yes": 5, "no": 5}


def test_rows_are_held_out_at_random_where_labels_are_no_classes():
    numbers = [index / 7 for index in range(40)]
    assert held_out(numbers)["test"]["label"] != sorted(numbers)[-4:]
    assert held_out(list(range(40)))["test"]["text"] == held_out(numbers)["test"]["text"]


def test_two_files_of_one_split_are_refused(tmp_path):
    for name in ("train.csv", "train.jsonl", "test.csv"):
        write(rows_of(4), tmp_path / name)
    with pytest.raises(ValueError, match=r"one file for each split in .*, got train.csv and train.jsonl"):
        read_splits(str(tmp_path), None)


def test_folders_of_save_to_disk_are_read(tmp_path):
    rows = Dataset.from_list(rows_of(6))
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "several")
    assert read_splits(str(tmp_path / "one"), None)["train"].to_list() == rows.to_list()
    found = read_splits(str(tmp_path / "several"), str(tmp_path / "one"))
    assert {name: len(part) for name, part in found.items()} == {"train": 6, "given test": 6}
    assert len(read_splits(str(tmp_path / "several"), None)["test"]) == 1


NO_ANSWER = [{"text": [], "answer_start": []}] * 2


@pytest.mark.parametrize("hidden", [[-1, -1], [None, None], ["", ""], [[], []], NO_ANSWER])
def test_a_test_whose_labels_are_kept_back_is_none(hidden):
    answer = {"text": ["a"], "answer_start": [0]}
    known = [answer, answer] if hidden is NO_ANSWER else [["a"], ["b"]] if hidden == [[], []] else ["a", "b"]
    splits = {
        "test": Dataset.from_dict({"label": hidden}),
        "validation": Dataset.from_dict({"label": known}),
        "train": Dataset.from_dict({"label": known}),
    }
    assert divide(splits, seed=0, columns=["label"], label="label")["test"] is splits["validation"]
    assert rows_to_judge(splits, "label") is splits["validation"]


def of_labels(train: list, test: list, words: bool = False) -> DatasetDict:
    """Two splits with these labels."""
    column, text = ("tokens", ["a"]) if words else ("text", "a")
    parts = {"train": train, "test": test}
    return DatasetDict(
        {name: Dataset.from_dict({column: [text] * len(x), "label": x}) for name, x in parts.items()}
    )


def test_a_class_may_be_a_number_in_one_file_and_its_digits_in_another():
    data, names = with_classes(of_labels([0, 1, 2], ["2", "0"]), "label")
    assert names == ["0", "1", "2"]
    assert data["test"]["label"] == [2, 0]
    tagged = of_labels([[0], [1]], [["1"], ["0"]], words=True)
    task = TokenClassification(tagged["train"], {})
    assert task.prepare(tagged)["test"]["label"] == [[1], [0]]
    assert task.labels == ["0", "1"]


def test_several_classes_of_a_text_are_refused_with_what_takes_them():
    data = of_labels([["a", "b"], ["a"]], [["b"]])
    with pytest.raises(ValueError, match=r"one class in every row, got lists in 'label' .*token-class"):
        with_classes(data, "label")


def test_numbers_that_are_none_are_refused():
    data = of_labels([1.0, float("nan"), 2.0], [0.5, 1.5])
    with pytest.raises(ValueError, match="expected a number in every row of train, got rows without one"):
        Regression(data["train"], {}).prepare(data)


@pytest.mark.parametrize("words", [False, True])
def test_a_blank_around_a_name_makes_no_other_class(words):
    def of(*names):
        return [[name] for name in names] if words else list(names)

    data = of_labels(of("yes", "no "), of(" no", "yes"), words)
    task = (TokenClassification if words else TextClassification)(data["train"], {})
    assert task.prepare(data)["test"]["label"] == of(0, 1)
    assert task.labels == ["no", "yes"]
