"""attach: make any model of a known family prunable, in place."""

from __future__ import annotations

import copy
import logging
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .config import PruningConfig
from .editing import edited
from .encoders import Encoder, inspect_encoders
from .families import head_of, known_encoders, plain_config
from .modeling.checkpoint import keep_present_names
from .modeling.family import Head
from .modeling.pretrained import become
from .modeling.pruned import set_fingerprint
from .prunable import CONFIGS, PrunableConfigMixin, new_masks, prunable_class, without_blocks
from .state import PruningState, is_attached

logger = logging.getLogger(__name__)


def attach(model: nn.Module, config: PruningConfig) -> list[PruningState]:
    """Make the encoders of a model prunable, in place. They may be dense, or pruned before.

    Stock classes become the ``PrunableBertFor...`` of the same head, so that checkpoints in the middle
    of training load through the Auto classes. A class of the user's own keeps its class, which
    `from_pretrained` does not rebuild (a warning says so). Parameters stay the same objects. If an error is
    raised, the model is not changed.

    Args:
        model: a model with one encoder of a known family, or with those that ``config.encoder`` names.
        config: the settings.

    Returns:
        One state for each encoder. The state is a submodule of the encoder.

    Raises:
        TypeError: the model cannot be pruned (see :func:`~hf_mlprune.encoders.inspect_encoders`).
        ValueError: masks are attached already, or a setting does not fit the model.
    """
    if is_attached(model):
        raise ValueError("the model has masks already: attach once per run")
    encoders = inspect_encoders(model, config.encoder)
    for encoder in encoders:
        _check_linears(encoder)
    _check_loadable(model)
    with edited(model):
        states = [_attach(model, encoder, config) for encoder in encoders]
        keep_present_names(model)
    if head_of(model) is None and isinstance(model, PreTrainedModel) and model.base_model is not model:
        logger.warning(
            "%s is not one of the supported stock classes. It keeps its class and its forward while it is "
            "trained and pruned. But from_pretrained cannot rebuild them: the Auto classes load its pruned "
            "checkpoints with the stock head, and the class itself fails, because shapes do not match. To "
            "serve the model, derive a class from the Pruned...For... of its head",
            type(model).__name__,
        )
    return states


def _check_loadable(model: nn.Module) -> None:
    """Refuse a class of transformers of a known family whose pruned checkpoint no class could load.

    Raises:
        TypeError: names the heads that there are.
    """
    if not type(model).__module__.startswith("transformers.") or head_of(model) is not None:
        return
    for _, family, encoder in known_encoders(model):
        if isinstance(model, PreTrainedModel) and model is not encoder and model.config is encoder.config:
            heads = [head.stock.__name__ for head in family.heads]
            raise TypeError(
                f"expected one of {heads}, got {type(model).__name__}, whose pruned checkpoint could not "
                "be loaded again: load the weights into one of these classes, or derive a class of your own"
            )


def _attach(model: nn.Module, encoder: Encoder, config: PruningConfig) -> PruningState:
    state = new_masks(encoder, config)
    old = encoder.module.config
    kind: Any = CONFIGS[encoder.family.name]
    settings = config.to_dict()
    if _has_head_within(model, encoder.module):
        # The names are those of the whole model, which that part does not know.
        settings["encoder"] = []
    new = kind.from_dict({**plain_config(old), "pruning": settings})
    new.structure = without_blocks(getattr(old, "structure", None))
    swap_class(model, encoder.module, new)
    set_fingerprint(encoder.module, None)
    return state


def _has_head_within(model: nn.Module, encoder: nn.Module) -> bool:
    """Whether an encoder is in a model with a head that is itself a part of the whole."""
    return any(
        module is not model and module is not encoder and module.base_model is encoder
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
    )


def _check_linears(encoder: Encoder) -> None:
    """Refuse linears whose weight is computed anew at each call: a mask on it would be overwritten.

    Raises:
        TypeError: says how to make the weight a parameter again.
    """
    for index, layer in enumerate(encoder.layers):
        for name, linear in layer.linears.items():
            found = sorted(parameter for parameter, _ in linear.named_parameters())
            if isinstance(linear, nn.Linear) and not {"weight"} <= set(found) <= {"weight", "bias"}:
                raise TypeError(
                    f"layer {index}, {name}: expected a linear with the parameters weight and bias, got "
                    f"{found}: its weight is reparametrized; make it permanent first, by "
                    "torch.nn.utils.prune.remove(linear, 'weight'), "
                    "torch.nn.utils.remove_weight_norm(linear) "
                    "or torch.nn.utils.parametrize.remove_parametrizations(linear, 'weight')"
                )


def swap_class(model: nn.Module, encoder: PreTrainedModel, new: Any) -> None:
    """Give an encoder, and what holds it in a model, another config in place, and their classes with it.

    A module of a known class that is or holds the encoder gets the class of its head that has this config;
    classes of the user's own stay. A config that holds the old one is replaced by a copy that holds the new.
    """
    old = encoder.config
    new._attn_implementation = old._attn_implementation
    copies: dict[int, Any] = {}
    inside = set(encoder.modules())
    for module in model.modules():
        # Other encoders may have been made from the same config.
        if module not in inside and encoder not in set(module.modules()):
            continue
        # Their own: some wrappers' is a property that reads that of the module that they hold.
        config = vars(module).get("config")
        if config is not old:
            if isinstance(config, PreTrainedConfig):
                module.config = copies.setdefault(id(config), _with_part(config, old, new))
            continue
        module.config = new
        head = head_of(module)
        if head is not None:
            assert isinstance(module, PreTrainedModel)
            become(module, _class_of(head, new), new)


def _with_part(config: Any, old: Any, new: Any) -> Any:
    """A config in which another stands for one of its parts; itself, if that is none."""
    names = [name for name, value in vars(config).items() if value is old]
    if not names:
        return config
    changed = copy.copy(config)
    for name in names:
        setattr(changed, name, new)
    return changed


def _class_of(head: Head, config: Any) -> type[PreTrainedModel]:
    return prunable_class(head) if isinstance(config, PrunableConfigMixin) else head.pruned
