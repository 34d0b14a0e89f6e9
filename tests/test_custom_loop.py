"""Distillation in a loop of one's own: gradients, the step-1 teacher, and nothing left behind."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from families import TABLE
from hf_mlprune import PruningConfig, advance, attach, collect, distilled, report, shrink, start
from hf_mlprune.state import pruning_state
from support.models import labelled_head, make_batch, make_model


def gradients(model, batch) -> torch.Tensor:
    model.zero_grad()
    model.train()(**batch).loss.backward()
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
