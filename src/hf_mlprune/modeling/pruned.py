"""Stock encoder layers -> the small layers that a structure describes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import GELUActivation

from .block_sparse import BlockSparseLinear, scatter_rows
from .structure import ROLES, LayerSizes, LayerStructure, Structure

#: Buffer of an encoder, uint8 (16,).
FINGERPRINT = "structure_fingerprint"


@dataclass(frozen=True)
class LayerPaths:
    """Where an encoder layer of one family keeps its parts, as paths from the layer."""

    attention: str
    query: str
    key: str
    value: str
    attention_output: str
    fc1: str
    activation: str
    fc2: str

    def linear(self, layer: nn.Module, role: str) -> nn.Module:
        """The module of one role."""
        return layer.get_submodule(getattr(self, role))

    def activation_of(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        """What is applied to the output of FC1; no module, where a config brings a function."""
        activation: Callable[[Tensor], Tensor] = attrgetter(self.activation)(layer)
        return activation


class Applied(nn.Module):
    """Stands where an activation was that the linear before it applies now."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """The input."""
        return x


class SmallLinear(nn.Linear):
    """``nn.Linear`` that may have no rows or no columns, of whose initialisation torch warns."""

    def reset_parameters(self) -> None:
        """As in torch, where there is anything to initialise."""
        if self.weight.numel():
            super().reset_parameters()
        elif self.bias is not None:
            nn.init.zeros_(self.bias)


class RowScatterLinear(SmallLinear):
    """A linear layer whose kept output features are written to their places among zeros.

    Args:
        in_features: columns of W.
        row_indices: ``(rows of W,)`` int64, position of each row in the output.
        scatter_size: number of output features.
        bias: whether there is a bias, one entry per kept row.
    """

    row_indices: Tensor

    def __init__(
        self, in_features: int, row_indices: Tensor, scatter_size: int, *, bias: bool = True
    ) -> None:
        super().__init__(in_features, len(row_indices), bias=bias)
        self.scatter_size = scatter_size
        # Persistent: non-persistent buffers are lost when a model is built on the meta device.
        self.register_buffer("row_indices", row_indices)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., scatter_size)``."""
        y = functional.linear(x, self.weight, self.bias)
        return scatter_rows(y, self.row_indices, self.scatter_size)


class NoHeads(nn.Module):
    """Stands where the heads of a layer were: emits a context of width zero.

    Not called anything with "Attention": transformers reads the source of a module's file and
    takes a class of that name for a hand-written attention, which cannot be switched.
    """

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        """``(batch, tokens, hidden)`` to ``(batch, tokens, 0)`` and no attention weights."""
        return hidden_states.new_zeros(*hidden_states.shape[:-1], 0), None


def apply_structure(
    layers: Iterable[nn.Module], structure: Structure, sizes: LayerSizes, paths: LayerPaths
) -> None:
    """Replace the linears of dense layers, in place, by ones of the kept shapes.

    Values are not carried over: a checkpoint or ``shrink`` brings them. Layers and roles from which
    nothing was removed stay as they are.
    """
    for layer, kept in zip(layers, structure.layers, strict=True):
        for role in ROLES:
            old = paths.linear(layer, role)
            assert isinstance(old, nn.Linear)
            same = kept.linear_shape(role, sizes) == (old.out_features, old.in_features)
            if not same or role in kept.blocks:
                new = build_linear(old, role, kept, sizes, structure.block_shape)
                layer.set_submodule(getattr(paths, role), new)
        set_heads(layer, kept, sizes, paths)
        fuse_activation(layer, paths)


def set_heads(layer: nn.Module, kept: LayerStructure, sizes: LayerSizes, paths: LayerPaths) -> None:
    """Tell a layer's attention how many heads it has left."""
    if not kept.heads:
        layer.set_submodule(paths.attention, NoHeads())
        return
    attention: Any = layer.get_submodule(paths.attention)
    attention.num_attention_heads = len(kept.heads)
    attention.all_head_size = len(kept.heads) * sizes.head_size


def fuse_activation(layer: nn.Module, paths: LayerPaths) -> None:
    """Let a block-sparse FC1 apply the activation behind it, where that is one it knows."""
    fc1, activation = paths.linear(layer, "fc1"), paths.activation_of(layer)
    if isinstance(fc1, BlockSparseLinear) and isinstance(activation, (GELUActivation, nn.ReLU)):
        fc1.activation = "relu" if isinstance(activation, nn.ReLU) else "gelu"
        layer.set_submodule(paths.activation, Applied(activation))


def separate_activation(layer: nn.Module, paths: LayerPaths) -> None:
    """Undo :func:`fuse_activation`."""
    fc1, applied = paths.linear(layer, "fc1"), paths.activation_of(layer)
    if isinstance(fc1, BlockSparseLinear) and isinstance(applied, Applied):
        fc1.activation = "none"
        layer.set_submodule(paths.activation, applied.activation)


def build_linear(
    old: nn.Linear,
    role: str,
    kept: LayerStructure,
    sizes: LayerSizes,
    block_shape: tuple[int, int] | None,
) -> nn.Module:
    """A linear of one role with the kept shape, on the device and of the dtype of the old one."""
    rows, columns = kept.linear_shape(role, sizes)
    bias = old.bias is not None
    scatter = _scatter_indices(role, kept, sizes)
    new: nn.Module
    if role in kept.blocks:
        assert block_shape is not None
        new = BlockSparseLinear(
            columns,
            rows,
            block_shape,
            kept.blocks[role],
            bias=bias,
            scatter=scatter,
            scatter_size=sizes.hidden_size if scatter is not None else None,
        )
    elif scatter is not None:
        new = RowScatterLinear(columns, scatter, sizes.hidden_size, bias=bias)
    else:
        new = (nn.Linear if rows * columns else SmallLinear)(columns, rows, bias=bias)
    new = new.to(old.weight.device, old.weight.dtype).train(old.training)
    copy_frozen(old, new)
    return new


def copy_frozen(old: nn.Module, new: nn.Module) -> None:
    """Freeze the weight and bias of a layer that stands for one in which they were frozen."""
    wanted = dict(old.named_parameters(recurse=False))
    for name, parameter in new.named_parameters(recurse=False):
        parameter.requires_grad_(wanted[name].requires_grad)


def _scatter_indices(role: str, kept: LayerStructure, sizes: LayerSizes) -> Tensor | None:
    if role not in ("attention_output", "fc2"):
        return None
    rows = kept.attention_output if role == "attention_output" else kept.fc2
    return torch.tensor(rows, dtype=torch.int64) if len(rows) != sizes.hidden_size else None


def set_fingerprint(encoder: nn.Module, structure: Structure | None) -> None:
    """Put a structure's fingerprint into an encoder's tensors, or take an old one out."""
    if FINGERPRINT in dict(encoder.named_buffers(recurse=False)):
        delattr(encoder, FINGERPRINT)
    if structure is not None:
        device = next(encoder.parameters()).device
        encoder.register_buffer(FINGERPRINT, _fingerprint(structure).to(device))


def _fingerprint(structure: Structure) -> Tensor:
    digits = structure.to_dict()["fingerprint"]
    return torch.tensor(list(bytes.fromhex(digits)), dtype=torch.uint8, device="cpu")


def check_fingerprint(encoder: nn.Module, structure: Structure) -> None:
    """Check that an encoder's tensors were saved with this structure.

    Raises:
        ValueError: they are of another model than the config.
    """
    if not torch.equal(encoder.get_buffer(FINGERPRINT).cpu(), _fingerprint(structure)):
        raise ValueError(
            "expected the fingerprint of the structure in config.json in the weights, too: config and "
            "weights are not of the same model; download the checkpoint again, or save the model again"
        )


def check_loaded(
    layers: Iterable[nn.Module], structure: Structure, sizes: LayerSizes, paths: LayerPaths
) -> None:
    """Check the index tensors that a checkpoint brought against its structure.

    Raises:
        ValueError: an index tensor is malformed, or is not the one the structure names.
    """
    for index, (layer, kept) in enumerate(zip(layers, structure.layers, strict=True)):
        for role in ROLES:
            if not kept.heads and role in ("query", "key", "value"):
                continue
            linear: Any = paths.linear(layer, role)
            where = f"layer {index}, {role}"
            if isinstance(linear, BlockSparseLinear):
                try:
                    linear.matrix().validate()
                except ValueError as error:
                    raise ValueError(f"{where}: {error}; the checkpoint is damaged") from None
            expected = _scatter_indices(role, kept, sizes)
            if expected is not None and not torch.equal(linear.row_indices.cpu(), expected):
                raise ValueError(
                    f"{where}: row_indices differ from the structure in config.json; "
                    "config and weights are not of the same model"
                )
