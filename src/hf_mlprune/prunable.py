"""Configs and models whose masks are learned, derived from the families."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from .config import PruningConfig
from .encoders import Encoder, inspect_encoder
from .families import FAMILIES, find_encoders
from .keywords import check_spelling, take_settings, with_settings
from .modeling.checkpoint import keep_present_names
from .modeling.family import Family, Head, damaged_fields, share_conversions
from .modeling.fields import check_config
from .modeling.pretrained import become, check_files, encoder_layers, unloaded_keys
from .modeling.pruned import FINGERPRINT, apply_structure, initialize
from .modeling.structure import fingerprint
from .run import reset_state
from .state import STATE_NAME, PruningState, insert_masks


class PrunableConfigMixin:
    """Config of models whose masks are being learned.

    ``PrunableBertConfig.from_pretrained(name, density=0.2, ...)`` takes every setting of
    :class:`~hf_mlprune.config.PruningConfig`.

    Attributes:
        model_type: ``prunable_`` and the type of the stock model.
        family: the encoders it is for.
        pruning: JSON form of the settings.
        structure: what an earlier run left, if a pruned model is pruned further.
    """

    model_type: ClassVar[str]
    family: ClassVar[Family]
    architectures: list[str] | None

    pruning: dict[str, Any] | None = None
    structure: dict[str, Any] | None = None

    def __init__(self, **kwargs: Any) -> None:
        """Settings given by name become :attr:`pruning`; see ``PruningConfig.create`` for errors."""
        settings = take_settings(kwargs)
        if settings:
            check_spelling(self.family.stock_config().to_dict(), kwargs)
        # Configs are dataclasses in later transformers, not in 5.0: in both, this sets every field.
        super().__init__(**kwargs)
        if settings:
            self.pruning = with_settings(self.pruning, settings)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; settings of a run given by name are checked and kept.

        A field of the stored config that is named like a setting stays what it was: a field.

        Raises:
            ValueError: a field is damaged, or a setting is not known.
        """
        settings, data = take_settings(kwargs), dict(config_dict)
        check_config(data, cls.family.config.config_fields)
        if not isinstance(data.get("pruning") or {}, dict):
            raise ValueError(f"config.json: pruning: expected an object, got {data['pruning']!r:.80}")
        check_spelling(cls.family.stock_config().to_dict(), kwargs)
        fields = take_settings(data)
        if settings:
            data["pruning"] = with_settings(data.get("pruning"), settings)
        with damaged_fields(cls.family):
            loaded = super().from_dict(data, **kwargs)  # type: ignore[misc]
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, value in fields.items():
            setattr(config, name, value)
        return loaded

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; the config of a dense or pruned model is taken for one of this type."""
        data, unused = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        if (data.get("structure") or {}).get("block_shape") is not None:
            raise ValueError(
                "config: expected a model that is dense or pruned by heads and rows, got one stored as "
                "blocks; load it with its Auto class, then `attach(model, config)` or pass it to a Trainer "
                "with a PruningCallback"
            )
        if data.get("model_type") in (cls.family.name, cls.family.config.model_type):
            data = {**data, "model_type": cls.model_type}
            data.pop("auto_map", None)
        return data, unused


class PrunableMixin(PreTrainedModel):
    """Builds the masks that the config asks for, and gives new ones their initial values.

    Attributes:
        task_head: the task head, with its classes.
    """

    task_head: ClassVar[Head]
    config: Any
    config_class: Any
    # By name: transformers would cast the whole state, bool masks included. Version 5.0 asks the class, later
    # ones the instance.
    _keep_in_fp32_modules_strict: Any = [rf"{STATE_NAME}\.layers\.\d+\.\w+\.(?!keep\b)\w+"]  # noqa: RUF012
    _keys_to_ignore_on_load_missing: ClassVar = [rf"(^|\.){STATE_NAME}\."]
    # Of a model that was pruned before.
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"\.row_indices$", rf"(^|\.){FINGERPRINT}$"]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if config.pruning is None:
            raise ValueError(
                f"the config names no density: use {type(config).__name__}.from_pretrained(name, density=0.2)"
            )
        super().__init__(config, *args, **kwargs)
        family, encoder = config.family, self.base_model
        settings = PruningConfig.from_dict(config.pruning)
        if encoder is not self:
            # There is one only, but a name that is none would fail at the end of the run.
            find_encoders(self, settings.encoder)
            become(encoder, prunable_class(family.heads[0]), config)
        if config.structure is not None:
            config.structure = without_blocks(config.structure)
            dense = family.config.dense_layer(config)
            layers = encoder_layers(encoder, dense.layout)
            apply_structure(layers, family.config.read_structure(config), dense)
        new_masks(inspect_encoder(encoder), settings)
        self._keep_floats(encoder)
        encoder.post_init()
        self.post_init()

    def _keep_floats(self, encoder: PreTrainedModel) -> None:
        """Have what this run's method learns loaded as float32, and nothing named that is not there."""
        state = getattr(encoder, STATE_NAME)
        names = {
            name.rpartition(".")[2] for name, buffer in state.named_buffers() if buffer.is_floating_point()
        }
        for model in {self, encoder}:
            model._keep_in_fp32_modules_strict = {f"{STATE_NAME}.*.{name}" for name in names}

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
                    f"not there under their present names, e.g. {missing[0]!r}; give the method and the kind "
                    "of target of the interrupted run. If they are the same, an earlier version wrote these "
                    "names: load the folder by its Auto class and save it again, or start the run anew"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, from a dense, prunable or row- and head-pruned checkpoint.

        Raises:
            ValueError: an encoder weight or some of the masks are missing or of another size.
        """
        config = kwargs.get("config")
        if args and isinstance(config, PrunableConfigMixin) and cls.__name__ in (config.architectures or ()):
            # Of a run of ours: whole, or refused. Others may bring a dense model in any form.
            check_files(cls, args[0], kwargs, not_stored=STATE_NAME)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        keep_present_names(model)
        unloaded = unloaded_keys(info)
        layers = f".{cls.config_class.family.config.dense_layer(model.config).layout.layers}."
        broken = sorted(key for key in unloaded if layers in f".{key}")
        if broken:
            raise ValueError(
                f"{cls.__name__}: expected every encoder weight in the checkpoint, but {len(broken)} are "
                f"missing or of another size, e.g. {broken[0]!r}"
            )
        return (model, info) if output_loading_info else model


def _derive_config(family: Family) -> type[PrunableConfigMixin]:
    stock = family.stock_config
    name = f"Prunable{stock.__name__}"
    contents = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"Config of a :class:`~transformers.{stock.__name__}` model whose masks are being "
        f"learned; see :class:`PrunableConfigMixin`. Takes the settings of :class:`PruningConfig` by name.",
        "model_type": f"prunable_{family.name}",
        "family": family,
        # transformers makes configs dataclasses, which get an `__init__` unless their own class has one.
        "__init__": PrunableConfigMixin.__init__,
    }
    share_conversions(family.name, f"prunable_{family.name}")
    return type(name, (PrunableConfigMixin, stock), contents)


def _derive_class(head: Head, config: type[PrunableConfigMixin]) -> type[PreTrainedModel]:
    name = f"Prunable{head.stock.__name__}"
    contents = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f":class:`~transformers.{head.stock.__name__}` with masks.",
        "config_class": config,
        "task_head": head,
    }
    share_conversions(head.stock.__name__, name)
    return type(name, (PrunableMixin, head.stock), contents)


#: Model type of the stock model -> its config class.
CONFIGS: dict[str, type[PrunableConfigMixin]] = {family.name: _derive_config(family) for family in FAMILIES}
#: Name -> class of each head of each family.
CLASSES: dict[str, type[PreTrainedModel]] = {
    model_class.__name__: model_class
    for family in FAMILIES
    for model_class in (_derive_class(head, CONFIGS[family.name]) for head in family.heads)
}
#: All of them by name. As globals, so that they are pickled.
PUBLIC: dict[str, Any] = {config.__name__: config for config in CONFIGS.values()} | CLASSES
globals().update(PUBLIC)


def prunable_class(head: Head) -> type[PreTrainedModel]:
    """The class of a task head over an encoder with masks."""
    return CLASSES[f"Prunable{head.stock.__name__}"]


def new_masks(encoder: Encoder, config: PruningConfig) -> PruningState:
    """Put gates into an encoder, with what the config's method learns them from."""
    method = config.make_method()
    state = insert_masks(encoder, config, mask_queries_and_keys=method.mask_queries_and_keys)
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
