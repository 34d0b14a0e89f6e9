"""The fields of a config that decide what is built, and their bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.activations import ACT2FN

from .layout import LayerSizes

#: Most heads and rows of all layers together.
MAX_UNITS = 2**22
#: Sizes of any family's config: the smallest, and the largest that is built before the weights are read.
BOUNDS = {
    "vocab_size": (1, 2**24),
    "max_position_embeddings": (1, 2**20),
    "type_vocab_size": (0, 2**16),
    "embedding_size": (1, 2**16),
}
#: Of families that take images.
IMAGE_BOUNDS = {
    "image_size": (1, 2**14),
    "patch_size": (1, 2**14),
    "num_channels": (1, 2**10),
    "encoder_stride": (1, 2**10),
}
BOOLEANS = ("is_decoder", "add_cross_attention", "output_hidden_states", "output_attentions", "return_dict")
NUMBERS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps")


@dataclass(frozen=True)
class ConfigFields:
    """What the config class of a family calls its sizes.

    Attributes:
        hidden_size: D, the width of the residual stream.
        num_layers: encoder layers.
        num_heads: H.
        ffn_size: F.
        activation: of the FFN.
        head_size: d, which a config may give apart from D and H; ``None`` where the family's code reads no
            such field, so that a model of fewer heads would have larger ones.
        bounds: smallest and largest value of each further size, of each side if it has several.
        numbers: further numbers from 0 to 1.
        positions_behind_padding: whether the first position is the one behind that of padding, so that a
            sequence can have fewer tokens than there are positions.
    """

    hidden_size: str = "hidden_size"
    num_layers: str = "num_hidden_layers"
    num_heads: str = "num_attention_heads"
    ffn_size: str = "intermediate_size"
    activation: str = "hidden_act"
    head_size: str | None = None
    bounds: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    numbers: tuple[str, ...] = ()
    positions_behind_padding: bool = False

    def sizes(self, config: Any) -> LayerSizes:
        """Sizes of one dense layer."""
        hidden, heads = getattr(config, self.hidden_size), getattr(config, self.num_heads)
        usual = hidden // heads
        size = usual if self.head_size is None else getattr(config, self.head_size, usual)
        return LayerSizes(hidden, heads, size, getattr(config, self.ffn_size))

    def most_tokens(self, config: Any) -> int:
        """Tokens of the longest sequence that a model can take."""
        if not getattr(config, "position_biased_input", True):
            # DeBERTa's positions may be relative only.
            return BOUNDS["max_position_embeddings"][1]
        most: int = config.max_position_embeddings
        return most - (config.pad_token_id or 0) - 1 if self.positions_behind_padding else most


def check_config(data: Mapping[str, Any], fields: ConfigFields) -> None:
    """Reject invalid fields of a config before building the model.

    Args:
        data: the JSON form; fields may be absent.
        fields: names and bounds.

    Raises:
        ValueError: what was expected of which field, and what came.
    """
    _check_sizes(data, fields)
    for name in (*NUMBERS, *fields.numbers):
        number = data.get(name, 0.0)
        if type(number) not in (int, float) or not 0 <= number <= 1:
            raise ValueError(f"config.json: {name}: expected a number from 0 to 1, got {number!r:.80}")
    activation, padding = data.get(fields.activation, "gelu"), data.get("pad_token_id")
    if not callable(activation) and (not isinstance(activation, str) or activation not in ACT2FN):
        raise ValueError(
            f"config.json: {fields.activation}: expected the name of an activation, got {activation!r:.80}"
        )
    vocabulary = data.get("vocab_size") or 2**24
    if padding is not None and (type(padding) is not int or not abs(padding) < vocabulary):
        raise ValueError(
            f"config.json: pad_token_id: expected a token of the vocabulary, got {padding!r:.80}"
        )
    for name in ("dtype", "torch_dtype"):
        dtype = data.get(name)
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ValueError(f"config.json: {name}: expected the name of a dtype, got {dtype!r:.80}")
    _check_rest(data)


def _check_sizes(data: Mapping[str, Any], fields: ConfigFields) -> None:
    bounds = {
        fields.hidden_size: (1, 2**16),
        fields.num_layers: (1, 2**10),
        fields.num_heads: (1, 2**12),
        fields.ffn_size: (1, 2**20),
        **({} if fields.head_size is None else {fields.head_size: (1, 2**12)}),
        **BOUNDS,
        **fields.bounds,
    }
    for name, (least, most) in bounds.items():
        size = data.get(name, most)
        sides = size if isinstance(size, (list, tuple)) and name in fields.bounds else [size]
        if not all(type(side) is int and least <= side <= most for side in sides):
            raise ValueError(f"config.json: {name}: expected {least} to {most}, got {size!r:.80}")
    width = data.get(fields.ffn_size, 1) + 3 * data.get(fields.hidden_size, 1)
    if data.get(fields.num_layers, 1) * width > MAX_UNITS:
        raise ValueError(f"config.json: expected at most {MAX_UNITS} heads and rows of all layers together")


def _check_rest(data: Mapping[str, Any]) -> None:
    code = data.get("auto_map") or {}
    if not isinstance(code, Mapping) or not all(isinstance(value, (str, list)) for value in code.values()):
        raise ValueError(f"config.json: auto_map: expected names of classes, got {code!r:.80}")
    for name in BOOLEANS:
        if data.get(name) not in (None, True, False):
            raise ValueError(f"config.json: {name}: expected true or false, got {data[name]!r:.80}")
    if data.get("is_decoder") or data.get("add_cross_attention"):
        raise ValueError("config.json: expected an encoder, got is_decoder or add_cross_attention")
    chunk = data.get("chunk_size_feed_forward", 0)
    if type(chunk) is not int or chunk < 0:
        raise ValueError(f"config.json: chunk_size_feed_forward: expected 0 or more, got {chunk!r:.80}")
    architectures = data.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ValueError(f"config.json: architectures: expected names of classes, got {architectures!r:.80}")
    labels = data.get("num_labels", 1)
    if type(labels) is not int or not 0 <= labels <= 2**20:
        raise ValueError(f"config.json: num_labels: expected 0 to {2**20}, got {labels!r:.80}")
