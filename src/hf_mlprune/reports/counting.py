"""Counts what a model has left: masked, pruned or dense."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..budgets.multiply_adds import attention_multiply_adds
from ..budgets.weights import block_weights
from ..config import PruningConfig
from ..encoders import Encoder, inspect_encoders, tokens_of, usual_length
from ..families import known_encoders
from ..kernels import explain
from ..masked import MaskedLinear
from ..modeling.block_sparse import BlockSparseLinear
from ..modeling.structure import LayerStructure, grid_shape
from ..shrinking import ShrinkReport
from ..state import STATE_NAME, PruningState
from .latency import Latency
from .report import LayerReport, Report


def report(
    model: nn.Module,
    *,
    shrunk: ShrinkReport | None = None,
    latency: Sequence[Latency] = (),
    settings: PruningConfig | None = None,
    length: int | None = None,
    predicted_speedup: float | None = None,
    reached: str | None = None,
) -> Report:
    """Describe a model, masked or pruned (or dense).

    Args:
        model: a model with encoders of known families.
        shrunk: what :func:`~hf_mlprune.shrink` said of it, if it was shrunk just now.
        latency: what :func:`~hf_mlprune.reports.latency.measure_latency` found.
        settings: of the run that pruned it.
        length: tokens of the sequence that multiply-adds are counted for; 128 (or the most that the model
            takes) or those of an image, if left out. Local attention is counted in full, as torch
            computes it.
        predicted_speedup: by the table of times of the run.
        reached: what the run counts the model at, in words, if its target is not the density.

    Raises:
        TypeError: the model is of no known family.
    """
    encoders = reported_encoders(model)
    lengths = {encoder.path: tokens_of(encoder) or length or usual_length(encoder) for encoder in encoders}
    layers = tuple(
        _layer_report(encoder, index) for encoder in encoders for index in range(len(encoder.layers))
    )
    kept = sum(layer.weights[0] for layer in layers)
    total = sum(layer.weights[1] for layer in layers)
    # Masked weights are counted as removed; the biases that go with them only once they are gone.
    parameters = sum(p.numel() for p in model.parameters())
    dense = _dense_parameters(model, encoders)
    if any(isinstance(module, MaskedLinear) for module in model.modules()):
        parameters = dense - (total - kept)
    attention = [_attention_multiply_adds(encoder, layers, lengths[encoder.path]) for encoder in encoders]
    linear = [[layer.weights[side] * lengths[layer.encoder] for layer in layers] for side in (0, 1)]
    return Report(
        density=kept / total,
        parameters=(parameters, dense),
        embedding_parameters=sum(_embedding_parameters(encoder) for encoder in encoders),
        multiply_adds=(
            sum(linear[0]) + sum(now for now, _ in attention),
            sum(linear[1]) + sum(full for _, full in attention),
        ),
        multiply_adds_length=lengths[encoders[0].path],
        layers=layers,
        max_difference=shrunk.max_difference if shrunk else None,
        difference_allowed=shrunk.tolerance if shrunk else None,
        compared_on=shrunk.real_batches if shrunk else None,
        latency=tuple(latency),
        settings=_shown(settings) if settings else None,
        multiplied=explain(model),
        predicted_speedup=predicted_speedup,
        reached=reached,
    )


def _shown(settings: PruningConfig) -> dict[str, Any]:
    """The settings, without the user's folders: reports are published."""
    found = settings.to_dict()
    if settings.latency_table is not None:
        found["latency_table"] = Path(settings.latency_table).name
    return found


def reported_encoders(model: nn.Module) -> list[Encoder]:
    """The encoders that are pruned or have masks; all of a model that is dense."""
    found = known_encoders(model)
    pruned = [
        path
        for path, _, module in found
        if getattr(module, STATE_NAME, None) is not None
        or getattr(module.config, "structure", None) is not None
    ]
    return inspect_encoders(model, pruned or [path for path, _, _ in found])


def _attention_multiply_adds(encoder: Encoder, layers: Sequence[LayerReport], length: int) -> tuple[int, int]:
    """Of scores and contexts of an encoder: now, dense."""
    own = [layer.heads for layer in layers if layer.encoder == encoder.path]
    size = encoder.dense.sizes.head_size
    counted = [[attention_multiply_adds(heads * size, 1, length) for heads in pair] for pair in own]
    return sum(now for now, _ in counted), sum(full for _, full in counted)


def _embedding_parameters(encoder: Encoder) -> int:
    embeddings = encoder.module.get_submodule(encoder.dense.layout.embeddings)
    return sum(p.numel() for p in embeddings.parameters())


def _dense_parameters(model: nn.Module, encoders: Sequence[Encoder]) -> int:
    """Parameters of the dense model that this one was made from."""
    return sum(p.numel() for p in model.parameters()) + sum(_missing_parameters(e) for e in encoders)


def _missing_parameters(encoder: Encoder) -> int:
    """Parameters of the dense encoder that are gone."""
    missing, dense = 0, encoder.dense
    for layer in encoder.layers:
        for name, matrix in dense.layout.matrices.items():
            rows, columns = dense.shape(name, dense.units)
            gone = matrix.rows == "heads" and not layer.structure.kept["heads"]
            linear = None if gone else layer.module.get_submodule(matrix.path)
            present = 0 if linear is None else sum(p.numel() for p in linear.parameters())
            missing += rows * columns + (rows if _has_bias(encoder, name) else 0) - present
    return missing


def _has_bias(encoder: Encoder, name: str) -> bool:
    """Whether a matrix has a bias, asked of a layer that has the matrix."""
    present = [layer.linears[name] for layer in encoder.layers if name in layer.linears]
    return not present or present[0].bias is not None


def _layer_report(encoder: Encoder, index: int) -> LayerReport:
    layer, dense = encoder.layers[index], encoder.dense
    kept = _kept(encoder, index)
    blocks = [0, 0]
    weights = 0
    for name in dense.layout.matrices:
        rows, columns = kept.shape(name, dense)
        linear = layer.linears.get(name)
        if isinstance(linear, MaskedLinear) and linear.masks.blocks is not None:
            costs, keep = linear.live_blocks()
            blocks = [blocks[0] + int(keep.sum()), blocks[1] + len(costs)]
            weights += int(costs[keep].sum())
        elif isinstance(linear, BlockSparseLinear):
            grid = grid_shape((rows, columns), linear.block_shape)
            blocks = [blocks[0] + len(linear.weight), blocks[1] + grid[0] * grid[1]]
            weights += _block_sparse_weights(linear)
        else:
            weights += rows * columns
    units = {group: (kept.widths[group], total) for group, total in dense.units.items()}
    return LayerReport(
        encoder=encoder.path,
        index=index,
        heads=units["heads"],
        attention_output=units["attention_output"],
        fc1=units["fc1"],
        fc2=units["fc2"],
        blocks=(blocks[0], blocks[1]),
        weights=(weights, dense.weights(dense.units)),
    )


def _kept(encoder: Encoder, index: int) -> LayerStructure:
    state = getattr(encoder.module, STATE_NAME, None)
    if isinstance(state, PruningState):
        return state.kept_structure(index)
    return encoder.layers[index].structure


def _block_sparse_weights(linear: BlockSparseLinear) -> int:
    """Stored weights, without the padding of edge blocks."""
    costs = block_weights((linear.out_features, linear.in_features), linear.block_shape)
    row, column = linear.matrix().places()
    return int(costs[row.cpu(), column.cpu()].sum())
