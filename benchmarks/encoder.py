"""Whole encoders: dense torch, pruned by heads and rows, by blocks, and by both, all at the same density.

The Amdahl bound is computed in the same run: dense time / (time of the pruned model without its linears +
time of the dense model's linears x density). Eager is compared with eager, compiled with compiled; for
reference the dense model in ONNX Runtime and OpenVINO, where they are installed. Weights are random.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BertConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)

import engines
from common import RESULTS, write_result
from hf_mlprune import kernels, report
from hf_mlprune.budgets.weights import ROW_GROUP
from hf_mlprune.encoders import inspect_encoder
from hf_mlprune.families import FAMILIES, plain_config
from hf_mlprune.modeling.block_sparse import BlockSparseLinear
from hf_mlprune.modeling.pruned import separate_activation
from hf_mlprune.modeling.structure import LayerStructure, Structure, grid_shape
from hf_mlprune.timing import interleave
from kernel import random_matrix

MODELS = {
    "bert-base": BertConfig(),
    "minilm-l6": BertConfig(
        hidden_size=384, num_attention_heads=12, num_hidden_layers=6, intermediate_size=1536
    ),
    "roberta-base": RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
    "modernbert-base": ModernBertConfig(),
}
#: Share of heads and FC1 rows, share of blocks of what is left; density 0.2 each.
KINDS = {"heads and rows": (0.2, 1.0), "blocks": (1.0, 0.2), "both": (0.5, 0.4)}
BLOCK_SHAPE = (16, 16)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["bert-base", "minilm-l6"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--inputs", nargs="+", default=["1x32", "1x128", "1x384", "32x32", "32x128", "32x384"]
    )
    parser.add_argument("--layers", type=int, default=2, help="layers of models that run 32 sequences")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--result", help="name of the file of results (default: encoder_<threads>)")
    parser.add_argument("--profile", action="store_true", help="which operations take the time, instead")
    parser.add_argument("--compile", action="store_true", help="compiled models, too (minutes)")
    parser.add_argument("--engines", action="store_true", help="dense models in other engines, too")
    return parser.parse_args()


def pruned_model(config: PreTrainedConfig, kind: str) -> PreTrainedModel:
    """A model with evenly spread heads and rows, and blocks at random places."""
    kept, block_share = KINDS[kind]
    family = next(family for family in FAMILIES if family.name == config.model_type)
    dense = family.config.dense_layer(config)
    full = LayerStructure.full(dense).kept

    def spread(indices: tuple[int, ...], group: int) -> tuple[int, ...]:
        count = max(1, round(kept * len(indices) / group)) * group
        return tuple(indices[i * len(indices) // count] for i in range(count))

    kept_units = {**full, "heads": spread(full["heads"], 1), "fc1": spread(full["fc1"], ROW_GROUP)}
    layer = LayerStructure(kept_units, blocks={})
    if block_share < 1:
        grids = {name: grid_shape(layer.shape(name, dense), BLOCK_SHAPE) for name in dense.layout.matrices}
        counts = {name: round(block_share * rows * columns) for name, (rows, columns) in grids.items()}
        layer = dataclasses.replace(layer, blocks=counts)
    structure = Structure((layer,) * config.num_hidden_layers, BLOCK_SHAPE if layer.blocks else None)
    data = {**plain_config(config), "structure": structure.to_dict()}
    model = family.heads[0].pruned(family.config.from_dict(data))
    for linear in model.modules():
        if isinstance(linear, BlockSparseLinear):
            weight = torch.randn(linear.out_features, linear.in_features) * 0.02
            linear.set_matrix(random_matrix(weight, block_share, BLOCK_SHAPE))
    return model.eval()


class Constant(nn.Module):
    """A linear without its work: an output that was made before."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.made: dict[tuple[int, ...], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """``(..., features)``, always the same."""
        shape = (*x.shape[:-1], self.features)
        if shape not in self.made:
            self.made[shape] = torch.randn(shape)
        return self.made[shape]


def without_linears(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose encoder linears cost nothing."""
    model = copy.deepcopy(model)
    encoder = inspect_encoder(model)
    layout = encoder.dense.layout
    for layer in encoder.layers:
        separate_activation(layer.module, layout)
        for name, linear in layer.linears.items():
            features = getattr(linear, "scatter_size", None) or linear.out_features
            layer.module.set_submodule(layout.matrices[name].path, Constant(features))
    return model


def time_calls(calls: engines.Calls, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Seconds and speedup over the first, of variants that are run in turn."""
    clock = time.process_time if args.threads == 1 else time.perf_counter
    with torch.inference_mode():
        timing = interleave(
            list(calls.values()), rounds=args.rounds, warmup=2, clock=clock, budget_seconds=30
        )
    return dict(zip(calls, zip(timing.seconds, timing.ratios, strict=True), strict=True))


def measure(name: str, batch: int, length: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All variants of one model and input."""
    config = copy.deepcopy(MODELS[name])
    if batch > 1:
        config.num_hidden_layers = min(config.num_hidden_layers, args.layers)
    dense = AutoModel.from_config(config).eval()
    tokens = torch.randint(0, config.vocab_size, (batch, length))
    models: dict[str, nn.Module] = {"dense": dense, "dense without linears": without_linears(dense)}
    density = {}
    for kind in args.kinds:
        models[kind] = pruned_model(config, kind)
        density[kind] = report(models[kind]).density
        models[f"{kind} without linears"] = without_linears(models[kind])
    if args.compile:
        for kind in ("dense", *args.kinds):
            models[f"{kind} compiled"] = torch.compile(models[kind])
    calls: engines.Calls = {
        kind: lambda model=model: model(input_ids=tokens) for kind, model in models.items()
    }
    timed = time_calls(calls, args)
    if args.engines:
        # By themselves: what they leave in the caches would be charged to their neighbours.
        others = {"dense": calls["dense"], **engines.whole_model(dense, tokens)}
        timed |= {kind: found for kind, found in time_calls(others, args).items() if kind != "dense"}
    seconds = {variant: found[0] for variant, found in timed.items()}
    speedups = {variant: found[1] for variant, found in timed.items()}
    shared = {"model": name, "batch": batch, "length": length, "layers": config.num_hidden_layers}
    rows = []
    for variant in timed:
        row = {**shared, "variant": variant, "seconds": seconds[variant], "speedup": speedups[variant]}
        if variant in density:
            linears = seconds["dense"] - seconds["dense without linears"]
            bound = seconds["dense"] / (seconds[f"{variant} without linears"] + linears * density[variant])
            row |= {
                "density": density[variant],
                "amdahl_bound": bound,
                "of_bound": speedups[variant] / bound,
                "multiplied": kernels.explain(models[variant]),
            }
        if variant.endswith(" compiled"):
            row["speedup_over_compiled_dense"] = seconds["dense compiled"] / seconds[variant]
        rows.append(row)
    return rows


def profile_operations(name: str, batch: int, length: int, args: argparse.Namespace) -> dict[str, Any]:
    """Shares of the operations in the time of a model pruned by both (torch's profiler)."""
    config = copy.deepcopy(MODELS[name])
    if batch > 1:
        config.num_hidden_layers = min(config.num_hidden_layers, args.layers)
    model = pruned_model(config, "both")
    tokens = torch.randint(0, config.vocab_size, (batch, length))
    with torch.inference_mode():
        for _ in range(3):
            model(input_ids=tokens)
        with torch.profiler.profile() as profile:
            for _ in range(args.rounds):
                model(input_ids=tokens)
    events = profile.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    largest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:8]
    shares = {event.key: round(event.self_cpu_time_total / total, 3) for event in largest}
    return {"model": name, "batch": batch, "length": length, "shares": shares}


def plot(rows: list[dict[str, Any]], args: argparse.Namespace, name: str) -> None:
    """Speedup of each kind of pruning over dense torch, and its bound, one panel per model."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(args.models), figsize=(5.5 * len(args.models), 4.2), squeeze=False)
    places = torch.arange(len(args.inputs))
    width = 0.8 / len(args.kinds)
    for axis, model in zip(axes.flat, args.models, strict=True):
        for number, kind in enumerate(args.kinds):
            own = [row for row in rows if row["model"] == model and row["variant"] == kind]
            middle = places + (number - (len(args.kinds) - 1) / 2) * width
            axis.bar(middle, [row["speedup"] for row in own], width, label=kind)
            axis.scatter(middle, [row["amdahl_bound"] for row in own], marker="_", color="black", zorder=2)
        axis.set(title=model, ylabel="speedup over dense torch")
        axis.set_xticks(places.tolist(), args.inputs)
    axes[0, 0].scatter([], [], marker="_", color="black", label="Amdahl bound")
    axes[0, 0].legend()
    figure.suptitle(f"density 0.2, threads: {args.threads} (batch x tokens)")
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=110)


def main() -> None:
    """Measure every model and input."""
    args = parse_arguments()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    if args.profile:
        shares = [
            profile_operations(name, *map(int, size.split("x")), args)
            for name in args.models
            for size in args.inputs
        ]
        print(json.dumps(shares, indent=2))
        print(f"written: {write_result({'results': shares}, name='encoder_profile')}")
        return
    rows = []
    for name in args.models:
        for size in args.inputs:
            batch, length = map(int, size.split("x"))
            found = measure(name, batch, length, args)
            for row in found:
                note = f" of bound {row['of_bound']:.2f}" if "of_bound" in row else ""
                took = f"{row['seconds'] * 1e3:.1f} ms, {row['speedup']:.2f}x"
                print(f"{name} {size} {row['variant']}: {took}{note}")
            rows += found
    settings = {"block_shape": BLOCK_SHAPE, "instruction_set": kernels.instruction_set()}
    name = args.result or f"encoder_{args.threads}"
    print(f"written: {write_result({'settings': settings, 'results': rows}, name=name)}")
    plot(rows, args, name)


if __name__ == "__main__":
    main()
