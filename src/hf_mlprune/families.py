"""The families that can be pruned, and the encoders of theirs within a model."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedModel

from .modeling.family import Family, Head

#: Files of `modeling/`, each of which describes a family.
FILES = (
    "bert",
    "roberta",
    "xlm_roberta",
    "camembert",
    "electra",
    "ernie",
    "distilbert",
    "mpnet",
    "modernbert",
    "deberta_v2",
    "esm",
    "vit",
    "deit",
)
FAMILIES: tuple[Family, ...] = tuple(import_module(f"{__package__}.modeling.{file}").FAMILY for file in FILES)

_HEADS = {kind: head for family in FAMILIES for head in family.heads for kind in (head.stock, head.pruned)}


def head_of(model: nn.Module) -> Head | None:
    """The task head of a model: stock, with masks or pruned; ``None`` for a class of the user's own."""
    kind = type(model)
    # Classes with masks are derived from the record, and name it.
    found = _HEADS.get(kind, vars(kind).get("task_head"))
    return found if isinstance(found, Head) else None


#: Model types that are asked for and cannot be pruned, and why.
UNSUPPORTED = {
    "albert": "its layers are one and the same, so that they cannot be pruned one by one",
    "bart": "its encoder is no model that is used by itself",
    "deberta": "its query, key and value lie interleaved in one matrix; deberta-v2 and v3 are supported",
    "t5": "a table in its first layer holds the relative positions for the heads of all others",
}


def find_encoders(model: nn.Module, names: Sequence[str] = ()) -> list[tuple[str, Family, PreTrainedModel]]:
    """Encoders of known families in a model, with their paths.

    Args:
        model: any module.
        names: paths of encoders, or of modules that hold one each; without any, the model must hold one.

    Raises:
        TypeError: none is found, or more than one and no names.
        ValueError: a name is not that of one encoder.
    """
    found = known_encoders(model)
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    if not names and len(found) > 1:
        raise TypeError(
            f"expected a model with one encoder, got {type(model).__name__} with {len(found)}: say which are "
            f"to be pruned by encoder=..., one or several of {[path for path, _, _ in found]}"
        )
    for name in names:
        named = [path for path, _, module in found if _is_within(paths[id(module)], name)]
        if len(named) != 1:
            raise ValueError(
                f"encoder: expected paths of encoders, of {[path for path, _, _ in found]}, got {name!r}, "
                f"which names {named or 'none'}"
            )
    return [row for row in found if not names or any(_is_within(paths[id(row[2])], n) for n in names)]


def known_encoders(model: nn.Module) -> list[tuple[str, Family, PreTrainedModel]]:
    """All encoders of known families in a model, with their paths.

    Raises:
        TypeError: there are none.
    """
    found = [
        (path, family, module)
        for path, module in model.named_modules()
        for family in FAMILIES
        if isinstance(module, family.heads[0].stock)
    ]
    if not found:
        raise TypeError(
            f"expected a model with an encoder of a known family "
            f"({', '.join(family.name for family in FAMILIES)}), got {type(model).__name__} with none"
            f"{_why_unsupported(model)}"
        )
    return found


def _is_within(paths: Sequence[str], name: str) -> bool:
    """Whether one of the paths of a module is a name, or lies within the module of that name."""
    return any(path == name or path.startswith(f"{name}.") for path in paths)


def _why_unsupported(model: nn.Module) -> str:
    for module in model.modules():
        kind = getattr(getattr(module, "config", None), "model_type", None)
        if kind in UNSUPPORTED:
            return f"; {kind} is not supported: {UNSUPPORTED[kind]}"
    return ""


def family_of(config: Any) -> Family | None:
    """The family of a config, dense or pruned; ``None`` if it is of none."""
    kinds = ((family, (family.name, family.config.model_type)) for family in FAMILIES)
    return next((family for family, names in kinds if config.model_type in names), None)


def read_config(name: str, expected: str) -> Any:
    """The config of a folder or of a model of the hub.

    Args:
        name: of either.
        expected: beginning of the error: ``"model: expected a folder"``.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: there is a folder whose config cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(name)
    except OSError as error:
        if Path(name).is_dir():
            raise ValueError(
                f"{expected} with a config.json that can be read, got {name!r} ({error})"
            ) from error
        raise FileNotFoundError(
            f"{expected}, or a name of the hub, got {name!r}: there is none, and the hub cannot be reached "
            "or has none of this name"
        ) from error


def plain_config(config: Any) -> dict[str, Any]:
    """The fields that a config shares with the stock one of its family."""
    data: dict[str, Any] = config.to_dict()
    for key in ("model_type", "auto_map", "structure", "pruning"):
        data.pop(key, None)
    return data
