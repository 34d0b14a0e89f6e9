"""What transformers asks of every model, asked of ours: pruned, and with masks."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch

from hf_mlprune import PruningConfig, shrink
from hf_mlprune.config import LEVELS
from support.models import assert_same_outputs, heads_of, loss_of, make_batch, make_model, prune

KINDS = [(head, kind) for head in heads_of() for kind in ("prunable", "pruned")]
SETTINGS = {
    "levels": LEVELS,
    "block_shape": (8, 4),
    "row_sites": ("attention_output", "fc1", "fc2"),
}


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def made(request):
    head, kind = request.param
    model = make_model(head)
    prune(model, PruningConfig.create(0.5, **SETTINGS), head=head)
    if kind == "pruned":
        shrink(model)
    return head, model


@pytest.fixture
def head(made):
    return made[0]


@pytest.fixture
def model(made):
    """A copy that a test may change."""
    return copy.deepcopy(made[1])


def test_a_copy_is_the_model(made, model):
    assert_same_outputs(made[1], model, make_batch(made[0]), 0.0)


def test_the_state_dict_is_all_there_is(model, head):
    again = type(model)(copy.deepcopy(model.config))
    again.load_state_dict(model.state_dict())
    assert_same_outputs(model, again, make_batch(head), 0.0)


def test_it_is_pickled_whole(model, head):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_same_outputs(model, torch.load(file, weights_only=False), make_batch(head), 0.0)
    assert_same_outputs(model, pickle.loads(pickle.dumps(model)), make_batch(head), 0.0)


def test_saving_and_loading_keeps_everything(model, head, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    first, second = model.state_dict(), loaded.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert dict(model.named_buffers()).keys() == dict(loaded.named_buffers()).keys()
    before, after = model.config.to_dict(), loaded.config.to_dict()
    assert {**before, "_name_or_path": ""} == {**after, "_name_or_path": ""}
    assert_same_outputs(model, loaded, make_batch(head), 0.0)


def test_built_on_meta_and_filled_as_transformers_does_it(model, head):
    with torch.device("meta"):
        found = type(model)(copy.deepcopy(model.config))
    found.to_empty(device="cpu")
    found.initialize_weights()
    found.tie_weights()
    assert all(parameter.isfinite().all() for parameter in found.parameters())
    found.load_state_dict(model.state_dict())
    assert_same_outputs(model, found, make_batch(head), 0.0)


def test_what_stays_in_float32_is_there(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    names = [name for name, tensor in loaded.state_dict().items() if tensor.dtype is torch.float32]
    patterns = loaded._keep_in_fp32_modules_strict or ()
    assert all(any(re.search(pattern, name) for name in names) for pattern in patterns)
    assert bool(names) == bool(patterns)


def test_a_bigger_vocabulary(model, head, tmp_path):
    before = model.eval()(**make_batch(head))
    model.resize_token_embeddings(100, mean_resizing=False)
    assert model.config.vocab_size == 100
    after = model(**make_batch(head))
    hidden = {"model": "last_hidden_state", "span": "start_logits", "pretraining": "prediction_logits"}.get(
        head, "logits"
    )
    width = before[hidden].shape[-1]
    torch.testing.assert_close(after[hidden][..., :width], before[hidden])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same_outputs(model, loaded, make_batch(head), 0.0)


def test_tied_weights_stay_tied(model, head, tmp_path):
    if head not in ("masked", "pretraining"):
        assert not model.all_tied_weights_keys
        return
    model.save_pretrained(tmp_path)
    for found in (model, type(model).from_pretrained(tmp_path)):
        predictions = found.cls.predictions
        assert predictions.decoder.weight is found.bert.embeddings.word_embeddings.weight
        assert predictions.decoder.bias is predictions.bias


# Its name in transformers 5.0; later versions warn of it.
@pytest.mark.filterwarnings("ignore:.*heckpointing:FutureWarning")
def test_gradients_with_and_without_activations_kept(model, head):
    model.train()

    def gradients():
        model.zero_grad()
        loss_of(model, make_batch(head)).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    recomputed = gradients()
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)


def test_hidden_states_and_attentions(model, head):
    model.eval().set_attn_implementation("eager")
    out = model(**make_batch(head), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3
    heads = [layer.attention.self.num_attention_heads for layer in model.base_model.encoder.layer]
    assert [attention.shape[1] for attention in out.attentions] == heads
    model.config.output_hidden_states = True
    assert len(model(**make_batch(head)).hidden_states) == 3


def test_every_attention_computes_the_same(model, head, tmp_path):
    model.save_pretrained(tmp_path)
    for name in ("eager", "sdpa"):
        loaded = type(model).from_pretrained(tmp_path, attn_implementation=name)
        assert loaded.base_model.config._attn_implementation == name
        assert_same_outputs(model, loaded, make_batch(head))
        model.set_attn_implementation(name)
        assert_same_outputs(loaded, model, make_batch(head), 0.0)


def test_inputs_as_embeddings(model, head):
    batch = make_batch(head)
    tokens = batch.pop("input_ids")
    expected = loss_of(model.eval(), {"input_ids": tokens, **batch})
    embedded = model.get_input_embeddings()(tokens)
    torch.testing.assert_close(loss_of(model, {"inputs_embeds": embedded, **batch}), expected)
