"""preset="paper" held to hand-computed values and to counts by brute force."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_mlprune import PruningConfig, advance, attach, collect, start
from hf_mlprune.methods.mlpruning import (
    adaptive_lambda,
    keep_ratio,
    kept_units,
    penalty,
    rate_multiplier,
    score_learning_rate,
    top_k,
)
from hf_mlprune.modeling.layout import BERT_LAYOUT, GROUPS, DenseLayer, LayerSizes
from hf_mlprune.run import current_run
from hf_mlprune.stages import BlockStage, StructuredStage
from hf_mlprune.state import pruning_state
from support.models import loss_of, make_batch, make_model


def paper(density=0.2, **settings) -> PruningConfig:
    return PruningConfig.create(density, "paper", **settings)


def test_preset_is_the_reference_recipe():
    config = paper()
    assert config.row_sites == ("attention_output", "fc1", "fc2")
    own = config.method_settings
    assert (own.threshold_init, own.temperature, own.lambda_max) == (10.0, 1.0, 20000.0)
    assert (config.task_weight, config.hidden_weight, config.attention_weight) == (0.1, 1.0, 1.0)
    assert config.distillation_temperature == 2.0
    assert config.first_target() == 0.5


def test_keep_ratio_and_count():
    assert float(keep_ratio(torch.tensor(0.0), 1.0)) == 0.5
    assert float(keep_ratio(torch.tensor(10.0), 1.0)) == pytest.approx(0.9999546, abs=1e-7)
    assert float(keep_ratio(torch.tensor(-4.0), 2.0)) == pytest.approx(1 / (1 + math.e**2))
    assert kept_units(0.5, 12, 1) == 6
    assert kept_units(0.51, 12, 1) == 7
    assert kept_units(0.0, 12, 1) == 1
    assert kept_units(1.0, 12, 1) == 12


def test_top_k_keeps_the_lower_index_of_equals():
    assert top_k(torch.tensor([0.0, 0.0, 0.0]), 2).tolist() == [True, True, False]
    assert top_k(torch.tensor([1.0, 3.0, 2.0]), 1).tolist() == [False, True, False]


def test_penalty_is_one_sided():
    assert float(penalty(torch.tensor(0.7), 0.5)) == pytest.approx(0.04)
    assert float(penalty(torch.tensor(0.4), 0.5)) == 0
    assert float(penalty(torch.tensor(1.0), 1.0)) == 0


def test_lambda():
    # 20000 * 0.25 / 0.25 at the start of a run to 0.5
    assert adaptive_lambda(0.25, 0.5, 20000) == pytest.approx(20000)
    assert adaptive_lambda(0.0004, 0.5, 20000) == 50
    assert adaptive_lambda(0.00029, 0.5, 20000) == 10
    assert adaptive_lambda(0.01, 0.5, 20000) == pytest.approx(800)
    assert adaptive_lambda(0.0, 1.0, 20000) == 0


def test_bert_base_ratio_is_the_reference_formula_over_144():
    with torch.device("meta"):
        from transformers import BertConfig, BertModel

        model = BertModel(BertConfig())
    attach(model, paper(levels=("heads", "rows")))
    state = pruning_state(model)
    stage = StructuredStage(state)
    generator = torch.Generator().manual_seed(0)
    ratios = [torch.rand((), generator=generator).double() * 0.8 + 0.15 for _ in stage.gates]
    by_place = dict(zip(stage.groups, ratios, strict=True))
    expected = sum(
        3 * by_place[i, "heads"]
        + by_place[i, "heads"] * by_place[i, "attention_output"]
        + 4 * by_place[i, "fc1"]
        + 4 * by_place[i, "fc1"] * by_place[i, "fc2"]
        for i in range(12)
    )
    assert float(stage.ratio(ratios)) == pytest.approx(float(expected) / 144, rel=1e-12)
    floors = [torch.zeros(()).double() for _ in stage.gates]
    one = 3 / 12 + 1 / 12 / 768 + 4 / 3072 + 4 / 3072 / 768
    assert float(stage.ratio(floors)) == pytest.approx(12 * one / 144, rel=1e-12)


@given(st.lists(st.integers(0, 12), min_size=6, max_size=6))
def test_layer_weights_are_those_of_the_matrices(numbers):
    columns, head_size, heads, output_rows, fc1, fc2 = numbers
    dense = DenseLayer(BERT_LAYOUT, LayerSizes(columns, heads, head_size, fc1))
    widths = dict(zip(GROUPS, (heads, output_rows, fc1, fc2), strict=True))
    attention = heads * head_size
    matrices = [(attention, columns)] * 3 + [(output_rows, attention), (fc1, columns), (fc2, fc1)]
    assert dense.weights(widths) == sum(torch.ones(shape).sum() for shape in matrices)
    assert [dense.shape(name, widths) for name in BERT_LAYOUT.matrices] == matrices
    for group in GROUPS:
        fewer = {**widths, group: widths[group] - 1}
        assert dense.unit_weights(group, widths) == dense.weights(widths) - dense.weights(fewer)


def masked_weight_count(model) -> int:
    """Weights that a unit input can reach through the masked linears, counted one by one."""
    kept = 0
    for linear in pruning_state(model).linears:
        rows, columns = linear.masks.rows, linear.masks.columns
        alive = torch.ones_like(linear.weight)
        if rows:
            alive[~rows.keep()] = 0
        if columns:
            alive[:, ~columns.keep()] = 0
        if linear.masks.blocks:
            first, second = linear.block_layout()
            grid = linear.masks.blocks.keep[: first.shape[1] * second.shape[0]]
            alive *= first @ grid.view(first.shape[1], second.shape[0]).float() @ second
        kept += int(alive.sum())
    return kept


@given(st.integers(0, 2**31), st.tuples(st.integers(1, 7), st.integers(1, 7)))
def test_density_counts_single_weights(seed, block_shape):
    model = make_model(intermediate_size=45)
    attach(model, paper(block_shape=block_shape))
    generator = torch.Generator().manual_seed(seed)
    for gate in pruning_state(model).all_gates():
        gate.set_keep(torch.rand(gate.units, generator=generator) < 0.6)
    total = sum(linear.weight.numel() for linear in pruning_state(model).linears)
    assert pruning_state(model).density() == pytest.approx(masked_weight_count(model) / total, abs=1e-12)
    if model.config.pruning["levels"] == ["heads", "rows", "blocks"]:
        pairs = [(linear.masks.blocks, linear) for linear in pruning_state(model).linears]
        stage = BlockStage(pruning_state(model), pairs)
        assert stage.density() == pytest.approx(pruning_state(model).density(), abs=1e-12)


def one_step(model, batch):
    """dL/dM of every learning gate, and of the same masks by finite differences' exact stand-in."""
    model.train()
    model.zero_grad()
    loss_of(model, batch).backward()


def test_straight_through_gradients_by_hand():
    """dL/dM of a row is the sum of weight times its gradient, with its bias; dθ is Σ dL/dM ∘ M."""
    model = make_model()
    attach(model, paper(0.7, levels=("rows",), row_sites=("fc1",)))
    start(model, 40)
    gate = pruning_state(model).gates(0)["fc1"]
    one_step(model, make_batch())
    linear = next(m for m in pruning_state(model).linears if m.masks.rows and m.masks.rows.gate is gate)
    by_hand = (linear.weight.grad * linear.weight).sum(1) + linear.bias.grad * linear.bias
    torch.testing.assert_close(gate.mask.grad, by_hand.detach())


def test_removed_units_get_gradients_too():
    model = make_model()
    attach(model, paper(0.7, levels=("rows",), row_sites=("fc1",)))
    start(model, 40)
    gate = pruning_state(model).gates(0)["fc1"]
    gate.set_keep(torch.arange(48) < 24)
    one_step(model, make_batch())
    assert bool((gate.mask.grad[24:] != 0).any())
    # The weights of a removed row are not trained.
    linear = next(m for m in pruning_state(model).linears if m.masks.rows and m.masks.rows.gate is gate)
    assert float(linear.weight.grad[24:].abs().max()) == 0


def test_one_threshold_step_is_adam_on_the_hand_computed_gradient():
    model = make_model()
    attach(model, paper(0.5, levels=("heads", "rows"), score_learning_rate=0.1))
    start(model, 40)
    state = pruning_state(model)
    stage = StructuredStage(state)
    one_step(model, make_batch())
    gradients = [gate.mask.grad.clone() for gate in stage.gates]
    thetas = [gate.get_buffer("threshold").clone().double().requires_grad_() for gate in stage.gates]
    ratio = stage.ratio([torch.sigmoid(theta).squeeze() for theta in thetas])
    loss = (ratio - 0.5) ** 2
    weight = max(20000 * float(loss.detach()) / 0.25, 50)
    pulls = torch.autograd.grad(loss, thetas)
    collect(model)
    rate = 0.1 * rate_multiplier(0, current_run(state).schedule.structured_end)
    for gate, gradient, pull in zip(stage.gates, gradients, pulls, strict=True):
        total = float(gradient.sum()) + weight * float(pull)
        # Adam's first step is the step size against the gradient's sign.
        expected = 10.0 - rate * total / (abs(total) + 1e-8)
        assert float(gate.get_buffer("threshold")) == pytest.approx(expected, abs=1e-5)
        moved = -rate * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(gate.scores, moved, atol=1e-5, rtol=1e-3)
    assert current_run(state).pressure.lambda_ == pytest.approx(weight)


def test_step_size_is_the_papers_at_its_step_count_and_paces_the_travel():
    assert score_learning_rate(227_400) == pytest.approx(1e-2)
    for steps in (80_000, 150_000, 227_400):
        rate = score_learning_rate(steps)
        travelled, step = 0.0, 0
        while travelled < 10:
            travelled += rate * rate_multiplier(step, steps)
            step += 1
        assert step / steps == pytest.approx(0.0207, rel=0.03)


@pytest.mark.parametrize("steps", [10, 100, 1000, 5000])
def test_thresholds_can_travel_to_any_target_in_short_runs(steps):
    rate = score_learning_rate(steps)
    assert sum(rate * rate_multiplier(step, steps) for step in range(steps)) >= 13


def test_block_ratio_counts_real_weights_of_shrunk_matrices():
    model = make_model(intermediate_size=45)
    attach(model, paper(block_shape=(7, 5)))
    state = pruning_state(model)
    for index in range(2):
        for name in ("heads", "attention_output", "fc1", "fc2"):
            gate = state.gates(index)[name]
            gate.set_keep(torch.arange(gate.units) % 3 != 0)
    pairs = [(linear.masks.blocks, linear) for linear in pruning_state(model).linears]
    stage = BlockStage(state, pairs)
    shapes = [linear.kept_shape() for linear in pruning_state(model).linears]
    sizes = [rows * columns for rows, columns in shapes]
    ratios = [torch.tensor(i / 20) for i in range(len(sizes))]
    expected = sum(i / 20 * n for i, n in enumerate(sizes)) / sum(sizes)
    assert float(stage.ratio(ratios)) == pytest.approx(expected, rel=1e-6)
    # final density = R1 · R2
    first = sum(sizes) / stage.total
    assert stage.relative_target(0.2) == pytest.approx(0.2 / first)


def test_whole_run_lands_within_one_block_of_the_target():
    model = make_model(hidden_size=64, intermediate_size=96)
    attach(model, paper(0.2, block_shape=(4, 4)))
    start(model, 60)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    seen = []
    for step in range(1, 61):
        loss_of(model, make_batch(seed=step)).backward()
        collect(model)
        optimizer.step()
        optimizer.zero_grad()
        advance(model, step)
        seen.append(pruning_state(model).density())
    total = sum(linear.weight.numel() for linear in pruning_state(model).linears)
    assert 0.2 - 16 / total <= seen[-1] <= 0.2
    structured_end = current_run(pruning_state(model)).schedule.structured_end
    # A head is four times 16 x 64 weights.
    assert 0.5 - 4 * 16 * 64 / total <= seen[structured_end - 1] <= 0.5


def test_landing_order_is_the_path_of_a_common_threshold_shift():
    config = paper(levels=("rows",), row_sites=("fc1",))
    model = make_model()
    attach(model, config)
    state = pruning_state(model)
    stage = StructuredStage(state)
    method = config.make_method()
    for index, gate in enumerate(stage.gates):
        gate.get_buffer("threshold").fill_(float(index))
        gate.scores.copy_(torch.linspace(1, 0, gate.units))
    priorities = method.priorities(stage)
    for shift in (-2.0, -0.3, 0.7):
        for gate, priority in zip(stage.gates, priorities, strict=True):
            ratio = float(torch.sigmoid(gate.get_buffer("threshold").double() + shift))
            kept = int((priority > -shift).sum())
            assert kept == kept_units(ratio, gate.units, 0)
