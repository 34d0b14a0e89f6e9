"""attach: make any stock BERT prunable, in place."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
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

from .anatomy import Anatomy, anatomy, find_encoder
from .config import PruningConfig
from .editing import edited
from .masked import PruningState
from .modeling import bert as pruned
from .modeling.checkpoint import keep_present_names
from .modeling.pruned import set_fingerprint
from .prunable import (
    PrunableBertConfig,
    PrunableBertForMaskedLM,
    PrunableBertForMultipleChoice,
    PrunableBertForQuestionAnswering,
    PrunableBertForSequenceClassification,
    PrunableBertForTokenClassification,
    PrunableBertModel,
    new_masks,
    without_blocks,
)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Kinds:
    """The three classes of one task head."""

    stock: type[PreTrainedModel]
    prunable: type[PreTrainedModel]
    pruned: type[PreTrainedModel]


KINDS = (
    Kinds(BertModel, PrunableBertModel, pruned.PrunedBertModel),
    Kinds(
        BertForSequenceClassification,
        PrunableBertForSequenceClassification,
        pruned.PrunedBertForSequenceClassification,
    ),
    Kinds(
        BertForTokenClassification,
        PrunableBertForTokenClassification,
        pruned.PrunedBertForTokenClassification,
    ),
    Kinds(BertForQuestionAnswering, PrunableBertForQuestionAnswering, pruned.PrunedBertForQuestionAnswering),
    Kinds(BertForMaskedLM, PrunableBertForMaskedLM, pruned.PrunedBertForMaskedLM),
    Kinds(BertForMultipleChoice, PrunableBertForMultipleChoice, pruned.PrunedBertForMultipleChoice),
)


def kinds_of(model: nn.Module) -> Kinds | None:
    """The classes of a model's task head; ``None`` for a class of the user's own."""
    for kinds in KINDS:
        if type(model) in (kinds.stock, kinds.prunable, kinds.pruned):
            return kinds
    return None


def auto_class_name(kinds: Kinds) -> str:
    """Name of the Auto class that loads models of these classes."""
    return kinds.stock.__name__.replace("Bert", "Auto" if kinds.stock is BertModel else "AutoModel", 1)


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
        TypeError: the model cannot be pruned (see :func:`~hf_mlprune.anatomy.anatomy`).
        ValueError: masks are attached already, or a setting does not fit the model.
    """
    if any(isinstance(module, PruningState) for module in model.modules()):
        raise ValueError("the model has masks already: attach once per run")
    _check_linears(anatomy(model))
    with edited(model):
        state = new_masks(model, config)
        encoder = find_encoder(model)[1]
        old = encoder.config
        new = PrunableBertConfig.from_dict({**plain_config(old), "pruning": config.to_dict()})
        new.structure = without_blocks(getattr(old, "structure", None))
        swap_class(model, old, new)
        keep_present_names(model)
        set_fingerprint(encoder, None)
    if kinds_of(model) is None and isinstance(model, PreTrainedModel):
        logger.warning(
            "%s is not one of the supported stock classes: it keeps its class and its forward while it is "
            "trained and pruned, but from_pretrained rebuilds neither: the Auto classes load its pruned "
            "checkpoints with the stock head, and the class itself fails on their shapes; derive a class for "
            "serving from the PrunedBertFor... of its head",
            type(model).__name__,
        )
    return state


def _check_linears(parts: Anatomy) -> None:
    """Refuse linears whose weight is computed anew at each call: a mask on it would be overwritten.

    Raises:
        TypeError: says how to make the weight a parameter again.
    """
    for index, layer in enumerate(parts.layers):
        for role, linear in layer.linears.items():
            names = sorted(name for name, _ in linear.named_parameters())
            if isinstance(linear, nn.Linear) and not {"weight"} <= set(names) <= {"weight", "bias"}:
                raise TypeError(
                    f"layer {index}, {role}: expected a linear with the parameters weight and bias, got "
                    f"{names}: its weight is reparametrized; make it permanent first, by "
                    "torch.nn.utils.prune.remove(linear, 'weight'), "
                    "torch.nn.utils.remove_weight_norm(linear) "
                    "or torch.nn.utils.parametrize.remove_parametrizations(linear, 'weight')"
                )


def swap_class(model: nn.Module, old: BertConfig, new: BertConfig) -> None:
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
        kinds = kinds_of(module)
        if kinds is not None:
            model_class = next(
                kind for kind in (kinds.stock, kinds.prunable, kinds.pruned) if kind.config_class is type(new)
            )
            # Building the class once lets transformers learn which outputs it can record.
            with torch.device("meta"):
                model_class(new)
            module.__class__ = model_class


def plain_config(config: BertConfig) -> dict[str, Any]:
    """The fields that a config shares with the stock one of its family."""
    data: dict[str, Any] = config.to_dict()
    for key in ("model_type", "auto_map", "structure", "pruning"):
        data.pop(key, None)
    return data
