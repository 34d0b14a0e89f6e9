"""The only file that knows where host models keep their layers: model -> sites."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import BertModel, PreTrainedModel

from .modeling.bert import BERT_PATHS, bert_layer_sizes, bert_structure
from .modeling.pruned import LayerPaths
from .modeling.structure import ROLES, LayerSizes, LayerStructure, Structure


@dataclass(frozen=True)
class LayerAnatomy:
    """One encoder layer as it stands.

    Attributes:
        module: the host model's layer.
        structure: which heads and rows of the dense layer it still has; blocks are left out.
        linears: role -> module; roles whose matrix has no rows or columns left are absent.
    """

    module: nn.Module
    structure: LayerStructure
    linears: dict[str, nn.Module]


@dataclass(frozen=True)
class Anatomy:
    """The prunable parts of a model.

    Attributes:
        family: key of :data:`FAMILIES`.
        encoder: the base model inside (or that is) the model.
        layers: its encoder layers.
        sizes: sizes of one dense layer.
        paths: where a layer keeps its parts.
        embeddings: path of what computes the first hidden states.
    """

    family: str
    encoder: PreTrainedModel
    layers: tuple[LayerAnatomy, ...]
    sizes: LayerSizes
    paths: LayerPaths
    embeddings: str

    @property
    def structure(self) -> Structure:
        """Heads and rows that are left of the dense model."""
        return Structure(tuple(layer.structure for layer in self.layers), None)


@dataclass(frozen=True)
class Family:
    """How one family of host models is laid out."""

    base_class: type[PreTrainedModel]
    layers: Callable[[PreTrainedModel], list[nn.Module]]
    paths: LayerPaths
    embeddings: str


def _bert_layers(encoder: PreTrainedModel) -> list[nn.Module]:
    return list(encoder.get_submodule("encoder.layer").children())


FAMILIES: dict[str, Family] = {
    "bert": Family(BertModel, _bert_layers, BERT_PATHS, "embeddings"),
}


def find_encoder(model: nn.Module) -> tuple[str, PreTrainedModel]:
    """The one encoder of a known family in a model, and the family's name.

    Raises:
        TypeError: none is found, more than one, or the model is wrapped by PEFT or quantized.
    """
    for module in model.modules():
        package = type(module).__module__.split(".")[0]
        if package in ("peft", "bitsandbytes", "torchao"):
            raise TypeError(
                f"expected a plain model, got one with {package} modules ({type(module).__name__}); "
                "merge adapters (`merge_and_unload()`) or load without quantization, then prune"
            )
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        raise TypeError("expected a plain model, got a quantized one; prune first, then quantize")
    found = [
        (name, module)
        for name, family in FAMILIES.items()
        for module in model.modules()
        if isinstance(module, family.base_class)
    ]
    if len(found) != 1:
        raise TypeError(
            f"expected a model with one encoder of a known family ({', '.join(FAMILIES)}), got "
            f"{type(model).__name__} with {len(found)}"
        )
    name, encoder = found[0]
    assert isinstance(encoder, PreTrainedModel)
    return name, encoder


def anatomy(model: nn.Module) -> Anatomy:
    """Find the prunable layers of a model, dense or already pruned.

    Raises:
        TypeError: see :func:`find_encoder`; or a linear is of a kind that cannot be pruned.
        ValueError: the activation does not map 0 to 0, the config names `pruned_heads`, or the
            model is a decoder.
    """
    name, encoder = find_encoder(model)
    family = FAMILIES[name]
    config = encoder.config
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError("expected an encoder, got a config with is_decoder or add_cross_attention")
    if getattr(config, "pruned_heads", None):
        raise ValueError(
            "config.pruned_heads is set, which transformers 5 ignores: heads that it names are still "
            "there; delete it from the config, and prune with the level 'heads'"
        )
    sizes = bert_layer_sizes(config)
    structure = (
        bert_structure(config)
        if getattr(config, "structure", None) is not None
        else Structure((LayerStructure.full(sizes),) * config.num_hidden_layers, None)
    )
    layers = []
    for index, (module, kept) in enumerate(zip(family.layers(encoder), structure.layers, strict=True)):
        _check_activation(index, family.paths.activation_of(module))
        linears = {
            role: family.paths.linear(module, role) for role in ROLES if not kept.is_empty(role, sizes)
        }
        layers.append(LayerAnatomy(module, dataclasses.replace(kept, blocks={}), linears))
    return Anatomy(name, encoder, tuple(layers), sizes, family.paths, family.embeddings)


def _check_activation(layer: int, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
    value = float(activation(torch.zeros(1, device="cpu")))
    if value != 0:
        raise ValueError(
            f"layer {layer}: expected an activation with act(0) = 0 (gelu, relu, silu), got "
            f"{activation} with act(0) = {value:g}; a removed FFN row would change the output"
        )
