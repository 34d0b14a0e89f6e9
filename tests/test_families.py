"""Every family from end to end: what a user does with it, and what each family could get wrong by itself."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig

import hf_mlprune
from families import TABLE, each_family
from hf_mlprune import PruningCallback, PruningConfig, attach, distilled, kernels, report, shrink
from hf_mlprune.distillation.losses import predictions
from hf_mlprune.distillation.recording import EncoderRecorder
from hf_mlprune.distillation.teacher import fingerprint
from hf_mlprune.encoders import inspect_encoder
from hf_mlprune.families import FAMILIES, head_of
from hf_mlprune.kernels import explain
from hf_mlprune.kernels.operation import WHY_NOT
from hf_mlprune.levels import LEVELS, ROW_SITES
from hf_mlprune.modeling.block_sparse import BlockSparseLinear
from hf_mlprune.reports.latency import measure_latency
from hf_mlprune.state import is_attached, pruning_state
from support.models import (
    HEADS,
    assert_same_outputs,
    clone,
    find_family,
    heads_of,
    inputs_of,
    make_batch,
    make_config,
    make_model,
    outputs,
    shrink_without,
)
from support.processes import run_without_package
from support.training import distillation_losses, make_trainer

SETTINGS = {"levels": LEVELS, "row_sites": ROW_SITES, "minimum_units": 0}
PAIRS = [(family, head) for family in TABLE for head in heads_of(family)]
VARIANTS = [(family, number) for family, row in TABLE.items() for number in range(len(row.variants) + 1)]


def variant(family: str, number: int) -> dict:
    """What makes a model of a kind of its family; 0 is the usual one."""
    return {} if number == 0 else dict(TABLE[family].variants[number - 1])


def make_pruned(family, *, empty=(), block_shape=(8, 4), **changes):
    """A masked model and its pruned form, without a third of its units, and all of some groups of layer 1."""
    model = make_model(family=family, **changes)
    attach(model, PruningConfig.create(0.5, block_shape=block_shape, **SETTINGS))
    for gate in pruning_state(model).all_gates():
        gate.set_keep(torch.arange(gate.units) % 3 != 1)
    return shrink_without(model, empty)


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_table_has_every_family():
    assert TABLE.keys() == {family.name for family in FAMILIES}


REMOTE = """
import sys
from pathlib import Path
import torch, transformers
root, found = Path(sys.argv[1]), {}
for case, (auto, inputs) in torch.load(root / "cases.pt").items():
    load = getattr(transformers, auto).from_pretrained
    model = load(root / case, trust_remote_code=True)
    assert type(model).__name__.startswith("Pruned"), type(model)
    if "blocks" in case:
        model.save_pretrained(root / "again" / case)
        model = load(root / "again" / case, trust_remote_code=True)
    with torch.no_grad():
        found[case] = model(**inputs)[0]
assert not any(name.split(".")[0] == "hf_mlprune" for name in sys.modules)
torch.save(found, root / "found.pt")
"""


def test_every_family_loads_by_the_code_in_its_folder(tmp_path):
    """With blocks, saved again by that code, and without heads in a layer; all in one process."""
    cases, expected = {}, {}
    for family in TABLE:
        inputs = inputs_of(make_batch(family=family))
        for name, empty in (("blocks", ()), ("no heads", ("heads", "fc1"))):
            _, model = make_pruned(family, empty=empty)
            model.save_pretrained(tmp_path / f"{family} {name}")
            cases[f"{family} {name}"] = (head_of(model).auto, inputs)
            expected[f"{family} {name}"] = outputs(model, inputs)["logits"]
    torch.save(cases, tmp_path / "cases.pt")
    run_without_package(REMOTE, tmp_path, cache=tmp_path / "cache")
    found = torch.load(tmp_path / "found.pt")
    assert found.keys() == expected.keys()
    for case, logits in expected.items():
        torch.testing.assert_close(found[case], logits, rtol=0, atol=1e-5)


@each_family
def test_what_a_teacher_is_compared_by_is_what_the_model_computes(family):
    model = make_model(family=family, attn_implementation="eager").eval()
    batch = inputs_of(make_batch(family=family))
    recorder = EncoderRecorder(inspect_encoder(model), attention=True)
    recorder.install()
    recorder.begin()
    model(**batch)
    (seen,) = recorder.end()
    recorder.remove()
    out = model(**batch, output_hidden_states=True, output_attentions=True)
    assert sorted(seen.attentions) == [0, 1]
    for index, attention in enumerate(out.attentions):
        assert torch.equal(seen.attentions[index], attention)
    # Behind the last layer some families put a norm.
    assert len(seen.hidden_states) == len(out.hidden_states) == 3
    for ours, theirs in zip(seen.hidden_states[:2], out.hidden_states[:2], strict=True):
        assert torch.equal(ours, theirs)
    if "attention_mask" in batch:
        assert torch.equal(seen.attention_mask, batch["attention_mask"])
    else:
        assert seen.attention_mask is None


@each_family
def test_a_run_with_teachers_ends_the_same_when_it_was_cut_short(family, tmp_path):
    """By the paper: the step-1 model teaches the blocks, also after the interruption."""

    def trainer(seed):
        callback = PruningCallback(
            0.4, preset="paper", block_shape=(8, 4), teacher=make_model(seed=7, family=family)
        )
        return make_trainer(
            tmp_path / "run", make_model(seed=seed, family=family), callback, family=family,
            save_strategy="steps", save_steps=16, logging_steps=1,
        )  # fmt: skip

    straight = trainer(0)
    straight.train()
    losses = distillation_losses(straight)
    assert len(losses) == 24
    # For one step, the step-1 model is what the student is.
    assert sum(loss > 0 for loss in losses) >= 23
    assert 0.37 < report(straight.model).density <= 0.4
    assert type(straight.model) is head_of(make_model(family=family)).pruned
    assert straight.evaluate()["eval_loss"] > 0
    straight.save_model(str(tmp_path / "straight"))
    shutil.rmtree(tmp_path / "run" / "checkpoint-24")
    # Of other weights, as a new process may draw them: all is taken from the checkpoint.
    resumed = trainer(3)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model(str(tmp_path / "resumed"))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "resumed"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    structures = [AutoConfig.from_pretrained(tmp_path / name).structure for name in ("straight", "resumed")]
    assert structures[0] == structures[1]


@pytest.mark.parametrize(("family", "number"), VARIANTS)
def test_config_first_reaches_the_same_place(family, number, tmp_path):
    stock = make_model(family=family, **variant(family, number))
    stock.save_pretrained(tmp_path / "stock")
    head, batch = head_of(stock), make_batch(family=family)
    config_class = getattr(hf_mlprune, f"Prunable{type(stock.config).__name__}")
    settings = {"levels": LEVELS, "block_shape": (8, 4)}
    config = config_class.from_pretrained(tmp_path / "stock", density=0.4, **settings)
    first = getattr(hf_mlprune, f"Prunable{head.stock.__name__}").from_pretrained(
        tmp_path / "stock", config=config
    )
    second = clone(stock)
    attach(second, PruningConfig.create(0.4, **settings))
    assert_same_outputs(stock, first, batch, 0.0)
    assert type(first) is type(second)
    assert first.state_dict().keys() == second.state_dict().keys()
    assert first.config.pruning == second.config.pruning
    # What a checkpoint in the middle is.
    for gate in pruning_state(first).all_gates():
        gate.set_keep(torch.arange(gate.units) % 3 != 1)
    first.save_pretrained(tmp_path / "masked")
    loaded, info = getattr(transformers, head.auto).from_pretrained(
        tmp_path / "masked", output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(loaded) is type(first)
    assert_same_outputs(first, loaded, batch, 0.0)
    shrink(loaded)
    assert type(loaded) is head.pruned
    assert_same_outputs(first, loaded, batch)


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
@each_family
def test_native_blocks_compute_what_dense_ones_do(family):
    _, model = make_pruned(family, block_shape=(16, 16), hidden_size=96, intermediate_size=96)
    layers = [module for module in model.modules() if isinstance(module, BlockSparseLinear)]
    assert explain(model) == {f"native ({kernels.instruction_set()})": len(layers)}
    matrices = inspect_encoder(model).dense.layout.matrices
    assert len(layers) == 2 * len(matrices)
    batch = make_batch(family=family)
    native = outputs(model, batch)
    # While training, and in float64, blocks are multiplied as dense matrices.
    dense = {name: value.detach() for name, value in model.train()(**inputs_of(batch)).items()}
    exact = outputs(clone(model).double(), batch)
    for name, value in native.items():
        torch.testing.assert_close(value, dense[name], rtol=0, atol=1e-5)
        torch.testing.assert_close(value.double(), exact[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "number"), VARIANTS)
def test_reports_count_what_is_there(family, number):
    masked, model = make_pruned(family, empty=("heads",), **variant(family, number))
    stock = make_model(family=family, **variant(family, number))
    encoder = inspect_encoder(model)
    latency = measure_latency(encoder, 2, 64, rounds=1, budget_seconds=0.0)
    found = report(model, latency=[latency])
    assert found.parameters == (count(model), count(stock))
    assert found.density == pytest.approx(pruning_state(masked).density())
    assert found.density == pytest.approx(report(masked).density)
    embeddings = stock.base_model.get_submodule(encoder.dense.layout.embeddings)
    assert found.embedding_parameters == count(embeddings)
    linears = [
        stock.base_model.get_submodule(f"{encoder.dense.layout.layers}.{index}.{matrix.path}")
        for index in range(2)
        for matrix in encoder.dense.layout.matrices.values()
    ]
    assert sum(layer.weights[1] for layer in found.layers) == sum(each.weight.numel() for each in linears)
    assert found.multiply_adds[0] < found.multiply_adds[1]
    assert found.layers[0].heads == (3, 4)
    assert found.layers[1].heads == (0, 4)
    assert min(latency.dense_seconds, latency.pruned_seconds, latency.speedup) > 0
    # As many as there are positions for, or patches of an image and what stands before them.
    record = find_family(family)
    most = latency.length if record.takes_images else record.config.config_fields.most_tokens(model.config)
    assert 4 < latency.length == min(64, most)
    assert found.multiply_adds_length == min(128, most)
    json.dumps(found.to_dict())


def sizes_of(family: str) -> list[str]:
    fields = find_family(family).config.config_fields
    own = [fields.hidden_size, fields.num_layers, fields.num_heads, fields.ffn_size]
    own += [] if fields.head_size is None else [fields.head_size]
    read = [] if find_family(family).takes_images else ["vocab_size", "max_position_embeddings"]
    return [*own, *read, *fields.bounds]


@pytest.mark.parametrize("kind", ["prunable", "pruned"])
@each_family
def test_enormous_sizes_are_refused_before_they_are_built(family, kind, tmp_path):
    masked, model = make_pruned(family)
    (masked if kind == "prunable" else model).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    for name in sizes_of(family):
        for size in (10**9, -2, "many", 1.5):
            (tmp_path / "config.json").write_text(json.dumps({**json.loads(text), name: size}))
            with pytest.raises(ValueError, match=rf"config\.json: {name}: expected -?\d+ to \d+, got"):
                getattr(transformers, head_of(model).auto).from_pretrained(tmp_path)


@pytest.mark.parametrize(("family", "head"), PAIRS)
def test_a_teacher_of_every_head_is_read_alike_from_tuples_and_names(family, head):
    model, batch = make_model(head, family=family), make_batch(head, family=family)
    for given in (batch, inputs_of(batch)):
        named = predictions(model, model(**given))
        unnamed = predictions(model, model(**given, return_dict=False))
        assert named.keys() == unnamed.keys()
        assert all(torch.equal(value, unnamed[name]) for name, value in named.items())


def test_a_logit_for_each_token_is_compared_token_by_token():
    """A softmax over the tokens would not see a teacher that is surer of each."""
    model = make_model("pretraining", family="electra")
    teacher = clone(model)
    with torch.no_grad():
        teacher.discriminator_predictions.dense_prediction.bias += 5
    with distilled(model, teacher, PruningConfig.create(0.5, hidden_weight=0.0)) as distillation:
        model.train()(**make_batch("pretraining", family="electra")).loss.backward()
        assert distillation.mean_loss() == pytest.approx(25)


@pytest.mark.parametrize(("field", "value"), [("num_attention_heads", 2), ("hidden_act", "relu")])
@each_family
def test_teachers_of_the_same_weights_are_told_apart_by_what_they_compute(family, field, value):
    teacher, other = make_model(family=family), make_model(family=family, **{field: value})
    sizes = {name: tensor.shape for name, tensor in other.state_dict().items()}
    shared = {name: x for name, x in teacher.state_dict().items() if x.shape == sizes.get(name)}
    other.load_state_dict(shared, strict=False)
    batch = make_batch(family=family)
    assert fingerprint(teacher) == fingerprint(clone(teacher))
    # ESM has its activation from nowhere else than its code.
    same = torch.equal(outputs(teacher, batch)["logits"], outputs(other, batch)["logits"])
    assert same or fingerprint(teacher) != fingerprint(other)


@pytest.mark.parametrize("masked", [True, False])
def test_damaged_fields_are_refused_as_such(masked, tmp_path):
    model = make_model(family="distilbert")
    attach(model, PruningConfig.create(0.5))
    if not masked:
        shrink(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": "x"}))
    with pytest.raises(
        ValueError,
        match=r"config\.json: expected the config of a model of type distilbert|id2label should be",
    ):
        type(model).from_pretrained(tmp_path)


def test_the_encoder_of_a_stock_class_is_named_right_or_not_at_all(tmp_path):
    make_model(family="mpnet").save_pretrained(tmp_path)
    config = hf_mlprune.PrunableMPNetConfig.from_pretrained(tmp_path, density=0.5, encoder="mpnet")
    assert pruning_state(hf_mlprune.PrunableMPNetForSequenceClassification(config)).config.encoder == (
        "mpnet",
    )
    wrong = hf_mlprune.PrunableMPNetConfig.from_pretrained(tmp_path, density=0.5, encoder="bert")
    with pytest.raises(ValueError, match=r"expected paths of encoders, of \['mpnet'\], got 'bert'"):
        hf_mlprune.PrunableMPNetForSequenceClassification(wrong)


def test_a_stock_head_that_could_not_be_loaded_again_is_refused():
    model = transformers.DeiTForImageClassificationWithTeacher(make_config("deit"))
    with pytest.raises(TypeError, match=r"'DeiTForImageClassification'\], got DeiTForImage"):
        attach(model, PruningConfig.create(0.5))
    assert not is_attached(model)


@pytest.mark.parametrize("family", [family.name for family in FAMILIES if not family.takes_images])
def test_auto_classes_that_load_a_head_of_another_name_load_ours(family, tmp_path):
    for auto, head in find_family(family).loaders().items():
        if auto != head.auto:
            stock = make_model(next(short for short, name in HEADS.items() if name == head.auto), 0, family)
            attach(stock, PruningConfig.create(0.5))
            shrink(stock)
            stock.save_pretrained(tmp_path / auto)
            assert type(getattr(transformers, auto).from_pretrained(tmp_path / auto)) is head.pruned
