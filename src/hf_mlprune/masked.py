"""Layers whose masks are learned, and the state of a run as a module of the encoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .anatomy import Anatomy
from .budget import block_weights, structure_weights
from .config import PruningConfig
from .gates import Gate, GateOf
from .modeling.block_sparse import BlockSparseLinear
from .modeling.pruned import copy_frozen, separate_activation, set_follower
from .modeling.structure import ROLES, LayerSizes, LayerStructure, grid_shape

STATE_NAME = "pruning"


@dataclass(frozen=True)
class Masks:
    """The gates of one linear.

    Attributes:
        rows: gate of its rows, if they are pruned.
        columns: gate of its columns, if the layer before is pruned; only the block grid needs it.
        blocks: gate of the blocks of what rows and columns leave.
        block_shape: ``(rows, columns)``.
        mask_rows: whether the rows' mask multiplies this linear's weight.
        layout: see :meth:`MaskedLinear.block_layout`; kept while rows and columns are final.
    """

    rows: GateOf | None
    columns: GateOf | None
    blocks: Gate | None
    block_shape: tuple[int, int]
    mask_rows: bool = True
    layout: tuple[Tensor, Tensor] | None = None


class MaskedLinear(nn.Linear):
    """A linear whose rows and blocks are multiplied by masks; cast in place from ``nn.Linear``."""

    masks: Masks

    @classmethod
    def cast(cls, linear: nn.Linear, masks: Masks) -> None:
        """Turn a linear into a masked one, keeping its identity and its parameters'."""
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear.masks = masks

    def kept_shape(self) -> tuple[int, int]:
        """Rows and columns that the row and column gates leave."""
        rows, columns = self.masks.rows, self.masks.columns
        return (
            int(rows.keep().sum()) if rows else self.out_features,
            int(columns.keep().sum()) if columns else self.in_features,
        )

    def live_blocks(self) -> tuple[Tensor, Tensor]:
        """Weights of each block of the kept rows and columns, int64, and whether it stays, bool.

        Both flat, grid row by grid row. A linear whose blocks are not pruned is one block that stays.
        """
        gate, shape = self.masks.blocks, self.kept_shape()
        if gate is None:
            return torch.tensor([shape[0] * shape[1]]), torch.ones(1, dtype=torch.bool)
        costs = block_weights(shape, self.masks.block_shape).flatten()
        return costs, gate.keep[: len(costs)].cpu()

    def block_layout(self) -> tuple[Tensor, Tensor]:
        """One-hot maps from the block grid, laid over kept rows and columns, to the matrix.

        Returns:
            ``(rows, grid rows)`` and ``(grid columns, columns)``; removed rows and columns map to
            no block, so that ``first @ grid mask @ second`` is the mask of single weights.
        """
        sides = []
        for gate, length, block in zip(
            (self.masks.rows, self.masks.columns),
            (self.out_features, self.in_features),
            self.masks.block_shape,
            strict=True,
        ):
            device = self.weight.device
            keep = gate.keep() if gate else torch.ones(length, dtype=torch.bool, device=device)
            block_of = (keep.cumsum(0) - 1).clamp(min=0) // block
            blocks = -(-int(keep.sum()) // block)
            sides.append(functional.one_hot(block_of, max(blocks, 1))[:, :blocks] * keep[:, None])
        dtype = self.weight.dtype
        return sides[0].to(dtype), sides[1].T.contiguous().to(dtype)

    def _block_mask(self) -> Tensor | None:
        gate = self.masks.blocks
        mask = gate.current() if gate else None
        if mask is None:
            return None
        in_step = self.training and self.masks.layout is not None
        first, second = self.masks.layout if in_step and self.masks.layout else self.block_layout()
        grid = mask[: first.shape[1] * second.shape[0]].view(first.shape[1], second.shape[0])
        return first @ grid.to(first.dtype) @ second

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``; biases go with their rows."""
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        masks = self.masks
        rows = masks.rows.current() if masks.rows and masks.mask_rows else None
        if rows is not None:
            rows = rows.to(weight.dtype)
            weight = weight * rows[:, None]
            bias = bias * rows if bias is not None else bias
        blocks = self._block_mask()
        if blocks is not None:
            weight = weight * blocks
        return functional.linear(x, weight, bias)


class PruningState(nn.Module):
    """All that a pruning run knows, as a submodule of the encoder: saved and resumed with it.

    Attributes:
        config: the settings.
        sizes: sizes of one dense layer.
        base: the structure that masks were laid over, one entry per layer (a pruned model can be
            pruned further).
        layers: per layer, gates by name: ``heads``, ``attention_output``, ``fc1``, ``fc2`` and
            ``blocks_<role>``.
        landed: int64 ``(1,)``; stages whose masks are final: 0, 1 (heads and rows) or 2 (all).
    """

    landed: Tensor

    def __init__(self, config: PruningConfig, anatomy: Anatomy, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.sizes: LayerSizes = anatomy.sizes
        self.base: tuple[LayerStructure, ...] = anatomy.structure.layers
        self.layers = nn.ModuleList(
            _make_gates(config, layer, anatomy.sizes, index, device)
            for index, layer in enumerate(anatomy.structure.layers)
        )
        # What `loop.start` and the callback at work set up; never saved.
        self.run: object | None = None
        self.session: object | None = None
        self.register_buffer("landed", torch.zeros(1, dtype=torch.int64, device=device))

    def __getstate__(self) -> dict[str, Any]:
        """Without what a run set up: copies and pickles of a model take no part in it."""
        return {**vars(self), "run": None, "session": None}

    def gates(self, index: int) -> dict[str, Gate]:
        """Gates of one layer by name."""
        layer = self.layers[index]
        assert isinstance(layer, nn.ModuleDict)
        return {name: gate for name, gate in layer.items() if isinstance(gate, Gate)}

    def all_gates(self) -> Iterator[Gate]:
        """Every gate, in a fixed order."""
        for index in range(len(self.layers)):
            yield from self.gates(index).values()

    def included(self) -> list[int]:
        """Indices of the layers that are pruned."""
        return [i for i in range(len(self.base)) if i not in self.config.exclude]

    def total_weights(self) -> int:
        """Weights of the prunable linears of the dense model: the denominator of density."""
        full = structure_weights(LayerStructure.full(self.sizes), self.sizes)
        return full * len(self.included())

    def kept_structure(self, index: int) -> LayerStructure:
        """Kept units of one layer as indices into the dense layer, blocks not considered."""
        base, gates = self.base[index], self.gates(index)

        def kept(name: str, indices: tuple[int, ...]) -> tuple[int, ...]:
            if name not in gates:
                return indices
            keep = gates[name].keep.tolist()
            return tuple(i for i, stays in zip(indices, keep, strict=True) if stays)

        return LayerStructure(
            heads=kept("heads", base.heads),
            attention_output=kept("attention_output", base.attention_output),
            fc1=kept("fc1", base.fc1),
            fc2=kept("fc2", base.fc2),
            blocks={},
        )


def _make_gates(
    config: PruningConfig, kept: LayerStructure, sizes: LayerSizes, index: int, device: torch.device
) -> nn.ModuleDict:
    gates: dict[str, nn.Module] = {}
    if index in config.exclude:
        return nn.ModuleDict(gates)
    if "heads" in config.levels and kept.heads:
        gates["heads"] = Gate(len(kept.heads), device)
    for site in config.row_sites if "rows" in config.levels else ():
        # Rows of a matrix without columns weigh nothing.
        if not kept.is_empty(site, sizes):
            gates[site] = Gate(len(getattr(kept, site)), device)
    if config.blocks:
        for role in ROLES:
            grid = grid_shape(kept.linear_shape(role, sizes), config.block_shape)
            if grid[0] * grid[1]:
                gates[f"blocks_{role}"] = Gate(grid[0] * grid[1], device)
    return nn.ModuleDict(gates)


def insert_masks(anatomy: Anatomy, config: PruningConfig, *, mask_queries_and_keys: bool) -> PruningState:
    """Cast the prunable linears of a model in place, and hang the state into its encoder.

    Raises:
        ValueError: ``exclude`` names a layer that is not there, or every layer.
        TypeError: a prunable linear is not an ``nn.Linear``.
    """
    count = len(anatomy.layers)
    if any(index >= count for index in config.exclude) or len(set(config.exclude)) == count:
        raise ValueError(f"exclude: expected some of the layers 0 to {count - 1}, got {list(config.exclude)}")
    for index in set(config.exclude):
        if any(isinstance(linear, BlockSparseLinear) for linear in anatomy.layers[index].linears.values()):
            raise ValueError(
                f"exclude: layer {index} is stored as blocks, which a further run makes dense again; "
                "leave it out of exclude"
            )
    restore_dense_blocks(anatomy)
    state = PruningState(config, anatomy, anatomy.encoder.device)
    casts: list[tuple[nn.Linear, Masks]] = []
    for index in state.included():
        gates = state.gates(index)
        for role, linear in anatomy.layers[index].linears.items():
            if type(linear) is not nn.Linear:
                raise TypeError(f"layer {index}, {role}: expected nn.Linear, got {type(linear).__name__}")
            assert isinstance(linear, nn.Linear)
            masks = _masks_of(role, gates, anatomy.sizes, config, mask_queries_and_keys)
            casts.append((linear, masks))
    for linear, masks in casts:
        MaskedLinear.cast(linear, masks)
    anatomy.encoder.add_module(STATE_NAME, state.train(anatomy.encoder.training))
    return state


def _masks_of(
    role: str,
    gates: dict[str, Gate],
    sizes: LayerSizes,
    config: PruningConfig,
    mask_queries_and_keys: bool,
) -> Masks:
    heads = GateOf(gates["heads"], sizes.head_size) if "heads" in gates else None
    own = GateOf(gates[role], 1) if role in gates else None
    fc1 = GateOf(gates["fc1"], 1) if "fc1" in gates else None
    attention = role in ("query", "key", "value")
    return Masks(
        rows=heads if attention else own,
        columns={"attention_output": heads, "fc2": fc1}.get(role),
        blocks=gates.get(f"blocks_{role}"),
        block_shape=config.block_shape,
        mask_rows=mask_queries_and_keys or role not in ("query", "key"),
    )


def restore_dense_blocks(anatomy: Anatomy) -> None:
    """Give a pruned model dense weights again where it had blocks; zeros stand for removed ones."""
    for layer in anatomy.layers:
        separate_activation(layer.module, anatomy.paths)
        for role, linear in layer.linears.items():
            if isinstance(linear, BlockSparseLinear):
                plain = _densified(linear)
                layer.module.set_submodule(getattr(anatomy.paths, role), plain)
                set_follower(layer.module, role, layer.structure, anatomy.sizes, anatomy.paths)
                layer.linears[role] = plain


@torch.no_grad()
def _densified(linear: BlockSparseLinear) -> nn.Linear:
    dense, bias = linear.matrix().to_dense(), linear.bias is not None
    plain = nn.Linear(linear.in_features, linear.out_features, bias=bias)
    plain = plain.to(dense.device, dense.dtype).train(linear.training)
    plain.weight.copy_(dense)
    if linear.bias is not None and plain.bias is not None:
        plain.bias.copy_(linear.bias)
    copy_frozen(linear, plain)
    return plain
