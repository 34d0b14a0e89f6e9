"""What transformers asks of every model, asked of ours: pruned, and with masks."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch

from families import TABLE
from hf_mlprune import PruningConfig, shrink
from hf_mlprune.encoders import inspect_encoder
from hf_mlprune.families import head_of
from hf_mlprune.levels import LEVELS
from support.models import (
    assert_same_outputs,
    heads_of,
    labelled_head,
    loss_of,
    make_batch,
    make_model,
    prune,
    tied_names,
)

#: All heads of BERT, the usual one of the other families.
KINDS = [
    (family, head, kind)
    for family in TABLE
    for head in (heads_of(family) if family == "bert" else [labelled_head(family)])
    for kind in ("prunable", "pruned")
]
SETTINGS = {
    "levels": LEVELS,
    "block_shape": (8, 4),
    "row_sites": ("attention_output", "fc1", "fc2"),
}


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def made(request):
    family, head, kind = request.param
    model = make_model(head, family=family)
    prune(model, PruningConfig.create(0.5, **SETTINGS), head=head)
    if kind == "pruned":
        shrink(model)
    else:
        # As a checkpoint brings it back. The model of a run computes only what is kept; see test_narrowing.
        state = model.state_dict()
        model = type(model)(model.config)
        model.load_state_dict(state)
        model.eval()
    return model, make_batch(head, family=family), make_model(head, family=family)


@pytest.fixture
def batch(made):
    return dict(made[1])


@pytest.fixture
def stock(made):
    """The dense model of transformers, of other weights."""
    return made[2]


@pytest.fixture
def model(made):
    """A copy that a test may change."""
    return copy.deepcopy(made[0])


def test_a_copy_is_the_model(made, model, batch):
    assert_same_outputs(made[0], model, batch, 0.0)


def test_the_state_dict_is_all_there_is(model, batch):
    again = type(model)(copy.deepcopy(model.config))
    again.load_state_dict(model.state_dict())
    assert_same_outputs(model, again, batch, 0.0)


def test_it_is_pickled_whole(model, batch):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_same_outputs(model, torch.load(file, weights_only=False), batch, 0.0)
    assert_same_outputs(model, pickle.loads(pickle.dumps(model)), batch, 0.0)


def test_saving_and_loading_keeps_everything(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    first, second = model.state_dict(), loaded.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert dict(model.named_buffers()).keys() == dict(loaded.named_buffers()).keys()
    before, after = model.config.to_dict(), loaded.config.to_dict()
    assert {**before, "_name_or_path": ""} == {**after, "_name_or_path": ""}
    assert_same_outputs(model, loaded, batch, 0.0)


def test_built_on_meta_and_filled_as_transformers_does_it(model, batch):
    with torch.device("meta"):
        found = type(model)(copy.deepcopy(model.config))
    found.to_empty(device="cpu")
    found.initialize_weights()
    found.tie_weights()
    assert all(parameter.isfinite().all() for parameter in found.parameters())
    found.load_state_dict(model.state_dict())
    assert_same_outputs(model, found, batch, 0.0)


def test_what_stays_in_float32_is_there(model, stock, tmp_path):
    model.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    loaded = type(model).from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    dense = type(stock).from_pretrained(tmp_path / "stock", dtype=torch.bfloat16)
    ours, theirs = (
        {name for name, tensor in network.state_dict().items() if tensor.dtype is torch.float32}
        for network in (loaded, dense)
    )
    patterns = loaded._keep_in_fp32_modules_strict or ()
    assert all(any(re.search(pattern, name) for name in ours) for pattern in patterns)
    assert bool(ours - theirs) == bool(patterns)


def test_a_bigger_vocabulary(model, batch, tmp_path):
    if "input_ids" not in batch:
        pytest.skip("it reads images")
    before = model.eval()(**batch)
    model.resize_token_embeddings(100, mean_resizing=False)
    assert model.config.vocab_size == 100
    after = model(**batch)
    predicted = head_of(model).predictions[0]
    width = before[predicted].shape[-1]
    torch.testing.assert_close(after[predicted][..., :width], before[predicted])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same_outputs(model, loaded, batch, 0.0)


def test_tied_weights_stay_tied(model, stock, tmp_path):
    model.save_pretrained(tmp_path)
    for found in (model, type(model).from_pretrained(tmp_path)):
        assert tied_names(found) == tied_names(stock)


# Its name in transformers 5.0; later versions warn of it.
@pytest.mark.filterwarnings("ignore:.*heckpointing:FutureWarning")
def test_gradients_with_and_without_activations_kept(model, stock, batch):
    assert model.supports_gradient_checkpointing == stock.supports_gradient_checkpointing
    if not stock.supports_gradient_checkpointing:
        return
    model.train()

    def gradients():
        model.zero_grad()
        loss_of(model, batch).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    recomputed = gradients()
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)


def test_hidden_states_and_attentions(model, batch):
    model.eval().set_attn_implementation("eager")
    out = model(**batch, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3
    heads = [layer.widths["heads"] for layer in inspect_encoder(model).structure.layers]
    assert [attention.shape[1] for attention in out.attentions] == heads
    model.config.output_hidden_states = True
    assert len(model(**batch).hidden_states) == 3


def test_every_attention_computes_the_same(model, stock, batch, tmp_path):
    model.save_pretrained(tmp_path)
    for name in ("eager", "sdpa") if stock._supports_sdpa else ("eager",):
        loaded = type(model).from_pretrained(tmp_path, attn_implementation=name)
        assert loaded.base_model.config._attn_implementation == name
        assert_same_outputs(model, loaded, batch)
        model.set_attn_implementation(name)
        assert_same_outputs(loaded, model, batch, 0.0)


def test_inputs_as_embeddings_count_as_for_the_stock_model(model, stock, batch):
    if "input_ids" not in batch:
        pytest.skip("it reads images")
    tokens = batch.pop("input_ids")
    # Some families give padding no position of its own, and see it in tokens only.
    tokens = tokens.masked_fill(tokens == model.config.pad_token_id, 5)

    def difference(network):
        expected = loss_of(network.eval(), {"input_ids": tokens, **batch})
        embedded = network.get_input_embeddings()(tokens)
        return abs(float((loss_of(network, {"inputs_embeds": embedded, **batch}) - expected).detach()))

    # ESM scales what it embeds itself.
    assert (difference(model) < 1e-5) == (difference(stock) < 1e-5)
