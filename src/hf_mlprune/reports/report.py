"""Report: what a model has left, per layer and level, and what that is worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from ..budgets import named_target
from ..config import PruningConfig
from ..modeling.structure import TITLES
from .latency import Latency

REPORT_VERSION = 1


@dataclass(frozen=True)
class LayerReport:
    """One layer: kept of all, per level.

    Attributes:
        encoder: path of its encoder in the model; empty if the model itself is the encoder.
        index: of the layer in its encoder.
        heads: kept heads, all heads.
        attention_output: kept rows of O, all.
        fc1: kept rows of FC1, all.
        fc2: kept rows of FC2, all.
        blocks: kept blocks, and all blocks that are left after heads and rows were removed; both are equal
            if no block was removed.
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
        settings: of the run that pruned it, if they were given; files by their names alone.
        multiplied: how block-sparse layers are multiplied on this machine's CPU, with the reason -> number
            of layers.
        predicted_speedup: of the first encoder, from the table of times used for pruning. The first row of
            :attr:`latency` has the measured value.
        reached: what the run counted the model at, in words, if its target was not the density; of several
            encoders the first.
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
    reached: str | None = None

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
            # Earlier reports do not have it.
            known = {"reached": None, **data}
            given = {field.name: known[field.name] for field in dataclasses.fields(cls)}
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
        titles, *rows = self._rows()
        head = "".join(f"<th>{title}</th>" for title in titles)
        body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
        lines = "".join(f"<p>{line}</p>" for line in self.latency_lines())
        return f"<table><caption>{self.title}</caption><tr>{head}</tr>{body}</table>{lines}"

    @property
    def density_of_pruned_layers(self) -> float:
        """As :attr:`density`, without the layers that the run left alone: what the target counts."""
        excluded = (self.settings or {}).get("exclude", ())
        pruned = [layer.weights for layer in self.layers if layer.index not in excluded]
        return sum(kept for kept, _ in pruned) / sum(total for _, total in pruned)

    def table(self) -> Table:
        """Kept of all, per layer and level, for a terminal."""
        titles, *rows = self._rows()
        table = Table(title=self.title)
        for title in titles:
            table.add_column(title, justify="right")
        for row in rows:
            table.add_row(*row)
        return table

    def latency_lines(self) -> list[str]:
        """The speedup that was predicted, and what was measured, one line each."""
        several = len({row.encoder for row in self.latency}) > 1
        measured = [f"{row.encoder}: {row}" if several else str(row) for row in self.latency]
        if self.predicted_speedup is None:
            return measured
        # Another engine's, maybe: what is measured here is torch.
        table = (self.settings or {}).get("latency_table")
        source = f" by the times in {Path(table).name}; measured in torch:" if table else ""
        return [f"predicted {self.predicted_speedup:.2f}x{source}", *measured]

    @property
    def run_line(self) -> str | None:
        """By which method it was pruned and to what, if that is known."""
        if self.settings is None:
            return None
        # Not by a PruningConfig: the method may be a class that is not imported here.
        name = named_target(self.settings)
        assert name is not None
        reached = f"; reached: {self.reached}" if self.reached else ""
        return f"pruned by the method {self.settings['method']} to {name}={self.settings[name]}{reached}"

    @property
    def has_blocks(self) -> bool:
        """Whether any layer is divided into blocks."""
        return any(layer.blocks[1] for layer in self.layers)

    @property
    def title(self) -> str:
        """The one figure, in words."""
        return f"{self.density:.1%} of the encoder's weights are left"

    def _rows(self) -> list[list[str]]:
        """The per-layer table: titles, then name, kept of all per level, share of the weights.

        Blocks have a column if there are any.
        """
        several = len({layer.encoder for layer in self.layers}) > 1
        blocks = self.has_blocks
        rows = [["layer", *TITLES.values(), *(["blocks"] if blocks else []), "weights"]]
        for layer in self.layers:
            kept = [layer.heads, layer.attention_output, layer.fc1, layer.fc2]
            kept += [layer.blocks] if blocks else []
            name = f"{layer.encoder} {layer.index}" if several else str(layer.index)
            share = layer.weights[0] / layer.weights[1]
            rows.append([name, *(f"{a}/{b}" for a, b in kept), f"{share:.1%}"])
        return rows

    def markdown(self) -> str:
        """The per-layer table as Markdown."""
        titles, *rows = [f"| {' | '.join(row)} |" for row in self._rows()]
        return "\n".join([titles, f"|{'---:|' * (titles.count('|') - 1)}", *rows])


def print_end(found: Report, settings: PruningConfig, saved: Path | None = None) -> None:
    """Print, to standard error, what a run has left.

    Args:
        found: on the pruned model.
        settings: of the run.
        saved: where the model was written, if it was.
    """
    reached = f", {found.reached}" if found.reached else ""
    landed = f"landed at density {found.density_of_pruned_layers:.4f}{reached} (target {settings.goal})"
    if settings.exclude:
        landed += f" without layers {list(settings.exclude)}, {found.density:.4f} in all"
    if found.max_difference is not None:
        landed += f"; masked and shrunk outputs differ by {found.max_difference:.1e} at most"
    console = Console(stderr=True)
    console.print(found.table())
    multiplied = [f"block-sparse layers: {count} {how}" for how, count in found.multiplied.items()]
    folder = [f"saved in {saved}"] if saved is not None else []
    for line in (*multiplied, *found.latency_lines(), landed, *folder):
        console.print(line)
