"""What pruning and int8 give in the engines that serve: torch, ONNX Runtime, OpenVINO.

Shapes of MiniLM-L6, BERT-base and ModernBERT-base with random weights, on which speed does not depend. Every
way is called in turn in one process, wall time on so many threads; medians.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, ModernBertConfig, PreTrainedModel

from common import RESULTS, write_result
from hf_mlprune import PruningConfig, attach, export, shrink
from hf_mlprune.exporting.engine import Runner, reference, torch_threads
from hf_mlprune.exporting.export import ENGINES
from hf_mlprune.exporting.source import read_source
from hf_mlprune.state import pruning_state
from hf_mlprune.timing import interleave

SHAPES: dict[str, Any] = {
    "MiniLM-L6": lambda: BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    ),
    "BERT-base": BertConfig,
    "ModernBERT-base": ModernBertConfig,
}
DENSITY = 0.2
KINDS = {"heads and rows": ("heads", "rows"), "blocks": ("blocks",)}
#: Way -> engine, int8 recipe.
WAYS = {
    "onnx": ("onnx", False),
    "onnx int8": ("onnx", "dynamic"),
    "openvino": ("openvino", False),
    "openvino int8": ("openvino", "static"),
}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--inputs", nargs="+", default=["1x128", "32x128"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--seconds", type=float, default=40.0, help="no more rounds after, per model and input"
    )
    parser.add_argument("--result", default="serving_1")
    parser.add_argument(
        "--memory", nargs=2, help="used by itself: folder and engine whose peak memory is printed"
    )
    return parser.parse_args()


def pruned(dense: PreTrainedModel, levels: tuple[str, ...]) -> PreTrainedModel:
    """A copy of which random units of one level or two are left, as many as the density allows."""
    model = copy.deepcopy(dense)
    attach(model, PruningConfig.create(DENSITY, levels=levels))
    generator = torch.Generator().manual_seed(0)
    state = pruning_state(model)
    for index in range(model.config.num_hidden_layers):
        for gate in state.gates(index).values():
            keep = torch.zeros(gate.units, dtype=torch.bool)
            keep[torch.randperm(gate.units, generator=generator)[: max(1, round(DENSITY * gate.units))]] = (
                True
            )
            gate.set_keep(keep)
    with contextlib.redirect_stderr(io.StringIO()):
        shrink(model)
    return model.eval()


def calibration(model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """Batches for static int8."""
    source = read_source(model, None)
    return [dict(source.batch(4, 64)) for _ in range(4)]


def export_ways(
    name: str, model: PreTrainedModel, work: Path, threads: int
) -> dict[str, tuple[str, Path, int]]:
    """Every export of a model: way -> engine, folder, bytes."""
    ways = dict(WAYS)
    if name == "blocks":
        ways |= {"onnx blocks": ("onnx-blocks", False), "onnx blocks int8": ("onnx-blocks", "dynamic")}
    found = {}
    for way, (engine, int8) in ways.items():
        folder = work / name / way.replace(" ", "_")
        settings = {"data": calibration(model)} if int8 == "static" else {}
        said = export(model, folder, engine, int8=int8, latency=(), threads=threads, **settings)
        found[way] = (engine, folder, sum(said.files.values()))
    return found


def peak_memory(folder: Path, engine: str) -> int:
    """Bytes of a fresh process that loads an export and runs it once, torch included."""
    command = [sys.executable, __file__, "--memory", str(folder), engine]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def print_memory(folder: Path, engine: str) -> None:
    """Load, run 1x128, print the peak."""
    ids = torch.randint(5, 1000, (1, 128))
    inputs = {"input_ids": ids, "attention_mask": ids.clamp(max=1), "token_type_ids": ids.clamp(max=0)}
    ENGINES[engine].load(folder, 1)(inputs)
    # Not `getrusage`: its peak is that of the process it was started from, if that was higher.
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    print(1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")))


def measure(args: argparse.Namespace, name: str, work: Path) -> list[dict[str, Any]]:
    """All rows of one model."""
    torch.manual_seed(0)
    config = SHAPES[name]()
    config.num_labels = 5
    dense = AutoModelForSequenceClassification.from_config(config).eval()
    models = {"dense": dense, **{kind: pruned(dense, levels) for kind, levels in KINDS.items()}}
    source = read_source(dense, None)
    runners: dict[tuple[str, str], Runner] = {}
    sizes: dict[tuple[str, str], tuple[int, int]] = {}
    for kind, model in models.items():
        runners[kind, "torch"] = reference(read_source(model, None))
        for way, (engine, folder, files) in export_ways(kind, model, work, args.threads).items():
            sizes[kind, way] = (files, peak_memory(folder, engine))
            runners[kind, way] = ENGINES[engine].load(folder, args.threads)
    rows = []
    for size in args.inputs:
        batch, length = map(int, size.split("x"))
        inputs = source.batch(batch, length)
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        calls = [partial(run, inputs) for run in runners.values()]
        with torch_threads(args.threads):
            timing = interleave(calls, rounds=args.rounds, warmup=1, budget_seconds=args.seconds)
        for key, seconds, over_dense in zip(runners, timing.seconds, timing.ratios, strict=True):
            row = {"model": name, "batch": batch, "length": length, "kind": key[0], "way": key[1]}
            row |= {"seconds": seconds, "over_dense_torch": over_dense, "rounds": timing.rounds}
            if key in sizes:
                row |= {"file_bytes": sizes[key][0], "peak_bytes": sizes[key][1]}
            rows.append(row)
            print(f"{name} {size} {key[0]}, {key[1]}: {seconds * 1e3:.1f} ms, {over_dense:.2f}x", flush=True)
    return rows


def best(rows: list[dict[str, Any]], *, dense: bool) -> dict[str, Any]:
    """The fastest int8 row of a model and size."""
    own = [row for row in rows if "int8" in row["way"] and (row["kind"] == "dense") is dense]
    return min(own, key=lambda row: row["seconds"])


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pruned int8 in its best engine over dense int8 in its best, and over dense torch."""
    found = []
    for name, batch, length in dict.fromkeys((row["model"], row["batch"], row["length"]) for row in rows):
        own = [r for r in rows if (r["model"], r["batch"], r["length"]) == (name, batch, length)]
        pruned_row, dense_row = best(own, dense=False), best(own, dense=True)
        found.append(
            {
                "model": name,
                "batch": batch,
                "length": length,
                "pruned": f"{pruned_row['kind']}, {pruned_row['way']}",
                "dense": dense_row["way"],
                "over_dense_int8": dense_row["seconds"] / pruned_row["seconds"],
                "over_dense_torch": pruned_row["over_dense_torch"],
            }
        )
    return found


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars: times as fast as dense torch."""
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((row["model"], row["batch"], row["length"]) for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 4.5), squeeze=False)
    for axis, (name, batch, length) in zip(axes[0], panels, strict=True):
        own = [r for r in rows if (r["model"], r["batch"], r["length"]) == (name, batch, length)]
        labels = [f"{row['kind']}, {row['way']}" for row in own]
        axis.barh(labels, [row["over_dense_torch"] for row in own])
        axis.set_title(f"{name}, {batch} x {length}", fontsize=8)
        axis.tick_params(labelsize=6)
        axis.invert_yaxis()
    figure.supxlabel("times as fast as dense torch")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print, write."""
    args = parse_arguments()
    if args.memory:
        print_memory(Path(args.memory[0]), args.memory[1])
        return
    # What the machine's entry of the result says.
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as work:
            rows += measure(args, name, Path(work))
        summary = summarize(rows)
        path = write_result({"density": DENSITY, "summary": summary, "results": rows}, args.result)
    print(json.dumps(summary, indent=2))
    print(f"written: {path}")
    plot(rows, RESULTS / f"{args.result}.png")


if __name__ == "__main__":
    main()
