"""export: every kind of pruned model in every engine, int8 within a drop, refusals in words."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification

from families import TABLE
from hf_mlprune import PruningCallback, PruningConfig, export, shrink
from hf_mlprune.exporting.bench import bench
from hf_mlprune.exporting.export import ENGINES
from hf_mlprune.exporting.metric import is_within, points_lost
from hf_mlprune.exporting.report import REPORT_FILE
from hf_mlprune.exporting.source import read_source
from hf_mlprune.exporting.table import measure_table
from hf_mlprune.modeling.block_sparse import BlockSparseLinear
from hf_mlprune.state import pruning_state
from support.models import assert_same_outputs, inputs_of, labelled_head, make_batch, make_model, prune
from support.training import make_trainer

# Of torch's, onnxscript's and nncf's own making.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::SyntaxWarning"
)

ROWS = ("attention_output", "fc1", "fc2")
KINDS = {
    "rows": (("heads", "rows"), ("fc1",), ()),
    "scatter": (("heads", "rows"), ROWS, ()),
    "empty": (("heads", "rows"), ROWS, ("heads", "fc1", "attention_output", "fc2")),
    "blocks": (("heads", "rows", "blocks"), ROWS, ()),
}


def pruned(kind="scatter", head=None, family="bert"):
    levels, sites, empty = KINDS[kind]
    head = head or labelled_head(family)
    model = make_model(head, family=family)
    shape = {"block_shape": (8, 4)} if "blocks" in levels else {}
    settings = PruningConfig.create(0.4, levels=levels, row_sites=sites, minimum_units=0, **shape)
    prune(model, settings, head=head)
    for name in empty:
        gate = pruning_state(model).gates(1)[name]
        gate.set_keep(torch.zeros(gate.units, dtype=torch.bool))
    shrink(model)
    return model.eval()


def labelled(model, batches=4):
    """Batches whose labels are what the model says, so that it is right every time."""
    found = []
    for seed in range(batches):
        batch = inputs_of(make_batch("sequence", rows=8, seed=seed))
        with torch.no_grad():
            found.append({**batch, "labels": model(**batch).logits.argmax(-1)})
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", ["onnx", "onnx-blocks", "openvino", "torch", "stock", "dense"])
def test_every_kind_of_model_in_every_engine(kind, to, tmp_path):
    model = pruned(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = export(model, tmp_path / "served", to, latency=())
    assert found.proof.difference <= 1e-4
    # Of the folder that was named, not of what was proved aside; and of other inputs.
    run = ENGINES[to].load(tmp_path / "served", 1)
    batch = inputs_of(make_batch("sequence", rows=5, seed=7))
    given = {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}
    with torch.no_grad():
        expected = model(**batch).logits.numpy()
    np.testing.assert_allclose(run(given)["logits"], expected, atol=1e-4 * np.abs(expected).max())
    assert json.loads((tmp_path / "served" / REPORT_FILE).read_text())["to"] == to
    # Nothing that would need consent.
    assert not list((tmp_path / "served").glob("*.py"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    dense = kind == "blocks" and to in ("onnx", "openvino", "stock", "dense")
    assert any("block-sparse layers are dense here" in note for note in found.notes) is dense


@pytest.mark.parametrize("family", [name for name in TABLE if name != "bert"])
def test_every_family_in_onnx(family, tmp_path):
    assert export(pruned(family=family), tmp_path / "served", latency=()).proof.difference <= 1e-4


def test_a_compiled_package(tmp_path):
    assert export(pruned("blocks"), tmp_path / "served", "aotinductor", latency=()).proof.difference <= 1e-4


def test_no_graph_holds_an_empty_matrix(tmp_path):
    import onnx

    export(pruned("empty"), tmp_path / "served", latency=())
    graph = onnx.load(tmp_path / "served" / "model.onnx").graph
    assert all(0 not in tensor.dims for tensor in graph.initializer)
    assert [axis.dim_param for axis in graph.input[0].type.tensor_type.shape.dim] == ["batch", "sequence"]


def test_a_model_of_blocks_without_blocks_is_its_bias(tmp_path):
    model = pruned("blocks")
    layer = next(module for module in model.modules() if isinstance(module, BlockSparseLinear))
    assert export(model, tmp_path / "served", latency=()).proof.difference <= 1e-4
    assert layer.matrix().to_dense().shape == (layer.out_features, layer.in_features)


STRANGER = """
import json, sys
import numpy as np, onnxruntime
inputs = {name: np.array(value) for name, value in json.loads(sys.argv[2]).items()}
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", providers=["CPUExecutionProvider"])
print(json.dumps(session.run(["logits"], inputs)[0].tolist()))
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("kind", ["rows", "blocks"])
def test_a_stranger_runs_int8_by_onnxruntime_alone(kind, tmp_path):
    model = pruned(kind)
    data = labelled(model)
    found = export(model, tmp_path / "served", int8=True, data=data, latency=())
    assert found.int8.metric[0] == 1.0
    batch = {name: data[0][name] for name in ("input_ids", "attention_mask")}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path / "served"),
         json.dumps({name: value.tolist() for name, value in batch.items()})],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    logits = np.array(json.loads(done.stdout))
    with torch.no_grad():
        expected = model(**batch).logits.numpy()
    assert np.abs(logits - expected).max() <= max(2 * found.int8.difference, 0.02) * np.abs(expected).max()


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_calibrated_int8(to, tmp_path):
    model = pruned("scatter")
    found = export(
        model, tmp_path / "served", to, int8="static", data=labelled(model), max_drop=100, latency=()
    )
    assert found.int8.recipe == "static"
    assert 0 < found.int8.difference < 0.5
    assert not found.int8.float_layers


def test_layers_that_hurt_are_named_and_stay_float(tmp_path):
    model = pruned("rows")
    data = [make_batch("sequence", rows=8, seed=seed) for seed in range(4)]
    with torch.no_grad():
        wanted = np.concatenate([model(**inputs_of(batch)).logits.numpy() for batch in data])

    def closeness(found):
        return {"closeness": 1 - np.abs(found.predictions - wanted).mean() / np.abs(wanted).mean()}

    def exported(max_drop):
        settings = {"int8": True, "data": data, "compute_metrics": closeness, "latency": ()}
        return export(model, tmp_path / f"within {max_drop}", max_drop=max_drop, **settings).int8

    everything = exported(100.0)
    assert not everything.float_layers
    loss = 100 * (everything.metric[0] - everything.metric[1])
    some = exported(0.8 * loss)
    assert some.recipe == "dynamic"
    assert 100 * (some.metric[0] - some.metric[1]) <= 0.8 * loss
    assert list(some.hurt.values()) == sorted(some.hurt.values(), reverse=True)
    assert {"bert.encoder.layer.0", "bert.encoder.layer.1", "classifier"} <= set(some.hurt)
    assert some.float_layers == tuple(some.hurt)[: len(some.float_layers)]
    assert 0 < len(some.float_layers) < len(some.hurt)


def test_a_model_that_int8_spoils_stays_float(tmp_path):
    model = pruned("rows")
    # A metric that nothing but float passes.
    with torch.no_grad():
        wanted = [model(**inputs_of(make_batch("sequence", seed=seed))).logits.numpy() for seed in range(2)]

    def exactness(found):
        return {"exact": float(np.abs(found.predictions - np.concatenate(wanted)).max() < 1e-6)}

    data = [make_batch("sequence", seed=seed) for seed in range(2)]
    found = export(model, tmp_path / "served", int8=True, data=data, compute_metrics=exactness, latency=())
    assert found.int8.recipe == "none"
    assert found.int8.metric == (1.0, 1.0)
    assert ENGINES["onnx"].load(tmp_path / "served", 1) is not None


def test_latency_is_over_dense_models_in_torch_and_in_the_engine(tmp_path):
    model = pruned("rows")
    found = export(model, tmp_path / "served", int8=True, latency=((1, 8), (2, 16)), threads=1)
    assert [(row.batch, row.length, row.threads) for row in found.latency] == [(1, 8, 1), (2, 16, 1)]
    ways = {"pruned in torch", "dense in torch", "dense in onnx", "dense int8 in onnx"}
    for row in found.latency:
        assert set(row.speedup) == ways
        assert row.seconds.keys() == ways | {"export"}
        assert row.processor


def test_a_folder_is_exported_with_its_tokenizer(tmp_path):
    from test_sentence_transformers import save_encoder

    model = pruned("scatter")
    save_encoder(tmp_path / "stock", "sequence")
    model.save_pretrained(tmp_path / "pruned")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "pruned" / name).write_bytes((tmp_path / "stock" / name).read_bytes())
    export(str(tmp_path / "pruned"), tmp_path / "served", "stock", latency=())
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "served").eval()
    assert type(loaded).__name__ == "BertForSequenceClassification"
    batch = inputs_of(make_batch("sequence"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, atol=1e-5, rtol=0)
    assert (tmp_path / "served" / "tokenizer.json").is_file()
    # Once more, over what an export wrote.
    export(str(tmp_path / "served"), tmp_path / "served", "stock", latency=())


BATCH = make_batch("sequence")
REFUSED = {
    "engine": ({"to": "tensorrt"}, ValueError, r"to: expected one of \['onnx', .*got 'tensorrt'"),
    "recipe": (
        {"int8": "int4"},
        ValueError,
        r"int8: expected False, True or one of \['dynamic', 'static'\], got 'int4'",
    ),
    "no recipe": ({"to": "stock", "int8": True}, ValueError, r'expected False for to="stock"'),
    "no data": ({"to": "openvino", "int8": True}, ValueError, "static int8 is calibrated; pass data="),
    "empty data": ({"data": []}, ValueError, "data: expected batches, got none"),
    "other data": ({"data": [{"text": 1}]}, ValueError, r"data: expected .*\['input_ids'.*\['text'\]"),
    "engines": ({"to": ["onnx"]}, ValueError, "to: expected one of .*got \\['onnx'\\]"),
    "one batch": ({"data": BATCH}, TypeError, "data: expected several batches, .*got dict"),
    "tuples": (
        {"data": [tuple(BATCH.values())]},
        TypeError,
        "data: expected batches that are dicts.*got tuple",
    ),
    "rows": (
        {"data": [{k: x[0] for k, x in BATCH.items()}]},
        ValueError,
        r"input_ids of 2 axes, .*got shape \(12,\); a dataset of single examples must be batched",
    ),
    "too long": (
        {"data": [{k: x.repeat(1, 4) for k, x in inputs_of(BATCH).items()}]},
        ValueError,
        r"data: expected input_ids with rows of 32 tokens at most, got shape \(4, 48\)",
    ),
    "some labels": (
        {"data": [BATCH, inputs_of(BATCH)]},
        ValueError,
        r"\['labels'\] in every batch, got \[\] in 1",
    ),
    "scores": (
        {"int8": True, "data": [{**BATCH, "labels": torch.ones(4, 3).long()}]},
        ValueError,
        r"one class as label of each row of logits, got .*\(4, 3\) and labels of int64 \(4, 3\); pass",
    ),
    "another figure": (
        {"int8": True, "data": [BATCH], "metric": "f1"},
        ValueError,
        r"which of \['accuracy'\] counts, got 'f1'",
    ),
    "metric alone": (
        {"int8": True, "metric": "f1"},
        ValueError,
        "metric: expected data with labels .*got no data",
    ),
    "metric of what": (
        {"compute_metrics": len, "data": [inputs_of(BATCH)]},
        ValueError,
        r"compute_metrics: expected data with labels .*got batches with \['attention_mask', 'input_ids'\]",
    ),
    "no function": (
        {"compute_metrics": "f1", "data": [BATCH]},
        TypeError,
        "compute_metrics: expected a function",
    ),
    "no number": ({"max_drop": float("nan")}, ValueError, "max_drop: expected points, 0 or more, got nan"),
    "text": ({"max_drop": "0.5"}, ValueError, "max_drop: expected points, 0 or more, got '0.5'"),
    "a drop of nothing": (
        {"int8": True, "max_drop": 0.5},
        ValueError,
        "max_drop: expected data with labels .*got no data",
    ),
    "a drop without int8": (
        {"max_drop": 0.5, "data": [BATCH]},
        ValueError,
        "max_drop: expected int8, which it is held to, got int8=False and 0.5",
    ),
    "one size": (
        {"latency": (1, 128)},
        ValueError,
        r"latency: expected pairs of batch and tokens, .*\(1, 128\)",
    ),
    "no rows": (
        {"latency": ((0, 8),)},
        ValueError,
        "latency: expected pairs of batch and tokens, each 1 or more",
    ),
    "threads": ({"threads": -1}, ValueError, "threads: expected 1 or more, or None"),
    "tokenizer": (
        {"processing_class": "bert"},
        TypeError,
        "processing_class: expected a tokenizer .*got str",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, tmp_path):
    settings, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        export(pruned("rows"), tmp_path / "served", **settings)
    assert not (tmp_path / "served").exists()


def test_models_that_cannot_be_exported(tmp_path):
    with pytest.raises(TypeError, match=r"a known family .*or a folder of one, got Linear"):
        export(torch.nn.Linear(2, 2), tmp_path / "served")
    masked = make_model("sequence")
    prune(masked, PruningConfig.create(0.5), head="sequence")
    with pytest.raises(TypeError, match=r"which still has masks; call shrink\(model\) first"):
        export(masked, tmp_path / "served")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_stays_as_it_is(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("my own words")
    with pytest.raises(FileExistsError, match="expected a new folder, or one that export wrote"):
        export(pruned("rows"), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "my own words"


def test_a_file_put_beside_an_export_stays(tmp_path):
    model = pruned("rows")
    export(model, tmp_path / "served", "stock", latency=())
    (tmp_path / "served" / "thesis.txt").write_text("my own words")
    with pytest.raises(FileExistsError, match=r"something else \(thesis.txt\)"):
        export(model, tmp_path / "served", "stock", latency=())
    assert (tmp_path / "served" / "thesis.txt").read_text() == "my own words"


def test_folders_are_refused_before_the_work(tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 2)  # Would be refused, but later.
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        export(model, tmp_path / "file" / "served")
    for nothing in (None, ""):
        with pytest.raises(TypeError, match="folder: expected the path of a folder"):
            export(model, nothing)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileExistsError, match="where this runs"):
        export(model, ".")


def test_links_stay_links(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "served").symlink_to(tmp_path / "disk")
    export(pruned("rows"), tmp_path / "served", "stock", latency=())
    assert (tmp_path / "served").is_symlink()
    assert (tmp_path / "disk" / REPORT_FILE).is_file()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"model: expected a folder or hub name, got .*where nothing is"
    ):
        export(tmp_path / "missing", tmp_path / "served")


def test_points_are_those_of_the_metric_before():
    # Hundredths of one and units of the other would differ by 88.5, in the wrong direction.
    assert points_lost(-0.9, -1.5) == pytest.approx(60)
    assert points_lost(1.2, 0.9) == pytest.approx(0.3)
    assert points_lost(0.9, 0.8) == pytest.approx(10)


def test_a_metric_that_is_no_number_is_refused(tmp_path):
    settings = {"int8": True, "data": [BATCH], "latency": ()}
    with pytest.raises(ValueError, match="expected f1 to be a number, got nan"):
        export(pruned("rows"), tmp_path / "served", compute_metrics=lambda _: {"f1": np.nan}, **settings)
    assert not list(tmp_path.iterdir())


def test_data_of_other_types_are_taken(tmp_path):
    data = [{name: x.int() for name, x in BATCH.items()}]
    found = export(pruned("rows"), tmp_path / "served", int8=True, data=data, max_drop=100, latency=())
    assert found.int8.metric is not None


def test_a_sentence_model_of_the_hub_is_read_as_one(tmp_path, monkeypatch):
    import sentence_transformers

    from hf_mlprune.exporting import source

    (tmp_path / source.SENTENCES).write_text('{"model_type": "SparseEncoder"}')
    monkeypatch.setattr(source, "find_file", lambda _, name: tmp_path / name)
    monkeypatch.setattr(sentence_transformers, "SparseEncoder", lambda name, device: (name, device))
    assert source._load("some/model", None) == (("some/model", "cpu"), None)


def test_an_export_that_computes_something_else_is_not_written(tmp_path):
    class Different(torch.nn.Module):
        def forward(self, x):
            return x + 0.1 * float(not torch.compiler.is_exporting())

    model = pruned("rows")
    model.dropout = Different()
    with pytest.raises(RuntimeError, match="the engine computes something else, and nothing was written"):
        export(model, tmp_path / "served", latency=())
    assert not list(tmp_path.iterdir())


@given(st.integers(1, 3000), st.data(), st.sampled_from([0.5, 1, 0.1, 2]))
def test_a_drop_is_counted_in_rows_whatever_floats_make_of_it(rows, data, max_drop):
    before = data.draw(st.integers(0, rows))
    after = data.draw(st.integers(0, before))
    lost = Fraction(100 * (before - after), rows)
    assert is_within(before / rows, after / rows, max_drop) == (lost <= Fraction(str(max_drop)))


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_a_dense_model_that_takes_more_inputs_is_compared(engine, tmp_path):
    model = make_model(family="distilbert")
    prune(model, PruningConfig.create(0.5))
    shrink(model)
    model.save_pretrained(tmp_path / "pruned")
    make_model().save_pretrained(tmp_path / "dense")
    found = bench(
        str(tmp_path / "pruned"), against=str(tmp_path / "dense"), engines=[engine], shapes=["1x8"], rounds=2
    )
    assert all(row.milliseconds > 0 for row in found.rows)


def test_a_model_that_was_trained_in_autocast_is_exported_without_it(tmp_path):
    trainer = make_trainer(
        tmp_path / "run", make_model(), PruningCallback(density=0.5), bf16=True, use_cpu=True
    )
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert_same_outputs(read_source(trainer.model, None).module, loaded, make_batch(), 0.0)
    export(trainer.model, tmp_path / "onnx", to="onnx", latency=())


def test_padding_counts_whatever_batches_an_export_was_given(tmp_path):
    """Data of one length have no mask; what is served has."""
    model = pruned()
    data = [{"input_ids": batch["input_ids"]} for batch in labelled(model)]
    export(model, tmp_path / "served", int8="static", data=data, latency=())
    export(model, tmp_path / "float", data=data, latency=())
    batch = inputs_of(make_batch(seed=9))
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    with torch.no_grad():
        wanted = model(**batch).logits.numpy()
    found = ENGINES["onnx"].load(tmp_path / "float", 1)(batch)["logits"]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("to", ["onnx", "torch"])
@pytest.mark.parametrize("choices", [1, 3])
def test_any_number_of_choices_is_served(choices, to, tmp_path):
    model = pruned(head="choice")
    export(model, tmp_path / "served", to, latency=())
    tokens = torch.randint(1, 60, (2, choices, 9))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    batch["token_type_ids"] = torch.zeros_like(tokens)
    with torch.no_grad():
        wanted = model(**batch).logits.numpy()
    found = ENGINES[to].load(tmp_path / "served", 1)(batch)["logits"]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_settings_of_training_do_not_hinder_an_export(tmp_path):
    """What a graphics processor computes attention with, and tuples as outputs."""
    model = pruned()
    model.config.return_dict = False
    model.config._attn_implementation = "flash_attention_2"
    export(model, tmp_path / "served", latency=())
    assert model.config.return_dict is False
    assert model.config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("to", ["stock", "dense"])
def test_a_folder_of_transformers_has_the_dtype_of_the_model(to, tmp_path):
    model = pruned().to(torch.bfloat16)
    found = export(model, tmp_path / "served", to, latency=())
    served = AutoModelForSequenceClassification.from_pretrained(tmp_path / "served", dtype="auto")
    assert served.dtype == torch.bfloat16
    assert found.cost.bytes[0] == sum(t.numel() * t.element_size() for t in model.state_dict().values())


def test_images_have_the_length_of_their_size(tmp_path):
    model = pruned(family="vit")
    found = export(model, tmp_path / "served", latency=((1, 128),))
    assert found.latency[0].length == 5
    model.save_pretrained(tmp_path / "pruned")
    rows = bench(str(tmp_path / "pruned"), shapes=("1x128",), rounds=1, threads=1).rows
    assert {row.length for row in rows} == {5}


def test_a_dense_model_of_fewer_words_and_positions_is_compared(tmp_path):
    pruned().save_pretrained(tmp_path / "pruned")
    make_model(vocab_size=8, max_position_embeddings=16).save_pretrained(tmp_path / "dense")
    against = str(tmp_path / "dense")
    rows = bench(str(tmp_path / "pruned"), against=against, shapes=("1x16",), rounds=1, threads=1).rows
    assert len(rows) == 2
    with pytest.raises(ValueError, match="shape: expected at most 16 tokens"):
        bench(str(tmp_path / "pruned"), against=against, shapes=("1x24",), rounds=1, threads=1)


def test_labels_of_two_kinds_need_a_metric(tmp_path):
    model = pruned(head="pretraining")
    batch = make_batch("pretraining")
    with pytest.raises(ValueError, match=r"one class as label of each row .* pass compute_metrics"):
        export(model, tmp_path / "served", int8=True, data=[batch])


@pytest.mark.parametrize(("name", "value"), [("batch", 0), ("length", 0), ("threads", 0), ("ffn_points", 0)])
def test_numbers_of_a_table_are_checked(name, value):
    sizes = {"batch": 1, "length": 8, "threads": 1, "ffn_points": 2, name: value}
    with pytest.raises(ValueError, match=f"{name}: expected a whole number from 1 up, got 0"):
        measure_table(make_model(), engine="torch", **sizes)
