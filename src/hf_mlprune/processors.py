"""Tokenizers and image processors as they are read from files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reading_processor(source: str) -> Iterator[None]:
    """Say of files that are damaged which ones they are: their readers raise errors of any kind.

    Args:
        source: folder or hub name that a tokenizer or image processor is loaded from.

    Raises:
        ValueError: its files cannot be read.
    """
    try:
        yield
    except (OSError, ImportError):
        # These say what is missing.
        raise
    except Exception as error:
        raise ValueError(
            f"{source}: expected files of a tokenizer or image processor that can be read, got "
            f"{type(error).__name__}: {error}; get them again, or save the tokenizer there again"
        ) from error
