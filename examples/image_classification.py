"""Classify images with a ViT: handwritten digits, a real data set that comes with scikit-learn.

A small ViT is trained from new weights and pruned to 25 % of its encoder weights, with that model as its
teacher. A pretrained one:

    python examples/image_classification.py --model google/vit-base-patch16-224-in21k --learning-rate 5e-5
"""

from __future__ import annotations

from functools import partial

import torch
from datasets import Dataset
from sklearn.datasets import load_digits
from torch.nn import functional
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, set_seed

from comparison import encoder_weights, per_second, show
from hf_mlprune import PruningCallback
from training import accuracy, fit, options

#: 8 x 8 grey pixels, of which 2 x 2 are a patch.
VIT = ViTConfig(
    image_size=8, patch_size=2, num_channels=1, hidden_size=128, num_hidden_layers=4, num_attention_heads=8,
    intermediate_size=512, num_labels=10,
)  # fmt: skip


def load_images(size: int, channels: int, seed: int) -> tuple[Dataset, Dataset]:
    """1,797 digits in the size of a model, with pixels between -1 and 1: training and test rows."""
    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32)[:, None].expand(-1, channels, -1, -1) / 8 - 1
    pixels = functional.interpolate(pixels, size=(size, size)).numpy()
    data = Dataset.from_dict({"pixel_values": pixels, "labels": found.target}).with_format("torch")
    parts = data.train_test_split(test_size=0.2, seed=seed)
    return parts["train"], parts["test"]


def main() -> None:
    """Train, prune, save, load, compare."""
    rates = {"learning_rate": 1e-3, "pruning_learning_rate": 2e-3}
    args = options(
        __doc__, model="hub name or folder (default: a small ViT with new weights)", dense_steps=600, **rates
    ).parse_args()
    set_seed(args.seed)
    if args.model:
        model = AutoModelForImageClassification.from_pretrained(
            args.model, num_labels=10, ignore_mismatched_sizes=True
        )
    else:
        model = ViTForImageClassification(VIT)
    data = load_images(model.config.image_size, model.config.num_channels, args.seed)
    found = [fit(model, args, data, accuracy)]
    dense, pruned = args.folder / "dense_images", args.folder / "pruned_images"
    model.save_pretrained(dense)
    pruning = PruningCallback(density=args.density, teacher=str(dense))
    found += [fit(model, args, data, accuracy, [pruning])]
    model.save_pretrained(pruned)

    # `import hf_mlprune` is all that the Auto classes need.
    models = [AutoModelForImageClassification.from_pretrained(folder).eval() for folder in (dense, pruned)]
    images = data[1][:32]["pixel_values"]
    with torch.inference_mode():
        speed = per_second([partial(model, pixel_values=images) for model in models], len(images))
    figures = {
        "accuracy, held-out images": [metrics["accuracy"] for metrics in found],
        "encoder weights": encoder_weights(models),
        "images per second, 32 at a time": speed,
    }
    show(figures, models[0].device, args.result)


if __name__ == "__main__":
    main()
