"""Token classification: a class for every word of a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from datasets import DatasetDict
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification

from .classes import numbered_classes
from .tasks import Task, logits_of
from .words import as_in_text


class TokenClassification(Task):
    """A class for every word of a list; pieces behind the first of a word take no part."""

    auto = AutoModelForTokenClassification
    roles: ClassVar = {
        "tokens": ("tokens", "words"),
        "label": ("ner_tags", "tags", "labels", "label", "pos_tags", "class", "classes"),
    }
    metrics = ("f1", "accuracy")
    reads_words = True

    def prepare(self, data: DatasetDict) -> DatasetDict:
        """See :meth:`Task.prepare`."""
        data = super().prepare(data)
        for name in self.columns.values():
            if not isinstance(data["train"][0][name], list):
                raise ValueError(
                    f"data: expected lists in the column {name!r}, one entry per word, got "
                    f"{type(data['train'][0][name]).__name__}; JSON lines or Parquet hold lists"
                )
        label, words = self.columns["label"], self.columns["tokens"]
        for name, rows in data.items():
            for index, (tokens, tags) in enumerate(zip(rows[words], rows[label], strict=True)):
                if len(tokens) != len(tags):
                    raise ValueError(
                        f"data: expected as many labels as words, got {len(tokens)} words and {len(tags)} "
                        f"labels in row {index} of {name}"
                    )
                if any(tag is None or tag == -1 for tag in tags):
                    raise ValueError(
                        f"data: expected a class for every word, got words without one in {label!r} "
                        f"({name}); take these rows out"
                    )
        data, self.labels = numbered_classes(data, label)
        return data

    def tokenize(self, rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, Any]:
        """See :meth:`Task.tokenize`."""
        words = [[str(word) for word in row] for row in rows[self.columns["tokens"]]]
        words = as_in_text(tokenizer, words)
        found = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
        found["labels"] = []
        for index, tags in enumerate(rows[self.columns["label"]]):
            places = found.word_ids(index)
            first = [place is not None and place not in places[:at] for at, place in enumerate(places)]
            found["labels"].append(
                [tags[p] if is_first else -100 for p, is_first in zip(places, first, strict=True)]
            )
        return dict(found)

    def collator(self, tokenizer: Any) -> Any:
        """See :meth:`Task.collator`."""
        return DataCollatorForTokenClassification(tokenizer)

    def compute_metrics(self, found: Any) -> dict[str, float]:
        """Accuracy of words, and F1 as the mean over classes."""
        real = found.label_ids != -100
        predicted, labels = logits_of(found).argmax(-1)[real], found.label_ids[real]
        return {
            "accuracy": 100 * float(accuracy_score(labels, predicted)),
            "f1": 100 * float(f1_score(labels, predicted, average="macro", zero_division=0)),
        }
