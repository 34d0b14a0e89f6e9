"""Texts of the examples: sentences, and articles with their headlines.

Those of BBC news are the BBC's, for non-commercial research use.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

from wheel_assets import bbc_news

#: Headline, article, class.
Article = tuple[str, str, str]
BBC = "bbc"


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
            texts = [text for text, _ in bbc_news(folder)]
            lines += [part for text in texts for part in re.split(r"(?<=[.!?])\s+|\n+", text)]
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


def load_scored_pairs(file: Path) -> tuple[list[float], list[str], list[str]]:
    """Scores and both sentences of the STS benchmark's pairs."""
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
    return [float(row[4]) for row in rows], [row[5] for row in rows], [row[6] for row in rows]
