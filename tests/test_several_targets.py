"""Several targets in one run: each model lands, lies within the one before, and loads."""

from __future__ import annotations

import json
from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertTokenizer,
    TrainerCallback,
)

from families import each_family
from hf_mlprune import (
    PruningCallback,
    PruningConfig,
    advance,
    attach,
    collect,
    finished_target,
    report,
    shrink,
    start,
)
from hf_mlprune.budgets import BUDGETS
from hf_mlprune.encoders import inspect_encoder
from hf_mlprune.methods.base import Progress
from hf_mlprune.schedule import Phase, make_schedules
from hf_mlprune.shrinking import ShrinkError
from hf_mlprune.stages import StructuredStage
from hf_mlprune.state import pruning_state
from support.methods import SETTINGS
from support.models import assert_same_outputs, clone, loss_of, make_batch, make_model
from support.training import make_trainer
from test_nested import Pair, make_pair


def without_blocks(method: str) -> dict:
    """Settings of a method for several targets."""
    row = {name: value for name, value in SETTINGS[method].items() if name != "block_shape"}
    return {**row, "method": method, "levels": [level for level in row["levels"] if level != "blocks"]}


class Remembers(Pair):
    """Keeps a tensor with its graph, which cannot be copied."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        out = super().forward(input_ids, attention_mask, labels)
        self.last = out["logits"]
        return out


def test_a_model_that_cannot_be_copied_on_the_way_is_refused_after_the_first_step(tmp_path):
    model = Remembers(make_model("model"), make_model("model", 1))
    callback = PruningCallback(targets=[0.6, 0.3], encoder=["first", "second"])
    trainer = make_trainer(tmp_path, model, callback, max_steps=48)
    with pytest.raises(ShrinkError, match="as its rehearsal did: Only Tensors created explicitly"):
        trainer.train()
    assert trainer.state.global_step <= 1


def run(model, config, steps, family="bert"):
    """A custom loop; the shrunk copies at its targets, in order, and the masked models that they are of."""
    attach(model, config)
    start(model, steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    found = []
    for step in range(1, steps + 1):
        loss_of(model, make_batch(seed=step, family=family)).backward()
        collect(model)
        optimizer.step()
        optimizer.zero_grad()
        if finished_target(model, step) is not None or step == steps:
            assert finished_target(model, step) == (len(found) if step < steps else None)
            found.append((clone(model), deepcopy(model)))
            shrink(found[-1][1])
        advance(model, step)
    return found


def kept_of(model):
    """Kept units of each layer and group, as sets."""
    layers = inspect_encoder(model).structure.layers
    return [{group: set(kept) for group, kept in layer.kept.items()} for layer in layers]


def assert_nested(models):
    kept = [kept_of(model) for model in models]
    for larger, smaller in pairwise(kept):
        for before, after in zip(larger, smaller, strict=True):
            assert all(after[group] <= before[group] for group in before)


@each_family
def test_models_land_one_within_the_other_and_are_the_masked_ones(family, tmp_path):
    targets = (0.8, 0.7, 0.6)
    found = run(make_model(family=family), PruningConfig.create(targets=targets), 60, family)
    assert len(found) == 3
    assert_nested([small for _, small in found])
    for (masked, small), target in zip(found, targets, strict=True):
        stage = StructuredStage(pruning_state(masked))
        unit = max(float(costs.max()) for costs in stage.costs if len(costs)) / stage.total
        assert target - unit <= pruning_state(masked).density() <= target
        assert_same_outputs(masked, small, make_batch(seed=99, family=family))


@pytest.mark.parametrize("method", SETTINGS)
def test_every_method_goes_on_from_one_target_to_the_next(method):
    config = PruningConfig.create(targets=(0.8, 0.5), **without_blocks(method))
    found = run(make_model(), config, 60)
    assert_nested([small for _, small in found])
    first, last = (pruning_state(masked).density() for masked, _ in found)
    assert 0.5 < first <= 0.8
    assert last <= 0.5


@pytest.mark.parametrize(
    ("name", "targets"),
    [("size", ("75 kB", "65 kB")), ("multiply_adds", (0.8, 0.6)), ("density", (0.8, 0.6))],
)
def test_every_kind_of_target_can_be_several(name, targets):
    model = make_model()
    found = run(model, PruningConfig.create(**{name: targets[-1]}, targets=targets), 60)
    assert_nested([small for _, small in found])
    for (masked, _), target in zip(found, targets, strict=True):
        state = pruning_state(masked)
        stage = StructuredStage(state)
        budget = BUDGETS[name](state.budget().sizes, {**vars(state.config), name: target})
        unit = max(float(costs.max()) for costs in stage.costs) / stage.total
        assert budget.share() - unit <= stage.kept_share() <= budget.share() + 1e-9


@given(st.integers(0, 999), st.floats(0.3, 0.6), st.integers(0, 2))
def test_what_went_with_a_target_never_comes_back(seed, share, minimum):
    model = make_model(intermediate_size=520)
    attach(model, PruningConfig.create(targets=(0.7, 0.3), minimum_units=minimum))
    generator = torch.Generator().manual_seed(seed)
    stage = StructuredStage(pruning_state(model))
    random = [torch.rand(units, generator=generator) for units in stage.active]
    for gate, keep in zip(stage.gates, stage.fit(random, 0.7, final=True), strict=True):
        gate.candidates.copy_(keep)
    stage = StructuredStage(pruning_state(model))
    for final in (False, True):
        random = [torch.rand(units, generator=generator) for units in stage.active]
        keep = stage.fit(random, share, final=final)
        for mask, candidates in zip(keep, stage.candidates, strict=True):
            assert not bool((mask & ~candidates).any())
            assert int(mask.sum()) >= min(minimum, int(candidates.sum()))
        cost = stage.cost_of([int(mask.sum()) for mask in keep]) / stage.total
        unit = max(float(costs.max()) for costs in stage.costs) / stage.total
        assert cost <= share + 1e-9
        assert not final or cost >= share - unit


@given(st.integers(60, 5000), st.integers(2, 3), st.sampled_from([0.0, 0.05, 0.5, 0.97]))
def test_every_target_has_its_part_of_the_run(steps, count, warmup):
    fractions = {"structured_fraction": 0.02, "block_fraction": 0.005} if warmup > 0.5 else {}
    config = PruningConfig.create(targets=(0.5, 0.35, 0.2)[:count], warmup_fraction=warmup, **fractions)
    schedules = make_schedules(config, steps)
    assert [each.start for each in schedules] == [0, *(each.end for each in schedules[:-1])]
    assert schedules[-1].end == steps
    first, *others = (each.end - each.warmup_end for each in schedules)
    assert max(others) - min(others) <= 1
    assert abs(first - 2 * others[0]) <= 2
    for each in schedules:
        assert each.warmup_end < each.structured_end == each.blocks_end < each.end
        assert each.phase(each.end - 1) is Phase.FINAL


def test_a_run_of_trainer_writes_the_models_on_the_way(tmp_path):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens), encoding="utf-8")
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    callback = PruningCallback(targets=[0.8, 0.7, 0.6], teacher=make_model(seed=7))
    trainer = make_trainer(
        tmp_path / "run", make_model(), callback, max_steps=66, eval_strategy="steps", eval_steps=3,
        save_strategy="steps", save_steps=3, save_total_limit=1, load_best_model_at_end=True,
        metric_for_best_model="loss",
    )  # fmt: skip
    trainer.processing_class = trainer.callback_handler.processing_class = tokenizer
    trainer.train()
    small = [
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / f"density-{target}")
        for target in (0.8, 0.7)
    ]
    assert_nested([*small, trainer.model])
    for target, model in zip((0.8, 0.7), small, strict=True):
        folder = tmp_path / "run" / f"density-{target}"
        found = json.loads((folder / "pruning_report.json").read_text())
        assert found["density"] <= target
        assert found["settings"]["density"] == target
        assert found["settings"]["targets"] == [0.8, 0.7, 0.6]
        assert found["latency"]
        assert f"{found['density']:.1%}" in (folder / "README.md").read_text()
        assert AutoConfig.from_pretrained(folder).structure == model.config.structure
        assert len(BertTokenizer.from_pretrained(folder)) == len(tokens)
    # Larger models are not the best ones of this run.
    schedule = make_schedules(callback.config, 66)[-1]
    assert trainer.state.best_global_step >= schedule.blocks_end
    assert json.loads((tmp_path / "run" / "pruning_report.json").read_text())["settings"]["density"] == 0.6


def test_a_model_on_the_way_is_written_beside_what_lies_there(tmp_path):
    (tmp_path / "density-0.8").mkdir()
    (tmp_path / "density-0.8" / "mine.onnx").write_text("a user's")
    callback = PruningCallback(targets=[np.float64(0.8), np.float32(0.5)])
    make_trainer(tmp_path, make_model(), callback, max_steps=40).train()
    assert (tmp_path / "density-0.8" / "mine.onnx").read_text() == "a user's"
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, subfolder="density-0.8")
    assert 0.5 < report(model).density <= 0.8
    settings = json.loads((tmp_path / "density-0.8" / "pruning_report.json").read_text())["settings"]
    assert PruningConfig.from_dict(settings).target == ("density", 0.8)


def test_a_module_of_the_users_own_is_written_so_that_it_loads_again(tmp_path):
    folder = tmp_path / "density-0.8"
    folder.mkdir()
    (folder / "mine.onnx").write_text("a user's")
    callback = PruningCallback(targets=[0.8, 0.6], encoder=["first", "second"])
    make_trainer(tmp_path, make_pair(), callback, max_steps=40).train()
    # The recipe of the README.
    towers = [AutoModel.from_config(AutoConfig.from_pretrained(folder / n)) for n in ("first", "second")]
    again = Pair(*towers)
    load_model(again, str(folder / "model.safetensors"))
    assert 0.6 < report(again).density <= 0.8
    assert report(again).density == json.loads((folder / "pruning_report.json").read_text())["density"]
    assert (folder / "mine.onnx").read_text() == "a user's"
    assert not list(tmp_path.glob("*partial*"))


class OnTheHub(nn.Module, PyTorchModelHubMixin):
    """A module that saves itself, and says nothing of the encoder in it."""

    def __init__(self, encoder=None):
        super().__init__()
        self.encoder = encoder or make_model()

    def forward(self, input_ids, attention_mask=None, labels=None):
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def test_a_module_that_saves_itself_has_the_configs_of_its_encoders_beside(tmp_path):
    callback = PruningCallback(targets=[0.8, 0.6], encoder="encoder.bert")
    make_trainer(tmp_path, OnTheHub(), callback, max_steps=40).train()
    folder = tmp_path / "density-0.8"
    tower = AutoModel.from_config(AutoConfig.from_pretrained(folder / "encoder.bert"))
    assert 0.6 < report(tower).density <= 0.8
    assert all(file.stat().st_mode & 0o044 for file in folder.glob("*.safetensors"))


class Mine(BertForSequenceClassification):
    """A class of the user's own, over one of transformers."""


def test_a_class_over_a_stock_one_is_written_with_its_report(tmp_path):
    model = Mine.from_pretrained(saved(make_model(), tmp_path / "dense"))
    make_trainer(tmp_path, model, PruningCallback(targets=[0.8, 0.6]), max_steps=40).train()
    found = json.loads((tmp_path / "density-0.8" / "pruning_report.json").read_text())
    assert 0.6 < found["density"] <= 0.8
    assert (tmp_path / "density-0.8" / "model.safetensors").is_file()


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def test_masks_that_wait_for_the_next_target_are_no_stall(caplog):
    run(make_model(), PruningConfig.create(targets=[0.8, 0.6], stall_steps=8), 100)
    assert "density has been" not in caplog.text


class Rates(TrainerCallback):
    """Learning rates that updates are taken with, and what the schedule says."""

    def __init__(self) -> None:
        self.taken, self.scheduled = [], []

    def on_pre_optimizer_step(self, args, state, control, *, optimizer, lr_scheduler, **kwargs):
        self.taken.append(optimizer.param_groups[0]["lr"])
        self.scheduled.append(lr_scheduler.get_last_lr()[0])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_step_size_cools_down_towards_each_target_but_the_last(schedule, tmp_path):
    rates = Rates()
    callback = PruningCallback(targets=[0.8, 0.6])
    changes = {"max_steps": 60, "lr_scheduler_type": schedule, "warmup_steps": 4}
    trainer = make_trainer(tmp_path, make_model(), callback, callbacks=[rates], **changes)
    trainer.train()
    plain = Rates()
    make_trainer(tmp_path, make_model(), callbacks=[plain], **changes).train()
    # The schedule is the stock one throughout.
    assert rates.scheduled == plain.scheduled == plain.taken
    first, last = make_schedules(callback.config, 60)
    factors = [taken / scheduled if scheduled else 1.0 for taken, scheduled in
               zip(rates.taken, rates.scheduled, strict=True)]  # fmt: skip
    middle = (first.blocks_end + first.end) // 2
    assert all(factor == 1 for factor in factors[: middle + 1] + factors[last.start :])
    falling = factors[middle : first.end]
    assert falling == sorted(falling, reverse=True)
    assert 0 < falling[-1] <= 1 / (first.end - middle) + 1e-9


class FullDisk:
    """A tokenizer that cannot be saved, from some call on."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def save_pretrained(self, folder) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError("No space left on device")


@pytest.mark.parametrize(("calls", "step"), [(0, 0), (1, 27)])
def test_a_tokenizer_that_cannot_be_saved_loses_nothing(calls, step, tmp_path):
    trainer = make_trainer(tmp_path, make_model(), PruningCallback(targets=[0.8, 0.6]), max_steps=40)
    trainer.processing_class = trainer.callback_handler.processing_class = FullDisk(calls)
    with pytest.raises(OSError, match="No space left") as caught:
        trainer.train()
    assert trainer.state.global_step == step
    if calls:
        assert "the trained model is saved with its masks" in caught.value.__notes__[0]
        assert (tmp_path / "_unshrunk_model" / "model.safetensors").is_file()


def test_learned_thresholds_go_on_from_where_they_landed():
    model = make_model(num_attention_heads=8, intermediate_size=64)
    attach(model, PruningConfig.create(targets=(0.7, 0.4), method="mlpruning"))
    state = pruning_state(model)
    generator = torch.Generator().manual_seed(0)
    stage = StructuredStage(state)
    for gate in stage.gates:
        gate.candidates.copy_(torch.rand(gate.units, generator=generator) < 0.5)
        gate.candidates[0] = True
        gate.set_keep(gate.candidates)
        gate.scores.copy_(torch.rand(gate.units, generator=generator))
    method, stage = state.config.make_method(), StructuredStage(state)
    method.take_up(stage)
    schedule = make_schedules(state.config, 60)[1]
    masks = method.select(stage, 0.4, Progress(schedule.start, Phase.STRUCTURED, schedule, 0.7))
    for mask, candidates in zip(masks, stage.candidates, strict=True):
        assert torch.equal(mask, candidates)


def test_masks_of_a_later_target_are_not_taken_for_those_of_the_first():
    model = make_model()
    config = PruningConfig.create(targets=(0.8, 0.6), structured_fraction=0.4)
    attach(model, config)
    start(model, 40)
    for step in range(1, 31):
        loss_of(model, make_batch(seed=step)).backward()
        collect(model)
        model.zero_grad()
        advance(model, step)
    start(model, 40, 30)
    with pytest.raises(ValueError, match="the first target should be at work"):
        start(model, 400, 30)


def test_a_module_of_ones_own_is_written_by_its_weights(tmp_path):
    callback = PruningCallback(targets=[0.8, 0.6], encoder=["first"])
    make_trainer(tmp_path, make_pair(), callback, max_steps=40).train()
    assert (tmp_path / "density-0.8" / "model.safetensors").is_file()
    found = json.loads((tmp_path / "density-0.8" / "pruning_report.json").read_text())
    assert 0.7 < found["density"] <= 0.8


def test_a_model_on_the_way_that_cannot_be_written_stops_the_run(tmp_path):
    (tmp_path / "density-0.8").write_text("a file")
    trainer = make_trainer(tmp_path, make_model(), PruningCallback(targets=[0.8, 0.6]), max_steps=40)
    with pytest.raises(NotADirectoryError, match=r"targets: expected .*density-0.8 to be a folder"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": [0.2, 0.5]}, "targets: expected several, from the one that leaves most to the one that"),
        ({"targets": [0.5]}, "targets: expected several"),
        ({"targets": [0.5, 0.5]}, "targets: expected several"),
        ({"targets": 0.5}, "targets: expected a list, got 0.5"),
        ({"targets": [0.5, 1.2]}, r"targets: expected densities, in \(0, 1\], got \[0.5, 1.2\]"),
        ({"targets": [0.5, "small"]}, "targets: expected densities, .*small"),
        ({"targets": [0.5, 0.2], "levels": ["heads", "blocks"]}, "expected no 'blocks' with several targets"),
        (
            {"targets": [0.5, 0.2], "density": 0.5},
            r"density: expected 0.2, the last of targets=\[0.5, 0.2\], or to be left out",
        ),
        ({"targets": ["12 ms", "10 ms"]}, "targets: expected densities, .*, too, as in latency='10 ms'"),
        ({"density": [0.5, 0.2]}, r"density: expected one value, .* give targets=\[0.5, 0.2\]"),
        ({"speedup": [2, 3]}, r"speedup: expected one value, .* give targets=\[2, 3\]"),
        ({"targets": [2, 3], "speedup": 2}, r"speedup: expected 3, the last of targets=\[2, 3\], got 2"),
        ({"targets": [2, 3]}, "targets: expected densities, .*, too, as in speedup=3"),
        ({"targets": ["12 ms", 0.5]}, "targets: expected densities, .* all of one kind, name it"),
        (
            {"targets": ["2 ms", "900 us"], "latency": "1 ms"},
            r"latency: expected '900 us', the last of targets=\['2 ms', '900 us'\], got '1 ms'",
        ),
        ({"targets": [3, 2], "speedup": 2}, "targets: expected several"),
        ({"targets": ["12 ms", "15 ms"], "latency": "15 ms"}, "targets: expected several"),
        (
            {"targets": ["30 MB", "29000 kB"], "size": "30 MB"},
            "size: expected '29000 kB', the last of targets=",
        ),
    ],
)
def test_targets_that_are_none_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PruningConfig.create(**settings)


def test_targets_that_a_model_or_a_run_cannot_reach_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"density 0.01 cannot be reached"):
        make_trainer(tmp_path, make_model(), PruningCallback(targets=[0.5, 0.01]))
    trainer = make_trainer(tmp_path, make_model(), PruningCallback(targets=[0.8, 0.6]))
    with pytest.raises(ValueError, match="20 optimizer steps to prune in for each of 2 targets, 40 in all"):
        trainer.train()
