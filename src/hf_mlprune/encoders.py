"""The encoder within a model, dissected: what is prunable, as it stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .families import find_encoders, head_of, known_encoders, plain_config
from .modeling.family import Family
from .modeling.layout import DenseLayer
from .modeling.pretrained import encoder_layers
from .modeling.pruned import activation_of
from .modeling.structure import LayerStructure, Structure

#: Tokens of a sequence where nobody says how long they are.
USUAL_LENGTH = 128


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
        path: where it is in the model; empty if it is the model.
        family: what it is of.
        module: the encoder itself.
        layers: its layers.
        dense: one dense layer.
    """

    path: str
    family: Family
    module: PreTrainedModel
    layers: tuple[EncoderLayer, ...]
    dense: DenseLayer

    @property
    def structure(self) -> Structure:
        """Heads and rows that are left of the dense model."""
        return Structure(tuple(layer.structure for layer in self.layers), None)


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
    """The one encoder of a model; see :func:`inspect_encoders`."""
    return inspect_encoders(model)[0]


def inspect_encoders(model: nn.Module, names: Sequence[str] = ()) -> list[Encoder]:
    """Find the prunable layers of a model's encoders, dense or already pruned.

    Args:
        model: any module.
        names: see :func:`find_encoders`.

    Raises:
        TypeError: see :func:`find_encoders` and :func:`check_plain`.
        ValueError: the activation does not map 0 to 0, the config names `pruned_heads`, layers share their
            weights, or the model is a decoder.
    """
    check_plain(model)
    encoders = [_inspect(path, family, module) for path, family, module in find_encoders(model, names)]
    _check_shared(model, encoders)
    return encoders


def _inspect(path: str, family: Family, encoder: PreTrainedModel) -> Encoder:
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
    return Encoder(path, family, encoder, tuple(layers), dense)


def _check_shared(model: nn.Module, encoders: Sequence[Encoder]) -> None:
    """Refuse a prunable weight that belongs to several modules: pruning one would prune the others."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(path)
    selected = {encoder.module for encoder in encoders}
    # A module that is in two encoders has one path above.
    foreign = {
        id(parameter): path
        for path, _, other in known_encoders(model)
        if other not in selected
        for parameter in other.parameters()
    }
    uses: dict[int, list[str]] = {}
    for encoder in encoders:
        for index, layer in enumerate(encoder.layers):
            for name, linear in layer.linears.items():
                uses.setdefault(id(linear.weight), []).append(f"{encoder.path} layer {index} {name}".strip())
    for weight, places in uses.items():
        # By both counts, as one module may be in two layers, and two modules may have one weight.
        names = places if len(places) > 1 else owners.get(weight, [])
        if weight in foreign:
            names = [*places, f"one of {foreign[weight] or 'the model'}"]
        if len(names) > 1:
            raise ValueError(
                f"expected layers with weights of their own, but {names} are one and the same, so that they "
                "cannot be pruned separately; give each its own (copy.deepcopy)"
            )


def _check_activation(layer: int, module: nn.Module, dense: DenseLayer) -> None:
    activation = activation_of(module, dense.layout)
    value = 0.0 if activation is None else float(activation(torch.zeros(1, device="cpu")))
    if value != 0:
        raise ValueError(
            f"layer {layer}: expected an activation with act(0) = 0 (gelu, relu, silu), got "
            f"{activation} with act(0) = {value:g}; a removed FFN row would change the output"
        )


def stock_encoder(encoder: Encoder, changes: Mapping[str, Any] = MappingProxyType({})) -> PreTrainedModel:
    """A stock encoder of the dense sizes, with random weights.

    Args:
        encoder: whose config it has.
        changes: fields of the config that differ.
    """
    module, family = encoder.module, encoder.family
    config = family.stock_config.from_dict({**plain_config(module.config), **changes})
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
        length: tokens per sequence; as many as the model can take, if that is less. The middle one is padded.
            Images have the size that the model takes.
    """
    config, head = encoder.module.config, head_of(model)
    device = encoder.module.device
    generator = torch.Generator().manual_seed(0)
    if encoder.family.takes_images:
        pixels = torch.randn(rows, config.num_channels, *_sides(config.image_size), generator=generator)
        return {"pixel_values": pixels.to(device, encoder.module.dtype)}
    length = min(length, most_tokens(encoder))
    pair = (2,) if head is not None and head.has_choices else ()
    tokens = torch.randint(0, config.vocab_size, (rows, *pair, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[rows // 2, ..., length // 2 :] = 0
    return {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}


def tokens_of(encoder: Encoder) -> int | None:
    """Tokens that an image has; ``None`` for a family that reads texts."""
    if not encoder.family.takes_images:
        return None
    embeddings = encoder.module.get_submodule(encoder.dense.layout.embeddings)
    tokens: int = embeddings.get_parameter("position_embeddings").shape[1]
    return tokens


def most_tokens(encoder: Encoder) -> int:
    """Tokens of the longest sequence that an encoder of texts takes."""
    return encoder.family.config.config_fields.most_tokens(encoder.module.config)


def check_length(encoder: Encoder, length: int) -> None:
    """Refuse sequences that a model cannot take; images have their own.

    Raises:
        ValueError: says what the most is.
    """
    if tokens_of(encoder) is None and length > most_tokens(encoder):
        raise ValueError(
            f"length: expected at most {most_tokens(encoder)} tokens, what the model takes, got {length}"
        )


def usual_length(encoder: Encoder, typical: int | None = None) -> int:
    """Tokens of the sequences that costs are counted for where no setting says them.

    Args:
        encoder: of images, whose tokens they are, or of texts: at most what it takes.
        typical: of the data; 128, if it is not known.
    """
    return tokens_of(encoder) or min(typical or USUAL_LENGTH, most_tokens(encoder))


def _sides(size: Any) -> tuple[int, int]:
    """Height and width, of which configs give one if they are equal."""
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)
