"""Masks -> small linears with what is kept of each weight, and their places in an encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .encoders import Encoder
from .masked import MaskedLinear
from .modeling.block_sparse import BlockSparseLinear, BlockSparseMatrix
from .modeling.layout import DenseLayer
from .modeling.pruned import build_linear, set_surroundings
from .modeling.standins import EmptyLinear
from .modeling.structure import LayerStructure, Structure, grid_shape
from .state import STATE_NAME, PruningState


def replace(encoder: Encoder, linears: Sequence[Mapping[str, nn.Module]], structure: Structure) -> None:
    """Put the new linears of each layer into their places, and have what is around them fit."""
    encoder.module.__delattr__(STATE_NAME)
    for layer, kept, new in zip(encoder.layers, structure.layers, linears, strict=True):
        for name, linear in new.items():
            layer.module.set_submodule(encoder.dense.layout.matrices[name].path, linear)
        set_surroundings(layer.module, kept, encoder.dense)


def plan(encoder: Encoder) -> tuple[list[dict[str, nn.Module]], Structure]:
    """New linears of each layer by matrix, and the structure they make."""
    state = getattr(encoder.module, STATE_NAME)
    assert isinstance(state, PruningState)
    linears: list[dict[str, nn.Module]] = []
    layers: list[LayerStructure] = []
    shape, dense = state.config.block_shape, encoder.dense
    for index, layer in enumerate(encoder.layers):
        kept = state.kept_structure(index)
        weights = {
            name: _kept_weight(linear)
            for name, linear in layer.linears.items()
            if isinstance(linear, MaskedLinear) and not kept.is_empty(name, dense)
        }
        blocks = {
            name: int(grid.sum())
            for name, (_, grid) in weights.items()
            if grid is not None and not bool(grid.all())
        }
        kept = dataclasses.replace(kept, blocks=blocks)
        layers.append(kept)
        linears.append(_new_linears(layer.module, kept, dense, shape, weights))
    any_blocks = any(layer.blocks for layer in layers)
    return linears, Structure(tuple(layers), shape if any_blocks else None)


def _new_linears(
    layer: nn.Module,
    kept: LayerStructure,
    dense: DenseLayer,
    block_shape: tuple[int, int],
    weights: Mapping[str, tuple[Tensor, Tensor | None]],
) -> dict[str, nn.Module]:
    """What replaces the linears of a layer, by matrix."""
    found: dict[str, nn.Module] = {}
    for name, matrix in dense.layout.matrices.items():
        if matrix.rows == "heads" and not kept.kept["heads"]:
            continue  # goes with the attention
        old = layer.get_submodule(matrix.path)
        # What was empty before has no masks, but what it is to be beside may have changed.
        if isinstance(old, (MaskedLinear, EmptyLinear)):
            new = build_linear(old, name, kept, dense, block_shape)
            weight, grid = weights.get(name, (None, None))
            _fill(new, old, weight, grid, block_shape)
            found[name] = new
    return found


@torch.no_grad()
def _kept_weight(linear: MaskedLinear) -> tuple[Tensor, Tensor | None]:
    """The kept rows and columns of a weight, and the keep mask of its block grid."""
    masks = linear.masks
    weight = linear.weight
    if masks.rows:
        weight = weight[masks.rows.keep()]
    if masks.columns:
        weight = weight[:, masks.columns.keep()]
    if masks.blocks is None:
        return weight, None
    grid = grid_shape((weight.shape[0], weight.shape[1]), masks.block_shape)
    return weight, masks.blocks.keep[: grid[0] * grid[1]].view(grid)


@torch.no_grad()
def _fill(
    new: nn.Module,
    old: nn.Module,
    weight: Tensor | None,
    grid: Tensor | None,
    block_shape: tuple[int, int],
) -> None:
    """Give a small layer what is kept of a weight, if there is any, and of a bias."""
    if isinstance(new, BlockSparseLinear):
        assert weight is not None
        assert grid is not None
        new.set_matrix(BlockSparseMatrix.from_dense(weight, grid, block_shape))
    elif weight is not None:
        new.get_parameter("weight").copy_(weight)
    if "bias" in dict(new.named_parameters(recurse=False)):
        rows = old.masks.rows if isinstance(old, MaskedLinear) else None
        bias = old.get_parameter("bias")
        new.get_parameter("bias").copy_(bias[rows.keep()] if rows else bias)
