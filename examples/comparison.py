"""The table that ends an example: figures of the dense and the pruned model side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from hf_mlprune import report
from hf_mlprune.reports.latency import device_name
from hf_mlprune.timing import interleave

Figures = Mapping[str, Sequence[float]]


def encoder_weights(models: Sequence[nn.Module]) -> list[int]:
    """Weights of each model's encoder that pruning counts."""
    return [sum(layer.weights[0] for layer in report(model).layers) for model in models]


def per_second(calls: Sequence[Callable[[], object]], count: int) -> list[float]:
    """How many of `count` things at a time each call does in a second; the calls are timed in turn."""
    return [count / seconds for seconds in interleave(calls, rounds=30, budget_seconds=30).seconds]


def rows_per_second(models: Sequence[nn.Module], length: int) -> list[float]:
    """Rows of that many tokens that each model reads in a second, 32 at a time."""
    tokens = torch.zeros(32, length, dtype=torch.long)
    with torch.inference_mode():
        return per_second([partial(model.eval(), input_ids=tokens) for model in models], 32)


def show(figures: Figures, device: torch.device, result: Path | None) -> None:
    """Print the figures, and write them as JSON.

    Args:
        figures: name -> of the dense model, of the pruned one.
        device: that they were measured on.
        result: file, if wanted.
    """
    table = Table("", "dense", "pruned", caption=f"{device_name(device)}, threads: {torch.get_num_threads()}")
    for name, values in figures.items():
        table.add_row(name, *(f"{value:,}" if isinstance(value, int) else f"{value:.1f}" for value in values))
    Console(width=100).print(table)
    if result is not None:
        how = {"command": command(), "device": device_name(device), "threads": torch.get_num_threads()}
        result.write_text(json.dumps({**how, "figures": figures}, indent=2), encoding="utf-8")


def command() -> str:
    """The command line; of absolute paths the last two names: where they lie here is nobody's concern."""
    words = ["/".join(Path(word).parts[-2:]) if Path(word).is_absolute() else word for word in sys.argv]
    return " ".join(["python", *words])
