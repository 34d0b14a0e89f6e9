"""What methods rank by, held to counts by brute force."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification

from families import each_family
from hf_mlprune import PruningCallback, PruningConfig, advance, attach, collect, report, shrink, start
from hf_mlprune.encoders import inspect_encoder
from hf_mlprune.levels import LEVELS, ROW_SITES
from hf_mlprune.methods import METHODS, Method, MethodSettings, setting_names
from hf_mlprune.methods.ranking import Ranking
from hf_mlprune.methods.snip import bound_spectral_norms, function_norms, spectral_norm
from hf_mlprune.narrowing import compute_all
from hf_mlprune.stage import Owned
from hf_mlprune.stages import BlockStage, StructuredStage
from hf_mlprune.state import pruning_state
from support.methods import SETTINGS, each_method
from support.models import assert_same_outputs, clone, loss_of, make_batch, make_model, prune
from support.training import make_trainer


class Divided(Ranking):
    """Of one unit nobody knows the importance."""

    def score(self, stage, gradients):
        for gate, active in zip(stage.gates, stage.active, strict=True):
            gate.scores[:active] = 1.0
        stage.gates[-1].scores[0] = float("nan")


class Infinite(Ranking):
    """All units are infinitely important."""

    def score(self, stage, gradients):
        for gate, active in zip(stage.gates, stage.active, strict=True):
            gate.scores[:active] = float("inf")


def test_importance_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"importance of every unit, got NaN for 1 of 48 units of a group"):
        prune(make_model(), PruningConfig.create(0.3, method=Divided))


def test_every_layer_keeps_units_beside_others_of_infinite_importance():
    model = make_model(num_hidden_layers=3)
    prune(model, PruningConfig.create(0.3, method=Infinite))
    shrink(model)
    assert all(layer.heads[0] and layer.fc1[0] for layer in report(model).layers)


class Misspelt(Divided):
    """Its defaults are of no run."""

    defaults: ClassVar = {"structured_fractoin": 0.3}


def test_defaults_of_a_method_are_settings_of_a_run():
    with pytest.raises(ValueError, match=r"defaults of Misspelt, got \['structured_fractoin'\]"):
        PruningConfig.create(0.3, method=Misspelt)


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


@each_method
def test_every_method_lands_and_its_masked_model_is_the_shrunk_and_the_reloaded_one(method, tmp_path):
    model = make_model()
    prune(model, PruningConfig.create(0.5, method=method, **SETTINGS[method]))
    state = pruning_state(model)
    compute_all(state)
    unit = max(int(costs.max()) for costs in StructuredStage(state).costs) / state.total_weights()
    assert 0.5 - (unit if method == "snip" else 0.02) < state.density() <= 0.5
    masked, batch = clone(model), make_batch(seed=99)
    shrink(model)
    assert_same_outputs(masked, model, batch)
    model.save_pretrained(tmp_path)
    assert_same_outputs(masked, AutoModelForSequenceClassification.from_pretrained(tmp_path), batch)


@each_family
@each_method
def test_every_method_prunes_every_family(method, family):
    model = make_model(family=family)
    prune(model, PruningConfig.create(0.6, method=method, **SETTINGS[method]))
    assert pruning_state(model).density() <= 0.6
    shrink(model)


@each_method
def test_settings_of_a_method_are_written_and_read(method):
    config = PruningConfig.create(0.3, method=method, **SETTINGS[method])
    assert PruningConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert set(config.to_dict()) == {*PruningConfig.run_settings(), *setting_names(METHODS[method])}


@pytest.mark.parametrize(("name", "meant"), [("snap", "snip"), ("lasso", "group-lasso"), ("SNIP", "snip")])
def test_an_unknown_method_says_what_there_is(name, meant):
    with pytest.raises(ValueError, match=rf"method: expected any of \('fisher', .*did you mean '{meant}'"):
        PruningConfig.create(0.3, method=name)


class FirstUnits(Ranking):
    """A method of a user's own: the first units of each gate stay."""

    def score(self, stage, gradients):
        for gate, costs, active in zip(stage.gates, stage.costs, stage.active, strict=True):
            gate.scores[:active] = torch.arange(active, 0, -1) * costs


def test_a_class_of_the_users_own_prunes_and_is_found_again(tmp_path):
    model = make_model()
    trainer = make_trainer(
        tmp_path, model, PruningCallback(0.3, method=FirstUnits), save_strategy="steps", save_steps=8
    )
    trainer.train()
    for layer in inspect_encoder(trainer.model).structure.layers:
        assert all(kept == tuple(range(len(kept))) for kept in layer.kept.values())
    again = make_trainer(tmp_path, make_model(), PruningCallback(0.3, method=FirstUnits))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)


class OutputNorm(Ranking):
    """A method of a user's own, as the guide has it: of weights and inputs, with no word on autograd."""

    needs_inputs = True
    graphs: ClassVar[list[bool]] = []

    def score(self, stage, gradients):
        for gate, owned, active in zip(stage.gates, stage.owned(), stage.active, strict=True):
            (last,) = [each for each in owned if each.inputs is not None]
            used = last.inputs.reshape(-1, last.inputs.shape[-1]).norm(dim=0)
            gate.scores[:active] += last.sum(last.weight.abs() * used)
            self.graphs.append(gate.scores.requires_grad)


def test_what_a_method_computes_of_weights_has_no_graph(tmp_path):
    trainer = make_trainer(
        tmp_path, make_model(), PruningCallback(targets=[0.6, 0.4], method=OutputNorm), max_steps=40
    )
    trainer.train()
    assert trainer.model.num_parameters() < make_model().num_parameters()
    assert OutputNorm.graphs
    assert not any(OutputNorm.graphs)


class Unscored(Ranking):
    pass


class Returning(Ranking):
    def score(self, stage, gradients):
        return gradients


class Loose(MethodSettings):
    horizon: int = 3


@dataclass(frozen=True)
class Taken(MethodSettings):
    length: int = 3
    density: float = 0.1


@dataclass(frozen=True)
class Deep(MethodSettings):
    window: tuple = (1, 2)


class LooseRanking(FirstUnits):
    Settings = Loose


class TakenRanking(FirstUnits):
    Settings = Taken


class DeepRanking(FirstUnits):
    Settings = Deep


class DictRanking(FirstUnits):
    Settings = dict


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Unscored, "method: expected Unscored to define score; see docs/add-a-method.md"),
        (Ranking, "method: expected Ranking to define score"),
        (Method, "method: expected Method to define learn, priorities and select"),
        (LooseRanking, "expected LooseRanking.Settings to be a frozen dataclass derived from MethodSettings"),
        (DictRanking, "expected DictRanking.Settings to be a frozen dataclass .* got <class 'dict'>"),
        (TakenRanking, r"other names for settings of TakenRanking, .*: \['density', 'length'\]"),
        (DeepRanking, r"window: expected a number or a string, .* got \(1, 2\)"),
    ],
)
def test_a_class_that_no_run_could_use_is_refused_as_it_is_given(method, message):
    with pytest.raises(ValueError, match=message):
        PruningCallback(density=0.5, method=method)


def test_a_score_that_is_returned_is_not_lost_in_silence(tmp_path):
    trainer = make_trainer(tmp_path, make_model(), PruningCallback(0.5, method=Returning))
    with pytest.raises(TypeError, match=r"Returning.score: expected it to write .* it returned list"):
        trainer.train()


def test_names_in_files_run_no_code():
    with pytest.raises(
        ValueError, match=r"wave\.Reader is a class of the user's own; import its module wave"
    ):
        PruningConfig.from_dict({"density": 0.3, "method": "wave.Reader"})
    assert "wave" not in sys.modules


def test_a_method_that_could_not_be_found_again_is_refused():
    class Local(FirstUnits):
        pass

    with pytest.raises(ValueError, match="expected a class at the top level of a module"):
        PruningConfig.create(0.3, method=Local)
    with pytest.raises(TypeError, match="expected a name or a subclass of Method, got 3"):
        PruningConfig.create(0.3, method=3)


def penalty_of(stage, weight, epsilon):
    """Σ λ p γ r with γ held fixed, by autograd on copies; and the copies."""
    copies = {
        id(each.weight): each.weight.detach().double().requires_grad_()
        for owned in stage.owned()
        for each in owned
    }
    total = 0.0
    for owned in stage.owned():
        squares = sum(each.sum(copies[id(each.weight)].square()) for each in owned)
        sizes = sum(each.sum(torch.ones_like(each.weight)) for each in owned)
        means = (squares / sizes.clamp(min=1)).clamp(min=1e-30).sqrt()
        total = total + (weight * sizes * means / (means.detach() + epsilon)).sum()
    return total, copies


@pytest.mark.parametrize("levels", [("heads",), ("rows",), ("blocks",)])
@pytest.mark.parametrize("shape", [(4, 4), (1, 6), (6, 1), (5, 7)])
def test_the_gradient_of_group_lasso_reaches_the_weights(levels, shape):
    model = make_model()
    blocks = {"block_shape": shape} if levels == ("blocks",) else {}
    attach(
        model,
        PruningConfig.create(
            0.9, method="group-lasso", levels=levels, warmup_fraction=0.0, lasso_weight=1e-5, **blocks
        ),
    )
    start(model, 20)
    loss_of(model.train(), make_batch()).backward()
    stage = pruning_state(model).run.stage
    before = {id(each.weight): each.weight.grad.clone() for owned in stage.owned() for each in owned}
    total, copies = penalty_of(stage, 1e-5, 1e-3)
    total.backward()
    collect(model)
    assert float(total.detach()) == pytest.approx(pruning_state(model).run.pressure.penalty, rel=1e-4)
    for owned in stage.owned():
        for each in owned:
            found = each.weight.grad - before[id(each.weight)]
            assert float(found.abs().max()) > 0
            torch.testing.assert_close(found, copies[id(each.weight)].grad.float(), rtol=1e-2, atol=1e-6)


def test_group_lasso_makes_the_norms_of_groups_uneven():
    """What it is for: after it, few groups hold the weights; after plain training, all do."""
    spreads = []
    for weight in (1e-12, 1e-7):
        model = make_model()
        config = PruningConfig.create(0.7, method="group-lasso", levels=("rows",), lasso_weight=weight,
                                      structured_fraction=0.9, block_fraction=0.0)  # fmt: skip
        attach(model, config)
        start(model, 200)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
        for step in range(1, 180):
            loss_of(model.train(), make_batch(seed=step)).backward()
            collect(model)
            optimizer.step()
            optimizer.zero_grad()
            advance(model, step)
        norms = torch.cat(pruning_state(model).run.stage.squared_norms()).sqrt()
        spreads.append(float(norms.std() / norms.mean()))
    assert spreads[1] > 1.5 * spreads[0]


@given(
    tokens=st.integers(1, 6), units=st.integers(1, 4), span=st.integers(1, 3), width=st.integers(1, 5),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_function_norms_and_their_gradient(tokens, units, span, width, seed):
    torch.manual_seed(seed)
    inputs, weight = torch.randn(tokens, units * span), torch.randn(width, units * span, requires_grad=True)
    parts = [
        (inputs[:, each] @ weight[:, each].T).norm(dim=1).mean() / width**0.5
        for each in torch.arange(units * span).split(span)
    ]
    torch.stack(parts).sum().backward()
    found, gradient = function_norms(Owned("fc2", 0, weight.detach(), None, None, inputs), units)
    torch.testing.assert_close(found, torch.stack(parts).detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gradient, weight.grad, rtol=1e-2, atol=1e-3)


def test_spectral_norms_are_those_of_the_decomposition():
    torch.manual_seed(0)
    for shape in ((8, 5), (5, 8), (6, 6)):
        weight = torch.randn(shape)
        true = float(torch.linalg.matrix_norm(weight, 2))
        assert 0.8 * true < float(spectral_norm(weight)) <= true * 1.0001


def test_snip_brings_spectral_norms_to_the_median_of_their_kind():
    model = make_model(num_hidden_layers=3)
    with torch.no_grad():
        model.base_model.encoder.layer[1].output.dense.weight.mul_(5)
    attach(model, PruningConfig.create(0.9, method="snip"))
    stage = StructuredStage(pruning_state(model))
    bound_spectral_norms(stage, 0.0)
    before = [layer.output.dense.weight.clone() for layer in model.base_model.encoder.layer]
    bound_spectral_norms(stage, 1.0)
    norms = sorted(float(spectral_norm(weight)) for weight in before)
    for layer, weight in zip(model.base_model.encoder.layer, before, strict=True):
        wanted = min(float(spectral_norm(weight)), norms[1])
        assert float(spectral_norm(layer.output.dense.weight)) == pytest.approx(wanted, rel=1e-3)


def test_snip_removes_whole_modules_from_the_compute(tmp_path):
    model = make_model(num_hidden_layers=3)
    prune(model, PruningConfig.create(0.4, method="snip"), steps=40)
    shrink(model)
    widths = [layer.widths for layer in inspect_encoder(model).structure.layers]
    assert {width["fc1"] for width in widths} == {0, 48}
    for layer, width in zip(model.base_model.encoder.layer, widths, strict=True):
        linears = [each for each in layer.modules() if isinstance(each, torch.nn.Linear)]
        assert any(each.out_features == 48 for each in linears) == bool(width["fc1"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "snip", "levels": ("rows",)},
            r"levels: expected any of \('heads', 'attention', 'ffn'\) with",
        ),
        (
            {"method": "mlpruning", "levels": ("attention", "ffn")},
            r"levels: expected any of \('heads', 'rows', 'blocks'\) with the method 'mlpruning'",
        ),
        ({"levels": ("heads", "attention")}, "levels: expected 'attention' or heads, got both"),
        ({"levels": ("rows", "ffn")}, "levels: expected 'ffn' or rows of fc1, got both"),
        ({"method": "snip", "norm_decay": 1}, "norm_decay: expected less than 1, got 1"),
        ({"method": "snip", "spectral_share": 2.0}, "spectral_share: expected at most 1, got 2.0"),
        ({"method": "group-lasso", "lasso_weight": 0}, "lasso_weight: expected more than 0, got 0"),
        (
            {"method": "group-lasso", "lasso_refreshes": 0},
            "lasso_refreshes: expected a whole number from 1 up",
        ),
        ({"method": "random", "draw": -1}, "draw: expected a whole number from 0 up, got -1"),
        ({"lasso_weight": 1.0}, "lasso_weight: has no effect here, it needs the method 'group-lasso'"),
    ],
)
def test_settings_of_methods_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        PruningConfig.create(0.3, **settings)
