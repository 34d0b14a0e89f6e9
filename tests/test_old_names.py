"""Checkpoints whose LayerNorms are called gamma and beta: resuming finds what was saved."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, BertModel

from hf_mlprune import (
    PrunableBertConfig,
    PrunableBertForSequenceClassification,
    PruningCallback,
    PruningConfig,
    attach,
    shrink,
)
from support.models import assert_same_outputs, make_batch, make_model
from support.training import make_trainer

OLD = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


def use_old_names(folder) -> None:
    """Rename the tensors of a checkpoint to what they were called in the first BERTs."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for present, old in OLD.items():
        tensors = {name.replace(present, old): tensor for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def old_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    model = make_model(hidden_dropout_prob=0.1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name:
                parameter.add_(0.1)
    model.save_pretrained(folder)
    use_old_names(folder)
    return folder


class Mine(BertForSequenceClassification):
    """A class of the user's own."""


class Wrapped(nn.Module):
    """An encoder in a module that transformers does not know."""

    def __init__(self, folder) -> None:
        super().__init__()
        self.encoder = BertModel.from_pretrained(folder)
        self.head = nn.Linear(32, 3)
        nn.init.constant_(self.head.weight, 0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids, attention_mask, labels=None):
        logits = self.head(self.encoder(input_ids, attention_mask).last_hidden_state[:, 0])
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def config_first(folder):
    config = PrunableBertConfig.from_pretrained(folder, density=0.3)
    return PrunableBertForSequenceClassification.from_pretrained(folder, config=config)


LOADERS = {
    "stock": BertForSequenceClassification.from_pretrained,
    "own": Mine.from_pretrained,
    "wrapped": Wrapped,
    "config first": config_first,
}


def layer_norms(model) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if "LayerNorm" in name}


@pytest.mark.parametrize("how", LOADERS)
def test_a_run_from_old_names_resumes_as_if_it_had_not_stopped(how, old_folder, tmp_path):
    def run(name, **changes):
        callback = PruningCallback() if how == "config first" else PruningCallback(density=0.3)
        return make_trainer(
            tmp_path / name,
            LOADERS[how](old_folder),
            callback,
            save_strategy="steps",
            save_steps=12,
            **changes,
        )

    straight = run("straight")
    straight.train()
    # As a run that was stopped half-way: only its first checkpoint is there.
    shutil.copytree(tmp_path / "straight" / "checkpoint-12", tmp_path / "resumed" / "checkpoint-12")
    stored = load_file(tmp_path / "resumed" / "checkpoint-12" / "model.safetensors")
    assert not [name for name in stored if name.endswith(("gamma", "beta"))]
    resumed = run("resumed")
    resumed.train(resume_from_checkpoint=True)
    expected, found = straight.model.state_dict(), resumed.model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_the_best_model_gets_its_layer_norms_back(old_folder, tmp_path):
    trainer = make_trainer(
        tmp_path,
        BertForSequenceClassification.from_pretrained(old_folder),
        PruningCallback(density=0.3),
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        # Of two checkpoints with final masks the first is the better one.
        greater_is_better=True,
        learning_rate=1e-2,
    )
    trainer.train()
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    last = load_file(tmp_path / "checkpoint-24" / "model.safetensors")
    found = layer_norms(trainer.model)
    assert len(found) == 10
    assert all(torch.equal(tensor, best[name]) for name, tensor in found.items())
    assert any(not torch.equal(tensor, last[name]) for name, tensor in found.items())


def test_an_old_pruned_checkpoint_is_saved_again_under_present_names(tmp_path):
    model = make_model()
    attach(model, PruningConfig.create(0.5))
    shrink(model)
    model.save_pretrained(tmp_path / "first")
    use_old_names(tmp_path / "first")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "first")
    assert_same_outputs(model, loaded, make_batch(), 0.0)
    loaded.save_pretrained(tmp_path / "second")
    loaded.bert.save_pretrained(tmp_path / "encoder")
    for name in ("second", "encoder"):
        stored = load_file(tmp_path / name / "model.safetensors")
        assert not [key for key in stored if key.endswith(("gamma", "beta"))]
