"""Where a model and its data come from, as far as it is known: what a card may say of them."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE

logger = logging.getLogger(__name__)

#: Name of a repository on the hub, with its owner.
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: Fields that say a licence; the last two only where the first is "other".
_LICENSE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Origin:
    """What a model was made from. Whatever is not known is ``None``.

    Attributes:
        base_model: name on the hub.
        language: of the base model: a code, or several.
        license: of the base model.
        license_name: see the hub's documentation of model cards.
        license_link: the same; an address.
    """

    base_model: str | None = None
    language: str | list[str] | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None


@dataclass(frozen=True)
class HubDataset:
    """A data set that was loaded from the hub.

    Attributes:
        name: with its owner.
        config: name of its configuration, if it has several.
        split: as a run used it.
    """

    name: str
    config: str | None = None
    split: str | None = None


def find_origin(source: str, *, online: bool = False) -> Origin:
    """What is known of the model that another was loaded from.

    A folder is known by its card; a name on the hub by itself, and by its card where that is in the cache.

    Args:
        source: what ``from_pretrained`` was given; empty for a model that was not loaded.
        online: ask the hub for a card that is not in the cache.
    """
    folder = Path(source)
    if source and folder.is_dir():
        card = _card_data(folder / "README.md")
        name = _snapshot_of(folder) or _text(card.get("base_model"))
        return _origin(name if name and _REPOSITORY.fullmatch(name) else None, card)
    cached = _cached(source, "config.json")
    # A name without an owner may be that of a folder that has gone since.
    if not source or not (cached or _REPOSITORY.fullmatch(source)):
        return Origin()
    return _origin(source, _card_data(_cached(source, "README.md") or (_asked(source) if online else None)))


def find_dataset(data: Any, cache: str | os.PathLike[str] = HF_HUB_CACHE) -> HubDataset | None:
    """Name on the hub of a data set, if it is of ``datasets`` and both its caches agree on it.

    A data set does not know its name. The folder of its tables has it in lower case, and the hub's cache as
    it is.

    Args:
        data: what a data loader reads.
        cache: folder of files from the hub.
    """
    info, files = getattr(data, "info", None), getattr(data, "cache_files", None)
    if info is None or not isinstance(files, list):
        return None
    folders = {part for file in files for part in Path(file["filename"]).parts if "___" in part}
    for folder in sorted(folders):
        owner, _, name = folder.partition("___")
        if name == info.dataset_name and (Path(cache) / f"datasets--{owner}--{name}").is_dir():
            split = None if data.split is None else str(data.split)
            config = None if info.config_name == "default" else info.config_name
            return HubDataset(f"{owner}/{name}", config, split)
    return None


def _origin(base_model: str | None, card: Mapping[str, Any]) -> Origin:
    found = {name: _text(card.get(name)) for name in _LICENSE}
    link = found["license_link"]
    if link is not None and not link.startswith("https://"):
        # A file beside that card, which is not beside ours.
        found["license_link"] = None
    language = card.get("language")
    if isinstance(language, list):
        language = [code for code in language if isinstance(code, str)] or None
    return Origin(base_model, language if isinstance(language, list) else _text(language), **found)


def _text(value: Any) -> str | None:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) and value else None


def _snapshot_of(folder: Path) -> str | None:
    """Name of the repository whose snapshot in the hub's cache a folder is."""
    parts = folder.absolute().parts
    if len(parts) < 3 or parts[-2] != "snapshots" or not parts[-3].startswith("models--"):
        return None
    return parts[-3].removeprefix("models--").replace("--", "/")


def _cached(name: str, file: str) -> Path | None:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return None
    found = try_to_load_from_cache(name, file)
    return Path(found) if isinstance(found, str) else None


def _asked(name: str) -> Path | None:
    """The card of a repository, if the hub gives it."""
    try:
        return Path(hf_hub_download(name, "README.md"))
    except Exception as error:
        # Whatever it is: a licence in a card is not worth a run.
        logger.info("the card of %s could not be read: %s", name, error)
        return None


def _card_data(path: Path | None) -> dict[str, Any]:
    """Front matter of a card; nothing if there is none that can be read."""
    if path is None or not path.is_file():
        return {}
    try:
        return dict(ModelCard.load(path, ignore_metadata_errors=True).data.to_dict())
    except Exception as error:
        # Somebody else's file: yaml, encodings and the library's own checks fail each in their way.
        logger.info("the card %s could not be read: %s", path, error)
        return {}
