"""Once masks are final, a run computes only what is kept; nothing else changes by it."""

from __future__ import annotations

import pytest
import torch

from families import TABLE, each_family
from hf_mlprune import PruningConfig, advance, attach, collect, report, shrink, start
from hf_mlprune.levels import LEVELS, ROW_SITES
from hf_mlprune.narrowing import compute_all, compute_kept
from hf_mlprune.state import pruning_state
from support.models import assert_same_outputs, loss_of, make_batch, make_model

STEPS = 24
KINDS = {
    "heads and rows of FC1": {},
    "rows of all sites": {"row_sites": ROW_SITES},
    "with blocks": {"levels": LEVELS, "block_shape": (8, 4), "row_sites": ROW_SITES},
}


def double_batch(family, seed=0):
    batch = make_batch(family=family, seed=seed)
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def run(model, family, config, after_step=lambda step: None, steps=STEPS):
    """A loop of one's own, to the end; the model keeps its masks."""
    attach(model, config)
    model.double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    start(model, STEPS)
    for step in range(1, steps + 1):
        loss_of(model, double_batch(family, seed=step)).backward()
        collect(model)
        optimizer.step()
        optimizer.zero_grad()
        advance(model, step)
        after_step(step)
    return model


def loss_and_gradients(model, family):
    model.zero_grad()
    loss = loss_of(model, double_batch(family))
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


@each_family
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_masked_model(family, kind):
    for variant in ({}, *TABLE[family].variants):
        model = make_model(family=family, **variant)
        run(model, family, PruningConfig.create(0.3, **KINDS[kind]))
        kept = loss_and_gradients(model, family)
        compute_all(pruning_state(model))
        masked = loss_and_gradients(model, family)
        torch.testing.assert_close(kept, masked)
        compute_kept(pruning_state(model))
        torch.testing.assert_close(loss_and_gradients(model, family), kept, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_that_of_the_masked_model(kind):
    config = PruningConfig.create(0.3, **KINDS[kind])
    kept = run(make_model(), "bert", config)
    model = make_model()
    masked = run(model, "bert", config, lambda step: compute_all(pruning_state(model)))
    torch.testing.assert_close(kept.state_dict(), masked.state_dict())
    assert shrink(kept).structures == shrink(masked).structures


def test_linears_compute_only_what_is_kept():
    model = make_model()
    run(model, "bert", PruningConfig.create(0.3, row_sites=ROW_SITES))
    sizes, state = [], pruning_state(model)
    for linear in state.linears:
        linear.register_forward_pre_hook(lambda module, args: sizes.append([args[0].shape[-1]]))
        linear.register_forward_hook(lambda module, args, out: sizes[-1].append(out.shape[-1]))
    found = []
    for index in range(2):
        widths = state.kept_structure(index).widths
        attention = widths["heads"] * 8
        assert 0 < widths["heads"] < 4 or 0 < widths["fc1"] < 48
        # O and FC2 write their rows to their places.
        found += [[32, attention]] * 3 + [[attention, 32], [32, widths["fc1"]], [widths["fc1"], 32]]
    loss_of(model, double_batch("bert"))
    assert sizes == found


def test_masks_that_learn_see_all_units():
    """Removed heads and rows can come back, so that their gradients are needed."""
    model = make_model()
    run(model, "bert", PruningConfig.create(0.3), steps=6)
    state = pruning_state(model)
    assert not state.structured_is_final
    assert all(linear.masks.kept is None or linear.masks.kept.rows is None for linear in state.linears)


def test_layers_that_lost_everything_are_still_computed_right():
    model = make_model()
    config = PruningConfig.create(0.3, minimum_units=0)
    run(model, "bert", config, steps=STEPS)
    state = pruning_state(model)
    compute_all(state)
    for group in ("heads", "fc1"):
        state.gates(0)[group].set_keep(torch.zeros(state.gates(0)[group].units, dtype=torch.bool))
    masked = loss_and_gradients(model, "bert")
    compute_kept(state)
    torch.testing.assert_close(loss_and_gradients(model, "bert"), masked)
    shrink(model)
    assert report(model).layers[0].weights[0] == 0


def test_a_new_run_begins_with_everything():
    model = make_model()
    run(model, "bert", PruningConfig.create(0.3))
    start(model, STEPS)
    masked = loss_and_gradients(model, "bert")
    model.eval()
    dense = make_model()
    dense.load_state_dict(model.state_dict(), strict=False)
    assert masked[0].isfinite()
    batch = make_batch()
    torch.testing.assert_close(model.float()(**batch).logits, dense.eval()(**batch).logits)


@each_family
def test_it_is_saved_as_the_masked_model(family, tmp_path):
    model = make_model(family=family)
    run(model, family, PruningConfig.create(0.3, row_sites=ROW_SITES))
    model.float().save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert_same_outputs(model, loaded, make_batch(family=family))


def test_attentions_are_those_of_the_kept_heads():
    model = make_model()
    run(model, "bert", PruningConfig.create(0.3))
    kept = [pruning_state(model).kept_structure(index).widths["heads"] for index in range(2)]
    model.set_attn_implementation("eager")
    found = model.float().eval()(**make_batch(), output_attentions=True).attentions
    assert [weights.shape[1] for weights in found] == kept


def test_heads_stay_where_the_attention_term_compares_them():
    model = make_model()
    run(model, "bert", PruningConfig.create(0.3, attention_weight=1.0))
    assert all(linear.masks.kept.rows is None for linear in pruning_state(model).linears[:3])
    assert model.bert.encoder.layer[0].attention.self.num_attention_heads == 4
