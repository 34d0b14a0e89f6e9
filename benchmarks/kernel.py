"""How near does the block-sparse product come to time proportional to density?

efficiency = dense torch time x density / block-sparse time: of the operations that layers call, or with
`--layers` of the layers. Every variant of a shape and number of tokens is run in turn: process CPU time at
one thread, wall time at more. For reference: torch's own BSR product, and where they are installed ONNX
Runtime and OpenVINO dense, and dynamic int8 of torch and ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import engines
from common import RESULTS, write_result
from hf_mlprune.kernels import instruction_set
from hf_mlprune.kernels.operation import INSTRUCTION_SETS
from hf_mlprune.modeling.block_sparse import BlockSparseLinear, BlockSparseMatrix
from hf_mlprune.modeling.structure import grid_shape
from hf_mlprune.timing import interleave

Calls = engines.Calls

SHAPES = [(768, 768), (768, 3072), (3072, 768), (384, 384), (384, 1536), (1536, 384)]
TOKENS = [1, 16, 128, 512, 4096]
DENSITIES = [0.5, 0.3, 0.2, 0.1]
REQUIRED = {"mean": 0.95, "least": 0.70, "mean_at_0.1": 0.75}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--block-shape", type=int, nargs=2, default=[16, 16])
    parser.add_argument("--instruction-set", default="", help="avx2 or avx512; the best, if left out")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--densities", type=float, nargs="+", help="others, such as those near 1; no plot")
    parser.add_argument("--bfloat16", action="store_true", help="instead of float32")
    parser.add_argument("--layers", action="store_true", help="nn.Linear against BlockSparseLinear")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--engines", action="store_true", help="other engines, too")
    return parser.parse_args()


def random_matrix(dense: Tensor, density: float, block_shape: tuple[int, int]) -> BlockSparseMatrix:
    """Exactly this share of blocks, at random places."""
    grid = grid_shape((dense.shape[0], dense.shape[1]), block_shape)
    count = grid[0] * grid[1]
    keep = torch.zeros(count, dtype=torch.bool)
    keep[torch.randperm(count)[: round(density * count)]] = True
    return BlockSparseMatrix.from_dense(dense, keep.view(grid), block_shape)


def sparse_operation(x: Tensor, matrix: BlockSparseMatrix, bias: Tensor, name: str) -> Callable[[], object]:
    """What layers call."""
    structure = matrix.crow_indices, matrix.col_indices
    # By default left out, as layers do.
    chosen = (0, INSTRUCTION_SETS[name]) if name else ()
    operation = torch.ops.hf_mlprune.block_sparse_linear.default
    return partial(operation, x, matrix.values, *structure, bias, *chosen)


def sparse_layer(x: Tensor, matrix: BlockSparseMatrix, bias: Tensor) -> Callable[[], object]:
    """A layer of this matrix, with the best instruction set."""
    rows, columns = matrix.shape
    layer = BlockSparseLinear(columns, rows, matrix.block_shape, len(matrix.values)).to(x.dtype)
    layer.set_matrix(matrix)
    with torch.no_grad():
        assert layer.bias is not None
        layer.bias.copy_(bias)
    return partial(layer.eval(), x)


def repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
    """The same call several times: a clock reads to some microseconds only."""

    def run() -> None:
        for _ in range(times):
            call()

    return run


def time_calls(calls: Calls, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Seconds and speedup over the first, of variants that are run in turn."""
    first = next(iter(calls.values()))
    first()
    started = time.perf_counter()
    first()
    times = max(1, round(5e-4 / (time.perf_counter() - started)))
    clock = time.process_time if args.threads == 1 else time.perf_counter
    with torch.no_grad():
        timing = interleave(
            [repeated(call, times) for call in calls.values()],
            rounds=args.rounds, clock=clock, warmup=1, budget_seconds=20,
        )  # fmt: skip
    return {
        name: (seconds / times, ratio)
        for name, seconds, ratio in zip(calls, timing.seconds, timing.ratios, strict=True)
    }


def measure(shape: tuple[int, int], tokens: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All variants of one shape and number of tokens."""
    columns, rows = shape
    dtype = torch.bfloat16 if args.bfloat16 else torch.float32
    x, weight, bias = (torch.randn(size).to(dtype) for size in ((tokens, columns), (rows, columns), (rows,)))
    block_shape = (args.block_shape[0], args.block_shape[1])
    dense: Callable[[], object] = partial(functional.linear, x, weight, bias)
    if args.layers:
        linear = nn.Linear(columns, rows, dtype=dtype).eval()
        linear.load_state_dict({"weight": weight, "bias": bias})
        dense = partial(linear, x)
    blocks = math.prod(grid_shape((rows, columns), block_shape))
    calls: Calls = {"dense": dense}
    others: Calls = {"dense": dense}
    kept = {}
    for density in args.densities or DENSITIES:
        matrix = random_matrix(weight, density, block_shape)
        name = f"sparse_{density}"
        kept[name] = len(matrix.values) / blocks
        if args.layers:
            calls[name] = sparse_layer(x, matrix, bias)
        else:
            calls[name] = sparse_operation(x, matrix, bias, args.instruction_set)
        if args.engines and density == 0.2:
            others["torch_bsr_0.2"] = engines.torch_bsr(x, matrix, bias)
    found = time_calls(calls, args)
    if args.engines:
        # By themselves: what they leave in the caches would be charged to their neighbours.
        others |= engines.dense_engines(x, weight, bias)
        found |= {name: timed for name, timed in time_calls(others, args).items() if name != "dense"}
    result = []
    for name, (seconds, speedup) in found.items():
        row = {"columns": columns, "rows": rows, "tokens": tokens, "variant": name}
        row |= {"seconds": seconds, "speedup": speedup}
        if name in kept:
            row |= {"density": kept[name], "efficiency": speedup * kept[name]}
        result.append(row)
    return result


def geometric_mean(values: list[float]) -> float:
    """Of ratios."""
    return math.exp(sum(map(math.log, values)) / len(values))


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The figures that are required."""
    main = [row["efficiency"] for row in rows if row["variant"] in ("sparse_0.5", "sparse_0.3", "sparse_0.2")]
    low = [row["efficiency"] for row in rows if row["variant"] == "sparse_0.1"]
    return {"mean": geometric_mean(main), "least": min(main), "mean_at_0.1": geometric_mean(low)}


def plot(rows: list[dict[str, Any]], name: str, title: str) -> None:
    """Efficiency over tokens, one panel per shape."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(11, 6), sharex=True, sharey=True)
    for axis, shape in zip(axes.flat, SHAPES, strict=True):
        for density in DENSITIES:
            own = [
                row
                for row in rows
                if (row["columns"], row["rows"]) == shape and row["variant"] == f"sparse_{density}"
            ]
            axis.plot(
                [r["tokens"] for r in own], [r["efficiency"] for r in own], marker="o", label=f"{density}"
            )
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set(title=f"{shape[0]} → {shape[1]}", xscale="log", ylim=(0, None))
    axes[0, 0].legend(title="density")
    figure.supxlabel("tokens")
    figure.supylabel("efficiency: dense time x density / block-sparse time")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=110)


def main() -> None:
    """Measure every cell."""
    args = parse_arguments()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    rows = []
    for shape in SHAPES:
        for tokens in args.tokens:
            found = measure(shape, tokens, args)
            cells = [f"{row['variant']} {row.get('efficiency', row['speedup']):.2f}" for row in found]
            print(shape, tokens, *cells[1:], flush=True)
            rows += found
    chosen = args.instruction_set or instruction_set()
    name = f"kernel_{chosen}_{args.threads}_{'x'.join(map(str, args.block_shape))}"
    name += "_bfloat16" * args.bfloat16 + "_layers" * args.layers
    if args.densities:
        speedups = {
            density: geometric_mean([r["speedup"] for r in rows if r["variant"] == f"sparse_{density}"])
            for density in args.densities
        }
        print(json.dumps(speedups, indent=2))
        print(f"written: {write_result({'speedup': speedups, 'results': rows}, name=f'{name}_crossover')}")
        return
    summary = summarise(rows)
    print(json.dumps(summary, indent=2))
    settings = {"instruction_set": chosen, "block_shape": args.block_shape}
    path = write_result(
        {"settings": settings, "summary": summary, "required": REQUIRED, "results": rows}, name=name
    )
    blocks = "x".join(map(str, args.block_shape))
    plot(rows, name, f"blocks {blocks}, {chosen}, threads: {args.threads}")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
