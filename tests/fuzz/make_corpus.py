"""Write the corpus anew: `python -m fuzz.make_corpus` in tests/. Only for a new format version."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from hf_mlprune import PruningConfig, shrink
from hf_mlprune.config import LEVELS
from support.models import make_batch, make_model, prune

CORPUS = Path(__file__).with_name("corpus")
RUNS = {
    "rows": ({"density": 0.5, "levels": ("heads", "rows"), "row_sites": ("fc1", "fc2")}, {}),
    "blocks": ({"density": 0.3, "levels": LEVELS, "block_shape": (8, 4)}, {"max_shard_size": "8KB"}),
    "blocks_of_another_run": ({"density": 0.3, "levels": LEVELS, "block_shape": (8, 4)}, {}),
}


def main() -> None:
    """Prune three small models and save them, with the logits that they give."""
    shutil.rmtree(CORPUS, ignore_errors=True)
    for seed, (name, (settings, saving)) in enumerate(RUNS.items()):
        model = make_model(seed=seed, hidden_size=16, num_attention_heads=2, intermediate_size=24)
        prune(model, PruningConfig.create(**settings))
        shrink(model)
        folder = CORPUS / name
        model.save_pretrained(folder, **saving)
        for code in folder.glob("*.py"):
            code.unlink()
        with torch.no_grad():
            logits = model.eval()(**make_batch()).logits
        (CORPUS / f"{name}.txt").write_text(
            "\n".join(" ".join(map(repr, row)) for row in logits.tolist()) + "\n"
        )


if __name__ == "__main__":
    main()
