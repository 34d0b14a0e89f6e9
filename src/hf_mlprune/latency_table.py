"""Tables of measured times, as JSON files: made by one run or machine, counted by in another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .budgets.time import PARTS
from .encoders import Encoder, check_length, inspect_encoder, tokens_of
from .state import PruningState, pruning_states

TABLE_VERSION = 1
#: What a table is for that a run can choose.
OF_RUNS = ("batch", "length", "threads")
#: One hour: more is no time of a forward pass.
MOST_NANOSECONDS = 3.6e12


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
        ValueError: it is no table, or one of other sizes or another shape, or longer than the model takes.
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
    except ValueError as error:
        raise _no_table(file, f"what is no JSON ({error.__class__.__name__})") from error
    if not isinstance(data, dict):
        raise _no_table(file, f"a JSON {type(data).__name__}")
    wanted |= {name: value for name, value in later.items() if data.get(name) is not None}
    for name, value in wanted.items():
        if data.get(name) != value:
            way = (
                f": give {name}={data[name]!r}, or a table for {value}"
                if name in OF_RUNS and name in data
                else ""
            )
            raise ValueError(f"latency_table: expected {name} {value}, got {data.get(name)!r} in {file}{way}")
    times, length = data.get("nanoseconds"), image_tokens or data.get("length")
    if type(length) is not int or length < 1:
        raise _no_table(file, f"length {length!r}")
    check_length(encoder, length)
    found = {name: torch.full((size,), -1, dtype=torch.int64) for name, size in state.tables().items()}
    for name in ("rest_time", *PARTS.values()):
        _fill(found[name], name, times.get(name) if isinstance(times, dict) else None, file)
    found["target_length"].fill_(length)
    if not any(int(found[name][-1]) > int(found[name][0]) for name in PARTS.values()):
        raise _no_table(file, "times that do not grow with what is kept")
    return found


def _fill(table: Tensor, name: str, times: Any, file: Path) -> None:
    """Write the times of one part, by kept units, into a table."""
    if not isinstance(times, dict):
        raise _no_table(file, f"none of {name}")
    widths = {str(width): width for width in range(len(table))}
    for width, nanoseconds in times.items():
        if width not in widths:
            raise _no_table(file, f"a time of {width!r} units in {name}, which has 0 to {len(table) - 1}")
        if type(nanoseconds) not in (int, float) or not 0 <= nanoseconds < MOST_NANOSECONDS:
            raise _no_table(file, f"{nanoseconds!r} nanoseconds in {name}")
        table[widths[width]] = round(nanoseconds)
    if not {"0", str(len(table) - 1)} <= times.keys():
        raise _no_table(file, f"no times of no units and of all {len(table) - 1} of them in {name}")


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


def _no_table(file: Path, came: str) -> ValueError:
    return ValueError(
        f"latency_table: expected a table of times in {file}, got {came}; make one with "
        "`python -m hf_mlprune.exporting.table`"
    )
