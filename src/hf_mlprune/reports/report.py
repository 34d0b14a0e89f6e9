"""Report: what a model has left, per layer and level, and what that is worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table
from torch import nn

from ..budgets.multiply_adds import attention_multiply_adds
from ..budgets.weights import block_weights
from ..config import PruningConfig
from ..encoders import Encoder, inspect_encoders, tokens_of
from ..families import known_encoders
from ..kernels import explain
from ..masked import MaskedLinear
from ..modeling.block_sparse import BlockSparseLinear
from ..modeling.structure import LayerStructure, grid_shape
from ..shrinking import ShrinkReport
from ..state import STATE_NAME, PruningState
from .latency import Latency

REPORT_VERSION = 1
#: Of the table of layers, wherever it is shown.
COLUMNS = ("layer", "heads", "O rows", "FC1 rows", "FC2 rows", "blocks", "weights")


@dataclass(frozen=True)
class LayerReport:
    """One layer: kept of all, per level.

    Attributes:
        encoder: path of its encoder in the model; empty if it is the model.
        index: of the layer in its encoder.
        heads: kept heads, all heads.
        attention_output: kept rows of O, all.
        fc1: kept rows of FC1, all.
        fc2: kept rows of FC2, all.
        blocks: kept blocks of what heads and rows left, all of those; equal if none was removed.
        weights: kept weights of the six linears, all.
    """

    encoder: str
    index: int
    heads: tuple[int, int]
    attention_output: tuple[int, int]
    fc1: tuple[int, int]
    fc2: tuple[int, int]
    blocks: tuple[int, int]
    weights: tuple[int, int]


@dataclass(frozen=True)
class Report:
    """What a model has left. See :func:`report`.

    Attributes:
        density: kept weights of the encoder's linears / all of them, excluded layers included.
        parameters: parameters of the model, of the dense model.
        embedding_parameters: parameters of its embeddings, which are not pruned.
        multiply_adds: of the encoder for one sequence of ``multiply_adds_length`` tokens: now, dense.
        multiply_adds_length: tokens.
        layers: one entry per layer.
        max_difference: largest difference between masked and shrunk outputs, if it was shrunk here.
        difference_allowed: the bound it was held to.
        compared_on: real batches it was measured on.
        latency: measured times, if any.
        settings: of the run that pruned it, if it was given.
        multiplied: how block-sparse layers are multiplied on this machine's CPU, and why so -> layers.
        predicted_speedup: of the first encoder, by the table of times that the run was pruned by; the first
            row of :attr:`latency` is what was measured.
    """

    density: float
    parameters: tuple[int, int]
    embedding_parameters: int
    multiply_adds: tuple[int, int]
    multiply_adds_length: int
    layers: tuple[LayerReport, ...]
    max_difference: float | None = None
    difference_allowed: float | None = None
    compared_on: int | None = None
    latency: tuple[Latency, ...] = ()
    settings: dict[str, Any] | None = None
    multiplied: dict[str, int] = dataclasses.field(default_factory=dict)
    predicted_speedup: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as ``pruning_report.json`` holds it."""
        return {
            "version": REPORT_VERSION,
            **dataclasses.asdict(self),
            "density_of_pruned_layers": self.density_of_pruned_layers,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: it is no report, or one of another version.
        """
        if data.get("version") != REPORT_VERSION:
            raise ValueError(
                f"report: expected version {REPORT_VERSION}, got {data.get('version')!r}; if a newer "
                "hf-mlprune wrote it, upgrade with `pip install -U hf-mlprune`"
            )
        try:
            given = {field.name: data[field.name] for field in dataclasses.fields(cls)}
            pairs = {name: tuple(given[name]) for name in ("parameters", "multiply_adds")}
            layers = tuple(
                LayerReport(
                    **cast(Any, {k: tuple(x) if isinstance(x, list) else x for k, x in layer.items()})
                )
                for layer in given["layers"]
            )
            latency = tuple(Latency(**row) for row in given["latency"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"report: expected the fields of a report, got {error!r}") from error
        return cls(**{**given, **pairs, "layers": layers, "latency": latency})

    def _repr_html_(self) -> str:
        """The table of layers, as notebooks show it."""
        titles = "".join(f"<th>{title}</th>" for title in COLUMNS)
        rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in self._rows())
        lines = "".join(f"<p>{line}</p>" for line in self.latency_lines())
        caption = f"{self.density:.1%} of the encoder's weights are left"
        return f"<table><caption>{caption}</caption><tr>{titles}</tr>{rows}</table>{lines}"

    @property
    def density_of_pruned_layers(self) -> float:
        """As :attr:`density`, without the layers that the run left alone: what the target counts."""
        excluded = (self.settings or {}).get("exclude", ())
        pruned = [layer.weights for layer in self.layers if layer.index not in excluded]
        return sum(kept for kept, _ in pruned) / sum(total for _, total in pruned)

    def table(self) -> Table:
        """Kept of all, per layer and level, for a terminal."""
        table = Table(title=f"kept of the encoder: {self.density:.1%} of the weights")
        for name in COLUMNS:
            table.add_column(name, justify="right")
        for row in self._rows():
            table.add_row(*row)
        return table

    def latency_lines(self) -> list[str]:
        """What was measured, one line each."""
        several = len({row.encoder for row in self.latency}) > 1
        return [f"{row.encoder}: {row}" if several else str(row) for row in self.latency]

    def _rows(self) -> list[list[str]]:
        """The per-layer table: name, kept of all per level, share of the weights."""
        several = len({layer.encoder for layer in self.layers}) > 1
        rows = []
        for layer in self.layers:
            kept = (layer.heads, layer.attention_output, layer.fc1, layer.fc2, layer.blocks)
            name = f"{layer.encoder} {layer.index}" if several else str(layer.index)
            share = layer.weights[0] / layer.weights[1]
            rows.append([name, *(f"{a}/{b}" for a, b in kept), f"{share:.1%}"])
        return rows

    def markdown(self) -> str:
        """The per-layer table as Markdown."""
        rows = [f"| {' | '.join(COLUMNS)} |", f"|{'---:|' * len(COLUMNS)}"]
        rows += [f"| {' | '.join(row)} |" for row in self._rows()]
        return "\n".join(rows)


def report(
    model: nn.Module,
    *,
    shrunk: ShrinkReport | None = None,
    latency: Sequence[Latency] = (),
    settings: PruningConfig | None = None,
    length: int | None = None,
    predicted_speedup: float | None = None,
) -> Report:
    """Describe a model, masked or pruned (or dense).

    Args:
        model: a model with encoders of known families.
        shrunk: what :func:`~hf_mlprune.shrinking.shrink` said of it, if it was shrunk just now.
        latency: what :func:`~hf_mlprune.reports.latency.measure_latency` found.
        settings: of the run that pruned it.
        length: tokens of the sequence that multiply-adds are counted for; 128, or those of an image. Local
            attention is counted in full, as torch computes it.
        predicted_speedup: by the table of times of the run.

    Raises:
        TypeError: the model is of no known family.
    """
    encoders = reported_encoders(model)
    length = length or tokens_of(encoders[0]) or 128
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
    attention = [_attention_multiply_adds(encoder, layers, length) for encoder in encoders]
    return Report(
        density=kept / total,
        parameters=(parameters, dense),
        embedding_parameters=sum(_embedding_parameters(encoder) for encoder in encoders),
        multiply_adds=(
            kept * length + sum(now for now, _ in attention),
            total * length + sum(full for _, full in attention),
        ),
        multiply_adds_length=length,
        layers=layers,
        max_difference=shrunk.max_difference if shrunk else None,
        difference_allowed=shrunk.tolerance if shrunk else None,
        compared_on=shrunk.real_batches if shrunk else None,
        latency=tuple(latency),
        settings=settings.to_dict() if settings else None,
        multiplied=explain(model),
        predicted_speedup=predicted_speedup,
    )


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


def print_end(found: Report, settings: PruningConfig, saved: Path | None = None) -> None:
    """Print, to standard error, what a run has left.

    Args:
        found: on the pruned model.
        settings: of the run.
        saved: where the model was written, if it was.
    """
    landed = f"landed at density {found.density_of_pruned_layers:.4f} (target {settings.goal})"
    if settings.exclude:
        landed += f" without layers {list(settings.exclude)}, {found.density:.4f} in all"
    if found.max_difference is not None:
        landed += f"; masked and shrunk outputs differ by {found.max_difference:.1e} at most"
    console = Console(stderr=True)
    console.print(found.table())
    multiplied = [f"block-sparse layers: {count} {how}" for how, count in found.multiplied.items()]
    predicted = [f"predicted {found.predicted_speedup:.2f}x"] if found.predicted_speedup else []
    folder = [f"saved in {saved}"] if saved is not None else []
    for line in (*multiplied, *predicted, *found.latency_lines(), landed, *folder):
        console.print(line)


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
