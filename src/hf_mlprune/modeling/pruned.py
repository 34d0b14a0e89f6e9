"""Stock encoder layers -> the small layers that a structure describes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import GELUActivation

from .block_sparse import BlockSparseLinear, row_places
from .standins import Applied, EmptyLinear, NoHeads, RowScatter
from .structure import ROLES, LayerSizes, LayerStructure, Structure

#: Buffer of an encoder, uint8 (16,).
FINGERPRINT = "structure_fingerprint"
#: Roles whose rows are places in the residual stream.
FOLLOWED = ("attention_output", "fc2")


@dataclass(frozen=True)
class LayerPaths:
    """Where an encoder layer of one family keeps its parts, as paths from the layer."""

    attention: str
    query: str
    key: str
    value: str
    attention_output: str
    attention_output_follower: str
    fc1: str
    activation: str
    fc2: str
    fc2_follower: str

    def linear(self, layer: nn.Module, role: str) -> nn.Module:
        """The module of one role."""
        return layer.get_submodule(getattr(self, role))

    def follower(self, layer: nn.Module, role: str) -> nn.Module:
        """The module right behind a linear of :data:`FOLLOWED`."""
        return layer.get_submodule(getattr(self, f"{role}_follower"))

    def activation_of(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        """What is applied to the output of FC1; no module, where a config brings a function."""
        activation: Callable[[Tensor], Tensor] = attrgetter(self.activation)(layer)
        return activation


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
            if kept.linear_shape(role, sizes) != (old.out_features, old.in_features) or role in kept.blocks:
                new = build_linear(old, role, kept, sizes, structure.block_shape)
                layer.set_submodule(getattr(paths, role), new)
                set_follower(layer, role, kept, sizes, paths)
        set_heads(layer, kept, sizes, paths)
        fuse_activation(layer, paths)


def set_follower(
    layer: nn.Module, role: str, kept: LayerStructure, sizes: LayerSizes, paths: LayerPaths
) -> None:
    """Have the module behind a linear, if there is one for its role, take what that linear gives now."""
    if role in FOLLOWED:
        new = build_follower(paths.follower(layer, role), paths.linear(layer, role), role, kept, sizes)
        layer.set_submodule(getattr(paths, f"{role}_follower"), new)


def build_follower(
    old: nn.Module, linear: nn.Module, role: str, kept: LayerStructure, sizes: LayerSizes
) -> nn.Module:
    """What stands behind the linear of a role: the plain module, or a :class:`RowScatter` around it."""
    plain = old.module if isinstance(old, RowScatter) else old
    rows = kept.scatter(role, sizes)
    # Blocks are written to their places by the layer itself, in one go.
    if rows is None or isinstance(linear, BlockSparseLinear):
        return plain
    weight = linear.weight
    assert isinstance(weight, Tensor)
    new = RowScatter(plain, rows, sizes.hidden_size).to(weight.device)
    new.training = plain.training
    return new


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
    old: nn.Module,
    role: str,
    kept: LayerStructure,
    sizes: LayerSizes,
    block_shape: tuple[int, int] | None,
) -> nn.Module:
    """A linear of one role with the kept shape, on the device and of the dtype of the old one."""
    rows, columns = kept.linear_shape(role, sizes)
    bias = old.bias is not None
    new: nn.Module
    if kept.is_empty(role, sizes):
        if role == "fc1":
            # FC2 has no columns then, and reads nothing.
            return nn.Identity()
        new = EmptyLinear(rows, columns, rows or sizes.hidden_size, bias=bias and rows > 0)
    elif role in kept.blocks:
        assert block_shape is not None
        scatter = kept.scatter(role, sizes)
        new = BlockSparseLinear(
            columns,
            rows,
            block_shape,
            kept.blocks[role],
            bias=bias,
            scatter=scatter,
            scatter_size=sizes.hidden_size if scatter is not None else None,
        )
    else:
        new = nn.Linear(columns, rows, bias=bias)
    weight = old.weight
    assert isinstance(weight, Tensor)
    new = new.to(weight.device, weight.dtype).train(old.training)
    copy_frozen(old, new)
    return new


def copy_frozen(old: nn.Module, new: nn.Module) -> None:
    """Freeze the weight and bias of a layer that stands for one in which they were frozen."""
    wanted = dict(old.named_parameters(recurse=False))
    for name, parameter in new.named_parameters(recurse=False):
        # A layer without blocks has no weight that could be frozen.
        if name in wanted:
            parameter.requires_grad_(wanted[name].requires_grad)


@torch.no_grad()
def initialize(module: nn.Module, std: float) -> None:
    """Give one of our modules what no checkpoint brought; for ``_init_weights``, which passes over the rest.

    Args:
        module: any module.
        std: of new weights.
    """
    if isinstance(module, BlockSparseLinear):
        init.normal_(module.weight, mean=0.0, std=std)
        crow, col = module.any_layout()
        init.copy_(module.crow_indices, crow)
        init.copy_(module.col_indices, col)
    if isinstance(module, (BlockSparseLinear, EmptyLinear)) and module.bias is not None:
        init.zeros_(module.bias)
    if isinstance(module, (BlockSparseLinear, RowScatter)) and module.rows is not None:
        init.copy_(module.row_indices, row_places(module.rows))


def set_fingerprint(encoder: nn.Module, structure: Structure | None) -> None:
    """Put a structure's fingerprint into an encoder's tensors, or take an old one out."""
    if FINGERPRINT in dict(encoder.named_buffers(recurse=False)):
        delattr(encoder, FINGERPRINT)
    if structure is not None:
        device = next(encoder.parameters()).device
        encoder.register_buffer(FINGERPRINT, fingerprint_tensor(structure).to(device))


def fingerprint_tensor(structure: Structure) -> Tensor:
    """A structure's fingerprint as the weights hold it, uint8 ``(16,)`` on the CPU."""
    digits = structure.to_dict()["fingerprint"]
    return torch.tensor(list(bytes.fromhex(digits)), dtype=torch.uint8, device="cpu")


def check_fingerprint(encoder: nn.Module, structure: Structure) -> None:
    """Check that an encoder's tensors were saved with this structure.

    Raises:
        ValueError: they are of another model than the config.
    """
    if not torch.equal(encoder.get_buffer(FINGERPRINT).cpu(), fingerprint_tensor(structure)):
        raise ValueError(
            "expected the fingerprint of the structure in config.json in the weights, too: config and "
            "weights are not of the same model; download the checkpoint again, or save the model again"
        )


def check_loaded(
    layers: Iterable[nn.Module], structure: Structure, sizes: LayerSizes, paths: LayerPaths
) -> None:
    """Check the index tensors that a checkpoint brought against its structure.

    Raises:
        ValueError: an index tensor is malformed.
    """
    for index, (layer, kept) in enumerate(zip(layers, structure.layers, strict=True)):
        for role in ROLES:
            if kept.is_empty(role, sizes):
                continue
            linear = paths.linear(layer, role)
            if isinstance(linear, BlockSparseLinear):
                try:
                    linear.matrix().validate()
                except ValueError as error:
                    raise ValueError(f"layer {index}, {role}: {error}; the checkpoint is damaged") from None
