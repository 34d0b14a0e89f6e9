"""Models that come out of sentence-transformers go back into it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedModel

from ..files import find_file
from ..trainer.resuming import SENTENCE_MODULES

PACKAGE = "sentence_transformers"


def check_sentence_package(source: str) -> None:
    """Refuse, before any work, a SentenceTransformer that could not be written as one.

    Args:
        source: folder or hub name of the model.

    Raises:
        ImportError: the package is not installed.
    """
    if find_file(source, SENTENCE_MODULES) is not None and find_spec(PACKAGE) is None:
        raise ImportError(
            f"model: {source} is of sentence-transformers, which writes the pruned model, too, and is not "
            "installed; pip install sentence-transformers"
        )


def save_sentence_model(source: str, model: PreTrainedModel, out: Path) -> bool:
    """Save a model as the SentenceTransformer that it came out of.

    Args:
        source: folder or hub name that it was loaded from.
        model: pruned.
        out: folder.

    Returns:
        Whether it came out of one; if not, nothing is written.
    """
    if find_file(source, SENTENCE_MODULES) is None or type(model).__name__ != type(model.base_model).__name__:
        return False
    from sentence_transformers import SentenceTransformer

    sentences = SentenceTransformer(source, device="cpu")
    # Its name in sentence-transformers from 5.4 on, and before.
    modules = sentences[0]._modules
    (name,) = [name for name in ("model", "auto_model") if isinstance(modules.get(name), PreTrainedModel)]
    setattr(sentences[0], name, model.cpu())
    sentences.save_pretrained(str(out))
    return True
