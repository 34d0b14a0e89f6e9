"""A pruned model's folder, read back: report, what is left unit by unit, and how it was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils._paths import DEFAULT_IGNORE_PATTERNS, filter_repo_objects
from rich.table import Table
from transformers import AutoModel

from ..encoders import Encoder
from ..families import read_config
from ..files import find_file
from ..modeling.block_sparse import BlockSparseLinear
from ..modeling.cards import named_card, pushed_card
from ..modeling.pretrained import REPORT_FILE
from ..modeling.structure import grid_shape
from .counting import report, reported_encoders
from .report import Report

TRAINER_STATE = "trainer_state.json"
CARD = "README.md"
#: What a job did, and its arguments: in its folder.
JOB = "job.json"


@dataclass(frozen=True)
class LayerMap:
    """What is left of one layer, unit by unit.

    Attributes:
        encoder: path of its encoder in the model; empty if it is the model.
        index: of the layer in its encoder.
        kept: group -> for each unit of the dense layer, whether it is left.
        blocks: matrix -> for each block of what heads and rows left, row by row, whether it is stored.
    """

    encoder: str
    index: int
    kept: dict[str, list[bool]]
    blocks: dict[str, list[list[bool]]]


@dataclass(frozen=True)
class PrunedFolder:
    """A folder, or a model of the hub.

    Attributes:
        name: as it was given.
        report: of the run that pruned it; without one what can be counted.
        layers: what is left.
        history: entries of Trainer's log, if the folder has it.
        file_bytes: of the safetensors files.
        metrics: figure -> of the dense and of the pruned model, if the command wrote the folder.
    """

    name: str
    report: Report
    layers: tuple[LayerMap, ...]
    history: tuple[dict[str, Any], ...]
    file_bytes: int | None
    metrics: dict[str, tuple[float, float]]

    def lines(self) -> list[str]:
        """What there is to say besides the table."""
        found = self.report
        lines = [found.run_line] if found.run_line else []
        lines += [
            f"parameters: {found.parameters[0]:,} of {found.parameters[1]:,}; of these are embeddings, which "
            f"are not pruned: {found.embedding_parameters:,}"
        ]
        if self.file_bytes is not None:
            lines.append(f"on disk: {self.file_bytes / 1e6:.1f} MB")
        for name, (dense, pruned) in self.metrics.items():
            lines.append(f"{name}: {pruned:.1f}, dense {dense:.1f}")
        return lines + found.latency_lines()


def read_folder(name: str) -> PrunedFolder:
    """Read a folder or a model of the hub.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no pruned model, or a damaged one.
    """
    folder = Path(name)
    if (folder.is_absolute() or name.startswith((".", "~"))) and not folder.is_dir():
        raise FileNotFoundError(f"expected the folder of a model, got {name}, where nothing is")
    config = read_config(name, "expected the folder of a model")
    if not isinstance(getattr(config, "structure", None), dict):
        raise ValueError(f"expected a pruned model, got {name}, whose config.json has no structure")
    model = AutoModel.from_pretrained(name)
    stored = read_stored(name, REPORT_FILE)
    found = report(model) if stored is None else Report.from_dict(stored)
    history = (read_stored(name, TRAINER_STATE) or {}).get("log_history", [])
    files = list(folder.glob("*.safetensors")) if folder.is_dir() else []
    return PrunedFolder(
        name=name,
        report=found,
        layers=tuple(
            _map(encoder, i) for encoder in reported_encoders(model) for i in range(len(encoder.layers))
        ),
        history=tuple(history),
        file_bytes=sum(file.stat().st_size for file in files) or None,
        metrics=_metrics(read_stored(name, JOB) or {}),
    )


def read_stored(name: str, file: str) -> dict[str, Any] | None:
    """A JSON file of a folder or of the hub; ``None`` if there is none."""
    path = find_file(name, file)
    if path is None:
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: expected a JSON object ({error}); restore it, or delete it") from error


def _metrics(job: dict[str, Any]) -> dict[str, tuple[float, float]]:
    dense, pruned = job.get("dense_metrics", {}), job.get("pruned_metrics", {})
    return {name: (dense[name], pruned[name]) for name in pruned if name in dense}


def _map(encoder: Encoder, index: int) -> LayerMap:
    layer = encoder.layers[index]
    kept = {}
    for group, units in encoder.dense.units.items():
        left = set(layer.structure.kept[group])
        kept[group] = [unit in left for unit in range(units)]
    blocks = {}
    for name, linear in layer.linears.items():
        if isinstance(linear, BlockSparseLinear):
            rows, columns = grid_shape((linear.out_features, linear.in_features), linear.block_shape)
            grid = torch.zeros(rows, columns, dtype=torch.bool)
            grid[linear.matrix().places()] = True
            blocks[name] = grid.tolist()
    return LayerMap(encoder.path, index, kept, blocks)


#: Row of a comparison -> its figure.
FIGURES: dict[str, Callable[[PrunedFolder], float | None]] = {
    "weights of the encoder": lambda found: found.report.density,
    "parameters": lambda found: found.report.parameters[0],
    "bytes on disk": lambda found: found.file_bytes,
    "multiply-adds": lambda found: found.report.multiply_adds[0],
    "speed over dense, as measured": lambda found: (
        found.report.latency[0].speedup if found.report.latency else None
    ),
}


def compare(first: str, second: str) -> dict[str, Any]:
    """Two pruned models side by side: figures, and the share of weights left per layer."""
    pair = [read_folder(name) for name in (first, second)]
    shares = [[layer.weights[0] / layer.weights[1] for layer in found.report.layers] for found in pair]
    metrics = [name for name in pair[0].metrics if name in pair[1].metrics]
    return {
        "models": [found.name for found in pair],
        "figures": {
            **{name: [found.metrics[name][1] for found in pair] for name in metrics},
            **{name: [figure(found) for found in pair] for name, figure in FIGURES.items()},
        },
        "layers": [
            [share[i] if i < len(share) else None for share in shares] for i in range(max(map(len, shares)))
        ],
    }


def comparison_table(found: dict[str, Any]) -> Table:
    """What :func:`compare` found, for a terminal."""
    table = Table("", *found["models"])

    def cell(name: str, value: Any) -> str:
        if value is None:
            return "-"
        if name.startswith("weights"):
            return f"{value:.1%}"
        if name.startswith("speed"):
            return f"{value:.2f}x"
        return f"{value:,}" if name in FIGURES else f"{value:.1f}"

    for name, values in found["figures"].items():
        table.add_row(name, *(cell(name, value) for value in values))
    for index, values in enumerate(found["layers"]):
        table.add_row(f"weights, layer {index}", *(cell("weights", value) for value in values))
    return table


def push(folder: str, repository: str, *, private: bool) -> str:
    """Upload a folder with a pruned model; what begins with an underscore stays here.

    The card gets the name of the repository. A card there that somebody wrote stays.

    Returns:
        Where it is.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no pruned model, or the name has no owner.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"expected the folder of a model, got {folder}, where nothing is")
    if repository.count("/") != 1:
        raise ValueError(f"expected a name with its owner, such as me/my-model, got {repository!r}")
    read_folder(folder)
    hub = HfApi()
    hub.create_repo(repository, private=private, exist_ok=True)
    paths = [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()]
    left_out = ["_*", "_*/**", JOB, f"*/{JOB}", *DEFAULT_IGNORE_PATTERNS]
    files: dict[str, str | bytes] = {
        name: str(Path(folder) / name)
        for name in filter_repo_objects(sorted(paths), ignore_patterns=left_out)
    }
    for name in [name for name in files if Path(name).name == CARD]:
        text = (Path(folder) / name).read_text(encoding="utf-8")
        text = named_card(text, repository, "" if name == CARD else Path(name).parent.as_posix())
        if name == CARD and hub.file_exists(repository, CARD):
            theirs = Path(hub.hf_hub_download(repository, CARD)).read_text(encoding="utf-8")
            text = pushed_card(theirs, text)
        files[name] = text.encode()
    done = hub.create_commit(
        repository,
        [CommitOperationAdd(name, content) for name, content in files.items()],
        commit_message="Upload a pruned model",
    )
    return str(done.commit_url)
