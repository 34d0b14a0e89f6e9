"""Config and models whose masks are learned."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
)

from .anatomy import anatomy
from .config import PruningConfig
from .loop import reset_state
from .masked import STATE_NAME, PruningState, insert_masks
from .methods import make_method
from .modeling import bert as pruned
from .modeling.checkpoint import check_config, keep_present_names
from .modeling.pruned import FINGERPRINT, apply_structure, initialize
from .modeling.structure import fingerprint


def _take_settings(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the settings of a pruning run out of keyword arguments."""
    names = {field.name for field in dataclasses.fields(PruningConfig)}
    return {name: kwargs.pop(name) for name in names & set(kwargs)}


def _check_spelling(names: Iterable[str]) -> None:
    """Refuse what is almost the name of a setting: configs keep any field, so nobody else would notice."""
    settings = [field.name for field in dataclasses.fields(PruningConfig)]
    for name in names:
        meant = difflib.get_close_matches(name, settings, n=1, cutoff=0.8)
        if meant and not hasattr(BertConfig, name):
            raise ValueError(f"unknown setting {name!r}: did you mean {meant[0]!r}?")


def _with_settings(stored: dict[str, Any] | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Stored settings of a run with those named by the caller on top, every value concrete."""
    stored = stored or {}
    if settings.get("preset", stored.get("preset")) != stored.get("preset"):
        # What is stored are the values of another preset, which must not stand for this one's.
        stored = {"density": stored["density"]} if "density" in stored else {}
    return PruningConfig.from_dict({**stored, **settings}).to_dict()


class PrunableBertConfig(BertConfig):
    """Config of a BERT whose masks are being learned.

    ``PrunableBertConfig.from_pretrained(name, density=0.2, ...)`` takes every setting of
    :class:`~hf_mlprune.config.PruningConfig`.

    Attributes:
        pruning: JSON form of the settings.
        structure: what an earlier run left, if a pruned model is pruned further.
    """

    model_type = "prunable_bert"

    pruning: dict[str, Any] | None = None
    structure: dict[str, Any] | None = None

    def __init__(self, **kwargs: Any) -> None:
        """Settings given by name become :attr:`pruning`; see ``PruningConfig.create`` for errors."""
        settings = _take_settings(kwargs)
        if settings:
            _check_spelling(kwargs)
        # Configs are dataclasses in later transformers, not in 5.0: in both, this sets every field.
        super().__init__(**kwargs)
        if settings:
            self.pruning = _with_settings(self.pruning, settings)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; settings of a run given by name are checked and kept.

        A field of the stored config that is named like a setting stays what it was: a field.
        """
        settings, data = _take_settings(kwargs), dict(config_dict)
        check_config(data)
        if not isinstance(data.get("pruning") or {}, dict):
            raise ValueError(f"config.json: pruning: expected an object, got {data['pruning']!r:.80}")
        _check_spelling(kwargs)
        fields = _take_settings(data)
        if settings:
            data["pruning"] = _with_settings(data.get("pruning"), settings)
        loaded = super().from_dict(data, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, value in fields.items():
            setattr(config, name, value)
        return loaded

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; a dense or pruned BERT's config is taken for one of this type."""
        data, unused = super().get_config_dict(*args, **kwargs)
        if (data.get("structure") or {}).get("block_shape") is not None:
            raise ValueError(
                "config: expected a model that is dense or pruned by heads and rows, got one stored as "
                "blocks; load it with its Auto class, then `attach(model, config)` or pass it to a Trainer "
                "with a PruningCallback"
            )
        if data.get("model_type") in ("bert", "pruned_bert"):
            data = {**data, "model_type": cls.model_type}
            data.pop("auto_map", None)
        return data, unused


class PrunableBertMixin(PreTrainedModel):
    """Builds the masks that the config asks for, and gives new ones their initial values."""

    config: PrunableBertConfig
    config_class = PrunableBertConfig
    # By name: transformers would cast the whole state, bool masks included. Version 5.0 asks the class, later
    # ones the instance.
    _keep_in_fp32_modules_strict: Any = [f"{STATE_NAME}.*.scores", f"{STATE_NAME}.*.threshold"]  # noqa: RUF012
    _keys_to_ignore_on_load_missing: ClassVar = [rf"(^|\.){STATE_NAME}\."]
    # Of a model that was pruned before.
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"\.row_indices$", rf"(^|\.){FINGERPRINT}$"]

    def _insert_masks(self) -> None:
        config = self.config
        if config.pruning is None:
            raise ValueError(
                "the config names no density: use PrunableBertConfig.from_pretrained(name, density=0.2)"
            )
        encoder = self.base_model
        if config.structure is not None:
            config.structure = without_blocks(config.structure)
            apply_structure(
                encoder.encoder.layer,
                pruned.bert_structure(config),
                pruned.bert_layer_sizes(config),
                pruned.BERT_PATHS,
            )
        new_masks(self, PruningConfig.from_dict(config.pruning))
        self._keep_floats()

    def _keep_floats(self) -> None:
        """Have what this run's method learns loaded as float32, and nothing named that is not there."""
        state = getattr(self.base_model, STATE_NAME)
        names = {
            name.rpartition(".")[2] for name, buffer in state.named_buffers() if buffer.is_floating_point()
        }
        self._keep_in_fp32_modules_strict = {f"{STATE_NAME}.*.{name}" for name in names}

    def _init_weights(self, module: nn.Module) -> None:
        """As in transformers, and what of our modules no checkpoint brought."""
        super()._init_weights(module)
        initialize(module, self.config.initializer_range)

    def initialize_weights(self) -> None:
        """As in transformers; masks that no checkpoint brought get their initial values.

        Raises:
            ValueError: the checkpoint has some masks, but not all.
        """
        super().initialize_weights()
        state = getattr(self.base_model, STATE_NAME, None)
        if not isinstance(state, PruningState):
            return  # called by the stock class's own constructor, before there are masks
        # The mark that transformers leaves on what it has loaded.
        new = [
            name for name, buffer in state.named_buffers() if not getattr(buffer, "_is_hf_initialized", False)
        ]
        if new and len(new) != len(list(state.buffers())):
            raise ValueError(
                f"{type(self).__name__}: expected all masks in the checkpoint or none, but {len(new)} are "
                f"missing, e.g. {new[0]!r}; its settings and its weights are not of the same run"
            )
        if new:
            reset_state(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As in torch; refuses a checkpoint that would be loaded in part, as Trainer does without a word.

        Raises:
            ValueError: the tensors are of a model that is pruned already, or under names of an old version.
        """
        if prefix + FINGERPRINT in state_dict:
            raise ValueError(
                "resume: the checkpoint is a pruned model, so its run is over: load it by its Auto class to "
                "use it, or give it to a new Trainer to prune it further"
            )
        masked = isinstance(getattr(self, STATE_NAME, None), PruningState)
        if masked and any(name.startswith(f"{prefix}{STATE_NAME}.") for name in state_dict):
            missing = [name for name in self.state_dict(prefix=prefix) if name not in state_dict]
            if missing:
                raise ValueError(
                    f"resume: expected every tensor of the encoder in the checkpoint, but {len(missing)} are "
                    f"not there under their present names, e.g. {missing[0]!r}; load the folder by its Auto "
                    "class and save it again, which writes present names, or start the run anew"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, from a dense, prunable or row- and head-pruned checkpoint.

        Raises:
            ValueError: an encoder weight or some of the masks are missing or of another size.
        """
        config = kwargs.get("config")
        if args and isinstance(config, PrunableBertConfig) and cls.__name__ in (config.architectures or ()):
            # Of a run of ours: whole, or refused. Others may bring a dense model in any form.
            pruned.check_files(cls, args[0], kwargs, not_stored=STATE_NAME)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        keep_present_names(model)
        unloaded = pruned.unloaded_keys(info)
        broken = sorted(key for key in unloaded if "encoder.layer." in key)
        if broken:
            raise ValueError(
                f"{cls.__name__}: expected every encoder weight in the checkpoint, but {len(broken)} are "
                f"missing or of another size, e.g. {broken[0]!r}"
            )
        return (model, info) if output_loading_info else model


class PrunableBertModel(PrunableBertMixin, BertModel):
    """:class:`~transformers.BertModel` with masks."""

    def __init__(self, config: PrunableBertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        self._insert_masks()
        self.post_init()


class PrunableBertHeadMixin(PrunableBertMixin):
    """A masked encoder under one of transformers' task heads."""

    bert: Any

    def __init__(self, config: PrunableBertConfig) -> None:
        super().__init__(config)
        self.bert = PrunableBertModel(config, add_pooling_layer=self.bert.pooler is not None)
        self._keep_floats()
        self.post_init()


class PrunableBertForSequenceClassification(PrunableBertHeadMixin, BertForSequenceClassification):
    """:class:`~transformers.BertForSequenceClassification` with masks."""


class PrunableBertForTokenClassification(PrunableBertHeadMixin, BertForTokenClassification):
    """:class:`~transformers.BertForTokenClassification` with masks."""


class PrunableBertForQuestionAnswering(PrunableBertHeadMixin, BertForQuestionAnswering):
    """:class:`~transformers.BertForQuestionAnswering` with masks."""


class PrunableBertForMaskedLM(PrunableBertHeadMixin, BertForMaskedLM):
    """:class:`~transformers.BertForMaskedLM` with masks."""


class PrunableBertForMultipleChoice(PrunableBertHeadMixin, BertForMultipleChoice):
    """:class:`~transformers.BertForMultipleChoice` with masks."""


def new_masks(model: nn.Module, config: PruningConfig) -> PruningState:
    """Put gates into a model's encoder, with what the config's method learns them from."""
    method = make_method(config)
    state = insert_masks(anatomy(model), config, mask_queries_and_keys=method.mask_queries_and_keys)
    for gate in state.all_gates():
        method.prepare(gate)
    return state


def without_blocks(structure: dict[str, Any] | None) -> dict[str, Any] | None:
    """A structure whose matrices are stored dense, as they are while masks are learned."""
    if structure is None:
        return None
    layers = [{**layer, "blocks": {}} for layer in structure["layers"]]
    dense = {**structure, "block_shape": None, "layers": layers}
    return {**dense, "fingerprint": fingerprint(dense)}
