"""A pruned model against its dense form, in one engine or several, called in turn."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ..encoders import most_tokens, tokens_of
from ..installed import check_installed
from ..reports.latency import device_name
from ..timing import interleave, using_threads
from ..values import check_whole_number
from .engine import Runner, reference
from .export import ENGINES
from .onnx_int8 import RECIPES
from .proof import proof_batches
from .source import Source, read_source
from .stock import stock_model

#: Engines that a model is measured in.
NAMES = ("torch", "onnx", "openvino")
DENSE = "dense in torch"


@dataclass(frozen=True)
class BenchRow:
    """One way of serving at one shape.

    Attributes:
        batch: rows.
        length: tokens of each.
        way: model and engine.
        milliseconds: median of a forward pass.
        speedup: over the dense model in torch: median over rounds.
    """

    batch: int
    length: int
    way: str
    milliseconds: float
    speedup: float


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        model: folder or name.
        against: the dense model.
        processor: what it calls itself.
        threads: of every engine.
        rows: by shape and way.
    """

    model: str
    against: str
    processor: str
    threads: int
    rows: tuple[BenchRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return dataclasses.asdict(self)

    def table(self) -> Table:
        """For a terminal."""
        table = Table(
            "batch x tokens", "", "ms", "speed", caption=f"{self.processor}, threads: {self.threads}"
        )
        for row in self.rows:
            shape = f"{row.batch} x {row.length}"
            table.add_row(shape, row.way, f"{row.milliseconds:.2f}", f"{row.speedup:.2f}x")
        return table


def bench(
    folder: str,
    *,
    against: str | None = None,
    engines: Sequence[str] = ("torch",),
    shapes: Sequence[str] = ("1x128",),
    threads: int | None = None,
    int8: bool = False,
    rounds: int = 30,
    budget_seconds: float = 20.0,
) -> Bench:
    """Measure a pruned model.

    Args:
        folder: of the model, or its name on the hub.
        against: folder or name of a dense model; the pruned one's own dense form if left out.
        engines: of :data:`NAMES`.
        shapes: rows and tokens, as ``"1x128"``.
        threads: of every engine; torch's number if left out.
        int8: also the pruned model in int8, in engines that need no data for it.
        rounds: at most this many rounds per shape.
        budget_seconds: no new round is begun after this long.

    Raises:
        ValueError: an engine or shape that is none, int8 without an engine that has it, or a dense model of
            other inputs.
        ImportError: an engine is not installed.
    """
    sizes = [read_shape(shape) for shape in shapes]
    for name in engines:
        if name not in NAMES:
            raise ValueError(f"engine: expected one of {NAMES}, got {name!r}")
        if name != "torch":
            check_installed(ENGINES[name].packages, extra="serve", needed_by=f"engine {name}")
    with_recipes = [name for name in NAMES if (name, "dynamic") in RECIPES]
    if int8 and set(engines).isdisjoint(with_recipes):
        raise ValueError(
            f"int8: expected an engine of {with_recipes}, whose int8 needs no data, got {list(engines)}"
        )
    pruned = read_source(folder, None)
    dense = pruned.with_model(stock_model(pruned.model, smallest=False))
    if against is not None:
        dense = read_source(against, None)
        if not set(pruned.names) <= set(dense.names):
            raise ValueError(f"against: expected a model that reads {pruned.names}, got one of {dense.names}")
        dense = dataclasses.replace(dense, names=pruned.names)
    if threads is not None:
        check_whole_number("threads", threads, at_least=1)
    count = threads or torch.get_num_threads()
    with using_threads(count), tempfile.TemporaryDirectory() as work:
        ways: dict[str, Runner] = {DENSE: reference(dense)}
        for name in engines:
            ways |= _ways(name, pruned, dense, Path(work), count, int8=int8)
        rows = [row for size in sizes for row in _measure(pruned, dense, ways, size, rounds, budget_seconds)]
    processor = device_name(torch.device("cpu"))
    return Bench(folder, against or "its dense form", processor, count, tuple(rows))


def read_shape(text: str) -> tuple[int, int]:
    """Rows and tokens of ``"1x128"``.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"\s*([1-9]\d*)\s*x\s*([1-9]\d*)\s*", text)
    if match is None:
        raise ValueError(f"shape: expected batch x tokens, such as 1x128, got {text!r}")
    return int(match[1]), int(match[2])


def _ways(
    name: str, pruned: Source, dense: Source, work: Path, threads: int, *, int8: bool
) -> dict[str, Runner]:
    """Both models in one engine."""
    if name == "torch":
        return {"pruned in torch": reference(pruned)}
    ways: dict[str, Runner] = {}
    for which, source in (("dense", dense), ("pruned", pruned)):
        folder = work / f"{which}_{name}"
        folder.mkdir()
        ENGINES[name].write(source, folder)
        ways[f"{which} in {name}"] = ENGINES[name].load(folder, threads)
    if int8 and (name, "dynamic") in RECIPES:
        folder = work / f"int8_{name}"
        folder.mkdir()
        RECIPES[name, "dynamic"](proof_batches(pruned))(work / f"pruned_{name}", folder, ())
        ways[f"pruned int8 in {name}"] = ENGINES[name].load(folder, threads)
    return ways


def _measure(
    source: Source,
    dense: Source,
    ways: dict[str, Runner],
    size: tuple[int, int],
    rounds: int,
    budget_seconds: float,
) -> list[BenchRow]:
    rows, length = size
    image = tokens_of(source.encoder)
    if image is None:
        most = min(most_tokens(each.encoder) for each in (source, dense))
        if length > most:
            raise ValueError(f"shape: expected at most {most} tokens, which the model reads, got {length}")
    inputs = source.full_batch(rows, length)
    if "input_ids" in inputs:
        inputs["input_ids"] %= min(each.model.config.vocab_size for each in (source, dense))
    calls = [partial(way, inputs) for way in ways.values()]
    timing = interleave(calls, rounds=rounds, budget_seconds=budget_seconds)
    return [
        BenchRow(rows, image or length, name, 1e3 * seconds, ratio)
        for name, seconds, ratio in zip(ways, timing.seconds, timing.ratios, strict=True)
    ]
