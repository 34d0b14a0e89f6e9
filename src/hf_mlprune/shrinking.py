"""Masks -> structure -> pruned model, in place and proved equal to the masked one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertForMultipleChoice, PreTrainedModel

from .anatomy import Anatomy, anatomy
from .attaching import kinds_of, plain_config, swap_class
from .loop import pruning_state
from .masked import STATE_NAME, MaskedLinear, PruningState
from .modeling.bert import PrunedBertConfig, PrunedBertMixin
from .modeling.block_sparse import BlockSparseLinear, BlockSparseMatrix
from .modeling.pruned import NoHeads, build_linear, fuse_activation, set_fingerprint, set_heads
from .modeling.structure import LayerStructure, Structure, grid_shape

Batch = Mapping[str, Any]

#: Largest difference between masked and shrunk outputs, relative to max(1, largest output), as a
#: multiple of the dtype's rounding unit: 1e-5 in float32.
TOLERANCE_UNITS = 1e-5 / torch.finfo(torch.float32).eps


class ShrinkError(RuntimeError):
    """The shrunk model does not compute what the masked one did; the masked one was put back."""


@dataclass(frozen=True)
class ShrinkReport:
    """What a shrink did.

    Attributes:
        structure: what is left.
        max_difference: largest absolute difference between outputs of masked and shrunk model.
        max_output: largest absolute output.
        tolerance: difference that was allowed.
        real_batches: number of real batches compared on; 0 if on random tokens.
    """

    structure: Structure
    max_difference: float
    max_output: float
    tolerance: float
    real_batches: int


def shrink(model: nn.Module, batches: Sequence[Batch] = ()) -> ShrinkReport:
    """Remove, in place, everything that the masks remove.

    A ``PrunableBertFor...`` becomes a ``PrunedBertFor...``; ``save_pretrained`` then writes a
    checkpoint that loads through the Auto classes.

    Args:
        model: a model with masks.
        batches: model inputs to compare masked and shrunk model on; random tokens if there are none.

    Returns:
        What is left, and how equal the two models are.

    Raises:
        ValueError: the model has no masks, or a run that was begun is not over.
        ShrinkError: outputs differ by more than rounding. The model is the masked one again.
    """
    state = pruning_state(model)
    if state.run is not None and int(state.landed) < 2:
        raise ValueError(
            "the run is not over: its masks are not final; call `advance` after each of its steps"
        )
    parts = anatomy(model)
    inputs = list(batches) or [random_batch(model, 2, 32)]
    swaps, structure = _plan(parts, state)
    before = _outputs(model, inputs)
    old = [(layer, path, layer.get_submodule(path)) for layer, path, _ in swaps]
    for layer, path, new in swaps:
        layer.set_submodule(path, new)
    parts.encoder.__delattr__(STATE_NAME)
    after = _outputs(model, inputs)
    difference, largest = _compare(before, after)
    tolerance = TOLERANCE_UNITS * torch.finfo(_check_dtype(model)).eps * max(1.0, largest)
    if not difference <= tolerance:
        for layer, path, module in old:
            layer.set_submodule(path, module)
        parts.encoder.add_module(STATE_NAME, state)
        raise ShrinkError(
            f"shrunk outputs differ from masked ones by {difference:.3g}, expected at most "
            f"{tolerance:.3g}; nothing was removed"
        )
    for part, kept in zip(parts.layers, structure.layers, strict=True):
        set_heads(part.module, kept, parts.sizes, parts.paths)
        fuse_activation(part.module, parts.paths)
    _become_pruned(model, parts, structure)
    return ShrinkReport(structure, difference, largest, tolerance, len(batches))


def shrunk_copy(model: PreTrainedModel, batches: Sequence[Batch] = ()) -> PreTrainedModel:
    """A shrunk copy of a model with masks, in evaluation mode; the model stays as it is.

    Hooks are copied with the model: take out those that hold other models first. Args and errors are
    those of :func:`shrink`.
    """
    state = pruning_state(model)
    session, run = state.session, state.run
    state.session = state.run = None
    copy = deepcopy(model)
    state.session, state.run = session, run
    shrink(copy, batches)
    return copy.eval()


def _plan(parts: Anatomy, state: PruningState) -> tuple[list[tuple[nn.Module, str, nn.Module]], Structure]:
    """New modules by layer and path, and the structure they make."""
    swaps: list[tuple[nn.Module, str, nn.Module]] = []
    layers: list[LayerStructure] = []
    shape = state.config.block_shape
    for index, layer in enumerate(parts.layers):
        kept = state.kept_structure(index)
        matrices: dict[str, tuple[MaskedLinear, Tensor, Tensor | None]] = {}
        for role, linear in layer.linears.items():
            if isinstance(linear, MaskedLinear) and (kept.heads or role not in _HEAD_ROLES):
                matrices[role] = (linear, *_kept_weight(linear))
        blocks = {
            role: int(grid.sum())
            for role, (_, _, grid) in matrices.items()
            if grid is not None and not bool(grid.all())
        }
        kept = dataclasses.replace(kept, blocks=blocks)
        layers.append(kept)
        for role, (linear, weight, grid) in matrices.items():
            new = build_linear(linear, role, kept, parts.sizes, shape)
            _fill(new, linear, weight, grid, shape)
            swaps.append((layer.module, getattr(parts.paths, role), new))
        if not kept.heads and layer.structure.heads:
            swaps.append((layer.module, parts.paths.attention, NoHeads()))
    any_blocks = any(layer.blocks for layer in layers)
    return swaps, Structure(tuple(layers), shape if any_blocks else None)


_HEAD_ROLES = ("query", "key", "value")


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
    old: MaskedLinear,
    weight: Tensor,
    grid: Tensor | None,
    block_shape: tuple[int, int],
) -> None:
    rows = old.masks.rows
    if isinstance(new, BlockSparseLinear):
        assert grid is not None
        new.set_matrix(BlockSparseMatrix.from_dense(weight, grid, block_shape))
    else:
        assert isinstance(new, nn.Linear)
        new.weight.copy_(weight)
    if old.bias is not None:
        assert isinstance(new.bias, Tensor)
        new.bias.copy_(old.bias[rows.keep()] if rows else old.bias)


def _become_pruned(model: nn.Module, parts: Anatomy, structure: Structure) -> None:
    old = parts.encoder.config
    new = PrunedBertConfig.from_dict(plain_config(old))
    new.structure = structure.to_dict()
    kinds = kinds_of(model)
    swap_class(model, old, new, kinds.pruned if kinds else None)
    set_fingerprint(parts.encoder, structure)
    if isinstance(model, PrunedBertMixin):
        # Of an earlier run, if there are any.
        model.pruning_report = model.pruning_card = None


def random_batch(model: nn.Module, rows: int, length: int, *, choices: bool = True) -> dict[str, Tensor]:
    """Random tokens in the shape that a model takes, one row padded; the same at every call.

    Args:
        model: a model with one encoder of a known family.
        rows: sequences (of two choices each, for a multiple-choice head).
        length: tokens per sequence; as many as the model can take, if that is less.
        choices: whether the batch is for the model as a whole; for its encoder, if not.
    """
    config = anatomy(model).encoder.config
    kinds = kinds_of(model)
    length = min(length, config.max_position_embeddings)
    pair = (2,) if choices and kinds is not None and kinds.stock is BertForMultipleChoice else ()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (rows, *pair, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[rows // 2, ..., length // 2 :] = 0
    device = next(model.parameters()).device
    return {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}


def _check_dtype(model: nn.Module) -> torch.dtype:
    dtype = next(model.parameters()).dtype
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@contextmanager
def _as_in_check(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and float32 for half-precision models: their rounding would hide errors."""
    training = model.training
    dtypes = {name: tensor.dtype for name, tensor in _floating(model)}
    model.eval()
    if dtypes and next(iter(dtypes.values())) is not _check_dtype(model):
        model.to(_check_dtype(model))
    try:
        yield
    finally:
        for name, tensor in _floating(model):
            tensor.data = tensor.data.to(dtypes.get(name, tensor.dtype))
        model.train(training)


def _floating(model: nn.Module) -> list[tuple[str, Tensor]]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]


@torch.no_grad()
def _outputs(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    found: list[Tensor] = []
    with _as_in_check(model):
        for batch in batches:
            # The class's own forward: accelerate may have wrapped the instance's in an autocast, whose
            # rounding would hide errors, or be taken for one.
            found += _tensors(type(model).forward(model, **batch))
    return found


def _tensors(out: Any) -> list[Tensor]:
    """Every tensor of an output, in order, in float64."""
    if isinstance(out, Tensor):
        return [out.double()]
    values = out.values() if isinstance(out, Mapping) else out if isinstance(out, (list, tuple)) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def _compare(before: list[Tensor], after: list[Tensor]) -> tuple[float, float]:
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a.numel()]
    # Not Python's max, which passes over NaN.
    difference = torch.stack([(a - b).abs().max() for a, b in pairs]).max()
    return float(difference), float(torch.stack([a.abs().max() for a, _ in pairs]).max())
