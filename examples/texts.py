"""Texts of the examples: sentences, and articles with their headlines.

Those of BBC news are the BBC's, for non-commercial research use.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from wheel_assets import bbc_news

#: Headline, article, class.
Article = tuple[str, str, str]
BBC = "bbc"
#: What is asked for: names of two words and more, and numbers.
ANSWER = r"(?<=[a-z,] )(?:[A-Z]\w+(?: [A-Z]\w+)+|[£$]?\d[\d,.]*\d(?:%|bn|m)?)"
#: Class of words -> what they look like; the first that fits.
CLASSES = {
    "MONEY": r"[£$€].*",
    "PERCENT": r".*%",
    "ORDINAL": r"\d+(st|nd|rd|th)",
    "YEAR": r"(19|20)\d\d",
    "NUMBER": r"\d.*",
    "LETTERS": r"[A-Z]{2,}s?",
    "NAME": r"[A-Z].*",
    "PUNCT": r"\W",
    "PLAIN": r".*",
}


def load_sentences(files: Sequence[str], folder: Path, seed: int, held_out: int) -> list[str]:
    """Distinct sentences of three words and more, in an order that the seed gives.

    Args:
        files: a sentence per line, or tables with sentences first; ``"bbc"`` for BBC news.
        folder: of downloads.
        seed: of the order.
        held_out: there must be more than these.
    """
    lines = []
    for file in files:
        if file == BBC:
            print("Data: BBC news. The text is the BBC's, for non-commercial research use.")
            lines += [part for text, _ in bbc_news(folder) for part in sentences_of(text)]
        else:
            lines += [line.partition("\t")[0] for line in Path(file).read_text("utf-8").splitlines()]
    found = list(dict.fromkeys(line.strip() for line in lines if len(line.split()) >= 3))
    if len(found) <= held_out:
        raise SystemExit(f"expected more than {held_out} sentences of three words, got {len(found)}")
    order = np.random.default_rng(seed).permutation(len(found))
    return [found[index] for index in order]


def load_articles(folder: Path, seed: int) -> list[Article]:
    """Headline, article, class, in an order that the seed gives."""
    print("Data: BBC news. The text is the BBC's, for non-commercial research use.")
    found: dict[str, Article] = {}
    for text, subject in bbc_news(folder):
        headline, _, article = text.partition("\n")
        found.setdefault(headline.strip(), (headline.strip(), article.strip(), subject))
    articles = list(found.values())
    return [articles[index] for index in np.random.default_rng(seed).permutation(len(articles))]


def others(articles: Sequence[Article], own: int, count: int, generator: np.random.Generator) -> list[str]:
    """Articles of the same class."""
    subject = articles[own][2]
    found = [text for index, (_, text, of) in enumerate(articles) if of == subject and index != own]
    return [found[index] for index in generator.permutation(len(found))[:count]]


def training_pairs(articles: Sequence[Article], seed: int) -> Dataset:
    """Each headline with its own article, and with three others of its class."""
    generator = np.random.default_rng(seed)
    rows = []
    for own, (headline, article, _) in enumerate(articles):
        rows.append({"headline": headline, "article": article, "label": 1.0})
        for other in others(articles, own, 3, generator):
            rows.append({"headline": headline, "article": other, "label": 0.0})
    return Dataset.from_list(rows)


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, of three words and more."""
    parts = (part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", text))
    return [part for part in parts if len(part.split()) >= 3]


def following_sentences(folder: Path, seed: int) -> tuple[Dataset, Dataset]:
    """Pairs of sentences for training and testing; label 1 where the second follows the first in an article.

    Of the others, the second is a sentence of another article of the class. No article is in both parts.
    """
    generator = np.random.default_rng(seed)
    articles = load_articles(folder, seed)
    rows = []
    for own, (_, article, _) in enumerate(articles):
        found = sentences_of(article)[:6]
        for first, second in itertools.pairwise(found):
            wrong = sentences_of(others(articles, own, 1, generator)[0])
            label = int(generator.integers(2)) if wrong else 1
            rows.append((own, first, second if label else wrong[generator.integers(len(wrong))], label))
    held_out = len(articles) // 10
    parts = ([row for row in rows if row[0] >= held_out], [row for row in rows if row[0] < held_out])
    names = ("sentence1", "sentence2", "label")
    train, test = (
        Dataset.from_list([dict(zip(names, row[1:], strict=True)) for row in part]) for part in parts
    )
    return train, test


def words_of(sentence: str) -> list[str]:
    """Words, numbers with what belongs to them, and marks."""
    return re.findall(
        r"[£$€]?\d[\d,.]*\d(?:%|bn|m|st|nd|rd|th)?|[£$€]?\d(?:%|bn|m|st|nd|rd|th)?|[\w'-]+|\S", sentence
    )


def classes_of_words(words: Sequence[str]) -> list[str]:
    """How each word is to be read, by the rules of :data:`CLASSES`."""
    found = []
    for place, word in enumerate(words):
        name = next(name for name, pattern in CLASSES.items() if re.fullmatch(pattern, word))
        # The first word of a sentence has a capital in any case.
        found.append("PLAIN" if name == "NAME" and place == 0 else name)
    return found


def sentences_with_gaps(articles: Sequence[Article]) -> list[dict[str, Any]]:
    """Questions in SQuAD's flat form: a sentence with a gap, and the beginning of the article without it.

    The answer is a name or number that stood in the gap and stands in the rest, too.
    """
    rows = []
    for _, article, _ in articles:
        # What has more words is no sentence, but a list of players.
        sentences = [part for part in sentences_of(article)[:10] if len(part.split()) <= 40]
        for place, sentence in enumerate(sentences):
            context = " ".join(sentences[:place] + sentences[place + 1 :])
            for found in re.finditer(ANSWER, sentence):
                if found[0] in context:
                    question = f"{sentence[: found.start()]}_____{sentence[found.end() :]}"
                    answers = {"text": [found[0]], "answer_start": [context.index(found[0])]}
                    rows.append({"question": question, "context": context, "answers": answers})
    return rows


def pair_tokens(parts: tuple[Dataset, Dataset], tokenizer: Any, max_length: int) -> tuple[Dataset, Dataset]:
    """Both sentences of each pair in one row, as models read pairs; of training and test rows."""
    names = ["sentence1", "sentence2"]

    def tokenize(rows: dict[str, list[str]]) -> Any:
        return tokenizer(*(rows[name] for name in names), truncation=True, max_length=max_length)

    train, test = (part.map(tokenize, batched=True, remove_columns=names) for part in parts)
    return train, test


def load_scored_pairs(file: Path) -> tuple[list[float], list[str], list[str]]:
    """Scores and both sentences of the STS benchmark's pairs."""
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
    return [float(row[4]) for row in rows], [row[5] for row in rows], [row[6] for row in rows]
