"""What a training step costs while each method learns, over the stock step.

MiniLM-L6 shapes, random weights and tokens, no teacher; heads and rows (of `snip` heads and whole FFNs), all
still there, which is the dearest part of a run. All steps are taken in turn in one process.

    python benchmarks/method_cost.py
"""

from __future__ import annotations

import argparse
import json

from common import write_result
from hf_mlprune.methods import METHODS
from hf_mlprune.schedule import Phase
from hf_mlprune.timing import interleave
from training_step import SHAPES, MaskedStep, StockStep, make_model


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="folder or hub name (default: random weights)")
    parser.add_argument("--shape", choices=SHAPES, default="minilm-l6", help="of random weights")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    return parser.parse_args()


def main() -> None:
    """Measure all methods."""
    args = parse_arguments()
    steps = {name: MaskedStep(make_model(args), args, Phase.STRUCTURED, method=name) for name in METHODS}
    timing = interleave([StockStep(make_model(args), args), *steps.values()], rounds=args.rounds)
    ratios = {name: round(1 / ratio, 3) for name, ratio in zip(steps, timing.ratios[1:], strict=True)}
    print(json.dumps(ratios, indent=2))
    shared = {"batch": args.batch, "length": args.length, "rounds": timing.rounds}
    print(f"written: {write_result({**shared, 'step_cost_over_stock': ratios}, name='method_cost')}")


if __name__ == "__main__":
    main()
