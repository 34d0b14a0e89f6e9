"""Encoders inside modules of the user's own, and several of them in one."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    EncoderDecoderModel,
    Trainer,
    TrainerCallback,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from families import TABLE
from hf_mlprune import PruningCallback, PruningConfig, advance, attach, collect, report, shrink, start
from hf_mlprune.encoders import inspect_encoders
from hf_mlprune.families import head_of
from hf_mlprune.loop import figures
from hf_mlprune.state import is_attached, pruning_state, pruning_states
from support.models import make_batch, make_config, make_dataset, make_model
from support.training import distillation_losses, training_arguments


class Pair(nn.Module):
    """Two towers, whose embeddings of two texts are compared."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.head = nn.Linear(32, 2)

    def forward(self, input_ids, attention_mask=None, labels=None):
        a = self.first(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        b = self.second(input_ids=input_ids.flip(-1)).last_hidden_state[:, 0]
        logits = self.head(a * b)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels.clamp(max=1))
        return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}


def make_pair(first: str = "bert", second: str = "modernbert") -> Pair:
    return Pair(make_model("model", 0, first), make_model("model", 1, second)).eval()


def logits(model) -> torch.Tensor:
    batch = make_batch(seed=3)
    with torch.no_grad():
        return model.eval()(batch["input_ids"], batch["attention_mask"])["logits"]


def test_multiply_adds_of_several_encoders_are_the_sum_of_each():
    """A picture has tokens of its own, however many the text has."""

    class Both(nn.Module):
        def __init__(self, names):
            super().__init__()
            for name in names:
                self.add_module(name, make_model("model", family=name))

    alone = [report(make_model("model", family=name)).multiply_adds[1] for name in ("bert", "vit")]
    for names in (("bert", "vit"), ("vit", "bert")):
        assert report(Both(names)).multiply_adds[1] == sum(alone)


def test_figures_of_a_method_are_of_all_encoders():
    model = make_pair()
    attach(model, PruningConfig.create(0.5, method="mlpruning", encoder=["first", "second"]))
    start(model, 20)
    first, second = pruning_states(model)
    for state, value in ((first, 2.0), (second, 4.0)):
        for gate in state.all_gates():
            gate.get_buffer("threshold").fill_(value)
    assert 2.5 < figures(model)["threshold"] < 3.5


def prune_pair(model, config, steps=20):
    attach(model, config)
    start(model, steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for step in range(1, steps + 1):
        model(**make_batch(seed=step))["loss"].backward()
        collect(model)
        optimizer.step()
        optimizer.zero_grad()
        advance(model, step)


@pytest.mark.parametrize("names", [("first",), ("second",), ("first", "second")])
def test_the_named_encoders_are_pruned_each_to_the_density_and_no_other(names):
    model = make_pair()
    untouched = {"first", "second"} - set(names)
    before = {name: copy.deepcopy(getattr(model, name)) for name in untouched}
    prune_pair(model, PruningConfig.create(0.4, encoder=names))
    reached = [state.density() for state in pruning_states(model)]
    assert len(reached) == len(names)
    assert all(0.36 < density <= 0.4 for density in reached)
    assert figures(model)["density"] <= 0.4
    masked = logits(model)
    done = shrink(model)
    torch.testing.assert_close(logits(model), masked)
    assert list(done.structures) == list(names)
    for name in ("first", "second"):
        tower = getattr(model, name)
        expected = head_of(tower).pruned if name in names else type(before[name])
        assert type(tower) is expected
    found = report(model)
    assert {layer.encoder for layer in found.layers} == set(names)
    assert found.density <= 0.4
    if len(names) > 1:
        assert "first 0" in found.markdown()


def test_a_pair_is_saved_and_loaded_as_its_class_does_it(tmp_path):
    model = make_pair()
    prune_pair(model, PruningConfig.create(0.4, encoder=["first", "second"]))
    shrink(model)
    # The recipe of the README.
    save_model(model, str(tmp_path / "model.safetensors"))
    for name in ("first", "second"):
        getattr(model, name).config.save_pretrained(tmp_path / name)
    towers = [AutoModel.from_config(AutoConfig.from_pretrained(tmp_path / n)) for n in ("first", "second")]
    loaded = Pair(*towers)
    load_model(loaded, str(tmp_path / "model.safetensors"))
    assert torch.equal(logits(loaded), logits(model))


def test_one_encoder_called_twice_is_one_encoder():
    tower = make_model("model")
    model = Pair(tower, tower)
    prune_pair(model, PruningConfig.create(0.4))
    masked = logits(model)
    shrink(model)
    torch.testing.assert_close(logits(model), masked)
    assert type(model.first) is head_of(tower).pruned
    assert model.first is model.second


def test_towers_made_from_one_config_do_not_touch_each_other():
    config = make_config("bert")
    model = Pair(AutoModel.from_config(config), AutoModel.from_config(config))
    stock = type(model.second)
    prune_pair(model, PruningConfig.create(0.4, encoder="first"))
    assert type(model.second) is stock
    assert model.second.config is config
    shrink(model)
    assert model.second.config is config
    assert model.first.config.model_type == "pruned_bert"


def test_a_pair_is_pruned_by_the_trainer_with_a_teacher_and_resumed(tmp_path):
    def run(folder, steps_first=None, resume=False):
        model = make_pair("bert", "roberta")
        teacher = copy.deepcopy(model)
        callback = PruningCallback(
            0.4, preset="paper", block_teacher="teacher", encoder=["first", "second"], block_shape=(8, 4),
            teacher=teacher,
        )  # fmt: skip
        arguments = training_arguments(folder, save_strategy="steps", save_steps=12, logging_steps=1)
        trainer = Trainer(model, arguments, train_dataset=make_dataset(), callbacks=[callback])
        if steps_first:
            trainer.add_callback(StopAt(steps_first))
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    straight = run(tmp_path / "straight")
    assert distillation_losses(straight)[-1] > 0
    assert not is_attached(straight.model)
    assert report(straight.model).density <= 0.4
    with pytest.raises(RuntimeError, match="training ended at step 12"):
        run(tmp_path / "resumed", steps_first=12)
    resumed = run(tmp_path / "resumed", resume=True)
    first, second = straight.model.state_dict(), resumed.model.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def dual_encoder() -> VisionTextDualEncoderModel:
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        make_config("vit"), make_config("bert"), projection_dim=8
    )
    torch.manual_seed(0)
    return VisionTextDualEncoderModel(config).eval()


@pytest.mark.parametrize("names", [["text_model"], ["vision_model"], ["text_model", "vision_model"]])
def test_towers_of_a_multimodal_model_of_transformers_are_saved_and_loaded_by_it(names, tmp_path):
    model = dual_encoder()
    attach(model, PruningConfig.create(0.5, encoder=names))
    for state in pruning_states(model):
        for gate in state.all_gates():
            gate.set_keep(torch.arange(gate.units) % 2 == 0)
    inputs = {**make_batch(seed=1), **make_batch("image", family="vit")}
    inputs.pop("labels")
    with torch.no_grad():
        masked = model(**inputs).logits_per_text
        shrink(model, [inputs])
        torch.testing.assert_close(model(**inputs).logits_per_text, masked)
        model.save_pretrained(tmp_path)
        loaded = VisionTextDualEncoderModel.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(**inputs).logits_per_text, model(**inputs).logits_per_text)
    assert type(loaded.text_model) is type(model.text_model)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())


def test_the_encoder_beside_a_decoder_is_pruned():
    model = EncoderDecoderModel(
        encoder=make_model("model"),
        decoder=AutoModel.from_config(make_config("bert", is_decoder=True, add_cross_attention=True)),
    )
    with pytest.raises(ValueError, match="expected an encoder, got a config with is_decoder"):
        attach(model, PruningConfig.create(0.5, encoder="decoder"))
    attach(model, PruningConfig.create(0.5, encoder="encoder"))
    assert pruning_state(model).config.encoder == ("encoder",)
    assert model.config.encoder is model.encoder.config


BAD = [
    (
        (),
        TypeError,
        r"got Pair with 2: say which are to be pruned by encoder=.*\['first', 'second'\]",
    ),
    ("third", ValueError, r"of \['first', 'second'\], got 'third', which names none"),
    (["first", ""], ValueError, "encoder: expected paths such as 'text_model'"),
    ((3,), ValueError, "encoder: expected paths such as 'text_model'"),
]


@pytest.mark.parametrize(("names", "kind", "message"), BAD)
def test_names_of_no_encoder_are_refused_and_nothing_is_changed(names, kind, message):
    model = make_pair()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(kind, match=message):
        attach(model, PruningConfig.create(0.5, encoder=names))
    assert before == {name: type(module) for name, module in model.named_modules()}
    assert not is_attached(model)


def test_a_name_that_holds_two_encoders_is_refused():
    model = nn.ModuleDict({"towers": make_pair()})
    with pytest.raises(ValueError, match=r"got 'towers', which names \['towers\.first', 'towers\.second'\]"):
        attach(model, PruningConfig.create(0.5, encoder="towers"))


@pytest.mark.parametrize("share", ["layer", "linear", "weight"])
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_layers_that_share_weights_are_refused(share, family):
    model = make_model("model", family=family)
    encoder = inspect_encoders(model)[0]
    layers = model.get_submodule(encoder.dense.layout.layers)
    path = encoder.dense.layout.matrices["fc1"].path
    if share == "layer":
        layers[1] = layers[0]
    elif share == "linear":
        layers[1].set_submodule(path, layers[0].get_submodule(path))
    else:
        layers[1].get_submodule(path).weight = layers[0].get_submodule(path).weight
    with pytest.raises(ValueError, match="be pruned separately; give each its own"):
        attach(model, PruningConfig.create(0.5))
    assert not is_attached(model)


@pytest.mark.parametrize("share", ["encoder", "layer"])
def test_layers_shared_with_an_encoder_that_is_not_named_are_refused(share):
    model = make_pair("bert", "roberta")
    if share == "encoder":
        model.second.encoder = model.first.encoder
    else:
        model.second.encoder.layer[1] = model.first.encoder.layer[1]
    with pytest.raises(ValueError, match=r"'first layer . \w+', 'one of second'\] are one and the same"):
        attach(model, PruningConfig.create(0.5, encoder="first"))
    assert not is_attached(model)


@pytest.mark.parametrize("names", ["second", ["first", "second"]])
def test_an_encoder_is_named_by_any_of_its_paths(names):
    tower = make_model("model")
    model = Pair(tower, tower)
    (state,) = attach(model, PruningConfig.create(0.5, encoder=names))
    assert tower.pruning is state
    shrink(model)


def test_a_model_that_loads_by_itself_brings_no_warning(caplog):
    attach(dual_encoder(), PruningConfig.create(0.5, encoder="text_model"))
    assert not [record for record in caplog.records if record.name.startswith("hf_mlprune")]


def test_a_density_that_is_refused_leaves_the_model_for_another(tmp_path):
    model = make_model()
    data = make_dataset()
    for density in (0.0001, 0.5):
        callback = PruningCallback(density)
        if density < 0.1:
            with pytest.raises(ValueError, match=r"density 0\.0001 cannot be reached"):
                Trainer(model, training_arguments(tmp_path), train_dataset=data, callbacks=[callback])
            assert not is_attached(model)
    Trainer(model, training_arguments(tmp_path), train_dataset=data, callbacks=[callback]).train()
    assert report(model).density <= 0.5


def test_every_family_is_found_by_its_path_within_a_module():
    for family in TABLE:
        model = nn.ModuleDict({"a": nn.ModuleDict({"b": make_model("model", family=family)})})
        assert [encoder.path for encoder in inspect_encoders(model, ["a"])] == ["a.b"]
