"""Several sizes from one run against a run for each: `targets=[0.5, 0.35, 0.2]`, accuracy and cost.

The one run has more steps than each of the others; its cost is compared with that of the smallest alone.

    python benchmarks/several_sizes.py --data DATA --model L6=all-MiniLM-L6-v2 --tasks banking77 CoLA
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from accuracy import PRUNING_RATE, Bench
from accuracy_tasks import PLANS
from common import RESULTS, command, machine
from hf_mlprune import PruningCallback, PruningConfig
from hf_mlprune.trainer.targets import target_folder


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks; see accuracy_tasks.py")
    parser.add_argument("--model", required=True, help="NAME=FOLDER, or NAME=HUB NAME")
    parser.add_argument("--tasks", nargs="+", default=["banking77", "CoLA"], choices=list(PLANS))
    parser.add_argument("--targets", nargs="+", type=float, default=[0.5, 0.35, 0.2])
    parser.add_argument("--more-steps", type=float, default=1.3, help="so many times the steps of one run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-back", action="store_true", help="measure on a slice of the training rows")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 autocast, all runs alike")
    parser.add_argument("--work", type=Path, default=Path("build/accuracy"), help="teachers, trainers")
    parser.add_argument("--result", type=Path, default=RESULTS / "several_sizes.jsonl")
    args = parser.parse_args()
    args.dense_learning_rate = None
    return args


def train(bench: Bench, steps: int, **settings: Any) -> tuple[Any, float]:
    """A pruned model and the seconds that its run took; the trainer holds the model."""
    seed, plan = bench.args.seed, bench.plan
    teacher = bench.fine_tuned("teacher", seed, plan.teacher_steps, bench.source)
    model = bench.model(bench.folder("teacher", seed))
    trainer = bench.trainer(model, seed, steps, PRUNING_RATE, PruningCallback(teacher=teacher, **settings))
    began = time.process_time()
    trainer.train()
    return trainer, time.process_time() - began


def metric(bench: Bench, model: Any) -> float:
    """The task's metric, 0 to 100."""
    return float(bench.trainer(model, 0, 1, 0.0, None).evaluate()[f"eval_{bench.task.metric}"])


def compare(bench: Bench) -> dict[str, Any]:
    """One task: metrics by density, of a run for each and of one run for all."""
    args, steps = bench.args, bench.plan.steps
    found: dict[str, Any] = {"a run for each": {}, "one run": {}}
    seconds = {}
    for density in args.targets:
        trainer, seconds[density] = train(bench, steps, density=density)
        found["a run for each"][density] = metric(bench, trainer.model)
    trainer, spent = train(bench, round(args.more_steps * steps), targets=args.targets)
    settings = PruningConfig.create(targets=args.targets)
    for index, density in enumerate(args.targets[:-1]):
        folder = target_folder(Path(trainer.args.output_dir), settings.with_target(index))
        found["one run"][density] = metric(bench, bench.model(folder))
    found["one run"][args.targets[-1]] = metric(bench, trainer.model)
    return {**found, "cost_over_smallest": round(spent / seconds[args.targets[-1]], 3)}


def main() -> None:
    """One line per task."""
    args = parse_arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    for task in args.tasks:
        bench = Bench(args, task)
        line = {
            "model": args.model.partition("=")[0],
            "task": task,
            "seed": args.seed,
            "steps": [bench.plan.steps, round(args.more_steps * bench.plan.steps)],
            "metric_name": bench.task.metric,
            "bf16": args.bf16,
            "held_back": args.held_back,
            **compare(bench),
            "machine": machine(),
            "command": command(),
        }
        with args.result.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
