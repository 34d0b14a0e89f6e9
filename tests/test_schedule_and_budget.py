"""Phases tile every run; budgets are never exceeded and never missed by more than one unit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_mlprune import PruningConfig, advance, attach, collect, report, shrink, start
from hf_mlprune.budgets.weights import block_weights
from hf_mlprune.levels import LEVELS
from hf_mlprune.loop import figures
from hf_mlprune.methods.base import Progress
from hf_mlprune.modeling.structure import grid_shape
from hf_mlprune.run import current_run
from hf_mlprune.schedule import Phase, cubic_target, make_schedule
from hf_mlprune.stages import BlockStage, StructuredStage
from hf_mlprune.state import pruning_state
from support.models import loss_of, make_batch, make_model, prune

levels = st.sets(st.sampled_from(LEVELS), min_size=1).map(tuple)


@given(st.integers(20, 5000), levels, st.floats(0, 0.3), st.floats(0, 0.3), st.floats(0, 0.3))
def test_every_phase_that_prunes_has_a_step_and_the_last_step_has_final_masks(n, chosen, warm, first, second):
    config = PruningConfig.create(
        0.5, levels=chosen, warmup_fraction=warm, structured_fraction=first, block_fraction=second
    )
    plan = make_schedule(config, n)
    phases = [plan.phase(step) for step in range(n + 1)]
    assert phases == sorted(phases)
    assert (Phase.STRUCTURED in phases) == config.structured
    assert (Phase.BLOCKS in phases) == config.blocks
    assert phases[n - 1] is Phase.FINAL
    for phase in Phase:
        start, end = plan.bounds(phase)
        assert phases[:n].count(phase) == end - start


def test_cubic_target_runs_from_one_to_the_target():
    path = [cubic_target(0.2, step, 10, 20) for step in range(8, 23)]
    assert path[:3] == [1.0, 1.0, 1.0]
    assert path[-3:] == pytest.approx([0.2, 0.2, 0.2])
    assert path == sorted(path, reverse=True)
    assert cubic_target(0.2, 15, 10, 20) == pytest.approx(0.2 + 0.8 * 0.125)


@given(st.tuples(st.integers(0, 30), st.integers(0, 30)), st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_block_weights_add_up_to_the_matrix(shape, block):
    costs = block_weights(shape, block)
    assert tuple(costs.shape) == grid_shape(shape, block)
    assert int(costs.sum()) == shape[0] * shape[1]
    assert costs.numel() == 0 or int(costs.max()) <= block[0] * block[1]


@given(st.integers(0, 2**31), st.floats(0.2, 1.0), st.booleans(), st.sampled_from([48, 520]))
def test_structured_budget_is_met_within_one_unit(seed, density, rows, ffn_size):
    model = make_model(intermediate_size=ffn_size)
    sites = ("attention_output", "fc1", "fc2") if rows else ("fc1",)
    attach(model, PruningConfig.create(density, levels=("heads", "rows"), row_sites=sites))
    stage = StructuredStage(pruning_state(model))
    generator = torch.Generator().manual_seed(seed)
    priorities = [torch.rand(live, generator=generator) for live in stage.active]
    for gate, keep in zip(stage.gates, stage.fit(priorities, density, final=True), strict=True):
        gate.set_keep(keep)
    assert stage.weights() <= stage.limit(density)
    assert all(bool(gate.keep.any()) for gate in stage.gates)
    for gate in stage.gates:
        if not bool(gate.keep.all()):
            another = (~gate.keep).nonzero()[0]
            gate.keep[another] = True
            assert stage.weights() > stage.limit(density)
            gate.keep[another] = False


@given(st.integers(0, 2**31), st.floats(0.1, 1.0))
def test_rows_of_large_sites_are_kept_in_groups_of_16_by_priority(seed, density):
    model = make_model(hidden_size=16, num_hidden_layers=4, intermediate_size=520)
    attach(model, PruningConfig.create(density, minimum_units=3))
    stage = StructuredStage(pruning_state(model))
    generator = torch.Generator().manual_seed(seed)
    # Layers of very different worth: some keep no more than they must.
    scales = 10.0 ** torch.randint(-3, 1, (len(stage.active),), generator=generator)
    priorities = [
        torch.rand(live, generator=generator) * scale
        for live, scale in zip(stage.active, scales, strict=True)
    ]
    fitted = stage.fit(priorities, density, final=False)
    masks = stage.fit(priorities, density, final=True)
    rows = [index for index, (_, site) in enumerate(stage.groups) if site == "fc1"]
    counts = [int(masks[index].sum()) for index in rows]
    assert len([count for count in counts if count % 16 and count not in (3, 520)]) <= 1
    for index in rows:
        worth, keep = priorities[index], masks[index]
        assert bool(keep.all()) or float(worth[keep].min()) > float(worth[~keep].max())
        assert int(keep.sum()) >= 3
    # Grouping moves no more than a group per site, and what that frees.
    moved = [abs(int(masks[index].sum()) - int(fitted[index].sum())) for index in rows]
    assert max(moved) <= 16 * len(rows)


@given(st.integers(0, 2**31), st.floats(0.05, 1.0))
def test_block_budget_is_met_within_the_smallest_block(seed, density):
    model = make_model(intermediate_size=45)
    attach(model, PruningConfig.create(0.5, levels=("blocks",), block_shape=(7, 5)))
    pairs = [(linear.masks.blocks, linear) for linear in pruning_state(model).linears]
    stage = BlockStage(pruning_state(model), pairs)
    generator = torch.Generator().manual_seed(seed)
    priorities = [torch.rand(live, generator=generator) for live in stage.active]
    masks = stage.fit(priorities, density, final=True)
    for gate, keep in zip(stage.gates, masks, strict=True):
        gate.set_keep(keep)
    left = stage.limit(density) - stage.weights()
    removed = torch.cat([costs[~keep] for costs, keep in zip(stage.costs, masks, strict=True)])
    assert left >= 0
    assert len(removed) == 0 or left < float(removed.min())
    assert pruning_state(model).density() == stage.density()


@given(st.integers(1, 10**9), st.floats(0.001, 1.0))
def test_a_limit_is_the_density_of_all_weights_rounded_down(total, density):
    model = make_model(num_hidden_layers=1)
    attach(model, PruningConfig.create(0.5))
    stage = StructuredStage(pruning_state(model))
    stage.total = total
    # A product of floats may lie just below the whole number that it stands for.
    assert density * total - 1 < stage.limit(density) <= density * total + 1e-6


def test_higher_priority_is_kept_first_and_equal_ones_by_index():
    model = make_model(num_hidden_layers=1)
    attach(model, PruningConfig.create(0.6, levels=("rows",)))
    stage = StructuredStage(pruning_state(model))
    worth = torch.zeros(48)
    worth[[5, 40]] = 1.0
    (keep,) = stage.fit([worth], 0.75, final=False)
    kept = keep.nonzero().flatten().tolist()
    assert {5, 40} < set(kept)
    assert sorted(set(kept) - {5, 40}) == [i for i in range(48) if i not in (5, 40)][: len(kept) - 2]


def test_ranking_is_importance_per_weight():
    config = PruningConfig.create(0.5)
    model = make_model()
    attach(model, config)
    stage = StructuredStage(pruning_state(model))
    method = config.make_method()
    plan = make_schedule(config, 100)
    gradients = [torch.full((live,), 2.0) for live in stage.active]
    method.learn(stage, gradients, 0.5, Progress(0, Phase.WARMUP, plan))
    # (1 - 0.98) · 2² over 4·8·32 weights of a head, 2·32 of an FC1 row.
    for (_, site), priority in zip(stage.groups, method.priorities(stage), strict=True):
        freed = 4 * 8 * 32 if site == "heads" else 2 * 32
        torch.testing.assert_close(priority, torch.full_like(priority, 0.08 / freed))


def test_first_target_is_half_as_in_the_papers_recipe_or_the_root():
    assert PruningConfig.create(0.2, levels=LEVELS).first_target() == 0.5
    assert PruningConfig.create(0.64, levels=LEVELS).first_target() == pytest.approx(0.8)
    assert PruningConfig.create(0.2, levels=LEVELS, structured_density=0.4).first_target() == 0.4
    assert PruningConfig.create(0.2, levels=("heads", "rows")).first_target() == 0.2


def test_blocks_of_a_model_pruned_before_go_from_what_it_has():
    model = make_model()
    prune(model, PruningConfig.create(0.4))
    shrink(model)
    had = report(model).density
    attach(model, PruningConfig.create(0.3, levels=LEVELS, block_shape=(8, 4)))
    start(model, 100)
    model.train()
    for step in range(1, 100):
        loss_of(model, make_batch(seed=step)).backward()
        collect(model)
        advance(model, step)
        model.zero_grad()
        if step == 30:
            break
    found = figures(model)
    assert found["pruning_phase"] == Phase.BLOCKS
    assert found["density_target"] < had
    assert current_run(pruning_state(model)).origin == pytest.approx(had)
