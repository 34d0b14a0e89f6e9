"""Tables of times for another engine, or another machine: ``python -m hf_mlprune.exporting.table MODEL``.

A run with ``speedup=`` or ``latency=`` measures in torch on the machine that it trains on. For ONNX Runtime
or OpenVINO, or for the machine that will serve, make a table there, and give it as ``latency_table=``.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModel

from ..encoders import Encoder, inspect_encoder, tokens_of
from ..families import read_config
from ..files import write_json
from ..installed import check_installed
from ..latency_table import table_to_json
from ..part_times import FFN_POINTS, Opener, measure_times
from ..timing import using_threads
from ..values import check_whole_number
from . import export, source

#: Engines that a table can be measured in.
NAMES = ("torch", "onnx", "openvino")


def measure_table(
    model: nn.Module, *, engine: str, batch: int, length: int, threads: int, ffn_points: int = FFN_POINTS
) -> dict[str, Any]:
    """Time the parts of an encoder in an engine on this machine.

    Args:
        model: an encoder of a known family, or a model of one; only its sizes matter.
        engine: one of :data:`NAMES`.
        batch: sequences, or images.
        length: tokens of each.
        threads: of the engine.
        ffn_points: at most so many widths of the FFN are measured; widths between them are not landed on.

    Returns:
        JSON form, as ``latency_table=`` reads it from a file.

    Raises:
        ValueError: the engine is not known, or a number is below 1; see
            :func:`~hf_mlprune.part_times.measure_times`.
        ImportError: it is not installed.
    """
    if engine not in NAMES:
        raise ValueError(f"engine: expected one of {NAMES}, got {engine!r}")
    counts = {"batch": batch, "length": length, "threads": threads, "ffn_points": ffn_points}
    for name, value in counts.items():
        check_whole_number(name, value, at_least=1)
    encoder = inspect_encoder(model)
    with using_threads(threads), tempfile.TemporaryDirectory() as folder:
        make = None
        if engine != "torch":
            check_installed(export.ENGINES[engine].packages, extra="serve", needed_by=f"engine {engine}")
            make = partial(in_engine, encoder, engine, threads, Path(folder))
        tables = measure_times(encoder, batch, length, make, ffn_points)
    return table_to_json(
        tables,
        encoder,
        engine=engine,
        batch=batch,
        length=tokens_of(encoder) or length,
        threads=threads,
    )


def in_engine(
    encoder: Encoder,
    engine: str,
    threads: int,
    folder: Path,
    network: nn.Module,
    inputs: Mapping[str, Tensor],
) -> Opener:
    """Write an encoder for an engine: what opens it there, as something to call."""
    names = tuple(inputs)
    thin: Any = network.float().cpu()
    made = source.Source(thin, thin, encoder, names, None)
    target = folder / str(len(list(folder.iterdir())))
    target.mkdir()
    export.ENGINES[engine].write(made, target)

    def opened() -> Callable[[], object]:
        run = export.ENGINES[engine].load(target, threads)
        return lambda: run(dict(inputs))

    return opened


def main() -> None:
    """Measure a table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder or hub name of a model of the family and sizes")
    parser.add_argument("--engine", choices=NAMES, required=True)
    parser.add_argument("--batch", type=int, default=1, help="sequences, or images (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens of each (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of the engine (default: %(default)s)"
    )
    parser.add_argument(
        "--points",
        type=int,
        default=FFN_POINTS,
        help="at most so many widths of the FFN (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        read_config(args.model, "model: expected a folder")
        found = measure_table(
            AutoModel.from_pretrained(args.model),
            engine=args.engine,
            batch=args.batch,
            length=args.length,
            threads=args.threads,
            ffn_points=args.points,
        )
        write_json(args.out, found)
    except (ValueError, TypeError, ImportError, OSError) as error:
        parser.error(str(error))
    Console().print(f"{args.out}: {args.engine}, {args.batch} x {args.length} tokens")


if __name__ == "__main__":
    main()
