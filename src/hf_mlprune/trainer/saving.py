"""A pruned model of any class, written so that it can be loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safetensors.torch import save_model
from torch import nn

from ..families import known_encoders
from ..modeling.checkpoint import make_readable


@runtime_checkable
class SavesItself(Protocol):
    """A model of transformers or of sentence-transformers, say."""

    def save_pretrained(self, save_directory: str) -> Any:
        """Write all that is needed to load it."""


def write_pruned(model: nn.Module, folder: Path) -> None:
    """Write a pruned model into an empty folder.

    Args:
        model: pruned. A class that has no ``save_pretrained`` gets ``model.safetensors``; one that does not
            write the configs of its encoders gets each in the folder of its path.
        folder: there already.
    """
    if isinstance(model, SavesItself):
        model.save_pretrained(str(folder))
    else:
        save_model(model, str(folder / "model.safetensors"))
    if not any('"structure"' in path.read_text(encoding="utf-8") for path in folder.rglob("config.json")):
        # A class of the user's own says nothing of its encoders.
        for path, _, encoder in known_encoders(model):
            encoder.config.save_pretrained(folder / path)
    make_readable(folder, next(folder.rglob("config.json")))
