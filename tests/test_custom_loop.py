"""Distillation in a loop of one's own: gradients, the step-1 teacher, and nothing left behind."""

from __future__ import annotations

import dataclasses
from copy import deepcopy

import pytest
import torch
from torch import nn

from families import TABLE
from hf_mlprune import PruningConfig, advance, attach, collect, distilled, report, shrink, start
from hf_mlprune.state import pruning_state
from support.models import labelled_head, make_batch, make_model


def gradients(model, batch, call=None) -> torch.Tensor:
    model.zero_grad()
    model.train()
    (model(**batch).loss if call is None else call()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", TABLE)
def test_gradients_are_those_of_both_losses_by_their_weights(family):
    head = labelled_head(family)
    model, teacher = (make_model(head, seed, family).double() for seed in (0, 1))
    batch = make_batch(head, family=family)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].double()
    settings = PruningConfig.create(0.5, task_weight=0.0)
    task = gradients(model, batch)
    with distilled(model, teacher, settings) as distillation:
        taught = gradients(model, batch)
        assert distillation.mean_loss() > 0
    with distilled(model, teacher, dataclasses.replace(settings, task_weight=0.3)):
        both = gradients(model, batch)
    # Losses are computed in float32.
    torch.testing.assert_close(both, 0.3 * task + 0.7 * taught, rtol=1e-4, atol=1e-5)
    assert not torch.equal(task, taught)
    assert torch.equal(gradients(model, batch), task)


def take(model, distillation, steps) -> None:
    """Steps that change masks and no weights."""
    for step in steps:
        model.train()(**make_batch(seed=step)).loss.backward()
        collect(model)
        model.zero_grad()
        advance(model, step)
        distillation.update()


class WithAnotherScalar(nn.Module):
    """A model with a figure beside its loss, as those with several losses have it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        out = self.model(**inputs)
        return {"figure": out.logits.square().mean(), "loss": out.loss, "logits": out.logits}


@pytest.mark.parametrize("weight", [0.0, 0.01, 1.0])
def test_other_scalars_of_the_loss_do_not_weigh_the_teacher(weight):
    model, teacher = WithAnotherScalar(make_model()), WithAnotherScalar(make_model(seed=1))
    batch = make_batch()
    with distilled(model, teacher, PruningConfig.create(0.5, task_weight=0.0)):
        expected = gradients(model.model, batch, call=lambda: model(**batch)["loss"])
        out = gradients(model.model, batch, call=lambda: total(model(**batch), weight))
    torch.testing.assert_close(out, expected)


def total(out, weight):
    return out["loss"] + weight * out["figure"]


class InPlace(nn.Module):
    """A model that scales its inputs where they lie."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, None

    def forward(self, scale, **inputs):
        scale.div_(255)
        self.seen = float(scale)
        out = self.model(**inputs)
        return {"loss": scale * out.loss, "logits": out.logits}


def test_what_a_model_does_to_its_inputs_in_place_the_other_does_not_see():
    model, teacher = InPlace(make_model()), InPlace(make_model(seed=1))
    with distilled(model, teacher, PruningConfig.create(0.5)):
        model.train()(scale=torch.tensor(255.0), **make_batch())["loss"].backward()
    assert (model.seen, teacher.seen) == (1.0, 1.0)


def test_masks_go_with_a_model_that_is_moved_after_the_start():
    model = make_model()
    attach(model, PruningConfig.create(0.5))
    start(model, 20)
    model.to("meta")
    assert {gate.mask.device.type for gate in pruning_state(model).all_gates()} == {"meta"}


def test_a_loop_taken_up_among_the_blocks_wants_the_step1_model_as_its_teacher():
    model, teacher = make_model(), make_model(seed=1)
    attach(model, PruningConfig.create(0.3, "paper", block_shape=(8, 4)))
    start(model, 24)
    with distilled(model, teacher) as distillation:
        take(model, distillation, range(1, 15))
        step1 = distillation.teacher
    start(model, 24, 14)
    refused = pytest.raises(ValueError, match=r"in its block phase, .* pass `distillation\.teacher`")
    with refused, distilled(model, teacher):
        pass
    with distilled(model, step1) as distillation:
        take(model, distillation, [15])
        assert distillation.teacher is step1


def test_a_frozen_encoder_is_taught_to_the_end():
    model, teacher = make_model(), make_model(seed=1)
    model.bert.requires_grad_(False)
    attach(model, PruningConfig.create(0.5, attention_weight=1.0))
    start(model, 20)
    with distilled(model, teacher) as distillation:
        take(model, distillation, range(1, 21))


@pytest.mark.parametrize("reentrant", [True, False])
def test_attention_is_taught_with_checkpoints_that_leave_it_a_gradient(reentrant):
    model, teacher = make_model(), make_model(seed=1)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    settings = PruningConfig.create(0.5, attention_weight=1.0)
    with distilled(model, teacher, settings):
        if reentrant:
            with pytest.raises(RuntimeError, match="attention weights have no gradient"):
                model.train()(**make_batch())
        else:
            model.train()(**make_batch()).loss.backward()


def test_a_run_in_a_loop_with_the_step1_model_as_the_teacher_of_blocks():
    model, teacher = make_model(), make_model(seed=1)
    config = PruningConfig.create(0.3, "paper", block_shape=(8, 4))
    attach(model, config)
    start(model, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    teachers = []
    with distilled(model, teacher) as distillation:
        for step in range(1, 25):
            model(**make_batch(seed=step)).loss.backward()
            collect(model)
            optimizer.step()
            optimizer.zero_grad()
            advance(model, step)
            distillation.update()
            teachers.append(distillation.teacher)
        assert distillation.mean_loss() > 0
    assert teachers[0] is teacher
    step1 = teachers[-1]
    assert step1 is not teacher
    assert 0.3 < report(step1).density <= config.first_target()
    # Another one for the phase of blocks, and the same to the end.
    assert [taught is step1 for taught in teachers] == [False] * 10 + [True] * 14
    shrink(model)
    assert report(model).density <= 0.3


def test_a_copy_that_is_made_in_a_pause_knows_nothing_of_the_teacher():
    model, teacher = make_model(), make_model(seed=3)
    attach(model, PruningConfig.create(0.5))
    start(model, 20)
    with distilled(model, teacher) as distillation:
        take(model, distillation, range(1, 20))
        with distillation.paused():
            copy = deepcopy(model)
        shrink(copy)
        assert distillation.mean_loss() > 0
        take(model, distillation, range(20, 21))
        assert distillation.mean_loss() > 0
    assert not copy._forward_hooks
    assert not copy._forward_pre_hooks
    rates = {module.p for module in copy.modules() if isinstance(module, nn.Dropout)}
    assert rates == {copy.config.hidden_dropout_prob}


def test_an_error_in_the_loop_leaves_no_hook():
    model, teacher = make_model(), make_model(seed=1)
    before = gradients(model, make_batch())
    with pytest.raises(ZeroDivisionError), distilled(model, teacher, PruningConfig.create(0.5)):
        1 / 0  # noqa: B018
    assert torch.equal(gradients(model, make_batch()), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_step_that_does_not_call_the_model_is_noticed():
    model, teacher = make_model(), make_model(seed=1)
    attach(model, PruningConfig.create(0.5))
    with distilled(model, teacher) as distillation, pytest.raises(RuntimeError, match="was not called"):
        distillation.update()


def test_without_masks_settings_are_needed():
    model = make_model()
    with (
        pytest.raises(ValueError, match=r"pass settings=PruningConfig\.create\(density\), or call `attach"),
        distilled(model, make_model(seed=1)),
    ):
        pass
    attach(model, PruningConfig.create(0.5, task_weight=0.7))
    with distilled(model, make_model(seed=1)):
        assert pruning_state(model).config.task_weight == 0.7
