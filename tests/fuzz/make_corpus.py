"""Write the corpus anew: `python -m fuzz.make_corpus` in tests/. Only for a new format version.

`python -m fuzz.make_corpus NAME ...` writes new parts of it: what is there shows that old checkpoints load.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from hf_mlprune import PruningConfig, shrink
from hf_mlprune.levels import LEVELS
from support.models import make_batch, make_model, prune

CORPUS = Path(__file__).with_name("corpus")
RUNS = {
    "rows": ({"density": 0.5, "levels": ("heads", "rows"), "row_sites": ("fc1", "fc2")}, {}),
    "blocks": ({"density": 0.3, "levels": LEVELS, "block_shape": (8, 4)}, {"max_shard_size": "8KB"}),
    "blocks_of_another_run": ({"density": 0.3, "levels": LEVELS, "block_shape": (8, 4)}, {}),
    "fused": ({"density": 0.4, "levels": LEVELS, "block_shape": (8, 4)}, {}),
    "selected_heads": ({"density": 0.4, "row_sites": ("attention_output", "fc1")}, {}),
}
#: Of other families than BERT, whose layers lie otherwise.
FAMILIES = {"fused": "modernbert", "selected_heads": "mpnet"}


def main() -> None:
    """Prune small models and save them, with the logits that they give."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="all, if none is given")
    names = parser.parse_args().names or list(RUNS)
    for seed, (name, (settings, saving)) in enumerate(RUNS.items()):
        if name not in names:
            continue
        shutil.rmtree(CORPUS / name, ignore_errors=True)
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
        model = make_model(seed=seed, family=FAMILIES.get(name, "bert"), **sizes)
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
