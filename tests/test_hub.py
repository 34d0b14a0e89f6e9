"""Pushing to the hub, and loading from there: against a local stand-in for its HTTP API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_mlprune.modeling.cards import CARD_MARK
from support.hub import OWNER, Hub, card_errors
from support.models import make_model

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
model.push_to_hub("by-model", commit_message="first", tags=["mine"])
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
        assert card_errors(text) == []
    for name in ("by-model", "by-saving"):
        assert f'from_pretrained("{OWNER}/{name}", trust_remote_code=True)' in cards[name]
        assert ModelCard(cards[name]).data.pipeline_tag == "text-classification"
    assert {"hf-mlprune", "mine"} <= set(ModelCard(cards["by-model"]).data.tags)
    assert any("-of-" in path for path in hub.repositories[f"{OWNER}/by-saving"])


PUSH_TWICE = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from huggingface_hub import ModelCard
from support.models import assert_same_outputs, make_batch
from support.training import make_trainer
from hf_mlprune import PruningCallback, PruningConfig
from transformers import AutoModelForSequenceClassification

folder = sys.argv[1]
trainer = make_trainer(
    folder, AutoModelForSequenceClassification.from_pretrained("me/base"), PruningCallback(density=0.3),
    hub_model_id="me/small", push_to_hub=True, hub_strategy="checkpoint", hub_always_push=True,
    save_strategy="steps", save_steps=8, eval_strategy="steps", eval_steps=24,
)
trainer.train()
ModelCard(trainer.model.pruning_card).validate()
trainer.push_to_hub(license="mit")
trainer.model.push_to_hub("me/small")
trainer.model.push_to_hub("me/small")
loaded = AutoModelForSequenceClassification.from_pretrained("me/small")
assert_same_outputs(trainer.model, loaded, make_batch())
"""


def test_what_stands_in_a_repository_after_each_kind_of_push(hub, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    base = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    hub.repositories[f"{OWNER}/base"] = {
        **base,
        "README.md": b"---\nlicense: apache-2.0\nlanguage: en\n---\n",
    }
    run(hub, tmp_path, PUSH_TWICE)
    pushed = [files for name, files in hub.history if name == f"{OWNER}/small" and "README.md" in files]

    # In the middle of training: the model with masks, and a card that says so.
    training = [files for files in pushed if "PRUNING.md" not in files]
    assert training
    for files in training:
        text = files["README.md"].decode()
        assert "Training is in progress" in text
        assert "trust_remote_code" not in text
        assert ModelCard(text).data.base_model == f"{OWNER}/base"
        config = json.loads(files["config.json"])
        assert config["model_type"] == "prunable_bert"
        assert "auto_map" not in config
    assert any(path.startswith("last-checkpoint/") for path in pushed[-1])

    # Pushed by Trainer: its own card with what it knows, ours beside it.
    by_trainer, once, twice = pushed[-3:]
    data = ModelCard(by_trainer["README.md"].decode()).data
    assert data.base_model == f"{OWNER}/base"
    assert {"pruning", "hf-mlprune", "generated_from_trainer"} <= set(data.tags)
    data = ModelCard(by_trainer["PRUNING.md"].decode()).data
    assert (data.base_model, data.get("base_model_relation")) == (f"{OWNER}/base", "finetune")
    assert (data.license, data.language) == ("apache-2.0", "en")
    assert [result.metric_type for result in data.eval_results] == ["loss"]
    assert f'from_pretrained("{OWNER}/small")' in by_trainer["PRUNING.md"].decode()

    # Then by the model: our card below Trainer's draft, and only once.
    text = once["README.md"].decode()
    assert text == twice["README.md"].decode()
    assert text.count(CARD_MARK) == text.count("## What is left") == 1
    assert text.index("### Training hyperparameters") < text.index(CARD_MARK)
    assert ModelCard(text).data.license == "mit"
    code = {"bert.py", "block_sparse.py", "checkpoint.py", "pruned.py", "structure.py"}
    for files in (by_trainer, once, twice):
        assert files.keys() >= code | {"config.json", "pruning_report.json"}

    assert hub.validated
    for card in hub.validated:
        assert card_errors(card) == []
        assert str(tmp_path) not in card


TRAINED_FURTHER = """
import sys
sys.path.insert(0, sys.argv[2])
from support.models import make_model, prune
from support.training import make_trainer
from hf_mlprune import PruningConfig, shrink
from hf_mlprune.reports.card import CardFacts
from hf_mlprune.reports.counting import report
from hf_mlprune.trainer.publishing import note

model = make_model()
prune(model, PruningConfig.create(0.3))
shrink(model)
note(model, report(model), CardFacts())
model.save_pretrained(sys.argv[1])
trainer = make_trainer(
    sys.argv[1], model, hub_model_id="me/further", push_to_hub=True, hub_strategy="every_save",
    hub_always_push=True, save_strategy="steps", save_steps=12,
)
trainer.train()
trainer.push_in_progress.wait_until_done()
"""


def test_a_pruned_model_that_is_trained_further_is_pushed_with_code_and_card(hub, tmp_path):
    run(hub, tmp_path, TRAINED_FURTHER)
    assert hub.history
    for _, files in hub.history:
        if "config.json" in files:
            assert files.keys() >= {"bert.py", "pruned.py", "pruning_report.json", "README.md"}
            assert CARD_MARK in files["README.md"].decode()
    assert "config.json" in hub.history[-1][1]


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


def test_a_card_of_ours_in_the_repository_is_replaced(hub, tmp_path):
    hub.repositories[f"{OWNER}/mine"] = {"README.md": f"---\nlicense: mit\n---\n{CARD_MARK}\nold".encode()}
    run(hub, tmp_path, OWN_CARD)
    assert hub.repositories[f"{OWNER}/mine"]["README.md"].decode() == f"{CARD_MARK} ours"
