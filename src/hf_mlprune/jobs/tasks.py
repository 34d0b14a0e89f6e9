"""The tasks of a job: which columns they read, how rows become tokens, and what is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, DatasetDict, Value
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
)

from .classes import with_classes
from .data import find_columns

TEXT = (
    "text",
    "sentence1",
    "premise",
    "question1",
    "question",
    "query",
    "sentence",
    "review",
    "content",
    "title",
)
SECOND = (
    "text2",
    "text_pair",
    "sentence2",
    "hypothesis",
    "question2",
    "passage",
    "answer",
    "document",
    "sentence",
    "context",
    "paragraph",
)
QUESTIONS, BEHIND_QUESTIONS = ("question", "query"), ("sentence", "context", "paragraph")
LABEL = ("label", "labels", "class", "category", "target", "intent", "sentiment", "score", "rating")


class Task(ABC):
    """One kind of job.

    Attributes:
        columns: role -> column.
        labels: names of the classes, if there are classes.
    """

    auto: ClassVar[Any]
    roles: ClassVar[dict[str, Sequence[str]]]
    optional: ClassVar[tuple[str, ...]] = ()
    #: Names of its figures, the one that counts first; larger is better.
    metrics: ClassVar[tuple[str, ...]]
    #: Whether the model is its own teacher, without labels: it is not fine-tuned, and judged by agreement.
    teaches_itself: ClassVar[bool] = False
    #: Learning rate of pruning, if nobody says it; ``None`` derives it from that of fine-tuning.
    pruning_rate: ClassVar[float | None] = None
    #: Whether rows are lists of words.
    reads_words: ClassVar[bool] = False
    #: Most tokens of a row, if nobody says it.
    max_length: ClassVar[int] = 128

    def __init__(self, rows: Dataset, columns: Mapping[str, str]) -> None:
        self.columns = find_columns(rows, self.roles, dict(columns), self.optional)
        self.labels: list[str] | None = None

    @property
    def label_column(self) -> str | None:
        """Column with what is to be predicted."""
        return self.columns.get("label")

    def prepare(self, data: DatasetDict) -> DatasetDict:
        """Rows with only the columns of the task, labels as numbers; sets :attr:`labels`."""
        return data.select_columns(list(self.columns.values()))

    def model_arguments(self) -> dict[str, Any]:
        """What the model's config must say of the classes."""
        if self.labels is None:
            return {}
        names = dict(enumerate(self.labels))
        return {
            "num_labels": len(names),
            "id2label": names,
            "label2id": {name: i for i, name in names.items()},
        }

    @abstractmethod
    def tokenize(self, rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, Any]:
        """A batch of rows as the model reads it."""

    def keep(self, data: DatasetDict, tokens: DatasetDict) -> DatasetDict:
        """Remember what figures need besides predictions; returns what models and batches need."""
        return tokens

    @abstractmethod
    def collator(self, tokenizer: Any) -> Any:
        """Makes batches."""

    def compute_metrics(self, found: Any) -> dict[str, float]:
        """Predictions -> figures."""
        raise NotImplementedError


class TextClassification(Task):
    """One class for a text, or for a pair of texts."""

    auto = AutoModelForSequenceClassification
    roles: ClassVar = {"text": TEXT, "text2": SECOND, "label": LABEL}
    optional = ("text2",)
    metrics = ("accuracy", "f1")

    def __init__(self, rows: Dataset, columns: Mapping[str, str]) -> None:
        super().__init__(rows, columns)
        asks = self.columns["text"].strip().lower() in QUESTIONS
        second = self.columns.get("text2", "").strip().lower()
        if "text2" not in columns and not asks and second in BEHIND_QUESTIONS:
            # Beside a text of another name, a context is something else.
            del self.columns["text2"]

    def prepare(self, data: DatasetDict) -> DatasetDict:
        """See :meth:`Task.prepare`."""
        data = super().prepare(data)
        data, self.labels = with_classes(data, self.columns["label"])
        return data

    def tokenize(self, rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, Any]:
        """See :meth:`Task.tokenize`."""
        texts = [[text_of(x) for x in rows[self.columns[r]]] for r in ("text", "text2") if r in self.columns]
        return {
            **tokenizer(*texts, truncation=True, max_length=max_length),
            "labels": rows[self.columns["label"]],
        }

    def collator(self, tokenizer: Any) -> Any:
        """See :meth:`Task.collator`."""
        return DataCollatorWithPadding(tokenizer)

    def model_arguments(self) -> dict[str, Any]:
        """See :meth:`Task.model_arguments`; the model may have been one of several classes per row."""
        return {**super().model_arguments(), "problem_type": "single_label_classification"}

    def compute_metrics(self, found: Any) -> dict[str, float]:
        """Accuracy and F1: of class 1 where there are two classes, else the mean over classes."""
        predicted = logits_of(found).argmax(-1)
        average = "binary" if self.labels is not None and len(self.labels) == 2 else "macro"
        return {
            "accuracy": 100 * float(accuracy_score(found.label_ids, predicted)),
            "f1": 100 * float(f1_score(found.label_ids, predicted, average=average, zero_division=0)),
        }


class Regression(TextClassification):
    """A number for a text, or for a pair of texts."""

    metrics = ("spearman", "pearson")

    def prepare(self, data: DatasetDict) -> DatasetDict:
        """See :meth:`Task.prepare`."""
        data = Task.prepare(self, data)
        for name, rows in data.items():
            if any(value is None or value != value for value in rows[self.columns["label"]]):
                raise ValueError(
                    f"data: expected a number in every row of {name}, got rows without one in "
                    f"{self.columns['label']!r}; take them out"
                )
        try:
            data = data.cast_column(self.columns["label"], Value("float32"))
        except Exception as error:
            raise ValueError(
                f"data: expected numbers in the column {self.columns['label']!r} for regression, got others "
                f"({error})"
            ) from error
        for name, rows in data.items():
            if len(set(rows[self.columns["label"]])) < 2:
                raise ValueError(
                    f"data: expected at least two different numbers in {name}, whose correlation with the "
                    f"model's can be measured, got {len(rows)} rows with one in {self.columns['label']!r}"
                )
        return data

    def model_arguments(self) -> dict[str, Any]:
        """See :meth:`Task.model_arguments`."""
        return {"num_labels": 1, "problem_type": "regression"}

    def compute_metrics(self, found: Any) -> dict[str, float]:
        """Correlations x 100, of ranks and of values."""
        predicted = logits_of(found).squeeze(-1)
        if np.ptp(predicted) == 0:
            # Nothing correlates with a constant.
            return dict.fromkeys(self.metrics, 0.0)
        return {
            "spearman": 100 * float(spearmanr(predicted, found.label_ids).statistic),
            "pearson": 100 * float(pearsonr(predicted, found.label_ids).statistic),
        }


class Embeddings(Task):
    """Texts without labels: the model is its own teacher."""

    auto = AutoModel
    roles: ClassVar = {"text": TEXT}
    # Chosen on the STS benchmark's development pairs; see examples/README.md.
    pruning_rate = 1e-3
    metrics = ("agreement",)
    teaches_itself = True

    def tokenize(self, rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, Any]:
        """See :meth:`Task.tokenize`."""
        texts = [text_of(text) for text in rows[self.columns["text"]]]
        return dict(tokenizer(texts, truncation=True, max_length=max_length))

    def collator(self, tokenizer: Any) -> Any:
        """See :meth:`Task.collator`."""
        return DataCollatorWithPadding(tokenizer)


def logits_of(found: Any) -> np.ndarray[Any, Any]:
    """The first output; a model may put out its hidden states, too."""
    return np.asarray(found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions)


def text_of(value: Any) -> str:
    """A cell as text; an empty one has none."""
    return "" if value is None else str(value)
