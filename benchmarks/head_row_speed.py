"""How much of the speedup that their multiply-adds promise do head- and row-pruned models reach?

BERT-base shapes with random weights, 1 x 128 tokens, half of the heads and of the FC1 rows in each layer;
what is left are small dense matrices. Dense and pruned are run in turn, on one thread and on all.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedModel

from common import write_result
from hf_mlprune import report
from hf_mlprune.encoders import inspect_encoder
from hf_mlprune.modeling.bert import PrunedBertConfig, PrunedBertModel
from hf_mlprune.modeling.structure import LayerStructure, Structure
from hf_mlprune.timing import interleave

REQUIRED = 0.85


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=60)
    return parser.parse_args()


def half_structure(config: BertConfig) -> Structure:
    """Every second head and FC1 row of each layer."""
    full = LayerStructure.full(PrunedBertConfig.dense_layer(config)).kept
    layer = LayerStructure({**full, "heads": full["heads"][::2], "fc1": full["fc1"][::2]}, blocks={})
    return Structure((layer,) * config.num_hidden_layers, None)


def linears_of(model: PreTrainedModel) -> list[nn.Linear]:
    """The linears of the encoder layers, in order."""
    found = [linear for layer in inspect_encoder(model).layers for linear in layer.linears.values()]
    return [linear for linear in found if isinstance(linear, nn.Linear)]


def run_linears(linears: list[nn.Linear], batch: int, length: int) -> Callable[[], None]:
    """Calls each linear once, on an input of its width."""
    inputs = {linear.in_features: torch.randn(batch, length, linear.in_features) for linear in linears}

    def run() -> None:
        for linear in linears:
            linear(inputs[linear.in_features])

    return run


def measure(dense: PreTrainedModel, pruned: PreTrainedModel, args: argparse.Namespace) -> dict[str, Any]:
    """Speedups on the present number of threads."""
    tokens = torch.randint(0, dense.config.vocab_size, (args.batch, args.length))
    linears = [linears_of(model) for model in (dense, pruned)]
    promised = sum(one.weight.numel() for one in linears[0]) / sum(one.weight.numel() for one in linears[1])
    with torch.inference_mode():
        whole = interleave(
            [lambda: dense(input_ids=tokens), lambda: pruned(input_ids=tokens)], rounds=args.rounds, warmup=5
        )
        alone = interleave(
            [run_linears(some, args.batch, args.length) for some in linears], rounds=args.rounds, warmup=5
        )
    return {
        "threads": torch.get_num_threads(),
        "rounds": whole.rounds,
        "model_seconds": {"dense": whole.seconds[0], "pruned": whole.seconds[1]},
        "model_speedup": whole.ratios[1],
        "linears_seconds": {"dense": alone.seconds[0], "pruned": alone.seconds[1]},
        "linears_speedup": alone.ratios[1],
        "linears_speedup_promised": promised,
        "measured_of_promised": alone.ratios[1] / promised,
        "required_of_promised": REQUIRED,
    }


def main() -> None:
    """Measure on one thread and on all."""
    args = parse_arguments()
    torch.manual_seed(0)
    config = BertConfig()
    dense = BertModel(config).eval()
    pruned = PrunedBertModel(PrunedBertConfig(structure=half_structure(config).to_dict())).eval()
    rows = []
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        rows.append(measure(dense, pruned, args))
        print(json.dumps(rows[-1], indent=2))
    density = report(pruned).density
    path = write_result({"batch": args.batch, "length": args.length, "density": density, "results": rows})
    print(f"written: {path}")


if __name__ == "__main__":
    main()
