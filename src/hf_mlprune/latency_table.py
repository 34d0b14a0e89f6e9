"""Tables of measured times, as JSON files: made by one run or machine, counted by in another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .budgets.time import PARTS
from .encoders import Encoder, inspect_encoder, tokens_of
from .state import PruningState, pruning_states

TABLE_VERSION = 1


def table_to_json(
    tables: Mapping[str, Tensor], encoder: Encoder, *, engine: str, batch: int, length: int, threads: int
) -> dict[str, Any]:
    """JSON form of a table of times; see :func:`read_table`.

    Args:
        tables: what :func:`~hf_mlprune.part_times.measure_times` found.
        encoder: that it is of.
        engine: that they were measured in.
        batch: sequences, or images.
        length: tokens of each.
        threads: of the engine.
    """
    times = {name: {str(i): int(t) for i, t in enumerate(table) if t >= 0} for name, table in tables.items()}
    about = {"engine": engine, "batch": batch, "length": length, "threads": threads}
    about["family"] = encoder.family.name
    sizes = {group: encoder.dense.units[group] for group in PARTS}
    sizes["hidden_size"] = encoder.dense.sizes.hidden_size
    return {"version": TABLE_VERSION, **about, "layers": len(encoder.layers), **sizes, "nanoseconds": times}


def measured_table(model: nn.Module) -> dict[str, Any] | None:
    """JSON form of the times that a run of a model counts by, for other runs; ``None`` if it counts others.

    Args:
        model: with masks of one encoder, whose run has begun.
    """
    (state,) = pruning_states(model)
    if "rest_time" not in state.tables():
        return None
    tables = {name: state.get_buffer(name).cpu() for name in ("rest_time", *PARTS.values())}
    config = state.config
    return table_to_json(
        tables,
        inspect_encoder(model),
        engine="torch",
        batch=config.batch,
        length=int(state.get_buffer("target_length")),
        threads=config.threads or torch.get_num_threads(),
    )


def read_table(file: Path, state: PruningState, encoder: Encoder) -> dict[str, Tensor]:
    """Read a table of times that was measured elsewhere, and the length that it is for.

    Args:
        file: as :func:`table_to_json` has it.
        state: of a run, whose settings say the batch, and length and threads if they do.
        encoder: that the state is of.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no table, or one of other sizes or another shape.
    """
    if not file.is_file():
        came = "a folder" if file.is_dir() else "where nothing is"
        raise FileNotFoundError(f"latency_table: expected a file, got {file}, {came}")
    image_tokens = tokens_of(encoder)
    wanted = _wanted(state, image_tokens)
    # Earlier tables have none of these.
    later = {"hidden_size": state.dense.sizes.hidden_size, "family": encoder.family.name}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        given = {name: data.get(name) for name in (*later, *wanted)}
    except (AttributeError, ValueError) as error:
        raise _no_table(file, error) from error
    wanted |= {name: value for name, value in later.items() if given[name] is not None}
    for name, value in wanted.items():
        if given[name] != value:
            raise ValueError(f"latency_table: expected {name} {value}, got {given[name]!r} in {file}")
    try:
        found = {name: torch.full((size,), -1, dtype=torch.int64) for name, size in state.tables().items()}
        for name in ("rest_time", *PARTS.values()):
            for width, time in data["nanoseconds"][name].items():
                found[name][int(width)] = int(time)
        found["target_length"].fill_(image_tokens or int(data["length"]))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise _no_table(file, error) from error
    if any(int(table[0]) < 0 or int(table[-1]) < 0 for table in found.values()):
        raise ValueError(f"latency_table: expected times of no units and of all of them in {file}, got none")
    return found


def _wanted(state: PruningState, image_tokens: int | None) -> dict[str, Any]:
    """What a table must be of, to count for a run."""
    config = state.config
    wanted: dict[str, Any] = {"version": TABLE_VERSION, "batch": config.batch, "layers": len(state.base)}
    wanted |= {group: state.dense.units[group] for group in PARTS}
    if config.length is not None and image_tokens is None:
        wanted["length"] = config.length
    if config.threads is not None:
        wanted["threads"] = config.threads
    return wanted


def _no_table(file: Path, error: Exception) -> ValueError:
    return ValueError(f"latency_table: expected a table of times in {file}, got {error!r}")
