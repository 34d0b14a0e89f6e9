"""A pruned model as a stock folder: loaded by plain transformers, with the same outputs."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from families import TABLE, each_family
from hf_mlprune import PruningConfig, attach, report, shrink
from hf_mlprune.exporting.stock import stock_cost, stock_model
from hf_mlprune.families import head_of
from hf_mlprune.levels import LEVELS, ROW_SITES
from hf_mlprune.state import pruning_state
from support.models import (
    assert_same_outputs,
    find_family,
    heads_of,
    inputs_of,
    make_batch,
    make_model,
    outputs,
    shrink_without,
    tied_names,
)
from support.processes import run_without_package

#: Settings of a run, and groups of layer 1 that lose all their units.
CASES = {
    "heads and rows": ({"levels": ("heads", "rows")}, ()),
    "all": ({"levels": LEVELS, "row_sites": ROW_SITES, "block_shape": (8, 4)}, ()),
    "no heads": ({"levels": LEVELS, "row_sites": ROW_SITES, "block_shape": (8, 4)}, ("heads", "fc2")),
    "no ffn": ({"levels": ("heads", "rows"), "row_sites": ROW_SITES}, ("fc1", "attention_output")),
}
PAIRS = [(family, head) for family in TABLE for head in heads_of(family)]
VARIANTS = [(family, changes) for family, row in TABLE.items() for changes in ({}, *row.variants)]


def make_pruned(family="bert", head=None, case="all", **changes):
    """Without a third of the units of each gate, and what the case takes away besides."""
    settings, empty = CASES[case]
    model = make_model(head, family=family, **changes)
    attach(model, PruningConfig.create(0.5, minimum_units=0, **settings))
    for gate in pruning_state(model).all_gates():
        gate.set_keep(torch.arange(gate.units) % 3 != 1)
    return shrink_without(model, empty)[1]


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def load_stock(model, folder):
    """Save a stock model, and load it as anybody would: all tensors there, none too many, no code."""
    model.save_pretrained(folder)
    loaded, info = getattr(transformers, head_of(model).auto).from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(loaded) is type(model)
    assert {file.name for file in folder.iterdir()} <= {"config.json", "model.safetensors"}
    return loaded


@pytest.mark.parametrize("case", ["all", "no heads"])
@pytest.mark.parametrize(("family", "head"), PAIRS)
def test_every_head_becomes_a_stock_folder(family, head, case, tmp_path):
    model, batch = make_pruned(family, head, case), make_batch(head, family=family)
    dense_size, sizes = count(make_model(head, family=family)), {}
    for smallest in (False, True):
        stock = stock_model(model, smallest=smallest)
        assert type(stock) is head_of(model).stock
        assert not stock.training
        assert_same_outputs(model, stock, batch)
        loaded = load_stock(stock, tmp_path / str(smallest))
        assert_same_outputs(stock, loaded, batch, 0.0)
        config = json.loads((tmp_path / str(smallest) / "config.json").read_text())
        assert config["model_type"] == family
        assert config["architectures"] == [type(stock).__name__]
        assert not {"auto_map", "structure", "pruning"} & set(config)
        assert loaded.config.id2label == model.config.id2label
        sizes[smallest] = count(loaded)
    assert sizes[True] < sizes[False] == dense_size


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_every_kind_of_a_family_becomes_a_stock_folder(family, changes, case, tmp_path):
    model = make_pruned(family, case=case, **changes)
    for smallest in (False, True):
        loaded = load_stock(stock_model(model, smallest=smallest), tmp_path / str(smallest))
        assert_same_outputs(model, loaded, make_batch(family=family))


PLAIN = """
import sys
from pathlib import Path
import torch, transformers
root, found = Path(sys.argv[1]), {}
for case, (auto, inputs) in torch.load(root / "cases.pt").items():
    model = getattr(transformers, auto).from_pretrained(root / case)
    with torch.no_grad():
        found[case] = model(**inputs)[0]
torch.save(found, root / "found.pt")
"""


def test_plain_transformers_loads_it_without_consent(tmp_path):
    cases, expected = {}, {}
    for family in ("bert", "modernbert", "vit"):
        inputs, model = inputs_of(make_batch(family=family)), make_pruned(family)
        expected[family] = outputs(model, inputs)["logits"]
        cases[family] = (head_of(model).auto, inputs)
        stock_model(model, smallest=True).save_pretrained(tmp_path / family)
    torch.save(cases, tmp_path / "cases.pt")
    run_without_package(PLAIN, tmp_path, cache=tmp_path / "cache")
    found = torch.load(tmp_path / "found.pt")
    for family, logits in expected.items():
        torch.testing.assert_close(found[family], logits, rtol=0, atol=1e-5)


@each_family
def test_weights_of_a_dense_stock_model_stand_where_they_were(family):
    """What is not zero is what the dense model had there."""
    dense, stock = make_model(family=family), stock_model(make_pruned(family), smallest=False)
    before = dict(dense.named_parameters())
    removed = 0
    for name, parameter in stock.named_parameters():
        assert bool(((parameter == 0) | (parameter == before[name])).all()), name
        removed += int(((parameter == 0) & (before[name] != 0)).sum())
    assert removed > count(dense) / 10


@each_family
def test_the_smallest_has_one_ffn_width_for_all_layers(family):
    """48 rows, of which two thirds were kept: a multiple of 16."""
    fields = find_family(family).config.config_fields
    stock = stock_model(make_pruned(family), smallest=True)
    assert getattr(stock.config, fields.ffn_size) == 32
    assert fields.sizes(stock.config).head_size == 8
    # Of 4 heads 3 are left.
    assert getattr(stock.config, fields.num_heads) == (3 if find_family(family).takes_images else 4)


def test_rows_that_nothing_reads_are_left_out():
    """Where the blocks behind a row are gone, it is of no use, though the structure keeps it."""
    model = make_model(intermediate_size=64)
    attach(model, PruningConfig.create(0.5, levels=("blocks",), block_shape=(8, 8)))
    for layer in range(2):
        gate = pruning_state(model).gates(layer)["blocks_fc2"]
        grid = torch.ones(4, 8, dtype=torch.bool)
        grid[:, 2:6] = False
        gate.set_keep(grid.flatten())
    shrink(model)
    stock = stock_model(model, smallest=True)
    assert stock.config.intermediate_size == 32
    assert_same_outputs(model, stock, make_batch())


def test_a_layer_with_nothing_left_keeps_its_least():
    model = make_model(family="vit", num_hidden_layers=1)
    attach(model, PruningConfig.create(0.5, levels=("heads", "rows"), minimum_units=0))
    for gate in pruning_state(model).gates(0).values():
        gate.set_keep(torch.zeros(gate.units, dtype=torch.bool))
    shrink(model)
    stock = stock_model(model, smallest=True)
    assert (stock.config.num_attention_heads, stock.config.intermediate_size) == (1, 16)
    assert_same_outputs(model, stock, make_batch(family="vit"))


def test_an_image_model_of_fewer_heads_can_be_pruned_on(tmp_path):
    """The size of its heads is not what its width and their number would give."""
    stock = stock_model(make_pruned("vit"), smallest=True)
    assert report(stock).parameters == (count(stock), count(stock))
    attach(stock, PruningConfig.create(0.5, levels=("heads", "rows")))
    for gate in pruning_state(stock).all_gates():
        gate.set_keep(torch.arange(gate.units) % 2 == 0)
    masked, again = shrink_without(stock, ())
    assert_same_outputs(masked, again, make_batch(family="vit"))
    again.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert_same_outputs(again, loaded, make_batch(family="vit"), 0.0)
    assert_same_outputs(again, stock_model(loaded, smallest=True), make_batch(family="vit"))


def test_half_precision_and_the_pruned_model_stay_as_they_are(tmp_path):
    model = make_pruned("modernbert").to(torch.bfloat16).train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = torch.get_rng_state()
    stock = stock_model(model, smallest=True)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert {x.dtype for x in stock.parameters()} == {torch.bfloat16}
    owned = {x.untyped_storage().data_ptr() for x in model.parameters()}
    assert not owned & {x.untyped_storage().data_ptr() for x in stock.parameters()}
    assert_same_outputs(model, stock, make_batch(family="modernbert"), 0.05)
    assert load_stock(stock, tmp_path).dtype is torch.bfloat16


def test_tied_embeddings_stay_tied_and_others_do_not(tmp_path):
    model = make_pruned("bert", "masked")
    stock = stock_model(model, smallest=True)
    assert tied_names(stock) == tied_names(model) != []
    stock.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "model.safetensors")) < len(stock.state_dict())
    model.cls.predictions.decoder.weight = nn.Parameter(torch.randn(64, 32))
    assert_same_outputs(model, stock_model(model, smallest=True), make_batch("masked"))


def test_an_encoder_without_pooler_gets_none(tmp_path):
    make_pruned("mpnet", "model").save_pretrained(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    stock = stock_model(model, smallest=True)
    assert stock.pooler is None
    assert_same_outputs(model, stock, make_batch("model", family="mpnet"))


def test_costs_are_those_of_the_files(tmp_path):
    model = make_pruned()
    for smallest, share in ((False, 0.492), (True, 0.553)):
        stock = stock_model(model, smallest=smallest)
        cost = stock_cost(model, stock)
        assert cost.parameters == (count(model), count(stock))
        assert cost.multiply_adds_share == pytest.approx(share, abs=0.001)
        for saved, size in zip((model, stock), cost.bytes, strict=True):
            saved.save_pretrained(tmp_path / str(size))
            tensors = load_file(tmp_path / str(size) / "model.safetensors").values()
            assert size == sum(x.numel() * x.element_size() for x in tensors)


def test_a_stock_model_comes_back_as_a_copy():
    model = make_model().train()
    copy = stock_model(model, smallest=True)
    assert copy is not model
    assert not copy.training
    assert model.training
    assert all(torch.equal(x, copy.state_dict()[name]) for name, x in model.state_dict().items())


class Own(nn.Module):
    def __init__(self, bert) -> None:
        super().__init__()
        self.bert = bert


def test_what_can_be_no_stock_folder_is_refused():
    masked = make_model()
    attach(masked, PruningConfig.create(0.5))
    with pytest.raises(TypeError, match=r"got PrunableBertForSequenceClassification with masks: `shrink"):
        stock_model(masked, smallest=True)
    with pytest.raises(TypeError, match=r"whole transformers model of a known head, .* got Own"):
        stock_model(Own(make_pruned("bert", "model")), smallest=True)
    mixed = make_model()
    mixed.bert = make_pruned().bert
    with pytest.raises(TypeError, match=r"known head, .* got BertForSequenceClassification"):
        stock_model(mixed, smallest=False)
    masks = make_pruned("vit", "model")
    masks.embeddings.mask_token = nn.Parameter(torch.zeros(1, 1, 32))
    with pytest.raises(ValueError, match=r"with \['embeddings\.mask_token'\] besides"):
        stock_model(masks, smallest=False)
