"""Tokenizers for rows that are lists of words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

PROBE = ["the", "of"]


def word_tokenizer(source: str) -> Any:
    """A model's tokenizer, set so that it cuts a list of words as it cuts the text that they make.

    Byte-level tokenizers (RoBERTa, ModernBERT) put the blank before a word into its first piece. For lists
    they leave it out, unless they are told to add it: the model would learn pieces that no text has. Those
    that cannot be told so are given words with their blanks, by :func:`as_in_text`.

    Args:
        source: folder or hub name.
    """
    tokenizer = AutoTokenizer.from_pretrained(source)
    if _cuts_alike(tokenizer, PROBE):
        return tokenizer
    # Some read this setting. Others have it in their file alone.
    told = AutoTokenizer.from_pretrained(source, add_prefix_space=True)
    if told.is_fast and isinstance(told.backend_tokenizer.pre_tokenizer, ByteLevel):
        told.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    return told if _cuts_alike(told, PROBE) else tokenizer


def as_in_text(tokenizer: Any, rows: Sequence[list[str]]) -> list[list[str]]:
    """Lists of words, with the blanks between them where a tokenizer would leave these out."""
    if _cuts_alike(tokenizer, PROBE) or not _cuts_alike(tokenizer, _blanks(PROBE)):
        return list(rows)
    return [_blanks(row) for row in rows]


def _blanks(words: list[str]) -> list[str]:
    return [*words[:1], *(f" {word}" for word in words[1:])]


def _cuts_alike(tokenizer: Any, words: list[str]) -> bool:
    """Whether a list of words gives the tokens of their text; before its first word there may be a blank."""
    found, text = tokenizer(words, is_split_into_words=True)["input_ids"], " ".join(PROBE)
    return found in (tokenizer(text)["input_ids"], tokenizer(f" {text}")["input_ids"])
