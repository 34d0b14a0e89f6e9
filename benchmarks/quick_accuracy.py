"""Is the default preset naive? Dense, paper and default side by side on banking77.

Per seed a dense teacher; per seed and density the preset "paper" started from the pretrained weights, as
published, and the preset "default" started from the teacher's. Both are taught by the teacher. Finished
runs are kept: called again, the script goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from common import RESULTS, write_result
from hf_mlprune import PruningCallback

PRESETS = ("default", "paper")
DENSE = "dense"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds banking77/")
    parser.add_argument("--model", required=True, help="folder or hub name, e.g. of all-MiniLM-L6-v2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--result", default="quick_accuracy", help="name of the file of results")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.2])
    parser.add_argument("--teacher-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--teacher-learning-rate", type=float, default=1e-4)
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of both presets")
    parser.add_argument("--settings", default="{}", help="JSON: of the default preset, on top")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 autocast, all runs alike")
    parser.add_argument("--work", type=Path, default=Path("build/quick_accuracy"), help="teachers, trainers")
    return parser.parse_args()


class Bench:
    """The data, and one file of results that grows run by run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(args.model)
        folder = args.data / "banking77"
        self.labels: list[str] = json.loads((folder / "categories.json").read_text(encoding="utf-8"))
        self.train, self.test = (self._read(folder / f"{split}.tsv") for split in ("train", "test"))
        self.settings = {
            "teacher_steps": args.teacher_steps,
            "pruning_steps": args.steps,
            "teacher_learning_rate": args.teacher_learning_rate,
            "learning_rate": args.learning_rate,
            **({} if args.batch_size == 32 else {"batch_size": args.batch_size}),
            "bf16": args.bf16,
            "model": Path(args.model).name,
            "training_questions": len(self.train),
            "test_questions": len(self.test),
        }
        self.runs = self._finished()

    def _read(self, file: Path) -> Dataset:
        header, *lines = file.read_text(encoding="utf-8").splitlines()
        if header.split("\t") != ["text", "label"]:
            raise SystemExit(f"{file}: expected the header 'text<TAB>label', got {header!r}")
        texts, names = zip(*(line.split("\t") for line in lines), strict=True)
        tokens = self.tokenizer(list(texts), truncation=True, max_length=64)
        return Dataset.from_dict({**tokens, "labels": [self.labels.index(name) for name in names]})

    def _finished(self) -> list[dict[str, Any]]:
        path = RESULTS / f"{self.args.result}.json"
        if not path.is_file():
            return []
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["settings"] != self.settings:
            raise SystemExit(
                f"{path}: expected runs of {self.settings}, got {stored['settings']}; move the file away"
            )
        return stored["runs"]

    def find(self, seed: int, preset: str, density: float) -> dict[str, Any] | None:
        """A finished run."""
        same = {"seed": seed, "preset": preset, "density_target": density}
        return next((run for run in self.runs if same.items() <= run.items()), None)

    def teacher_folder(self, seed: int) -> Path:
        """Where the dense model of a seed is kept."""
        return self.args.work / f"dense_{seed}"

    def run_dense(self, seed: int) -> None:
        """Fine-tune a seed's dense model, unless it is there."""
        if self.find(seed, DENSE, 1.0) and self.teacher_folder(seed).is_dir():
            return
        rate = self.args.teacher_learning_rate
        trainer, seconds = self._train(seed, self.args.model, self.args.teacher_steps, rate, None)
        trainer.save_model(str(self.teacher_folder(seed)))
        # Losses are counted against the dense model: runs taught by an earlier one do not compare.
        self.runs = [run for run in self.runs if run["seed"] != seed]
        self._store(trainer, seconds, seed, DENSE, 1.0, density=1.0)

    def run_pruned(self, seed: int, preset: str, density: float) -> None:
        """Prune by one preset, unless it was done."""
        if self.find(seed, preset, density):
            return
        teacher = str(self.teacher_folder(seed))
        source = teacher if preset == "default" else self.args.model
        settings = json.loads(self.args.settings) if preset == "default" else {}
        callback = PruningCallback(density=density, preset=preset, teacher=teacher, **settings)
        trainer, seconds = self._train(seed, source, self.args.steps, self.args.learning_rate, callback)
        report = trainer.model.pruning_report
        speedups = {f"{row['batch']}x{row['length']}": row["speedup"] for row in report["latency"]}
        self._store(trainer, seconds, seed, preset, density, density=report["density"], speedups=speedups)

    def _train(
        self, seed: int, source: str, steps: int, rate: float, callback: PruningCallback | None
    ) -> tuple[Trainer, float]:
        set_seed(seed)
        trainer = Trainer(
            model=AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(self.labels)),
            args=TrainingArguments(
                output_dir=str(self.args.work / f"trainer_{seed}"),
                max_steps=steps,
                per_device_train_batch_size=self.args.batch_size,
                per_device_eval_batch_size=128,
                learning_rate=rate,
                bf16=self.args.bf16,
                use_cpu=not torch.cuda.is_available(),
                lr_scheduler_type="linear",
                warmup_steps=round(0.06 * steps),
                train_sampling_strategy="group_by_length",
                logging_steps=50,
                save_strategy="no",
                report_to="none",
                seed=seed,
            ),
            train_dataset=self.train,
            eval_dataset=self.test,
            data_collator=DataCollatorWithPadding(self.tokenizer),
            processing_class=self.tokenizer,
            compute_metrics=accuracy,
            callbacks=[callback] if callback else [],
        )
        began = time.perf_counter()
        trainer.train()
        return trainer, time.perf_counter() - began

    def _store(
        self,
        trainer: Trainer,
        seconds: float,
        seed: int,
        preset: str,
        target: float,
        *,
        density: float,
        speedups: dict[str, float] | None = None,
    ) -> None:
        percent = 100 * trainer.evaluate()["eval_accuracy"]
        dense = self.find(seed, DENSE, 1.0)
        run = {
            "seed": seed,
            "preset": preset,
            "density_target": target,
            "density": density,
            "accuracy": percent,
            "loss_in_points": dense["accuracy"] - percent if dense else 0.0,
            "training_seconds": seconds,
        }
        if speedups is not None:
            # Of the whole encoder over the stock one, sequences x tokens.
            run["speedups"] = speedups
        # Seeds may run side by side, each in a process of its own.
        others = [other for other in self._finished() if other["seed"] != seed]
        self.runs = [*others, *(own for own in self.runs if own["seed"] == seed), run]
        print(json.dumps(run))
        write_result({"settings": self.settings, "runs": self.runs}, name=self.args.result)

    def print_table(self) -> None:
        """Means over seeds."""
        table = Table(title=f"banking77, {self.args.steps} pruning steps, mean over {self.args.seeds}")
        for name in ("preset", "density", "accuracy", "loss in points"):
            table.add_column(name, justify="right")
        wanted = [(DENSE, 1.0), *((preset, d) for d in self.args.densities for preset in self.args.presets)]
        for preset, target in wanted:
            found = [self.find(seed, preset, target) for seed in self.args.seeds]
            means = [
                statistics.mean(run[name] for run in found if run)
                for name in ("density", "accuracy", "loss_in_points")
            ]
            table.add_row(preset, f"{means[0]:.3f}", f"{means[1]:.2f}", f"{means[2]:+.2f}")
        Console().print(table)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of right classes."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    """Run what is missing."""
    args = parse_arguments()
    bench = Bench(args)
    for seed in args.seeds:
        bench.run_dense(seed)
        for preset in args.presets:
            for density in args.densities:
                bench.run_pruned(seed, preset, density)
    bench.print_table()


if __name__ == "__main__":
    main()
