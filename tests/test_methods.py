"""What methods rank by, held to counts by brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from families import each_family
from hf_mlprune import PruningConfig, advance, attach, collect, start
from hf_mlprune.config import LEVELS, ROW_SITES
from hf_mlprune.config import METHODS as NAMES
from hf_mlprune.methods import METHODS
from hf_mlprune.stages import BlockStage, StructuredStage
from hf_mlprune.state import pruning_state
from support.models import loss_of, make_batch, make_model


@each_family
def test_squared_norms_are_those_of_what_goes_with_a_unit(family):
    model = make_model(family=family)
    attach(model, PruningConfig.create(0.3, row_sites=ROW_SITES))
    state = pruning_state(model)
    stage = StructuredStage(state)
    for gate, norms in zip(stage.gates, stage.squared_norms(), strict=True):
        for unit in {0, gate.units // 2, gate.units - 1}:
            keep = torch.ones(gate.units, dtype=torch.bool)
            keep[unit] = False
            gate.set_keep(keep)
            lost = 0.0
            for linear in state.linears:
                stays = torch.ones_like(linear.weight, dtype=torch.bool)
                if linear.masks.rows:
                    stays &= linear.masks.rows.keep()[:, None]
                if linear.masks.columns:
                    stays &= linear.masks.columns.keep()[None, :]
                lost += float(linear.weight.detach()[~stays].square().sum())
            assert float(norms[unit]) == pytest.approx(lost, rel=1e-5)
            gate.set_keep(torch.ones(gate.units, dtype=torch.bool))


@settings(max_examples=15)
@given(shape=st.tuples(st.integers(1, 9), st.integers(1, 9)), seed=st.integers(0, 99))
def test_squared_norms_of_blocks_are_those_of_kept_rows_and_columns(shape, seed):
    model = make_model()
    attach(model, PruningConfig.create(0.3, levels=LEVELS, row_sites=ROW_SITES, block_shape=shape))
    state = pruning_state(model)
    generator = torch.Generator().manual_seed(seed)
    for gate in StructuredStage(state).gates:
        gate.set_keep((torch.rand(gate.units, generator=generator) < 0.5).index_fill(0, torch.tensor([0]), 1))
    stage = BlockStage(state, [(linear.masks.blocks, linear) for linear in state.linears])
    for linear, norms in zip(stage.linears, stage.squared_norms(), strict=True):
        rows, columns = (
            side.keep() if side else torch.ones(length, dtype=torch.bool)
            for side, length in zip(
                (linear.masks.rows, linear.masks.columns), linear.weight.shape, strict=True
            )
        )
        kept = linear.weight.detach()[rows][:, columns].square()
        blocks = [block.sum() for band in kept.split(shape[0]) for block in band.split(shape[1], dim=1)]
        torch.testing.assert_close(norms, torch.stack(blocks))


def test_the_settings_know_every_method():
    assert tuple(METHODS) == NAMES


def test_magnitude_keeps_the_rows_of_largest_weights():
    model = make_model()
    attach(model, PruningConfig.create(0.8, method="magnitude", levels=("rows",)))
    start(model, 20)
    for step in range(1, 21):
        loss_of(model, make_batch("sequence", seed=step)).backward()
        collect(model)
        advance(model, step)
    state = pruning_state(model)
    norms, keeps = [], []
    for gate in state.all_gates():
        first, second = (
            next(x for x in state.linears if side(x) is not None and side(x).gate is gate)
            for side in (lambda x: x.masks.rows, lambda x: x.masks.columns)
        )
        norms.append(first.weight.square().sum(1) + second.weight.square().sum(0))
        keeps.append(gate.keep)
    norms, keeps = torch.cat(norms), torch.cat(keeps)
    assert 0 < int(keeps.sum()) < len(keeps)
    assert norms[keeps].min() > norms[~keeps].max()
