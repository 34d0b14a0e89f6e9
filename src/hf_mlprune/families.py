"""The families that can be pruned, and the encoder of one within a model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .modeling import (
    bert,
    camembert,
    deberta_v2,
    deit,
    distilbert,
    electra,
    esm,
    modernbert,
    mpnet,
    roberta,
    vit,
    xlm_roberta,
)
from .modeling.family import Family, Head
from .modeling.layout import DenseLayer
from .modeling.pretrained import encoder_layers
from .modeling.pruned import activation_of
from .modeling.structure import LayerStructure, Structure

FAMILIES: tuple[Family, ...] = (
    bert.FAMILY,
    roberta.FAMILY,
    xlm_roberta.FAMILY,
    camembert.FAMILY,
    electra.FAMILY,
    distilbert.FAMILY,
    mpnet.FAMILY,
    modernbert.FAMILY,
    deberta_v2.FAMILY,
    esm.FAMILY,
    vit.FAMILY,
    deit.FAMILY,
)


@dataclass(frozen=True)
class EncoderLayer:
    """One encoder layer as it stands.

    Attributes:
        module: the host model's layer.
        structure: which heads and rows of the dense layer it still has; blocks are left out.
        linears: matrix -> module; matrices that have no rows or columns left are absent.
    """

    module: nn.Module
    structure: LayerStructure
    linears: dict[str, nn.Module]


@dataclass(frozen=True)
class Encoder:
    """The prunable parts of a model.

    Attributes:
        family: what it is of.
        module: the base model inside (or that is) the model.
        layers: its layers.
        dense: one dense layer.
    """

    family: Family
    module: PreTrainedModel
    layers: tuple[EncoderLayer, ...]
    dense: DenseLayer

    @property
    def structure(self) -> Structure:
        """Heads and rows that are left of the dense model."""
        return Structure(tuple(layer.structure for layer in self.layers), None)


def head_of(model: nn.Module) -> Head | None:
    """The task head of a model: stock, with masks or pruned; ``None`` for a class of the user's own."""
    kind = type(model)
    for family in FAMILIES:
        for head in family.heads:
            # Classes with masks are derived from the record, and name it.
            if kind in (head.stock, head.pruned) or vars(kind).get("task_head") is head:
                return head
    return None


def find_encoder(model: nn.Module) -> tuple[Family, PreTrainedModel]:
    """The one encoder of a known family in a model.

    Raises:
        TypeError: none is found, or more than one.
    """
    found = [
        (family, module)
        for module in model.modules()
        for family in FAMILIES
        if isinstance(module, family.heads[0].stock)
    ]
    if len(found) != 1:
        raise TypeError(
            f"expected a model with one encoder of a known family "
            f"({', '.join(family.name for family in FAMILIES)}), got {type(model).__name__} with {len(found)}"
        )
    family, encoder = found[0]
    assert isinstance(encoder, PreTrainedModel)
    return family, encoder


def check_plain(model: nn.Module) -> None:
    """Refuse a model whose weights are not what they seem.

    Raises:
        TypeError: the model is wrapped by PEFT or quantized.
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


def inspect_encoder(model: nn.Module) -> Encoder:
    """Find the prunable layers of a model, dense or already pruned.

    Raises:
        TypeError: see :func:`find_encoder` and :func:`check_plain`.
        ValueError: the activation does not map 0 to 0, the config names `pruned_heads`, or the
            model is a decoder.
    """
    check_plain(model)
    family, encoder = find_encoder(model)
    config = encoder.config
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError("expected an encoder, got a config with is_decoder or add_cross_attention")
    if getattr(config, "pruned_heads", None):
        raise ValueError(
            "config.pruned_heads is set, which transformers 5 ignores: heads that it names are still "
            "there; delete it from the config, and prune with the level 'heads'"
        )
    dense = family.config.dense_layer(config)
    modules = encoder_layers(encoder, dense.layout)
    structure = (
        family.config.read_structure(config)
        if getattr(config, "structure", None) is not None
        else Structure((LayerStructure.full(dense),) * len(modules), None)
    )
    layers = []
    for index, (module, kept) in enumerate(zip(modules, structure.layers, strict=True)):
        _check_activation(index, module, dense)
        linears = {
            name: module.get_submodule(matrix.path)
            for name, matrix in dense.layout.matrices.items()
            if not kept.is_empty(name, dense)
        }
        layers.append(EncoderLayer(module, dataclasses.replace(kept, blocks={}), linears))
    return Encoder(family, encoder, tuple(layers), dense)


def _check_activation(layer: int, module: nn.Module, dense: DenseLayer) -> None:
    activation = activation_of(module, dense.layout)
    value = 0.0 if activation is None else float(activation(torch.zeros(1, device="cpu")))
    if value != 0:
        raise ValueError(
            f"layer {layer}: expected an activation with act(0) = 0 (gelu, relu, silu), got "
            f"{activation} with act(0) = {value:g}; a removed FFN row would change the output"
        )


def plain_config(config: Any) -> dict[str, Any]:
    """The fields that a config shares with the stock one of its family."""
    data: dict[str, Any] = config.to_dict()
    for key in ("model_type", "auto_map", "structure", "pruning"):
        data.pop(key, None)
    return data


def stock_encoder(encoder: Encoder) -> PreTrainedModel:
    """A stock encoder of the dense sizes, with random weights."""
    module, family = encoder.module, encoder.family
    config = family.stock_config.from_dict(plain_config(module.config))
    config._attn_implementation = module.config._attn_implementation
    dense = family.heads[0].stock(config)
    if getattr(module, "pooler", dense) is None:
        # Most heads build their encoder without it.
        dense.pooler = None
    return dense


def random_batch(model: nn.Module, encoder: Encoder, rows: int, length: int) -> dict[str, Tensor]:
    """Random inputs in the shape that a model takes; the same at every call.

    Args:
        model: the encoder, or a model of a known class around it.
        encoder: its encoder.
        rows: sequences (of two choices each, for a multiple-choice head), or images.
        length: tokens per sequence; as many as the model can take, if that is less. One sequence is padded.
            Images have the size that the model takes.
    """
    config, head = encoder.module.config, head_of(model)
    device = encoder.module.device
    generator = torch.Generator().manual_seed(0)
    if encoder.family.takes_images:
        pixels = torch.randn(rows, config.num_channels, *_sides(config.image_size), generator=generator)
        return {"pixel_values": pixels.to(device, encoder.module.dtype)}
    length = min(length, config.max_position_embeddings)
    pair = (2,) if head is not None and head.has_choices else ()
    tokens = torch.randint(0, config.vocab_size, (rows, *pair, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[rows // 2, ..., length // 2 :] = 0
    return {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}


def _sides(size: Any) -> tuple[int, int]:
    """Height and width, of which configs give one if they are equal."""
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)
