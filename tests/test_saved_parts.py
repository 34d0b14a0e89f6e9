"""An encoder saved out of a bigger model, old tokenizer files, a head of another size."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
)

from hf_mlprune import (
    PrunableBertForSequenceClassification,
    PrunableBertModel,
    PruningConfig,
    attach,
    shrink,
)
from hf_mlprune.levels import LEVELS
from hf_mlprune.modeling.bert import PrunedBertForSequenceClassification, PrunedBertModel
from support.models import assert_same_outputs, make_batch, make_model, prune
from support.processes import run_without_package

SETTINGS = {"density": 0.4, "levels": LEVELS, "block_shape": (4, 4)}


class Wrapped(nn.Module):
    """A user's own module around an encoder."""

    def __init__(self, encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(32, 3)

    def forward(self, input_ids, attention_mask, **labels):
        return self.head(self.encoder(input_ids, attention_mask).last_hidden_state[:, 0])


class Mine(BertForSequenceClassification):
    """A class of the user's own."""


REMOTE = """
import sys, torch
from transformers import AutoModel
folder, out = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(model).__name__ == "PrunedBertModel", type(model)
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(1, 13)[None]).last_hidden_state, out)
"""


def encoder_of(kind, tmp_path):
    """A pruned encoder within a bigger model."""
    if kind == "wrapped":
        model = Wrapped(make_model("model"))
        attach(model, PruningConfig.create(**SETTINGS))
        shrink(model)
        return model.encoder
    model = Mine(make_model().config) if kind == "own" else make_model()
    prune(model, PruningConfig.create(**SETTINGS))
    shrink(model)
    if kind == "loaded":
        model.save_pretrained(tmp_path / "whole")
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    return model.bert


@pytest.mark.parametrize("kind", ["shrunk", "loaded", "own", "wrapped"])
def test_an_encoder_saved_on_its_own_loads_without_the_package(kind, tmp_path):
    encoder = encoder_of(kind, tmp_path)
    assert type(encoder) is PrunedBertModel
    encoder.save_pretrained(tmp_path / "encoder")
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert config["architectures"] == ["PrunedBertModel"]
    assert config["auto_map"]["AutoModel"] == "bert.PrunedBertModel"
    assert_same_outputs(encoder, AutoModel.from_pretrained(tmp_path / "encoder"), make_batch())
    run_without_package(REMOTE, tmp_path / "encoder", tmp_path / "out.pt", cache=tmp_path / "cache")
    with torch.no_grad():
        expected = encoder.eval()(input_ids=torch.arange(1, 13)[None]).last_hidden_state
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected)


def test_modules_that_hold_the_encoder_are_what_they_hold():
    class Outer(nn.Module):
        def __init__(self, inner) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **batch):
            return self.inner(**batch)

    inner = make_model()
    outer = Outer(inner)
    attach(outer, PruningConfig.create(**SETTINGS))
    assert type(inner) is PrunableBertForSequenceClassification
    assert type(inner.bert) is PrunableBertModel
    shrink(outer)
    assert type(inner) is PrunedBertForSequenceClassification
    assert type(inner.bert) is PrunedBertModel
    out = inner.bert(**{k: v for k, v in make_batch().items() if k != "labels"}, output_hidden_states=True)
    assert len(out.hidden_states) == 3


def test_a_masked_encoder_saved_on_its_own_loads(tmp_path):
    model = make_model()
    prune(model, PruningConfig.create(**SETTINGS))
    model.bert.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is PrunableBertModel
    assert_same_outputs(model.bert, loaded, make_batch())


# transformers 5.0 itself, with the tokenizers of its day.
@pytest.mark.filterwarnings("ignore:Deprecated in 0.9.0:DeprecationWarning")
@pytest.mark.parametrize("kind", ["stock", "prunable", "pruned"])
def test_old_tokenizer_files_are_read_as_for_bert(kind, tmp_path):
    model = make_model()
    if kind != "stock":
        attach(model, PruningConfig.create(0.5))
    if kind == "pruned":
        shrink(model)
    model.save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "we"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("We playing").input_ids == [2, 7, 5, 6, 3]


def test_a_head_of_another_size_names_the_switch(tmp_path):
    model = make_model()
    attach(model, PruningConfig.create(0.5))
    shrink(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"classifier\.weight: expected .* pass ignore_mismatched_sizes=True"
    ):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=7)
