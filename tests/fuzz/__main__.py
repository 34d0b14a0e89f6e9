"""Load damaged checkpoints: every one is refused in words, or loaded whole.

python -m fuzz --count 20000 --seed 0        (in tests/)

The corpus beside this file holds the checkpoints that are damaged: of BERT by rows and heads, by blocks in
two shards, and by blocks of another run; of ModernBERT (fused) by blocks; of MPNet by heads and rows.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

import hf_mlprune  # noqa: F401  (registers the classes)

from .mutations import mix, mutate_config, mutate_shards, mutate_weights

CORPUS = Path(__file__).with_name("corpus")
#: What a user may meet: each says what is wrong with which file.
REFUSALS = (ValueError, OSError, SafetensorError)
MOST_SECONDS = 10.0
MOST_MEMORY = 2 * 2**30


class Wrong(AssertionError):
    """A damaged checkpoint was neither refused nor loaded whole."""


def check_whole(model: torch.nn.Module, folder: Path) -> None:
    """Every tensor of a loaded model is the one in its files."""
    stored = {}
    for path in folder.glob("*.safetensors"):
        stored |= load_file(path)
    for name, tensor in model.state_dict().items():
        if name not in stored or not same(stored[name].to(tensor.dtype), tensor):
            raise Wrong(f"{name} is not the one in the file")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, NaN included."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def try_one(folder: Path) -> str:
    """How loading a folder ends: the name of the error, or "loaded".

    Raises:
        Wrong: another error, a model that is not whole, or too long.
    """
    started = time.monotonic()
    try:
        model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=False)
    except REFUSALS as error:
        if len(str(error)) < 10:
            raise Wrong(f"{error!r} says nothing") from error
        outcome = type(error).__name__
    except Exception as error:
        if Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent.name != "auto":
            raise Wrong(f"{error!r:.300}") from error
        # A damaged model_type or auto_map, which the Auto classes read before any code of ours runs.
        outcome = f"Auto class: {type(error).__name__}"
    else:
        check_whole(model, folder)
        outcome = "loaded"
        try:
            with torch.no_grad():
                model(input_ids=torch.arange(1, 9)[None])
        except Exception as error:
            raise Wrong(f"loaded, but does not compute: {error!r:.300}") from error
    if time.monotonic() - started > MOST_SECONDS:
        raise Wrong(f"took {time.monotonic() - started:.0f} s")
    return outcome


def fuzz(count: int, seed: int) -> Counter[str]:
    """Damage and load so many checkpoints.

    Raises:
        Wrong: see :func:`try_one`; names the cases, each of which `--seed CASE --count 1` repeats.
    """
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, hard))
    outcomes: Counter[str] = Counter()
    wrong = []
    seeds = sorted(path for path in CORPUS.iterdir() if path.is_dir())
    mutations = [
        mutate_config,
        mutate_weights,
        mutate_shards,
        *(mix(other) for other in seeds),
    ]
    try:
        with tempfile.TemporaryDirectory() as root:
            for case in range(seed, seed + count):
                chance = random.Random(case)
                folder = Path(root) / "model"
                shutil.copytree(chance.choice(seeds), folder)
                chance.choices(mutations, [6, 8, 4, *(1 for _ in seeds)])[0](folder, chance)
                try:
                    outcomes[try_one(folder)] += 1
                except Wrong as error:
                    wrong.append(f"case {case}: {error}")
                shutil.rmtree(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    if wrong:
        raise Wrong("\n".join([f"{len(wrong)} of {count}", *wrong[:20]]))
    return outcomes


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    args = parser.parse_args()
    sys.stdout.write(f"{dict(fuzz(args.count, args.seed))}\n")


if __name__ == "__main__":
    main()
