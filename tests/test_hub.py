"""Pushing to the hub, and loading from there: against a local stand-in for its HTTP API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.hub import OWNER, Hub

PUSH = """
import sys
sys.path.insert(0, sys.argv[2])
from support.models import assert_same_outputs, make_batch, make_model
from support.training import make_trainer
from hf_mlprune import PruningCallback
from transformers import AutoModelForSequenceClassification

trainer = make_trainer(
    sys.argv[1], make_model(), PruningCallback(density=0.3), hub_model_id="by-trainer", save_strategy="steps",
    save_steps=12, push_to_hub=True, hub_strategy="every_save", hub_always_push=True,
)
trainer.train()
trainer.push_to_hub()
model = trainer.model
model.push_to_hub("by-model", commit_message="first")
model.save_pretrained(sys.argv[1] + "-saved", push_to_hub=True, repo_id="by-saving", max_shard_size="30KB")
for name in ("by-trainer", "by-model", "by-saving"):
    loaded = AutoModelForSequenceClassification.from_pretrained(f"me/{name}")
    assert type(loaded) is type(model)
    assert_same_outputs(model, loaded, make_batch())
"""


@pytest.fixture
def hub():
    stand_in = Hub()
    yield stand_in
    stand_in.close()


def run(hub: Hub, tmp_path: Path, script: str) -> None:
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_token", "HF_HOME": str(tmp_path / "cache"),
                   "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "run"), str(Path(__file__).parent)],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def test_what_is_pushed_is_the_small_model_with_all_it_needs(hub, tmp_path):
    run(hub, tmp_path, PUSH)
    assert set(hub.repositories) == {f"{OWNER}/{name}" for name in ("by-trainer", "by-model", "by-saving")}
    code = {"bert.py", "block_sparse.py", "checkpoint.py", "pruned.py", "structure.py"}
    for name, files in hub.repositories.items():
        assert files.keys() >= code | {"config.json", "pruning_report.json", "README.md"}, name
        assert json.loads(files["config.json"])["model_type"] == "pruned_bert"
        assert json.loads(files["pruning_report.json"])["density"] <= 0.3
        assert not [path for path in files if "_partial" in path or path.endswith(".pkl")]
    # Trainer writes a card of its own; ours stands beside it.
    cards = {name.split("/")[1]: files["README.md"].decode() for name, files in hub.repositories.items()}
    assert "generated_from_trainer" in cards["by-trainer"]
    notes = hub.repositories[f"{OWNER}/by-trainer"]["PRUNING.md"].decode()
    for text in (notes, cards["by-model"], cards["by-saving"]):
        assert "import hf_mlprune" in text
        assert "of the encoder's weights are left" in text
    assert "hf-mlprune" in cards["by-model"]
    assert any("-of-" in path for path in hub.repositories[f"{OWNER}/by-saving"])


OWN_CARD = """
import sys
sys.path.insert(0, sys.argv[2])
from support.models import make_model, prune
from hf_mlprune import PruningConfig, shrink
model = make_model()
prune(model, PruningConfig.create(0.3))
shrink(model)
model.pruning_card = "<!-- written by hf-mlprune --> ours"
model.push_to_hub("mine")
"""


def test_a_card_that_somebody_wrote_stays(hub, tmp_path):
    hub.repositories[f"{OWNER}/mine"] = {"README.md": b"---\nlicense: mit\n---\nMy own words."}
    run(hub, tmp_path, OWN_CARD)
    assert b"My own words." in hub.repositories[f"{OWNER}/mine"]["README.md"]
