"""How near a model comes to the speedup that was asked for: table, masks, small model, measured.

Masks are random (`method="random"`): speed depends on widths alone. Run it with nothing else at work.

    python benchmarks/targets.py --model MiniLM-L6=all-MiniLM-L6-v2 --engines torch onnx
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from common import write_result
from hf_mlprune import PruningConfig, advance, attach, collect, report, shrink, start
from hf_mlprune.encoders import inspect_encoder, random_batch, stock_encoder
from hf_mlprune.exporting.table import NAMES, in_engine, measure_table
from hf_mlprune.goals import predicted_speedup
from hf_mlprune.part_times import Opener, in_torch
from hf_mlprune.state import pruning_state
from hf_mlprune.timing import interleave

STEPS = 20
#: Where the weights of an opened model lie in memory is worth some percent: it is opened so many times.
OPENINGS = 5


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="NAME=FOLDER or HUB NAME; only its config is read")
    parser.add_argument("--speedups", nargs="+", type=float, default=[2.0, 3.0, 4.0])
    parser.add_argument("--shapes", nargs="+", default=["1x128", "32x128"])
    parser.add_argument("--engines", nargs="+", choices=NAMES, default=["torch"])
    return parser.parse_args()


def pruned_to(source: str, speedup: float, batch: int, length: int, table: Path) -> tuple[nn.Module, float]:
    """A model of random weights, pruned, and the speedup that the table predicts."""
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.from_pretrained(source))
    settings = {"batch": batch, "length": length, "latency_table": str(table), "method": "random"}
    attach(model, PruningConfig.create(speedup=speedup, **settings))
    start(model, STEPS)
    inputs = random_batch(model, inspect_encoder(model), 2, 16)
    for step in range(1, STEPS + 1):
        model.train()(**inputs).last_hidden_state.square().mean().backward()
        collect(model)
        model.zero_grad()
        advance(model, step)
    predicted = predicted_speedup(pruning_state(model))
    assert predicted is not None
    shrink(model)
    return model.eval(), predicted


def measured_speedup(openers: list[Opener]) -> float:
    """How many times as fast the second model is as the first: the median over instances of both."""
    found = []
    for _ in range(OPENINGS):
        calls = [opened() for opened in openers]
        with torch.inference_mode():
            found.append(interleave(calls, rounds=20, budget_seconds=20).ratios[1])
    return statistics.median(found)


def measured_rows(source: str, engine: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All targets in one engine; one table of times for each shape."""
    rows = []
    for shape in args.shapes:
        batch, length = map(int, shape.split("x"))
        model = AutoModel.from_config(AutoConfig.from_pretrained(source))
        found = measure_table(
            model, engine=engine, batch=batch, length=length, threads=torch.get_num_threads()
        )
        for speedup in args.speedups:
            with tempfile.TemporaryDirectory() as work:
                table = Path(work) / "table.json"
                table.write_text(json.dumps(found))
                model, predicted = pruned_to(source, speedup, batch, length, table)
                encoder = inspect_encoder(model)
                inputs = random_batch(model, encoder, batch, length)
                inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
                pair = [stock_encoder(encoder).eval(), model]
                openers: list[Opener]
                if engine == "torch":
                    inputs.pop("attention_mask")
                    openers = [in_torch(each, inputs) for each in pair]
                else:
                    folder = Path(work) / "engine"
                    folder.mkdir()
                    threads = torch.get_num_threads()
                    openers = [in_engine(encoder, engine, threads, folder, each, inputs) for each in pair]
                measured = measured_speedup(openers)
            rows.append(
                {
                    "engine": engine,
                    "shape": shape,
                    "speedup": speedup,
                    "predicted": round(predicted, 3),
                    "measured": round(measured, 3),
                    "error": round(measured / speedup - 1, 4),
                    "density": round(report(model).density, 4),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Measure all targets, one file of results for each engine."""
    args = parse_arguments()
    name, _, source = args.model.partition("=")
    for engine in args.engines:
        rows = measured_rows(source, engine, args)
        of_engine = "" if engine == "torch" else f"_{engine}"
        write_result({"model": name, "rows": rows}, f"targets_{name}{of_engine}")


if __name__ == "__main__":
    main()
