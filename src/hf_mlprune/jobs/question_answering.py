"""Extractive question answering: long contexts in windows, answers as texts."""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding

from .tasks import Task

#: An answer has no more tokens than this; of starts and ends so many of the likeliest are tried.
MOST_TOKENS, CANDIDATES = 30, 20
#: Windows of a context share a quarter of their tokens.
SHARED = 4


class QuestionAnswering(Task):
    """The span of a context that answers a question; none, where the data have questions without answers."""

    auto = AutoModelForQuestionAnswering
    roles: ClassVar = {
        "question": ("question", "query"),
        "context": ("context", "passage", "paragraph", "document", "text"),
        "label": ("answers", "answer"),
    }
    metrics = ("f1", "exact_match")
    max_length = 384

    def prepare(self, data: DatasetDict) -> DatasetDict:
        """See :meth:`Task.prepare`; answers become the texts and starts of all that are right."""
        data = super().prepare(data)
        column = self.columns["label"]
        self.has_unanswered = False
        for name, rows in data.items():
            for row in rows:
                found = _check_answers(row, column, str(row[self.columns["context"]]), name)
                self.has_unanswered = self.has_unanswered or not found
        return data

    def tokenize(self, rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, Any]:
        """See :meth:`Task.tokenize`; one window or more for each row, with the places of its first answer."""
        questions = [str(question).strip() for question in rows[self.columns["question"]]]
        contexts = [str(context) for context in rows[self.columns["context"]]]
        _check_room(questions, tokenizer, max_length)
        found = tokenizer(
            questions,
            contexts,
            truncation="only_second",
            max_length=max_length,
            stride=max_length // SHARED,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        found["row"] = found.pop("overflow_to_sample_mapping")
        found["start_positions"], found["end_positions"] = [], []
        for window, row in enumerate(found["row"]):
            sides = found.sequence_ids(window)
            answers = _answers(rows[self.columns["label"]][row])
            offsets = [
                o if side == 1 else None
                for o, side in zip(found["offset_mapping"][window], sides, strict=True)
            ]
            first, last = _span(offsets, answers[0] if answers else None)
            found["start_positions"].append(first)
            found["end_positions"].append(last)
            # Of the question nothing can be answered.
            found["offset_mapping"][window] = [offset or (-1, -1) for offset in offsets]
        return dict(found)

    def keep(self, data: DatasetDict, tokens: DatasetDict) -> DatasetDict:
        """See :meth:`Task.keep`; answers are read from the rows, by the windows' offsets."""
        self.rows: Dataset = data["test"]
        windows = tokens["test"]
        self.row_of, self.offsets = _absolute(windows["row"]), windows["offset_mapping"]
        return tokens.remove_columns(["row", "offset_mapping"])

    def collator(self, tokenizer: Any) -> Any:
        """See :meth:`Task.collator`."""
        return DataCollatorWithPadding(tokenizer)

    def compute_metrics(self, found: Any) -> dict[str, float]:
        """F1 of words and exact matches x 100, as SQuAD counts them: the best over right answers."""
        starts, ends = found.predictions[:2]
        windows: dict[int, list[int]] = defaultdict(list)
        for window, row in enumerate(self.row_of):
            windows[row].append(window)
        scores = []
        for row, places in windows.items():
            example = self.rows[row]
            score, begin, end = max(
                _best(starts[window], ends[window], self.offsets[window]) for window in places
            )
            # Most windows have no answer of their own. As in SQuAD, the surest that there is one counts.
            none = min(float(starts[window][0] + ends[window][0]) for window in places)
            context = str(example[self.columns["context"]])
            said = "" if self.has_unanswered and none > score else context[begin:end]
            right = [text for text, _ in _answers(example[self.columns["label"]])] or [""]
            scores.append(
                [
                    max(word_f1(said, text) for text in right),
                    max(plain_answer(said) == plain_answer(t) for t in right),
                ]
            )
        means = 100 * np.mean(scores, axis=0)
        return {"f1": float(means[0]), "exact_match": float(means[1])}


def _answers(value: Any) -> list[tuple[str, int]]:
    """Texts and starts of right answers, of SQuAD's form or a list of pairs; none for no answer.

    Blanks around an answer, which are no tokens, are left out.
    """
    if isinstance(value, Mapping):
        pairs = list(zip(value["text"], value["answer_start"], strict=True))
    else:
        pairs = [(each["text"], each["answer_start"]) for each in value or ()]
    return [(text.strip(), start + len(text) - len(text.lstrip())) for text, start in pairs]


def _check_answers(row: Mapping[str, Any], column: str, context: str, split: str) -> list[tuple[str, int]]:
    """The answers of a row, which are where they should be in its context."""
    try:
        answers = _answers(row[column])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"data: expected {{'text': [...], 'answer_start': [...]}} in the column {column!r} of {split}, "
            f"got {row[column]!r:.100}"
        ) from error
    for text, start in answers:
        if context[start : start + len(text)] != text:
            raise ValueError(
                f"data: expected the answer {text!r:.50} at character {start} of its context, in {split}, "
                f"got {context[start : start + len(text)]!r:.50}"
            )
    return answers


def _span(offsets: list[Any], answer: tuple[str, int] | None) -> tuple[int, int]:
    """First and last token of an answer in a window; 0 and 0 (the first token) if it is not all there."""
    if answer is None:
        return 0, 0
    begin, end = answer[1], answer[1] + len(answer[0])
    inside = [at for at, offset in enumerate(offsets) if offset and offset[0] < end and offset[1] > begin]
    if not inside or offsets[inside[0]][0] > begin or offsets[inside[-1]][1] < end:
        return 0, 0
    return inside[0], inside[-1]


def _best(
    starts: np.ndarray[Any, Any], ends: np.ndarray[Any, Any], offsets: list[Any]
) -> tuple[float, int, int]:
    """Score and characters of a window's likeliest answer; the least score if it can have none."""
    count = len(offsets)
    starts, ends = starts[:count], ends[:count]
    found = (-float("inf"), 0, 0)
    for first in np.argsort(starts)[::-1][:CANDIDATES].tolist():
        for last in np.argsort(ends)[::-1][:CANDIDATES].tolist():
            fits = first <= last < first + MOST_TOKENS and offsets[first][0] >= 0 and offsets[last][0] >= 0
            if fits and float(starts[first] + ends[last]) > found[0]:
                found = (float(starts[first] + ends[last]), offsets[first][0], offsets[last][1])
    return found


def _absolute(rows: list[int]) -> list[int]:
    """Indices of rows, which begin anew with every batch of the tokenizer, counted through."""
    found: list[int] = []
    base = 0
    for index, row in enumerate(rows):
        if index and row < rows[index - 1]:
            base = found[-1] + 1
        found.append(base + row)
    return found


def _check_room(questions: list[str], tokenizer: Any, max_length: int) -> None:
    """Refuse questions that leave no room for a window of their text."""
    tokens = tokenizer(questions, add_special_tokens=False)["input_ids"]
    longest = max(range(len(questions)), key=lambda index: len(tokens[index]))
    needed = len(tokens[longest]) + tokenizer.num_special_tokens_to_add(pair=True) + max_length // SHARED + 1
    if needed > max_length:
        raise ValueError(
            f"max_length: expected room for a question and its text, got {max_length} tokens, and a question "
            f"of {len(tokens[longest])}: {questions[longest]!r:.80}; make it shorter, or max_length larger"
        )


def plain_answer(text: str) -> str:
    """As SQuAD compares answers: lower case, without punctuation and articles."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def word_f1(said: str, right: str) -> float:
    """F1 of the words of two answers, as SQuAD compares them, in ``[0, 1]``."""
    words = [plain_answer(text).split() for text in (said, right)]
    if not all(words):
        return float(words[0] == words[1])
    shared = sum((Counter(words[0]) & Counter(words[1])).values())
    return 2 * shared / (len(words[0]) + len(words[1]))
