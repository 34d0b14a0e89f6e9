"""Pruned models of any family: building, loading, checking and saving them."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import get_model_conversion_mapping

from .cards import CARD_MARK, may_replace, named_card, pushed_card
from .checkpoint import (
    HUB_ARGUMENTS,
    POOLER,
    StoredTensor,
    check_stored,
    check_whole,
    keep_present_names,
    quantized_weights,
    stored_tensors,
    write_checkpoint,
    write_text,
)
from .layout import Layout
from .pruned import (
    FINGERPRINT,
    apply_structure,
    check_fingerprint,
    check_loaded,
    fingerprint_tensor,
    initialize,
    set_fingerprint,
)

REPORT_FILE = "pruning_report.json"

#: What `save_pretrained(push_to_hub=True)` hands on.
_PUSH_ARGUMENTS = ("repo_id", "commit_message", "create_pr", "private", "token", "revision")


def encoder_layers(encoder: nn.Module, layout: Layout) -> list[nn.Module]:
    """The layers of an encoder, in their order."""
    layers = encoder.get_submodule(layout.layers)
    assert isinstance(layers, nn.ModuleList)
    return list(layers)


def become(module: PreTrainedModel, model_class: type[PreTrainedModel], config: Any) -> None:
    """Give a model, in place, another class over the same stock class."""
    # Building the class once lets transformers learn which outputs it can record.
    with torch.device("meta"):
        model_class(config)
    module.__class__ = model_class


def unloaded_keys(info: dict[str, Any]) -> set[str]:
    """Keys of a model that its checkpoint did not bring, or brought in another size."""
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    return set(info["missing_keys"]) | mismatched


def _under_present_names(
    model: PreTrainedModel, stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Stored tensors under the names that transformers gives those of old checkpoints when it loads them."""
    transforms, found = get_model_conversion_mapping(model), {}
    for name, tensor in stored.items():
        for transform in transforms:
            name, _ = transform.rename_source_key(name)
        found[name] = tensor
    return found


def _tied(model: nn.Module) -> list[list[str]]:
    """Names of the parameters that have several, together."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def is_encoder_weight(model: PreTrainedModel, key: str) -> bool:
    """Whether a tensor of a model belongs to its encoder, poolers aside."""
    inside = f"{model.base_model_prefix}."
    if model.base_model is not model and not key.startswith(inside):
        return False
    return not key.removeprefix(inside).startswith(POOLER)


def check_files(
    model_class: type[PreTrainedModel],
    source: str | os.PathLike[str],
    kwargs: dict[str, Any],
    not_stored: str | None = None,
) -> None:
    """Compare a checkpoint's headers with the model that its config describes, before either takes memory.

    Args:
        model_class: what is loaded.
        source: a folder, or a hub name.
        kwargs: of ``from_pretrained``.
        not_stored: part of the names of tensors that a checkpoint need not have.

    Raises:
        ValueError: a file is damaged, or does not belong to the others.
        OSError: there are no weights of safetensors.
    """
    check_whole(Path(source) / (kwargs.get("subfolder") or ""))
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    config = kwargs.get("config")
    if not isinstance(config, model_class.config_class):
        config = model_class.config_class.from_pretrained(source if config is None else config, **hub)
    stored = stored_tensors(source, kwargs.get("variant"), hub)
    try:
        with torch.device("meta"):
            model = model_class(config)
            model.tie_weights()
    except (ValueError, OSError, MemoryError):
        raise
    except Exception as error:
        # A field that transformers reads only when it builds a model: rotary frequencies, say.
        raise ValueError(
            f"config.json: expected the config of a {model_class.__name__} ({error!r:.300}); restore it, or "
            "save the model again"
        ) from error
    stored = _under_present_names(model, stored)
    tensors = model.state_dict()
    # A tied weight is stored under one of its names; an encoder may be saved without its pooler.
    optional = {name for group in _tied(model) if any(name in stored for name in group) for name in group}
    optional |= {name for name in tensors if name.startswith(POOLER) and name not in stored}
    optional |= {name for name in tensors if not_stored is not None and not_stored in name}
    if getattr(config, "quantization_config", None) is not None:
        for name in quantized_weights(model, stored, model_class.base_model_prefix):
            del tensors[name]
    check_stored(
        stored,
        {name: tensor for name, tensor in tensors.items() if name not in optional or name in stored},
        model_class.base_model_prefix,
        is_encoder=model.base_model is model,
        whole=model_class.__name__ in (config.architectures or ()),
        ignore_heads=bool(kwargs.get("ignore_mismatched_sizes")),
    )


class PrunedMixin(PreTrainedModel):
    """Builds the small layers, checks what was loaded, and saves the report beside the weights."""

    config_class: Any
    # Stored once; the structure says it.
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"\.row_indices$"]

    #: JSON report of the run that pruned this model, and its model card; `save_pretrained` writes
    #: what is set, the card only where there is none but our own.
    pruning_report: dict[str, Any] | None = None
    pruning_card: str | None = None

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        kind = type(self).config_class
        # Read first: a damaged one must not decide how much is built.
        structure = kind.read_structure(config)
        super().__init__(config, *args, **kwargs)
        encoder = self.base_model
        if encoder is not self:
            # Not the stock encoder with other layers: saved on its own, it is to be known for what it is.
            become(encoder, kind.family.heads[0].pruned, config)
        dense = kind.dense_layer(config)
        apply_structure(encoder_layers(encoder, dense.layout), structure, dense)
        set_fingerprint(encoder, structure)
        encoder.post_init()
        self.post_init()

    def _repr_html_(self) -> str:
        """What each layer has left, as notebooks show it."""
        kind = type(self).config_class
        table = kind.read_structure(self.config).html(kind.dense_layer(self.config))
        return f"<p>{type(self).__name__}</p>{table}"

    def _init_weights(self, module: nn.Module) -> None:
        """As in transformers, and what of our modules no checkpoint brought."""
        super()._init_weights(module)
        initialize(module, self.config.initializer_range)
        if FINGERPRINT in dict(module.named_buffers(recurse=False)):
            structure = self.config_class.read_structure(self.config)
            init.copy_(module.get_buffer(FINGERPRINT), fingerprint_tensor(structure))

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but never returns an encoder that is only partly loaded.

        Headers and sizes are compared before memory is taken for any weight.

        Raises:
            ValueError: an encoder weight is missing or of another size (also under
                ``ignore_mismatched_sizes=True``), an index tensor or a file is damaged, or config and weights
                are of two models.
        """
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if source is not None and kwargs.get("state_dict") is None:
            check_files(cls, source, kwargs)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        keep_present_names(model)
        # The fingerprint, too: a new one would agree with any config.
        broken = sorted(
            key for key in unloaded_keys(info) if is_encoder_weight(model, key) or key.endswith(FINGERPRINT)
        )
        if broken:
            raise ValueError(
                f"{cls.__name__}: expected every encoder weight in the checkpoint with the shape that "
                f"the structure in config.json gives, but {len(broken)} are missing or of another "
                f"size, e.g. {broken[0]!r}; the checkpoint is incomplete or was edited"
            )
        config, encoder = model.config, model.base_model
        structure, dense = cls.config_class.read_structure(config), cls.config_class.dense_layer(config)
        check_fingerprint(encoder, structure)
        check_loaded(encoder_layers(encoder, dense.layout), structure, dense)
        if source is not None and Path(source).is_dir():
            # Of other weights the card would show metrics that are not theirs.
            same = cls.__name__ in (config.architectures or ()) and not info["mismatched_keys"]
            model._read_notes(Path(source) / kwargs.get("subfolder", ""), with_card=same)
        return (model, info) if output_loading_info else model

    def _read_notes(self, folder: Path, *, with_card: bool) -> None:
        """Take over a folder's report, and card if wanted, so that they are saved again with the model."""
        report, card = folder / REPORT_FILE, folder / "README.md"
        if report.is_file():
            try:
                self.pruning_report = dict(json.loads(report.read_text(encoding="utf-8")))
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"{report}: expected JSON ({error!r:.200}); restore it, or delete it"
                ) from None
        if with_card and card.is_file():
            text = card.read_text(encoding="utf-8", errors="replace")
            self.pruning_card = text if CARD_MARK in text else None

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As in transformers; also writes the pruning report and card, if this model carries them.

        All files are written beside those of the folder and then replace them, so that a full disk leaves
        what was there. A report or card of another model that we wrote there before is taken away.

        Raises:
            OSError: the folder cannot be written; what was there before is untouched.
            ValueError: other weights than the model's own are to be pushed.
        """
        names = list(inspect.signature(PreTrainedModel.save_pretrained).parameters)[3:]
        kwargs |= dict(zip(names, args, strict=False))
        # Of a model with adapters, transformers writes only these.
        if not is_main_process or getattr(self, "_hf_peft_config_loaded", False):
            super().save_pretrained(save_directory, is_main_process, **kwargs)
            return
        push = kwargs.pop("push_to_hub", False)
        for name in ("variant", "state_dict"):
            if push and kwargs.get(name) is not None:
                raise ValueError(
                    f"save_pretrained: expected no {name} with push_to_hub, which uploads the model as it "
                    "is; save it, then upload the folder with huggingface_hub"
                )
        hub = {name: kwargs.pop(name) for name in _PUSH_ARGUMENTS if name in kwargs}
        folder = Path(save_directory)

        def write(partial: Path) -> None:
            super(PrunedMixin, self).save_pretrained(partial, **kwargs)
            self._write_notes(partial)

        if folder.is_file():
            raise NotADirectoryError(f"save_pretrained: expected a folder, got the file {folder}")
        card = folder / "README.md"
        theirs = not may_replace(card)
        write_checkpoint(
            folder, write, variant=kwargs.get("variant"), keep={"README.md"} if theirs else set()
        )
        if self.pruning_report is None:
            (folder / REPORT_FILE).unlink(missing_ok=True)
        if self.pruning_card is None and not theirs:
            card.unlink(missing_ok=True)
        if push:
            sizes = {name: kwargs[name] for name in ("max_shard_size",) if name in kwargs}
            self.push_to_hub(hub.pop("repo_id", folder.name), **hub, **sizes)

    def _write_notes(self, folder: Path) -> None:
        if self.pruning_report is not None:
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            text = json.dumps({**self.pruning_report, "file_bytes": size}, indent=2) + "\n"
            write_text(folder / REPORT_FILE, text)
        if self.pruning_card is not None:
            write_text(folder / "README.md", self.pruning_card)

    def _upload_modified_files(
        self, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, which put the repository's card, or one of its own, over ours."""
        card = Path(working_dir) / "README.md"
        if self.pruning_card is not None:
            ours = named_card(self.pruning_card, repo_id)
            write_text(card, pushed_card(card.read_text(encoding="utf-8"), ours))
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)
