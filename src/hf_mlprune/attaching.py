"""attach: make any model of a known family prunable, in place."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .config import PruningConfig
from .editing import edited
from .families import Encoder, head_of, inspect_encoder, plain_config
from .modeling.checkpoint import keep_present_names
from .modeling.family import Head
from .modeling.pretrained import become
from .modeling.pruned import set_fingerprint
from .prunable import CONFIGS, PrunableConfigMixin, new_masks, prunable_class, without_blocks
from .state import PruningState, is_attached

logger = logging.getLogger(__name__)


def attach(model: nn.Module, config: PruningConfig) -> PruningState:
    """Make a model prunable, in place: dense, or pruned before.

    Stock classes become the ``PrunableBertFor...`` of the same head, so that checkpoints in the middle
    of training load through the Auto classes. A class of the user's own keeps its class, which
    `from_pretrained` does not rebuild (a warning says so). Parameters stay the same objects. Whatever is
    raised leaves the model as it was.

    Args:
        model: a model with one encoder of a known family.
        config: the settings.

    Returns:
        The run's state, a submodule of the encoder.

    Raises:
        TypeError: the model cannot be pruned (see :func:`~hf_mlprune.families.inspect_encoder`).
        ValueError: masks are attached already, or a setting does not fit the model.
    """
    if is_attached(model):
        raise ValueError("the model has masks already: attach once per run")
    encoder = inspect_encoder(model)
    _check_linears(encoder)
    with edited(model):
        state = new_masks(encoder, config)
        old = encoder.module.config
        kind: Any = CONFIGS[encoder.family.name]
        new = kind.from_dict({**plain_config(old), "pruning": config.to_dict()})
        new.structure = without_blocks(getattr(old, "structure", None))
        swap_class(model, old, new)
        keep_present_names(model)
        set_fingerprint(encoder.module, None)
    if head_of(model) is None and isinstance(model, PreTrainedModel):
        logger.warning(
            "%s is not one of the supported stock classes: it keeps its class and its forward while it is "
            "trained and pruned, but from_pretrained rebuilds neither: the Auto classes load its pruned "
            "checkpoints with the stock head, and the class itself fails on their shapes; derive a class for "
            "serving from the PrunedBertFor... of its head",
            type(model).__name__,
        )
    return state


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


def swap_class(model: nn.Module, old: Any, new: Any) -> None:
    """Give a model, in place, another config in all modules that share it, and their classes with it.

    A module of a known class that is or holds the encoder gets the class of its head that has this config;
    classes of the user's own stay.
    """
    new._attn_implementation = old._attn_implementation
    for module in model.modules():
        # Their own: some wrappers' is a property that reads that of the module that they hold.
        if vars(module).get("config") is not old:
            continue
        module.config = new
        head = head_of(module)
        if head is not None:
            assert isinstance(module, PreTrainedModel)
            become(module, _class_of(head, new), new)


def _class_of(head: Head, config: Any) -> type[PreTrainedModel]:
    return prunable_class(head) if isinstance(config, PrunableConfigMixin) else head.pruned
