"""Stock encoder layers -> the small layers that a structure describes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import GELUActivation

from .block_sparse import BlockSparseLinear, row_places
from .layout import RESIDUAL, DenseLayer, Layout
from .standins import EmptyLinear, FusedActivation, NoHeads, OutputScatter, RowScatter, Selection
from .structure import LayerStructure, Structure

#: Buffer of an encoder, uint8 (16,).
FINGERPRINT = "structure_fingerprint"
#: Modules whose buffer `row_indices` follows from the structure.
SCATTERS = (BlockSparseLinear, RowScatter, Selection)


def apply_structure(layers: Iterable[nn.Module], structure: Structure, dense: DenseLayer) -> None:
    """Replace the linears of dense layers, in place, by ones of the kept shapes.

    Values are not carried over: a checkpoint or ``shrink`` brings them. Layers and matrices from which
    nothing was removed stay as they are.
    """
    for layer, kept in zip(layers, structure.layers, strict=True):
        for name, matrix in dense.layout.matrices.items():
            old = layer.get_submodule(matrix.path)
            assert isinstance(old, nn.Linear)
            if kept.shape(name, dense) != (old.out_features, old.in_features) or name in kept.blocks:
                layer.set_submodule(matrix.path, build_linear(old, name, kept, dense, structure.block_shape))
        set_surroundings(layer, kept, dense)


def set_surroundings(layer: nn.Module, kept: LayerStructure, dense: DenseLayer) -> None:
    """Have what is around the linears of a layer fit them."""
    set_heads(layer, kept, dense)
    for name in dense.layout.matrices:
        set_scatter(layer, name, kept, dense)
    fuse_activation(layer, dense.layout)


def set_scatter(layer: nn.Module, name: str, kept: LayerStructure, dense: DenseLayer) -> None:
    """Have the rows of a linear of O or FC2 written to their places behind it, if that is needed now."""
    matrix = dense.layout.matrices[name]
    if matrix.rows not in RESIDUAL:
        return
    linear, rows = layer.get_submodule(matrix.path), kept.scatter(matrix.rows, dense)
    # Blocks are written to their places by the layer itself, in one go.
    if isinstance(linear, BlockSparseLinear):
        rows = None
    weight, size = linear.weight, dense.sizes.hidden_size
    assert isinstance(weight, Tensor)
    path = dense.layout.followers.get(matrix.rows)
    if path is not None:
        old = layer.get_submodule(path)
        new = old.module if isinstance(old, RowScatter) else old
        if rows is not None:
            new = RowScatter(new, rows, size).to(weight.device).train(new.training)
        layer.set_submodule(path, new)
        return
    holder = layer.get_submodule(matrix.path.rpartition(".")[0])
    OutputScatter.leave(holder)
    if rows is not None:
        OutputScatter(rows, size).to(weight.device).train(holder.training).enter(holder)


def set_heads(layer: nn.Module, kept: LayerStructure, dense: DenseLayer) -> None:
    """Tell a layer's attention how many heads it has left."""
    layout, heads = dense.layout, len(kept.kept["heads"])
    attention: Any = layer.get_submodule(layout.attention)
    if isinstance(attention, NoHeads):
        return
    if not heads:
        layer.set_submodule(layout.attention, NoHeads(_output_within(layer, layout)))
        return
    counts = {"heads": heads, "width": heads * dense.sizes.head_size}
    for attribute, count in layout.head_counts.items():
        setattr(attention, attribute, counts[count])
    if layout.select_heads is not None:
        layout.select_heads(attention, kept.kept["heads"])


def _output_within(layer: nn.Module, layout: Layout) -> tuple[str, nn.Module] | None:
    """The linear behind the heads, if it is a child of what computes them, and its name there."""
    path, inside = layout.matrices["attention_output"].path, f"{layout.attention}."
    return (path.removeprefix(inside), layer.get_submodule(path)) if path.startswith(inside) else None


def activation_of(layer: nn.Module, layout: Layout) -> Callable[[Tensor], Tensor] | None:
    """What is applied to the output of FC1: a module, or a function that a config brought.

    ``None`` where the forward pass itself names a function.
    """
    return None if layout.activation is None else attrgetter(layout.activation)(layer)


def fuse_activation(layer: nn.Module, layout: Layout) -> None:
    """Let a block-sparse FC1 apply the activation behind it, where that is one it knows."""
    activation = activation_of(layer, layout)
    if layout.activation is None:
        return
    fc1 = layer.get_submodule(layout.matrices["fc1"].path)
    known = {GELUActivation: "gated_gelu"} if layout.is_gated() else {GELUActivation: "gelu", nn.ReLU: "relu"}
    if isinstance(fc1, BlockSparseLinear) and isinstance(activation, nn.Module) and type(activation) in known:
        fc1.activation = known[type(activation)]
        layer.set_submodule(layout.activation, FusedActivation(activation))


def separate_activation(layer: nn.Module, layout: Layout) -> None:
    """Undo :func:`fuse_activation`."""
    fused = activation_of(layer, layout)
    if isinstance(fused, FusedActivation):
        assert layout.activation is not None
        fc1 = layer.get_submodule(layout.matrices["fc1"].path)
        assert isinstance(fc1, BlockSparseLinear)
        fc1.activation = "none"
        layer.set_submodule(layout.activation, fused.activation)


def build_linear(
    old: nn.Module,
    name: str,
    kept: LayerStructure,
    dense: DenseLayer,
    block_shape: tuple[int, int] | None,
) -> nn.Module:
    """A linear for one matrix with the kept shape, on the device and of the dtype of the old one."""
    rows, columns = kept.shape(name, dense)
    group, hidden = dense.layout.matrices[name].rows, dense.sizes.hidden_size
    bias = old.bias is not None
    scatter = kept.scatter(group, dense)
    new: nn.Module
    if kept.is_empty(name, dense):
        if group == "fc1":
            # FC2 has no columns then, and reads nothing.
            parts = len(dense.parts(name))
            return nn.Identity() if parts == 1 else EmptyLinear(rows, columns, parts, bias=False)
        new = EmptyLinear(rows, columns, rows or hidden, bias=bias and rows > 0)
    elif name in kept.blocks:
        assert block_shape is not None
        new = BlockSparseLinear(
            columns,
            rows,
            block_shape,
            kept.blocks[name],
            bias=bias,
            scatter=scatter,
            scatter_size=hidden if scatter is not None else None,
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
    if isinstance(module, SCATTERS) and module.rows is not None:
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


def check_loaded(layers: Iterable[nn.Module], structure: Structure, dense: DenseLayer) -> None:
    """Check the index tensors that a checkpoint brought against its structure.

    Raises:
        ValueError: an index tensor is malformed.
    """
    for index, (layer, kept) in enumerate(zip(layers, structure.layers, strict=True)):
        for name in kept.blocks:
            if kept.is_empty(name, dense):
                continue
            linear = layer.get_submodule(dense.layout.matrices[name].path)
            assert isinstance(linear, BlockSparseLinear)
            try:
                linear.matrix().validate()
            except ValueError as error:
                raise ValueError(f"layer {index}, {name}: {error}; the checkpoint is damaged") from None
