"""Tokenizers for rows that are lists of words."""

from __future__ import annotations

from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

#: Of letters that every vocabulary has.
PROBE = ["the", "of"]


def word_tokenizer(source: str) -> Any:
    """A model's tokenizer, set so that it cuts a list of words as it cuts the text that they make.

    Byte-level tokenizers (RoBERTa, ModernBERT) put the blank before a word into its first piece. For lists
    they leave it out, unless they are told to add it: the model would learn pieces that no text has.

    Args:
        source: folder or hub name.

    Raises:
        ValueError: the tokenizer cannot be set so.
    """
    tokenizer = AutoTokenizer.from_pretrained(source)
    if _cuts_alike(tokenizer):
        return tokenizer
    # Some read this setting. Others have it in their file alone.
    tokenizer = AutoTokenizer.from_pretrained(source, add_prefix_space=True)
    if tokenizer.is_fast and isinstance(tokenizer.backend_tokenizer.pre_tokenizer, ByteLevel):
        tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    if not _cuts_alike(tokenizer):
        raise ValueError(
            f"model: expected a tokenizer that cuts a list of words as it cuts a text, got "
            f"{type(tokenizer).__name__}, which leaves out the blanks between words; save it with "
            "add_prefix_space=True"
        )
    return tokenizer


def _cuts_alike(tokenizer: Any) -> bool:
    words, text = tokenizer(PROBE, is_split_into_words=True), tokenizer(" ".join(PROBE))
    # Before the first word of a text there is no blank, or there is one: both are seen in texts.
    return bool(words["input_ids"][-2:] == text["input_ids"][-2:])
