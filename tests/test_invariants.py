"""masked == shrunk == saved and loaded again, for every level, head and size."""

from __future__ import annotations

import tempfile

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from families import TABLE, each_family
from hf_mlprune import (
    PrunableBertConfig,
    PrunableBertForSequenceClassification,
    PruningConfig,
    advance,
    attach,
    collect,
    report,
    shrink,
    start,
)
from hf_mlprune.encoders import inspect_encoder
from hf_mlprune.families import head_of
from hf_mlprune.levels import LEVELS
from hf_mlprune.loop import figures
from hf_mlprune.masked import MaskedLinear
from hf_mlprune.modeling.layout import GROUPS
from hf_mlprune.shrinking import ShrinkError
from hf_mlprune.state import is_attached, pruning_state
from support.models import (
    assert_same_outputs,
    clone,
    find_head,
    heads_of,
    inputs_of,
    loss_of,
    make_batch,
    make_model,
    outputs,
    prune,
    tied_names,
)

#: BERT's heads by both presets; those of the others by one and the other in turn.
CASES = [
    (family, head, preset)
    for family in TABLE
    for number, head in enumerate(heads_of(family))
    for preset in (("default", "paper") if family == "bert" else (("default", "paper")[number % 2],))
]


@st.composite
def shapes(draw, family):
    """Odd sizes of one kind of a family."""
    row = TABLE[family]
    heads, head_size = draw(st.integers(1, 5)), draw(st.integers(1, 7)) * (2 if row.even_heads else 1)
    return {
        **draw(st.sampled_from([{}, *row.variants])),
        "hidden_size": heads * head_size,
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "intermediate_size": draw(st.integers(1, 40)),
        "hidden_act": draw(st.sampled_from(["gelu", "relu", "silu"])),
    }


def random_masks(model, generator) -> None:
    """Any masks at all, empty groups included: no schedule stands between the test and a shape."""
    state = pruning_state(model)
    for gate in state.all_gates():
        density = torch.rand((), generator=generator)
        # One group in five is emptied, one in five kept whole.
        density = {0: 0.0, 1: 1.0}.get(int(torch.randint(5, (), generator=generator)), density)
        gate.set_keep(torch.rand(gate.units, generator=generator) < density)


@each_family
@settings(max_examples=8)
@given(
    data=st.data(),
    block_shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    preset=st.sampled_from(["default", "paper"]),
    seed=st.integers(0, 2**31),
)
def test_masked_equals_shrunk_equals_reloaded_in_float64(family, data, block_shape, preset, seed):
    model = make_model(family=family, seed=seed % 1000, **data.draw(shapes(family))).double()
    config = PruningConfig.create(
        0.5, preset, levels=LEVELS, block_shape=block_shape, row_sites=("attention_output", "fc1", "fc2")
    )
    attach(model, config)
    random_masks(model, torch.Generator().manual_seed(seed))
    density = pruning_state(model).density()
    masked = clone(model)
    batch = make_batch(family=family)
    result = shrink(model, [inputs_of(batch)])
    assert result.max_difference <= 1e-12 * max(1.0, result.max_output)
    assert_same_outputs(masked, model, batch, 1e-12)
    assert report(model).density == pytest.approx(density, abs=1e-12)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder, dtype=torch.float64)
    assert_same_outputs(masked, loaded, batch, 1e-12)


@pytest.mark.parametrize(("family", "head", "preset"), CASES)
def test_every_head_prunes_shrinks_and_loads_through_its_auto_class(family, head, preset, tmp_path):
    model = make_model(head, family=family)
    prune(model, PruningConfig.create(0.4, preset, levels=LEVELS, block_shape=(4, 8)), head=head)
    masked = clone(model)
    shrink(model)
    batch = make_batch(head, seed=99, family=family)
    assert_same_outputs(masked, model, batch)
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, find_head(head, family).auto).from_pretrained(tmp_path)
    assert type(loaded) is type(model) is head_of(model).pruned
    assert tied_names(loaded) == tied_names(make_model(head, family=family))
    assert_same_outputs(masked, loaded, batch)


@each_family
@pytest.mark.parametrize(
    "levels", [("heads",), ("rows",), ("blocks",), ("heads", "rows"), ("rows", "blocks")]
)
def test_each_level_alone_and_together_lands_on_its_target(levels, family):
    model = make_model(family=family)
    # Without rows of FC1 or blocks, a good part of the weights cannot be reached.
    density = 0.75 if levels == ("heads",) else 0.65
    shape = {"block_shape": (4, 4)} if "blocks" in levels else {}
    dense = inspect_encoder(model).dense
    prune(model, PruningConfig.create(density, levels=levels, **shape))
    reached = pruning_state(model).density()
    # Within one unit: a head is some 7 % of this model's weights.
    head = dense.unit_weights("heads", dense.units) / (2 * dense.weights(dense.units))
    assert density - (head if levels == ("heads",) else 0.02) < reached <= density
    shrink(model)
    assert report(model).density == pytest.approx(reached)


@each_family
@pytest.mark.parametrize("empty", GROUPS)
def test_a_layer_can_lose_every_unit_of_a_group(empty, family, tmp_path):
    model = make_model(family=family)
    config = PruningConfig.create(
        0.5, levels=("heads", "rows"), row_sites=("attention_output", "fc1", "fc2"), minimum_units=0
    )
    attach(model, config)
    gate = pruning_state(model).gates(1)[empty]
    gate.set_keep(torch.zeros(gate.units, dtype=torch.bool))
    masked = clone(model)
    shrink(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    batch = make_batch(family=family)
    assert_same_outputs(masked, loaded, batch)
    # What is left can be trained on, and its hidden states and attentions asked for.
    out = loaded.train()(**batch, output_hidden_states=True)
    out.loss.backward()
    assert len(out.hidden_states) == 3


@each_family
def test_keeping_everything_is_the_stock_model(family):
    stock = make_model(family=family)
    model = clone(stock)
    prune_nothing = PruningConfig.create(1.0)
    attach(model, prune_nothing)
    assert_same_outputs(stock, model, make_batch(family=family), 0.0)
    shrink(model)
    assert_same_outputs(stock, model, make_batch(family=family), 0.0)


@each_family
def test_attach_keeps_parameters_and_names(family):
    model = make_model(family=family)
    before = dict(model.named_parameters())
    attach(model, PruningConfig.create(0.5))
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


@each_family
def test_excluded_layers_are_left_alone_and_not_counted(family):
    model = make_model(family=family, num_hidden_layers=3)
    prune(model, PruningConfig.create(0.4, exclude=(1,), levels=LEVELS, block_shape=(4, 4)))
    assert 0.36 <= pruning_state(model).density() <= 0.4
    shrink(model)
    layers = report(model).layers
    assert layers[1].weights[0] == layers[1].weights[1]
    assert layers[0].weights[0] < layers[0].weights[1]


@each_family
@pytest.mark.parametrize("site", GROUPS)
def test_removed_units_take_their_bias_with_them(site, family):
    model = make_model(family=family)
    config = PruningConfig.create(0.5, "paper")
    attach(model, config)
    gate = pruning_state(model).gates(0)[site]
    keep = torch.ones(gate.units, dtype=torch.bool)
    keep[1] = False
    gate.set_keep(keep)
    before = outputs(model, make_batch(family=family))["logits"]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MaskedLinear) and module.masks.rows and module.masks.rows.gate is gate:
                for parameter in module.parameters(recurse=False):
                    parameter[~module.masks.rows.keep()] += 100.0
    assert torch.equal(before, outputs(model, make_batch(family=family))["logits"])


@each_family
def test_a_pruned_model_can_be_pruned_further(family, tmp_path):
    model = make_model(family=family, hidden_size=64, intermediate_size=96)
    batch = make_batch(family=family)
    first = PruningConfig.create(
        0.6, levels=LEVELS, block_shape=(8, 8), row_sites=("attention_output", "fc1", "fc2")
    )
    prune(model, first)
    shrink(model)
    model.save_pretrained(tmp_path / "first")
    loaded = type(model).from_pretrained(tmp_path / "first")
    assert_same_outputs(model, loaded, batch)
    prune(loaded, PruningConfig.create(0.3, levels=LEVELS, block_shape=(4, 4)))
    assert 0.27 <= pruning_state(loaded).density() <= 0.3
    masked = clone(loaded)
    shrink(loaded)
    loaded.save_pretrained(tmp_path / "second")
    again = type(loaded).from_pretrained(tmp_path / "second")
    assert_same_outputs(masked, again, batch)
    assert report(again).density == pytest.approx(pruning_state(masked).density())


def test_a_model_that_is_pruned_further_begins_at_the_density_that_it_has():
    model = make_model(intermediate_size=256)
    prune(model, PruningConfig.create(0.6))
    shrink(model)
    had = report(model).density
    attach(model, PruningConfig.create(0.4, warmup_fraction=0.0))
    start(model, 40)
    targets = []
    for step in range(1, 9):
        loss_of(model.train(), make_batch(seed=step)).backward()
        collect(model)
        advance(model, step)
        targets.append(figures(model)["density_target"])
    assert had >= targets[0] > targets[-1]
    assert targets == sorted(targets, reverse=True)
    assert 0.4 <= targets[-1] < 0.45


@each_family
def test_half_precision_models_are_proved_in_float32(family):
    model = make_model(family=family).bfloat16()
    prune(model, PruningConfig.create(0.4, levels=LEVELS, block_shape=(4, 4)))
    result = shrink(model)
    assert result.max_difference <= 1e-5 * max(1.0, result.max_output)
    assert next(model.parameters()).dtype is torch.bfloat16


def test_a_nan_in_the_outputs_does_not_pass_for_equal():
    model = make_model()
    prune(model, PruningConfig.create(0.5))
    with torch.no_grad():
        model.classifier.weight[0, 0] = torch.nan
    with pytest.raises(ShrinkError, match="differ from masked ones by nan"):
        shrink(model)
    assert is_attached(model)


def test_scores_stay_in_float32_whatever_the_model_is(tmp_path):
    make_model().save_pretrained(tmp_path)
    config = PrunableBertConfig.from_pretrained(tmp_path, density=0.5, preset="paper")
    first = PrunableBertForSequenceClassification.from_pretrained(tmp_path, config=config, dtype="bfloat16")
    second = make_model().bfloat16()
    attach(second, PruningConfig.create(0.5, preset="paper"))
    for model in (first, second):
        gates = list(pruning_state(model).all_gates())
        assert {gate.scores.dtype for gate in gates} == {torch.float32}
        assert {gate.get_buffer("threshold").dtype for gate in gates} == {torch.float32}
        assert {gate.keep.dtype for gate in gates} == {torch.bool}
        assert model.classifier.weight.dtype is torch.bfloat16


def test_scores_stay_in_float32_when_the_model_is_cast():
    model = make_model()
    attach(model, PruningConfig.create(0.5, preset="paper"))
    model.to(torch.bfloat16)
    for gate in pruning_state(model).all_gates():
        floats = [buffer for buffer in gate.buffers() if buffer.is_floating_point()]
        assert len(floats) == 6
        assert {buffer.dtype for buffer in floats} == {torch.float32}


def test_start_begins_anew():
    found = []
    for abandoned in (0, 4, 12):
        model = make_model()
        attach(model, PruningConfig.create(0.3))
        start(model, 20)
        model.train()
        for step in range(1, abandoned + 1):
            model(**make_batch(seed=step + 50)).loss.backward()
            collect(model)
            advance(model, step)
        start(model, 20)
        assert pruning_state(model).density() == 1.0
        for step in range(1, 21):
            model(**make_batch(seed=step)).loss.backward()
            collect(model)
            advance(model, step)
        found.append([gate.keep.clone() for gate in pruning_state(model).all_gates()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_heads_and_blocks_reach_a_density_that_heads_alone_cannot():
    model = make_model()
    prune(model, PruningConfig.create(0.2, levels=("heads", "blocks"), block_shape=(4, 4)))
    shrink(model)
    assert 0.19 <= report(model).density <= 0.2


def test_saved_config_is_versioned_and_readable(pruned_folder):
    config = AutoConfig.from_pretrained(pruned_folder)
    assert config.model_type == "pruned_bert"
    assert config.structure["version"] == 2
    assert all(isinstance(layer["heads"], str) for layer in config.structure["layers"])
