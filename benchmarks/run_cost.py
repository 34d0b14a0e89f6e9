"""What a whole pruning run costs, and a step of it once masks are final, over dense fine-tuning.

MiniLM-L6 shapes, random weights and tokens, on which speed does not depend; preset default. Runs are taken
step by step in turn with as many dense steps, so that a drifting machine slows all alike. Peak memory is that
of a fresh process each, through all phases.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable

import torch

from common import peak_megabytes, print_peak_memory, write_result
from hf_mlprune import PruningConfig, attach, distilled, start
from hf_mlprune.schedule import MINIMUM_STEPS, Phase, make_schedule
from training_step import STOCK, PruningStep, StockStep, make_model

#: Kind of run -> dtype of its teacher.
RUNS = {"no teacher": None, "teacher": torch.float32, "teacher in bfloat16": torch.bfloat16}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or hub name (default: random weights)")
    parser.add_argument("--shape", default="minilm-l6", help="of random weights; see training_step.py")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--result", default="run_cost")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    return parser.parse_args()


class PruningRun(PruningStep):
    """A run of pruning, step by step."""

    def __init__(
        self, args: argparse.Namespace, taught: torch.dtype | None, stack: contextlib.ExitStack
    ) -> None:
        model = make_model(args)
        attach(model, PruningConfig.create(args.density))
        super().__init__(model, args)
        start(model, args.steps)
        self.distillation = None
        if taught is not None:
            self.distillation = stack.enter_context(distilled(model, make_model(args).to(taught)))

    def __call__(self) -> None:
        """The step, and what the teacher needs after it."""
        super().__call__()
        if self.distillation is not None:
            self.distillation.update()


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def run_for_memory(args: argparse.Namespace) -> None:
    """Make the shortest run of one kind in this process, then print its peak memory."""
    args.steps = MINIMUM_STEPS
    with contextlib.ExitStack() as stack:
        stock = args.peak_of == STOCK
        step = StockStep(make_model(args), args) if stock else PruningRun(args, RUNS[args.peak_of], stack)
        for _ in range(args.steps):
            step()
    print_peak_memory()


def main() -> None:
    """Measure, print, write."""
    args = parse_arguments()
    if args.peak_of:
        run_for_memory(args)
        return
    megabytes = {name: peak_megabytes(["--peak-of", name]) for name in (STOCK, *RUNS)}
    phases = make_schedule(PruningConfig.create(args.density), args.steps)
    with contextlib.ExitStack() as stack:
        steps = {STOCK: StockStep(make_model(args), args)}
        steps[STOCK]()  # the first allocates what the optimizer keeps
        steps |= {name: PruningRun(args, taught, stack) for name, taught in RUNS.items()}
        times = [{name: seconds(step) for name, step in steps.items()} for _ in range(args.steps)]
    figures = {}
    for name in RUNS:
        by_phase: dict[str, list[float]] = {}
        for step, row in enumerate(times[1:], start=1):
            by_phase.setdefault(phases.phase(step).name.lower(), []).append(row[name] / row[STOCK])
        figures[name] = {
            "whole_run_over_stock": sum(row[name] for row in times) / sum(row[STOCK] for row in times),
            "step_over_stock": {phase: statistics.median(ratios) for phase, ratios in by_phase.items()},
            "final_phase_begins_at": phases.bounds(Phase.FINAL)[0] / args.steps,
            "peak_memory_ratio": megabytes[name] / megabytes[STOCK],
        }
        print(name, json.dumps(figures[name], indent=2))
    shared = {name: getattr(args, name) for name in ("density", "steps", "batch", "length")}
    print(f"written: {write_result({**shared, 'results': figures}, name=args.result)}")


if __name__ == "__main__":
    main()
