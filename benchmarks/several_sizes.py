"""Several sizes from one run against a run for each: `targets=[0.5, 0.35, 0.2]`, accuracy and cost.

The one run has more steps than each of the others; its cost is compared with that of the smallest alone.
Models of the runs for each are those of `accuracy.py`: kept, and taken from there.

    python benchmarks/several_sizes.py --data DATA --model L6=all-MiniLM-L6-v2 --tasks banking77 CoLA
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from accuracy import PRUNING_RATE, Bench, Run, finished
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
    parser.add_argument("--steps", type=int, help="of a run, if not the plan's; fewer serve for the cost")
    parser.add_argument("--more-steps", type=float, default=1.15, help="so many times the steps of one run")
    parser.add_argument(
        "--cost", action="store_true", help="measure the processor time in place of the metric"
    )
    parser.add_argument("--learning-rate", type=float, default=PRUNING_RATE, help="of all runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-back", action="store_true", help="measure on a slice of the training rows")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 autocast, all runs alike")
    parser.add_argument("--work", type=Path, default=Path("build/accuracy"), help="teachers, trainers")
    parser.add_argument("--result", type=Path, default=RESULTS / "several_sizes.jsonl")
    args = parser.parse_args()
    args.dense_learning_rate = None
    return args


def teacher_of(bench: Bench) -> Any:
    """The fine-tuned model that all runs begin with."""
    return bench.fine_tuned("teacher", bench.args.seed, bench.plan.teacher_steps, bench.source)


def train(bench: Bench, steps: int, **settings: Any) -> tuple[Any, float]:
    """The trainer of a pruned model, and the processor seconds of its run."""
    seed, teacher = bench.args.seed, teacher_of(bench)
    model = bench.model(bench.folder("teacher", seed))
    callback = PruningCallback(teacher=teacher, **settings)
    trainer = bench.trainer(model, seed, steps, bench.args.learning_rate, callback)
    began = time.process_time()
    trainer.train()
    return trainer, time.process_time() - began


def metric(bench: Bench, model: Any) -> float:
    """The task's metric, 0 to 100."""
    return float(bench.measuring(model).evaluate()[f"eval_{bench.task.metric}"])


def own_run(bench: Bench, steps: int, density: float) -> Any:
    """The model of a run of its own."""
    args, dense = bench.args, bench.dense_rate
    name, rates = args.model.partition("=")[0], (args.learning_rate, dense)
    how = ("{}", *rates, args.held_back, args.bf16)
    run = Run(name, bench.name, "default", density, args.seed, steps, *how)
    return bench.pruned(run, teacher_of(bench))


def accuracy(bench: Bench, steps: int, known: dict[str, float] | None) -> dict[str, Any]:
    """One task: metrics by density, of a run for each (if not known) and of one run for all."""
    args = bench.args
    own: dict[str, float] = known or {}
    for density in [] if known else args.targets:
        own[str(density)] = metric(bench, own_run(bench, steps, density))
    trainer, _ = train(bench, round(args.more_steps * steps), targets=args.targets)
    settings, one = PruningConfig.create(targets=args.targets), {}
    for index, density in enumerate(args.targets[:-1]):
        folder = target_folder(Path(trainer.args.output_dir), settings.with_target(index))
        one[str(density)] = metric(bench, bench.model(folder))
    one[str(args.targets[-1])] = metric(bench, trainer.model)
    return {"a run for each": own, "one run": one}


def cost(bench: Bench, steps: int) -> dict[str, Any]:
    """Processor time of one run for all, over that of a run for the smallest alone; on a quiet machine."""
    args = bench.args
    _, alone = train(bench, steps, density=args.targets[-1])
    _, together = train(bench, round(args.more_steps * steps), targets=args.targets)
    return {"cost_over_smallest": round(together / alone, 3)}


def main() -> None:
    """One line per task."""
    args = parse_arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    for task in args.tasks:
        bench = Bench(args, task)
        steps = args.steps or bench.plan.steps
        run = {
            "model": args.model.partition("=")[0],
            "task": task,
            "seed": args.seed,
            "steps": steps,
            "learning_rate": args.learning_rate,
            "targets": args.targets,
            "metric_name": bench.task.metric,
            "bf16": args.bf16,
            "held_back": args.held_back,
        }
        if args.cost:
            found = cost(bench, steps)
        else:
            # These do not depend on how many steps the one run has; teachers differ from machine to machine.
            same = {**run, "machine": machine()}
            lines = [line for line in finished(args.result) if same.items() <= line.items()]
            known = next((line["a run for each"] for line in lines if "a run for each" in line), None)
            found = accuracy(bench, steps, known)
        line = {
            **run, "more_steps": args.more_steps, **found, "machine": machine(), "command": command()
        }  # fmt: skip
        with args.result.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
