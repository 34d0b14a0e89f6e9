"""What a pruned model still knows: tasks x models x methods x densities x seeds, one line per run.

Every run but `dense` gets the same teacher, steps, batches and order of the data; `dense` gets the steps of
the teacher and of pruning together. Finished runs are lines of the result file; called again, after any kill,
the script does what is missing.

    python benchmarks/accuracy.py --data DATA --model L6=all-MiniLM-L6-v2 --tasks banking77 CoLA --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, EvalPrediction, PreTrainedModel, Trainer, TrainingArguments, set_seed

from accuracy_tasks import PLANS, Task, load_task
from common import RESULTS, command, machine
from hf_mlprune import PruningCallback, PruningConfig, attach, export, report, shrink
from hf_mlprune.budgets import TARGETED
from hf_mlprune.exporting.export import ENGINES
from hf_mlprune.exporting.source import read_source
from hf_mlprune.files import write_folder
from hf_mlprune.state import pruning_state
from hf_mlprune.timing import interleave

#: Method -> settings of the callback. `paper from pretrained` begins with the model as it was published,
#: `default from dense` with the model of `dense`, so it has more steps than all others.
METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "default from dense": {},
    "default int8": {},
    "magnitude": {"method": "magnitude"},
    "random": {"method": "random"},
    "group-lasso": {"method": "group-lasso"},
    "snip": {"method": "snip"},
    "paper": {"preset": "paper"},
    "paper from pretrained": {"preset": "paper"},
    "small-dense": {},
}
#: These have no density to choose.
DENSE = ("dense", "teacher", "int8", "L3")
LATENCY = (1, 128)
#: Learning rate of pruning.
PRUNING_RATE = 6e-4


@dataclass(frozen=True)
class Run:
    """One line: what is run."""

    model: str
    task: str
    method: str
    target_density: float
    seed: int
    steps: int
    settings: str
    learning_rate: float
    dense_learning_rate: float
    held_back: bool
    bf16: bool


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks; see accuracy_tasks.py")
    parser.add_argument("--model", required=True, help="NAME=FOLDER, or NAME=HUB NAME")
    parser.add_argument("--smaller", help="for L3: folder or hub name of paraphrase-MiniLM-L3-v2")
    parser.add_argument("--tasks", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--methods", nargs="+", default=["dense", "default"], choices=[*DENSE, *METHODS])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--more-steps", type=int, default=1, help="so many times the steps of pruning")
    parser.add_argument(
        "--settings", default="{}", help="JSON: settings of the callback, on top; a target, too"
    )
    parser.add_argument("--learning-rate", type=float, default=PRUNING_RATE, help="of pruning")
    parser.add_argument("--dense-learning-rate", type=float, help="of dense models, if not the plan's")
    parser.add_argument("--held-back", action="store_true", help="measure on a slice of the training rows")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 autocast, all runs alike")
    parser.add_argument("--work", type=Path, default=Path("build/accuracy"), help="teachers, trainers")
    parser.add_argument("--result", type=Path, default=RESULTS / "accuracy.jsonl")
    return parser.parse_args()


def wanted(args: argparse.Namespace) -> Iterator[Run]:
    """The runs of a command line, teachers' tasks together."""
    name = args.model.partition("=")[0]
    settings = json.dumps(json.loads(args.settings), sort_keys=True)
    for task in args.tasks:
        for seed in args.seeds:
            for method in args.methods:
                plain = method in DENSE
                for density in [1.0] if plain else args.densities:
                    steps = PLANS[task].steps * (1 if plain else args.more_steps)
                    own = "{}" if plain or method == "small-dense" else settings
                    dense = args.dense_learning_rate or PLANS[task].dense_rate
                    rates = (dense if plain else args.learning_rate, dense)
                    yield Run(
                        name, task, method, density, seed, steps, own, *rates, args.held_back, args.bf16
                    )


def finished(result: Path) -> list[dict[str, Any]]:
    """Lines of a file of results."""
    if not result.is_file():
        return []
    return [json.loads(line) for line in result.read_text(encoding="utf-8").splitlines()]


class Bench:
    """One model on one task."""

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        self.args, self.name, self.plan = args, name, PLANS[name]
        self.dense_rate: float = args.dense_learning_rate or self.plan.dense_rate
        self.source = args.model.partition("=")[2]
        self.tokenizer = AutoTokenizer.from_pretrained(self.source)
        self.task: Task = load_task(name, args.data, self.tokenizer, held_back=args.held_back)

    def model(self, folder: str | Path) -> PreTrainedModel:
        """A model with the task's head."""
        labels = {"num_labels": len(self.task.labels)} if self.task.labels else {}
        return self.task.auto.from_pretrained(folder, **labels)

    def folder(self, kind: str, seed: int) -> Path:
        """Where a fine-tuned dense model is kept."""
        slices = "held_back" if self.args.held_back else "all"
        name = self.args.model.partition("=")[0]
        how = [f"{self.dense_rate:g}", f"bf16{self.args.bf16}"]
        return self.args.work / "_".join([kind, name, self.name, slices, str(seed), *how])

    def fine_tuned(self, kind: str, seed: int, steps: int, source: str) -> PreTrainedModel:
        """A dense model after so many steps; made if it is not there."""
        folder = self.folder(kind, seed)
        if not folder.is_dir():
            trainer = self.trainer(self.model(source), seed, steps, self.dense_rate, None)
            trainer.train()
            write_folder(folder, lambda partial_folder: trainer.save_model(str(partial_folder)))
        return self.model(folder)

    def trainer(
        self, model: nn.Module, seed: int, steps: int, rate: float, callback: PruningCallback | None
    ) -> Trainer:
        """The stock Trainer; batches are bucketed by length."""
        set_seed(seed)
        return Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(self.args.work / f"trainer_{os.getpid()}"),
                max_steps=steps,
                per_device_train_batch_size=self.plan.batch,
                per_device_eval_batch_size=64,
                learning_rate=rate,
                bf16=self.args.bf16,
                use_cpu=not torch.cuda.is_available(),  # else bfloat16 is refused there
                warmup_steps=round(0.06 * steps),
                train_sampling_strategy="group_by_length",
                logging_steps=50,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=seed,
            ),
            train_dataset=self.task.train,
            eval_dataset=self.task.test,
            data_collator=self.task.collator,
            compute_metrics=self.task.compute,
            callbacks=[callback] if callback else [],
        )

    def measuring(self, model: nn.Module) -> Trainer:
        """A Trainer that only evaluates, in the order of the data: answers are put together by it."""
        trainer = self.trainer(model, 0, 1, 0.0, None)
        trainer.args.train_sampling_strategy = "sequential"
        return trainer

    def run(self, run: Run) -> dict[str, Any]:
        """Do a run; its line."""
        began = time.perf_counter()
        if run.method in DENSE:
            measured = self.run_dense(run)
        else:
            kind = "dense" if run.method == "default from dense" else "teacher"
            teacher = self.fine_tuned(kind, run.seed, self.steps(kind), self.source)
            began = time.perf_counter()
            model = self.pruned(run, teacher)
            if run.method == "default int8":
                measured = self.measure_int8(model, weights(model) / weights(teacher))
            else:
                measured = self.measure(model, teacher)
        return {**measured, "wall_seconds": round(time.perf_counter() - began, 1)}

    def pruned(self, run: Run, teacher: PreTrainedModel) -> PreTrainedModel:
        """A pruned model; kept, as int8 begins with it, and as a quiet machine may measure it again."""
        method = run.method.removesuffix(" int8")
        name = f"{method}_{run.target_density}_{run.steps}_{run.learning_rate:g}"
        if run.settings != "{}":
            name += f"_{sha256(run.settings.encode()).hexdigest()[:8]}"
        kept = self.folder(name, run.seed)
        if kept.is_dir():
            return self.model(kept)
        model = self.model(self.source) if method == "paper from pretrained" else copy.deepcopy(teacher)
        density = run.target_density
        if method == "small-dense":
            density = make_narrow(model, density)
        settings = {**METHODS[method], **json.loads(run.settings)}
        if set(TARGETED).isdisjoint(settings):
            settings["density"] = density
        callback = PruningCallback(teacher=teacher, **settings)
        self.trainer(model, run.seed, run.steps, run.learning_rate, callback).train()
        write_folder(kept, model.save_pretrained)
        return model

    def steps(self, kind: str) -> int:
        """Steps of a dense model."""
        return self.plan.teacher_steps + (0 if kind == "teacher" else self.plan.steps)

    def run_dense(self, run: Run) -> dict[str, Any]:
        """Do a run that prunes nothing."""
        kind = "dense" if run.method == "int8" else run.method
        source = self.smaller() if kind == "L3" else self.source
        model = self.fine_tuned(kind, run.seed, self.steps(kind), source)
        if run.method == "int8":
            return self.measure_int8(model, 1.0)
        return self.measure(model, self.model(self.source) if kind == "L3" else model)

    def smaller(self) -> str:
        """The smaller pretrained model, which must read the same tokens."""
        if self.args.smaller is None:
            raise SystemExit("--methods L3: expected --smaller with its folder or hub name, got none")
        if AutoTokenizer.from_pretrained(self.args.smaller).get_vocab() != self.tokenizer.get_vocab():
            raise SystemExit(
                f"--smaller: expected the vocabulary of --model, got another in {self.args.smaller}"
            )
        return str(self.args.smaller)

    def measure(self, model: PreTrainedModel, dense: PreTrainedModel) -> dict[str, Any]:
        """Metrics by Trainer; speed against the dense model, sizes from the file."""
        found = self.measuring(model).evaluate()
        metrics = {name.removeprefix("eval_"): value for name, value in found.items()}
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            size = (Path(folder) / "model.safetensors").stat().st_size
            density = weights(self.model(folder)) / weights(dense)  # of what lies on disk
        inputs = read_source(dense, None).batch(*LATENCY)
        # Copies on the processor: that is where such models serve.
        calls = [partial(copy.deepcopy(each).cpu().eval(), **inputs) for each in (dense, model)]
        with torch.inference_mode():
            ratio = interleave(calls, rounds=40, budget_seconds=30).ratios[1]
        return self.line(metrics, density, ratio, size)

    def measure_int8(self, model: PreTrainedModel, density: float) -> dict[str, Any]:
        """The same of a model of this density in ONNX Runtime's int8."""
        model = model.cpu()
        with tempfile.TemporaryDirectory() as folder:
            said = export(model, Path(folder) / "int8", int8=True, latency=(LATENCY,), threads=1)
            run = ENGINES["onnx"].load(Path(folder) / "int8", torch.get_num_threads())
            metrics = self.task.compute(self.predict(run, model))
        return self.line(
            metrics, density, said.latency[0].speedup["dense in torch"], sum(said.files.values())
        )

    def predict(self, run: Any, model: PreTrainedModel) -> EvalPrediction:
        """Outputs for all rows of the test, batches of 64, padded to one length."""
        trainer = self.measuring(model)
        names, found = read_source(model, None).names, []
        for batch in trainer.get_eval_dataloader():
            outputs = run({name: value.cpu() for name, value in batch.items() if name in names})
            found.append(({name: torch.as_tensor(x) for name, x in outputs.items()}, batch))
        keys = ["start_logits", "end_logits"] if not self.task.labels else ["logits"]
        logits = [padded([out[key] for out, _ in found], 0.0) for key in keys]
        labels = padded([batch["labels"] for _, batch in found], -100) if self.task.labels else None
        return EvalPrediction(predictions=logits[0] if len(logits) == 1 else tuple(logits), label_ids=labels)

    def line(self, metrics: dict[str, float], density: float, ratio: float, size: int) -> dict[str, Any]:
        """What was measured, as the result file has it."""
        kept = {name: value for name, value in metrics.items() if name in ("loss", *self.names(metrics))}
        name = self.task.metric
        return {
            "density": density,
            "metric_name": name,
            "metric": metrics[name],
            "metrics": kept,
            "latency_ratio": round(ratio, 3),
            "bytes": size,
        }

    def names(self, metrics: dict[str, float]) -> list[str]:
        """Metrics of the task."""
        return [name for name in metrics if name in ("accuracy", "f1", "matthews", "macro_f1", "exact_match")]


def weights(model: PreTrainedModel) -> int:
    """Weights of the encoder that pruning counts."""
    return sum(layer.weights[0] for layer in report(model).layers)


def padded(parts: list[torch.Tensor], value: float) -> np.ndarray:
    """Batches ``(rows, ...)`` of several lengths as one array."""
    if parts[0].dim() > 1:
        longest = max(part.shape[1] for part in parts)
        shapes = [(part.shape[0], longest, *part.shape[2:]) for part in parts]
        wide = [part.new_full(shape, value) for part, shape in zip(parts, shapes, strict=True)]
        for part, room in zip(parts, wide, strict=True):
            room[:, : part.shape[1]] = part
        parts = wide
    return torch.cat(parts).cpu().numpy()


def make_narrow(model: PreTrainedModel, density: float) -> float:
    """Make a model narrow at once: in each layer as many heads and FC1 rows, those of largest norm.

    Returns:
        Its density: the most that is not above the one asked for.
    """
    attach(model, PruningConfig.create(density))
    state = pruning_state(model)
    for index, (_, linears) in enumerate(state.modules_of):
        gates = state.gates(index)
        for group, name in (("heads", "attention_output"), ("fc1", "fc2")):
            gate, weight = gates[group], linears[name].weight.detach()
            norms = weight.view(len(weight), gate.units, -1).square().sum(dim=(0, 2))
            keep = torch.zeros(gate.units, dtype=torch.bool)
            keep[norms.topk(max(1, int(density * gate.units))).indices.cpu()] = True
            gate.set_keep(keep)
    shrink(model)
    return report(model).density


def main() -> None:
    """Do the runs that are missing."""
    args = parse_arguments()
    args.result.parent.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    bench = None
    for run in wanted(args):
        if any(vars(run).items() <= line.items() for line in finished(args.result)):
            continue
        if bench is None or bench.name != run.task:
            bench = Bench(args, run.task)
        line = {**vars(run), **bench.run(run), "machine": machine(), "command": command()}
        with args.result.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
