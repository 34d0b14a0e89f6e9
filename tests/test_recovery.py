"""Where a teacher teaches, nothing is dropped while what is left of a model recovers."""

from __future__ import annotations

import contextlib

import pytest

from families import each_family
from hf_mlprune import PruningCallback, PruningConfig, advance, attach, collect, distilled, start
from hf_mlprune.distillation.dropout import dropouts_of
from hf_mlprune.families import find_encoders
from support.models import loss_of, make_batch, make_model
from support.training import make_trainer

STEPS = 20
#: The first that has final masks.
FINAL = 8


def with_dropout(family="bert"):
    """A model whose every dropout is at work."""
    model = make_model(family=family)
    for module, name, _ in dropouts_of(model):
        setattr(module, name, 0.5)
    return model


def probabilities(model):
    return {value for _, _, value in dropouts_of(model.base_model)}


def family_of(model):
    return find_encoders(model)[0][1].name


def losses(model):
    """Of two passes over one batch, as in training."""
    batch = make_batch(family=family_of(model))
    return [float(loss_of(model.train(), batch).detach()) for _ in range(2)]


def run(model, teacher=None):
    """A run to its end: what each pass was dropped with, and the losses of two more passes."""
    found = []
    with distilled(model, teacher) if teacher else contextlib.nullcontext() as distillation:
        start(model, STEPS)
        for step in range(1, STEPS + 1):
            loss_of(model.train(), make_batch(family=family_of(model), seed=step)).backward()
            found.append(probabilities(model))
            collect(model)
            advance(model, step)
            if distillation is not None:
                distillation.update()
        last = losses(model)
    assert probabilities(model) == {0.5}
    return found, last


@each_family
def test_nothing_is_dropped_once_masks_are_final(family):
    model = with_dropout(family)
    before = losses(model)
    assert before[0] != before[1]
    attach(model, PruningConfig.create(0.3))
    # That of a head outside of the encoder is its own affair.
    inside = {id(module) for module, _, _ in dropouts_of(model.base_model)}
    for module, name, _ in dropouts_of(model):
        if id(module) not in inside:
            setattr(module, name, 0.0)
    found, after = run(model, make_model(family=family, seed=7))
    assert found == [{0.5}] * FINAL + [{0.0}] * (STEPS - FINAL)
    assert after[0] == after[1]


@pytest.mark.parametrize(("setting", "expected"), [(None, 0.5), (0.1, 0.1)])
def test_the_recovery_has_the_dropout_of_the_settings(setting, expected):
    model = with_dropout()
    attach(model, PruningConfig.create(0.3, recovery_dropout=setting))
    assert run(model, make_model(seed=7))[0][-1] == {expected}


@pytest.mark.parametrize(("preset", "taught"), [("default", False), ("paper", True)])
def test_dropout_is_left_alone(preset, taught):
    model = with_dropout()
    attach(model, PruningConfig.create(0.3, preset))
    assert run(model, make_model(seed=7) if taught else None)[0][-1] == {0.5}


def test_a_run_of_the_trainer_leaves_the_model_its_dropout(tmp_path):
    model = with_dropout()
    make_trainer(tmp_path, model, PruningCallback(0.3, teacher=make_model(seed=7))).train()
    assert probabilities(model) == {0.5}


def test_a_probability_is_one():
    with pytest.raises(ValueError, match=r"recovery_dropout: expected a value in \[0, 1\], got 1.5"):
        PruningConfig.create(0.3, recovery_dropout=1.5)
