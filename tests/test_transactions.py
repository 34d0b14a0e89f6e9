"""Whatever attach, start, shrink and a rehearsal raise, the model is as it was, to the bit."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_model
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

from hf_mlprune import PruningCallback, PruningConfig, advance, attach, collect, report, shrink, start
from hf_mlprune.levels import LEVELS
from hf_mlprune.shrinking import ShrinkError, rehearse, shrunk_copy
from hf_mlprune.state import is_attached
from hf_mlprune.trainer.ending import PRUNED, UNSHRUNK
from support.models import assert_same_outputs, loss_of, make_batch, make_dataset, make_model, prune
from support.training import make_trainer, training_arguments

ALL = PruningConfig.create(0.4, levels=LEVELS, block_shape=(8, 4), minimum_units=0)


def snapshot(model: nn.Module) -> dict[str, object]:
    """All that a user can see of a model, and the random generators."""
    found: dict[str, object] = {
        f"value of {name}": tensor.detach().clone()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    for name, module in model.named_modules():
        found[f"class of {name}"] = type(module)
        found[f"module {name}"] = id(module)
        found[f"mode of {name}"] = module.training
        found[f"hooks of {name}"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
        for key, value in vars(module).items():
            if isinstance(value, (int, float, str, bool)):
                found[f"{key} of {name}"] = value
    found |= {f"parameter {name}": id(parameter) for name, parameter in model.named_parameters()}
    found |= {f"dtype of {name}": parameter.dtype for name, parameter in model.named_parameters()}
    found |= {"config": id(model.config), "fields": model.config.to_dict()}
    return found | {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
    }


def assert_unchanged(before: dict[str, object], model: nn.Module) -> None:
    after = snapshot(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
        assert same, name


def failing(model, at: int, error: BaseException) -> None:
    """Have a part of a model raise at its n-th call from now."""
    calls = []

    def fail(*_):
        calls.append(None)
        if len(calls) == at:
            raise error

    model.classifier.register_forward_pre_hook(fail)


def ready(dtype=torch.float32, steps=20):
    model = make_model().to(dtype)
    prune(model, ALL, steps=steps)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), KeyboardInterrupt(), ValueError("odd")], ids=repr
)
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_shrink_that_is_interrupted(at, error, dtype):
    model = ready(dtype)
    failing(model, at, error)
    before = snapshot(model)
    with pytest.raises(type(error)):
        shrink(model, [make_batch(seed=1), make_batch(seed=2)])
    assert_unchanged(before, model)
    shrink(model)
    assert not is_attached(model)


def test_a_shrink_that_is_wrong_only_after_its_last_edit_is_noticed_and_undone(monkeypatch):
    import hf_mlprune.resizing as resizing

    model = ready()
    before = snapshot(model)
    real = resizing.set_surroundings

    def wrong(layer, kept, dense):
        real(layer, kept, dense)
        layer.get_submodule(dense.layout.matrices["fc2"].path).get_parameter("bias").data[0] += 1.0

    monkeypatch.setattr(resizing, "set_surroundings", wrong)
    with pytest.raises(ShrinkError, match="nothing was removed"):
        shrink(model)
    assert_unchanged(before, model)


@pytest.mark.parametrize("training", [True, False])
def test_a_rehearsal_changes_nothing(training):
    model = make_model(hidden_dropout_prob=0.1)
    attach(model, ALL)
    start(model, 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for step in range(1, 12):
        loss_of(model, make_batch(seed=step)).backward()
        collect(model)
        optimizer.step()
        optimizer.zero_grad()
        advance(model, step)
    model.train(training)
    model.classifier.eval()
    before = snapshot(model)
    small = []

    def inspect(done):
        small.append(report(model).density)
        torch.rand(3)
        random.random()

    rehearse(model, [make_batch()], inspect)
    assert small[0] < 0.6
    assert_unchanged(before, model)
    with pytest.raises(ZeroDivisionError):
        rehearse(model, [make_batch()], lambda done: 1 / 0)
    assert_unchanged(before, model)


@pytest.mark.parametrize("levels", [("attention", "ffn"), ("heads", "ffn"), ("attention", "rows")])
def test_whole_modules_are_removed_in_a_rehearsal(levels):
    model = make_model()
    attach(model, PruningConfig.create(0.5, levels=levels, minimum_units=0))
    start(model, 20)
    widths = []

    def inspect(done):
        (structure,) = done.structures.values()
        widths.extend(tuple(map(len, (layer.kept["heads"], layer.kept["fc1"]))) for layer in structure.layers)

    rehearse(model, [make_batch()], inspect)
    attention, ffn = zip(*widths, strict=True)
    assert "attention" not in levels or attention == (0, 4)
    assert "ffn" not in levels or ffn == (0, 48)


def test_runs_with_a_rehearsal_at_another_step_are_the_same(tmp_path):
    """As a resumed run has it."""

    class Rehearse(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 5:
                rehearse(model, [make_batch()], lambda done: None)

    def run(*callbacks):
        model = make_model(hidden_dropout_prob=0.1)
        make_trainer(tmp_path, model, PruningCallback(density=0.4), callbacks=callbacks).train()
        return model.state_dict()

    first, second = run(), run(Rehearse())
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initializer_range": 2.0}, "initializer_range: expected a number from 0 to 1"),
        ({"hidden_act": "sigmoid"}, "act"),
    ],
)
def test_attach_that_is_refused(changes, message):
    model = make_model()
    for name, value in changes.items():
        setattr(model.config, name, value)
    if "hidden_act" in changes:
        model.bert.encoder.layer[1].intermediate.intermediate_act_fn = nn.Sigmoid()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        attach(model, ALL)
    assert_unchanged(before, model)
    assert not is_attached(model)


@settings(max_examples=10)
@given(st.sampled_from(["query", "output", "intermediate"]), st.integers(0, 1))
def test_attach_to_foreign_linears(part, index):
    class Foreign(nn.Linear):
        pass

    model = make_model()
    layer = model.bert.encoder.layer[index]
    where = {"query": layer.attention.self, "output": layer.output, "intermediate": layer.intermediate}[part]
    name = "query" if part == "query" else "dense"
    old = getattr(where, name)
    setattr(where, name, Foreign(old.in_features, old.out_features))
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"expected nn\.Linear, got Foreign"):
        attach(model, ALL)
    assert_unchanged(before, model)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"levels": ("blocks",), "block_shape": (8, 4)}, (20, 19), "pruning stages should be final"),
        ({}, (19,), "expected at least 20 optimizer steps"),
        ({"levels": ("heads",)}, (20,), "cannot be reached"),
    ],
)
def test_start_that_is_refused(settings, arguments, message):
    model = make_model()
    attach(model, PruningConfig.create(0.3, **settings))
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        start(model, *arguments)
    assert_unchanged(before, model)


def test_a_copy_that_cannot_be_made_leaves_the_run():
    model = make_model()
    attach(model, ALL)
    start(model, 20)
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match="lock"):
        shrunk_copy(model)
    model.train()
    loss_of(model, make_batch()).backward()
    collect(model)
    advance(model, 1)


class _Break(TrainerCallback):
    """Makes the model fail at the very end, past every rehearsal."""

    def __init__(self, error):
        self.error = error

    def on_train_end(self, args, state, control, model, **kwargs):
        failing(model if hasattr(model, "classifier") else model.inner, 2, self.error)


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), KeyboardInterrupt()], ids=repr)
def test_an_export_that_fails_at_the_end_loses_nothing(error, tmp_path):
    model = make_model()
    trainer = Trainer(
        model=model,
        args=training_arguments(tmp_path),
        train_dataset=make_dataset(),
        callbacks=[_Break(error), PruningCallback(density=0.3)],
    )
    with pytest.raises((ShrinkError, KeyboardInterrupt)) as raised:
        trainer.train()
    said = str(raised.value) + "".join(getattr(raised.value, "__notes__", []))
    assert "the trained model is saved with its masks" in said
    folder = tmp_path / UNSHRUNK
    assert str(folder) in said
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    model.classifier._forward_pre_hooks.clear()
    torch.testing.assert_close(model.state_dict(), loaded.state_dict(), rtol=0, atol=0)
    assert_same_outputs(model, loaded, make_batch())
    shrink(loaded)
    assert report(loaded).density <= 0.3
    assert_same_outputs(model, loaded, make_batch())


def test_what_fails_after_the_shrink_leaves_the_pruned_model_on_disk(tmp_path):
    (tmp_path / "pruning_report.json").mkdir()
    trainer = make_trainer(tmp_path, make_model(), PruningCallback(density=0.3))
    with pytest.raises(OSError, match="pruning_report") as raised:
        trainer.train()
    assert "the pruned model is whole, and saved in" in "".join(raised.value.__notes__)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / PRUNED)
    assert report(loaded).density <= 0.3
    assert_same_outputs(trainer.model, loaded, make_batch())


def test_a_run_stopped_too_early_leaves_its_model_on_disk(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    trainer = make_trainer(tmp_path, make_model(), PruningCallback(density=0.3), callbacks=[Stop()])
    with pytest.raises(
        RuntimeError, match=r"before pruning did: .* the trained model is saved with its masks"
    ):
        trainer.train()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / UNSHRUNK)
    assert_same_outputs(trainer.model, loaded, make_batch(), 0.0)


def test_a_shrink_that_is_refused_puts_back_what_the_forward_wrote():
    model = ready()
    model.register_buffer("seen", torch.zeros(3))

    def count(module, args, out):
        model.seen = model.seen + out.detach().mean(0)
        return out * model.bert.encoder.layer[0].intermediate.dense.out_features

    model.classifier.register_forward_hook(count)
    before = snapshot(model)
    with pytest.raises(ShrinkError):
        shrink(model, [make_batch()])
    assert_unchanged(before, model)


def test_an_export_of_a_users_module_that_fails_at_the_end_loses_nothing(tmp_path):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_model()

        def forward(self, **batch):
            return self.inner(**batch)

    model = Around()
    trainer = Trainer(
        model=model,
        args=training_arguments(tmp_path, remove_unused_columns=False),
        train_dataset=make_dataset(),
        callbacks=[_Break(RuntimeError("out of luck")), PruningCallback(density=0.3)],
    )
    with pytest.raises(ShrinkError, match="out of luck; the trained model is saved with its masks"):
        trainer.train()
    again = Around()
    attach(again, PruningConfig.create(0.3))
    load_model(again, tmp_path / UNSHRUNK / "model.safetensors")
    shrink(again)
    model.inner.classifier._forward_pre_hooks.clear()
    assert_same_outputs(model.inner, again.inner, make_batch())
