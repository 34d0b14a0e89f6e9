"""Dropout is off while what is left recovers, and the model's own before and after."""

from __future__ import annotations

import pytest

from families import each_family
from hf_mlprune import PruningConfig, advance, attach, collect, shrink, start
from hf_mlprune.encoders import dropouts_of
from support.models import loss_of, make_batch, make_model

STEPS = 20


def with_dropout(family):
    """A model whose every dropout is at work, and the settings' names for them."""
    model = make_model(family=family)
    for module, name, _ in dropouts_of(model):
        setattr(module, name, 0.5)
    return model


def probabilities(model):
    return {value for _, _, value in dropouts_of(model.base_model)}


def losses(model, family):
    """Of two passes over one batch, as in training."""
    model.train()
    batch = make_batch(family=family)
    return [float(loss_of(model, batch).detach()) for _ in range(2)]


def train(model, family, steps, config):
    attach(model, config)
    start(model, STEPS)
    for step in range(1, steps + 1):
        loss_of(model.train(), make_batch(family=family, seed=step)).backward()
        collect(model)
        advance(model, step)


@each_family
def test_nothing_is_dropped_once_masks_are_final(family):
    model = with_dropout(family)
    before = losses(model, family)
    assert before[0] != before[1]
    train(model, family, STEPS // 4, PruningConfig.create(0.3))
    assert probabilities(model) == {0.5}
    model = with_dropout(family)
    train(model, family, STEPS, PruningConfig.create(0.3))
    # That of a head outside of the encoder is its own affair.
    for module, name, _ in set(dropouts_of(model)) - set(dropouts_of(model.base_model)):
        setattr(module, name, 0.0)
    after = losses(model, family)
    assert after[0] == after[1]
    shrink(model)
    assert probabilities(model) == {0.5}


@pytest.mark.parametrize(("setting", "expected"), [(None, 0.5), (0.1, 0.1)])
def test_the_recovery_has_the_dropout_of_the_settings(setting, expected):
    model = with_dropout("bert")
    train(model, "bert", STEPS, PruningConfig.create(0.3, recovery_dropout=setting))
    assert probabilities(model) == {expected}


def test_the_paper_preset_leaves_dropout_alone():
    assert PruningConfig.create(0.3, "paper").recovery_dropout is None


def test_a_run_taken_up_again_drops_nothing_either():
    model = with_dropout("bert")
    train(model, "bert", STEPS - 1, PruningConfig.create(0.3))
    state = model.state_dict()
    again = with_dropout("bert")
    attach(again, PruningConfig.create(0.3))
    again.load_state_dict(state)
    assert probabilities(again) == {0.5}
    start(again, STEPS, STEPS - 1)
    assert probabilities(again) == {0.0}


def test_a_refused_start_leaves_dropout_as_it_was():
    model = with_dropout("bert")
    attach(model, PruningConfig.create(0.3))
    with pytest.raises(ValueError, match="resume with the same number of steps"):
        start(model, STEPS, STEPS - 1)
    assert probabilities(model) == {0.5}
