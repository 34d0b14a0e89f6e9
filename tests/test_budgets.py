"""Targets other than a density: what masks cost in time, bytes and multiply-adds."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_model
from torch import nn

from families import each_family
from hf_mlprune import PruningCallback, PruningConfig, attach, part_times, report, shrink, start
from hf_mlprune.budgets.bytes import parse_size
from hf_mlprune.budgets.time import PARTS, increasing, parse_time
from hf_mlprune.encoders import inspect_encoder
from hf_mlprune.goals import is_within_target, predicted_speedup, reached
from hf_mlprune.part_times import points
from hf_mlprune.reports.folder import read_folder
from hf_mlprune.stages import StructuredStage
from hf_mlprune.state import pruning_state, pruning_states
from hf_mlprune.trainer.data import typical_length
from support.models import assert_same_outputs, clone, find_family, make_batch, make_model, prune
from support.training import make_trainer
from test_nested import Pair, prune_pair


def file_bytes(model, folder):
    model.save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size


def with_times(model, config, *, head=1000, row=10, rest=5000):
    """Masks, and a table by which every head, every row and the rest cost so much."""
    attach(model, config)
    state = pruning_state(model)
    for group, cost in (("heads", head), ("fc1", row)):
        table = state.get_buffer(PARTS[group])
        table.copy_(torch.arange(len(table)) * cost)
    state.get_buffer("rest_time").fill_(rest)
    state.get_buffer("target_length").fill_(128)
    return state


def random_fit(stage, share, seed):
    """Land on a share by random priorities."""
    generator = torch.Generator().manual_seed(seed)
    masks = stage.fit([torch.rand(each, generator=generator) for each in stage.active], share, final=True)
    for gate, keep in zip(stage.gates, masks, strict=True):
        gate.set_keep(keep)


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_size_is_met_by_the_file_within_a_unit(family, dtype, tmp_path):
    model = make_model(family=family).to(dtype)
    size = 0.8 * file_bytes(model, tmp_path / "dense")
    prune(model, PruningConfig.create(size=f"{size / 1e3:.3f} kB"))
    unit = max(float(costs.max()) for costs in StructuredStage(pruning_state(model)).costs)
    shrink(model)
    # Of tiny models the header, which is estimated, is a good part.
    assert size - unit - 6000 < file_bytes(model, tmp_path / "small") <= size


@each_family
@pytest.mark.parametrize("exclude", [(0,), (0, 2)])
def test_layers_that_are_left_alone_take_their_part_of_a_size(family, exclude, tmp_path):
    model = make_model(family=family, num_hidden_layers=3, hidden_size=64, intermediate_size=256)
    size = 0.9 * file_bytes(model, tmp_path / "dense")
    prune(model, PruningConfig.create(size=f"{size / 1e3:.3f} kB", exclude=exclude))
    unit = max(float(costs.max()) for costs in StructuredStage(pruning_state(model)).costs)
    shrink(model)
    assert size - unit - 6000 < file_bytes(model, tmp_path / "small") <= size


def test_a_linear_without_bias_does_not_count_for_the_others(tmp_path):
    model = make_model(family="vit", qkv_bias=False)
    size = 0.8 * file_bytes(model, tmp_path / "dense")
    prune(model, PruningConfig.create(size=f"{size / 1e3:.3f} kB"))
    assert set(pruning_state(model).sizes().biases) == {"attention_output", "fc1", "fc2"}
    shrink(model)
    assert file_bytes(model, tmp_path / "small") <= size


@pytest.mark.parametrize("share", [0.8, 0.6])
def test_encoders_share_a_size_alike(share, tmp_path):
    def bytes_of(pair):
        save_model(pair, str(tmp_path / "model.safetensors"))
        return (tmp_path / "model.safetensors").stat().st_size

    sizes = {"hidden_size": 64, "intermediate_size": 256}
    model = Pair(
        make_model("model", 0, "bert", **sizes), make_model("model", 1, "bert", **sizes, num_hidden_layers=3)
    )
    model.head = nn.Linear(64, 2)
    size = share * bytes_of(model)
    prune_pair(model, PruningConfig.create(size=f"{size / 1e3:.3f} kB", encoder=["first", "second"]))
    units = [max(float(costs.max()) for costs in StructuredStage(s).costs) for s in pruning_states(model)]
    densities = [state.density() for state in pruning_states(model)]
    shrink(model)
    assert size - max(units) - 6000 < bytes_of(model) <= size
    assert max(densities) - min(densities) < 0.1


@each_family
def test_multiply_adds_are_met_within_a_unit(family):
    model = make_model(family=family)
    prune(model, PruningConfig.create(multiply_adds=0.7))
    stage = StructuredStage(pruning_state(model))
    unit = max(float(costs.max()) for costs in stage.costs)
    shrink(model)
    now, dense = report(model).multiply_adds
    assert 0.7 * dense - unit <= now <= 0.7 * dense


@given(st.integers(0, 2**31), st.floats(1.1, 6.0), st.integers(0, 3000), st.integers(1, 50))
def test_a_speedup_is_met_within_a_step_of_the_table(seed, speedup, rest, row):
    model = make_model(hidden_size=16, intermediate_size=520)
    state = with_times(model, PruningConfig.create(speedup=speedup), rest=rest, row=row)
    stage = StructuredStage(state)
    share = stage.budget.share()
    if share < stage.least_share():
        with pytest.raises(ValueError, match=r"cannot be reached: the least is .* ms"):
            random_fit(stage, share, seed)
        return
    random_fit(stage, share, seed)
    assert is_within_target(state)
    assert predicted_speedup(state) >= speedup - 1e-6
    # Nothing more fits: every unit here costs as much as any other of its kind.
    for gate in stage.gates:
        if not bool(gate.keep.all()):
            another = (~gate.keep).nonzero()[0]
            gate.keep[another] = True
            assert not is_within_target(state)
            gate.keep[another] = False


def test_widths_are_those_that_pay():
    """A width that is slower than a larger one is not landed on."""
    model = make_model(intermediate_size=64)
    state = with_times(model, PruningConfig.create(speedup=1.5))
    table = state.get_buffer("ffn_time")
    table.fill_(-1)
    for width, time in ((0, 0), (16, 100), (24, 400), (32, 200), (48, 300), (64, 400)):
        table[width] = time
    stage = StructuredStage(state)
    assert stage.budget.widths_that_pay("fc1", 64) == [0, 16, 32, 48, 64]
    for seed in range(5):
        random_fit(stage, stage.budget.share(), seed)
        counts = {int(gate.keep.sum()) for gate in stage.gates if gate.units == 64}
        # Each layer keeps a row at least.
        assert counts <= {1, 16, 32, 48, 64}


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12))
def test_times_that_never_fall_are_the_nearest_ones(values):
    found = increasing(torch.tensor(values, dtype=torch.float64))
    assert bool((found.diff() >= -1e-9).all())
    assert float(found.sum()) == pytest.approx(sum(values))
    if values == sorted(values):
        assert found.tolist() == values


@given(st.integers(1, 5000), st.integers(1, 40))
def test_points_of_a_table(most, count):
    found = points(most, count)
    assert found[0] == 0
    assert found[-1] == most
    assert found == sorted(set(found))
    assert len(found) <= count + 2


@pytest.mark.parametrize(("seconds", "layers"), [(1e-4, 3), (0.02, 6), (1.0, 6), (1.2, 1), (60, 6)])
def test_where_calls_are_long_fewer_widths_are_timed_more_than_once(seconds, layers):
    most = part_times.HEAD_POINTS + part_times.FFN_POINTS
    share = part_times.share_of_points(seconds, most, layers)
    assert 1 / 3 <= share <= 1
    round_seconds = seconds * (2 * layers + part_times.MEAN_TIME * most * share)
    # Of each opening one round is counted, and one goes before it.
    openings = part_times.MOST_SECONDS / round_seconds / 2
    assert openings >= part_times.LEAST_OPENINGS - 1e-9 or share == 1 / 3
    # No width is left out for nothing.
    assert share == 1 or openings <= part_times.LEAST_OPENINGS + 1e-9


def test_a_table_has_the_widths_for_which_there_is_time(monkeypatch):
    encoder = inspect_encoder(make_model(num_attention_heads=8, intermediate_size=480))
    tables = []
    for budget in (part_times.MOST_SECONDS, 1e-6):
        monkeypatch.setattr(part_times, "MOST_SECONDS", budget)
        monkeypatch.setattr(part_times, "ROUNDS", 1)
        # What the machine does beside may hide that a small encoder takes time at all.
        for _ in range(10):
            with contextlib.suppress(ValueError):
                tables.append(part_times.measure_times(encoder, 8, 16))
                break
    many, few = ({name: int((table >= 0).sum()) for name, table in found.items()} for found in tables)
    assert many == {"rest_time": 1, "attention_time": 9, "ffn_time": 25}
    assert few == {"rest_time": 1, "attention_time": 5, "ffn_time": 9}


@pytest.mark.parametrize(("contention", "error"), [(0.0, 1e-3), (0.3, 0.02), (1.0, 0.06)])
def test_a_table_is_right_about_small_encoders_though_large_parts_slow_each_other(
    contention, error, monkeypatch
):
    """What large weights push out of the caches makes other parts slower: times are no mere sums."""
    layers, sizes = 6, {"num_attention_heads": 12, "intermediate_size": 384, "hidden_size": 96}
    encoder = inspect_encoder(make_model(num_hidden_layers=layers, **sizes))

    def time_of(kept):
        each = [heads / 12 + 2 * rows / 384 + contention * heads / 12 * rows / 384 for heads, rows in kept]
        return 1e-3 * (1 + sum(each))

    monkeypatch.setattr(
        part_times, "_times", lambda _, shapes: [time_of([shape[:2]] * shape[2]) for shape in shapes]
    )
    tables = part_times.measure_times(encoder, 1, 8)
    bare, attention, ffn = (tables[name] for name in ("rest_time", "attention_time", "ffn_time"))

    def predicted(kept):
        return 1e-9 * float(bare + sum(attention[heads] + ffn[rows] for heads, rows in kept))

    for part in (1, 2, 4):
        kept = [(12 // part, 384 // part)] * layers
        assert predicted(kept) == pytest.approx(time_of(kept), rel=0.01)
    draw = random.Random(0)
    for share in (0.33, 0.22) * 4:
        unequal = [
            [min(most, max(0, round(draw.gauss(share, share / 2) * most / step) * step))
             for most, step in ((12, 1), (384, 16))]
            for _ in range(layers)
        ]  # fmt: skip
        assert predicted(unequal) == pytest.approx(time_of(unequal), rel=error)


@each_family
def test_times_are_measured_without_copies_of_the_vocabulary(family):
    sizes = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 256}
    large = {} if find_family(family).takes_images else {"vocab_size": 40_000}
    if family == "modernbert":
        large["pad_token_id"] = 39_999
    encoder = inspect_encoder(make_model(family=family, **sizes, **large))
    words = []

    def make(network, inputs):
        words.extend(p.shape[0] for name, p in network.named_parameters() if "word_embeddings" in name)
        repeats = 1 + sum(p.numel() for p in network.parameters()) // 1000
        return lambda: lambda: [network(**inputs), sum(range(100 * repeats))]

    found = part_times.measure_times(encoder, 2, 8, make, ffn_points=2)
    assert max(words, default=0) <= part_times.PROBED_VOCABULARY
    assert int(found["rest_time"]) > 0


@pytest.mark.parametrize(
    "settings", [{"multiply_adds": 0.5, "length": 16}, {"size": "70 kB"}, {"density": 0.5}]
)
def test_what_a_run_reached_is_said_as_its_target_counts_it(settings, tmp_path, capsys):
    callback = PruningCallback(**settings)
    trainer = make_trainer(tmp_path, make_model(), callback)
    trainer.train()
    printed = " ".join(capsys.readouterr().err.split())
    trainer.model.save_pretrained(tmp_path / "pruned")
    found, said = callback.report, callback.report.reached
    if "density" in settings:
        assert said is None
    elif "size" in settings:
        written = (tmp_path / "pruned" / "model.safetensors").stat().st_size
        # The header of the file is counted as if nothing were removed.
        assert float(said.partition(" kB of ")[0]) == pytest.approx(written / 1e3, rel=0.01)
    else:
        now, dense = found.multiply_adds
        assert said == f"{now / dense:.4f} of the dense multiply-adds for 16 tokens"
    (name, value), counted = next(iter(settings.items())), f", {said}" if said else ""
    goal = value if name == "density" else f"{name}={value}"
    assert f"landed at density {found.density:.4f}{counted} (target {goal})" in printed
    line = f"pruned by the method fisher to {name}={value}" + (f"; reached: {said}" if said else "")
    assert read_folder(str(tmp_path / "pruned")).lines()[0] == line
    assert f"It was {line}." in (tmp_path / "pruned" / "README.md").read_text()


def test_rows_land_in_groups_of_16_whatever_is_counted(tmp_path):
    dense = file_bytes(make_model(hidden_size=16, num_hidden_layers=4, intermediate_size=520), tmp_path)
    for target in ({"multiply_adds": 0.5}, {"size": f"{0.7 * dense / 1000:.3f} kB"}):
        model = make_model(hidden_size=16, num_hidden_layers=4, intermediate_size=520)
        prune(model, PruningConfig.create(**target))
        counts = [int(gates["fc1"].keep.sum()) for gates in map(pruning_state(model).gates, range(4))]
        assert len([count for count in counts if count % 16 and count != 520]) <= 1
        assert is_within_target(pruning_state(model))


@pytest.mark.parametrize("target", [{"speedup": 1.2}, {"multiply_adds": 0.5}])
def test_a_length_that_the_model_does_not_take_is_refused(target):
    model = make_model()
    attach(model, PruningConfig.create(**target, length=64))
    with pytest.raises(ValueError, match="length: expected at most 32 tokens, what the model takes, got 64"):
        start(model, 20)


def test_positions_that_are_relative_only_have_no_most(tmp_path):
    model = make_model(family="deberta-v2")
    attach(model, PruningConfig.create(multiply_adds=0.5, length=64))
    start(model, 20)
    assert int(pruning_state(model).get_buffer("target_length")) == 64


def test_a_table_of_other_threads_is_refused(tmp_path):
    model = make_model()
    sizes = {"layers": 2, "heads": 4, "fc1": 48}
    times = {
        "rest_time": {"0": 5},
        **{n: {"0": 0, str(m): 9} for n, m in (("attention_time", 4), ("ffn_time", 48))},
    }
    table = {"version": 1, "engine": "torch", "batch": 1, "length": 16, "threads": 1, **sizes}
    file = tmp_path / "table.json"
    file.write_text(json.dumps({**table, "nanoseconds": times}))
    attach(model, PruningConfig.create(speedup=1.2, latency_table=str(file), threads=8))
    with pytest.raises(ValueError, match="latency_table: expected threads 8, got 1"):
        start(model, 20)


def test_a_speedup_is_measured_pruned_to_and_reported(tmp_path):
    # Large enough that its time is that of its products, also where other tests run beside.
    model = make_model(num_hidden_layers=3, intermediate_size=2048, hidden_size=128)
    callback = PruningCallback(speedup=1.5, batch=2, length=16, threads=1)
    trainer = make_trainer(tmp_path, model, callback)
    trainer.train()
    found = report(model, predicted_speedup=2.0)
    assert found.predicted_speedup == 2.0
    written = (tmp_path / "pruning_report.json").read_text()
    assert '"predicted_speedup": 1.' in written
    assert '"batch": 2' in written
    assert found.density < 1
    masked, batch = clone(model), make_batch()
    model.save_pretrained(tmp_path / "pruned")
    assert_same_outputs(masked, type(model).from_pretrained(tmp_path / "pruned"), batch)


ROWS = [[5] * length for length in (3, 4, 4, 9, 30)]


@pytest.mark.parametrize(
    ("data", "length"),
    [
        (Dataset.from_dict({"input_ids": ROWS}), 4),
        (Dataset.from_dict({"input_ids": ROWS}).with_format("torch"), 4),
        (Dataset.from_dict({"input_ids": [[5] * 8] * 3, "attention_mask": [[1] * 6 + [0] * 2] * 3}), 6),
        (Dataset.from_dict({"input_ids": ROWS * 1001}), 4),
        (Dataset.from_dict({"input_ids": []}), None),
        # Choices, as tokenizers leave them.
        (Dataset.from_dict({"input_ids": [[[5] * 3, [5] * 4], [[5] * 4, [5] * 9]]}), 4),
        (Dataset.from_dict({"input_ids": [[[5] * 3] * 2], "attention_mask": [[[1, 1, 0], [1, 1, 0]]]}), 2),
        (Dataset.from_dict({"input_ids": [[5] * 3], "attention_mask": [[0.0, -1e9, 0.0]]}), None),
        (Dataset.from_dict({"input_ids": [[5] * 3, None]}), None),
        (Dataset.from_dict({"input_ids": [[], *ROWS, []]}), 4),
        (Dataset.from_dict({"input_ids": [[]]}), None),
        (Dataset.from_dict({"input_ids": [5, 6]}), None),
        (Dataset.from_dict({"input_ids": ["a b"]}), None),
        (Dataset.from_dict({"pixel_values": ROWS}), None),
        (Dataset.from_dict({"input_ids": ROWS}).to_iterable_dataset(), None),
        ([{"input_ids": row} for row in ROWS], None),
        (None, None),
    ],
)
def test_the_typical_length_of_data(data, length):
    assert typical_length(data) == length


@pytest.mark.parametrize("given", [None, 7])
def test_a_target_is_counted_for_the_length_of_the_data(given, tmp_path):
    callback = PruningCallback(multiply_adds=0.7, length=given)
    trainer = make_trainer(tmp_path, make_model(), callback)
    lengths = sorted(sum(row) for row in trainer.train_dataset["attention_mask"])
    trainer.train()
    found = json.loads((tmp_path / "pruning_report.json").read_text())
    assert found["multiply_adds_length"] == (given or lengths[len(lengths) // 2])
    now, dense = found["multiply_adds"]
    assert now <= 0.7 * dense


def test_a_resumed_run_counts_by_the_times_it_began_with(tmp_path):
    settings = {"speedup": 1.3, "batch": 8, "length": 32}
    sizes = {"num_hidden_layers": 3, "intermediate_size": 512, "hidden_size": 128}
    first = make_trainer(
        tmp_path, make_model(**sizes), PruningCallback(**settings), save_strategy="steps", save_steps=6
    )
    first.train()
    again = make_trainer(tmp_path, make_model(**sizes), PruningCallback(**settings))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert again.model.config.structure == first.model.config.structure
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {},
            r"density is missing: give .* or another target: density, speedup, latency, size, multiply_adds",
        ),
        ({"density": 0.2, "speedup": 3}, "expected one target, got density, speedup; leave out all but one"),
        ({"speedup": 1}, "speedup: expected more than 1, got 1"),
        ({"multiply_adds": 0}, r"multiply_adds: expected a value in \(0, 1\], got 0"),
        ({"latency": "fast"}, r"latency: expected a time such as '12 ms' \(us, ms, s\), got 'fast'"),
        ({"latency": 12}, r"latency: expected a time such as '12 ms'"),
        ({"size": "30 potatoes"}, r"size: expected a size such as '30 MB' \(kB, .*\), got '30 potatoes'"),
        ({"size": "0 MB"}, "size: expected a size such as"),
        ({"size": "30 mb"}, "got '30 mb'; did you mean MB?"),
        ({"latency": "12 MS"}, "got '12 MS'; did you mean ms?"),
        ({"latency": "1e999 s"}, "got '1e999 s'$"),
        (
            {"speedup": 2, "levels": ("blocks",)},
            r"levels: expected no 'blocks' with speedup=, .*\. Give levels=\('heads', 'rows'\)$",
        ),
        (
            {"speedup": 2, "preset": "paper"},
            r"with speedup=, .*\. Give levels=\('heads', 'rows'\), row_sites=\('fc1',\)$",
        ),
        ({"size": "1 MB", "preset": "paper"}, r"with size=, .*\. Give levels=\('heads', 'rows'\)$"),
        ({"speedup": 2, "row_sites": ("fc2",)}, r"row_sites: expected any of \('fc1',\) with speedup="),
        ({"density": 0.2, "batch": 4}, "batch: has no effect here, it needs speedup= or latency="),
        (
            {"density": 0.2, "length": 4},
            "length: has no effect here, it needs speedup=, latency= or multiply_adds=; leave",
        ),
        ({"speedup": 2, "threads": 0}, "threads: expected a whole number from 1 up, got 0"),
    ],
)
def test_targets_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        PruningConfig.create(**settings)


def test_sizes_and_times():
    assert parse_size("30 MB") == parse_size("30000kB") == 30e6
    assert parse_size("1 KiB") == 1024
    assert parse_time("12 ms") == parse_time("12000us") == parse_time("1.2e-2 s") == 12e6
    assert parse_time(".5 ms") == parse_time("500. us") == 5e5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"size": "1 kB"},
            r"size='1 kB' cannot be reached: the least is .*B of .*B \(.*x at most\), as embeddings and "
            r"all .* take .* [kM]B and every layer keeps minimum_units=1 .*; ask .*, lower .* or store",
        ),
        ({"size": "1 GB"}, r"size: expected less than the model's own .* [kM]B, got '1 GB'"),
        (
            {"multiply_adds": 0.001},
            r"multiply_adds=0.001 cannot be reached: .* at most\), as every layer keeps minimum_units=1",
        ),
        (
            {"multiply_adds": 0.1, "exclude": [0], "minimum_units": 0},
            r"at most\), as excluded layers \[0\] take .*; ask for less or exclude fewer layers$",
        ),
        ({"latency": "1 s", "length": 8}, r"latency: expected less than the model's own .* ms, got '1 s'"),
        (
            {"speedup": 5000, "length": 8},
            r"speedup=5000 cannot be reached: .* \(.*x at most\), as embeddings, layer norms",
        ),
    ],
)
def test_what_cannot_be_reached_is_refused_as_the_run_begins(settings, message, tmp_path):
    sizes = {"intermediate_size": 1024, "hidden_size": 128}  # so that times are those of products
    model = make_model(**sizes)
    attach(model, PruningConfig.create(**settings))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        start(model, 20)
    for name, tensor in model.state_dict().items():
        assert name.startswith("bert.pruning") or torch.equal(tensor, before[name])
    trainer = make_trainer(tmp_path, make_model(**sizes), PruningCallback(**settings))
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_layers_left_alone_count_as_they_are():
    model = make_model(num_hidden_layers=3)
    prune(model, PruningConfig.create(multiply_adds=0.8, exclude=(0,)))
    shrink(model)
    now, dense = report(model).multiply_adds
    assert 0.7 * dense < now <= 0.8 * dense
    assert report(model).layers[0].weights[0] == report(model).layers[0].weights[1]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table in ONNX Runtime, made by the command, and the sizes it is of."""
    folder = tmp_path_factory.mktemp("table")
    sizes = {"num_attention_heads": 1, "intermediate_size": 256, "hidden_size": 64}
    make_model(**sizes).save_pretrained(folder / "model")
    command = [
        "-W",
        "ignore",
        "-m",
        "hf_mlprune.exporting.table",
        str(folder / "model"),
        "--engine",
        "onnx",
        "--length",
        "16",
        "--points",
        "2",
    ]
    done = subprocess.run(
        [sys.executable, *command, "--out", str(folder / "table.json")],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "table.json", sizes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["./nowhere", "--engine", "torch"],
            "or a name of the hub, got './nowhere'",
        ),
        (["MODEL", "--engine", "torch", "--length", "6400"], "length: expected at most 32 tokens"),
        (["MODEL", "--engine", "torch", "--batch", "0"], "batch: expected a whole number from 1 up, got 0"),
        (["MODEL"], "the following arguments are required: --engine"),
    ],
)
def test_a_table_that_cannot_be_measured_is_said_in_a_line(options, message, tmp_path):
    make_model().save_pretrained(tmp_path / "MODEL")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "hf_mlprune.exporting.table", *options, "--out", "t.json"],
        check=False, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "t.json").exists()


def test_a_table_is_a_file(tmp_path):
    with pytest.raises(ValueError, match="latency_table: expected a file, got 5"):
        PruningConfig.create(speedup=2, latency_table=5)
    attach(model := make_model(), PruningConfig.create(speedup=2, latency_table=tmp_path))
    with pytest.raises(FileNotFoundError, match=r"latency_table: expected a file, got .*, a folder"):
        start(model, 20)


def test_a_prediction_by_a_table_of_ones_own_names_it(table):
    file, sizes = table
    settings = PruningConfig.create(speedup=2, latency_table=file).to_dict()
    found = report(make_model(**sizes), predicted_speedup=2.0)
    assert found.latency_lines() == ["predicted 2.00x"]
    named = dataclasses.replace(found, settings=settings).latency_lines()
    assert named == ["predicted 2.00x by the times in table.json; measured in torch:"]


def test_a_run_counts_by_a_table_that_was_made_elsewhere(table):
    file, sizes = table
    data = json.loads(file.read_text())
    assert (data["engine"], data["heads"], data["fc1"], data["layers"]) == ("onnx", 1, 256, 2)
    # Of this tiny model much does not shrink: times are set so that a speedup of 2 can be reached.
    data["nanoseconds"] = {
        "rest_time": {"0": 1_000_000},
        "attention_time": {"0": 0, "1": 400_000},
        "ffn_time": {str(width): 16_000 * width for width in range(0, 257, 16)},
    }
    file.with_name("mine.json").write_text(json.dumps(data))
    model = make_model(**sizes)
    prune(model, PruningConfig.create(speedup=2, length=16, latency_table=file.with_name("mine.json")))
    predicted = predicted_speedup(pruning_state(model))
    assert predicted == pytest.approx(2, rel=0.1)
    said = f"predicted {predicted:.2f}x, {9.992 / predicted:.2f} ms of 9.99 ms"
    assert reached(pruning_state(model)) == said
    # The length is that of the table, unless the user says another.
    attach(
        model := make_model(**sizes),
        PruningConfig.create(speedup=2, latency_table=file.with_name("mine.json")),
    )
    start(model, 20)
    assert pruning_state(model).length == 16


def times(**parts) -> dict:
    """A change of a table: nanoseconds, some of them other ones."""
    usual = {"rest_time": {"0": 9}, "attention_time": {"0": 0, "1": 9}, "ffn_time": {"0": 0, "256": 9}}
    return {"nanoseconds": {**usual, **parts}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 8}, "latency_table: expected length 16, got 8 in"),
        ({"layers": 3}, "latency_table: expected layers 2, got 3 in"),
        ({"family": "roberta"}, "latency_table: expected family bert, got 'roberta' in"),
        ({"hidden_size": 32}, "latency_table: expected hidden_size 64, got 32 in"),
        ({"length": "a", "hidden_size": None}, "latency_table: expected length 16, got 'a' in"),
        (
            {"nanoseconds": {"rest_time": {"a": 1}}},
            "latency_table: expected a table of times in .* got a time of 'a' units in rest_time",
        ),
        ({"version": 9}, "latency_table: expected version 1, got 9 in"),
        (
            {"nanoseconds": {}},
            "latency_table: expected a table of times in .* got none of rest_time; make one",
        ),
        (
            {"nanoseconds": 3},
            "latency_table: expected a table of times in .* got none of rest_time; make one",
        ),
        (
            {"nanoseconds": {"rest_time": {"0": 1}, "attention_time": {"0": 0}, "ffn_time": {"0": 0}}},
            "latency_table: .* got no times of no units and of all 1 of them in attention_time",
        ),
        (
            {"nanoseconds": {"rest_time": {"0": 1}, "attention_time": {"90": 0}, "ffn_time": {"0": 0}}},
            "latency_table: .* got a time of '90' units in attention_time, which has 0 to 1;",
        ),
        (times(attention_time={"-1": 5}), "got a time of '-1' units in attention_time, which has 0 to 1;"),
        (times(rest_time={"0": -7}), "got -7 nanoseconds in rest_time;"),
        (times(ffn_time={"0": 0, "256": float("inf")}), "got inf nanoseconds in ffn_time;"),
        (times(ffn_time={"0": 0, "256": float("nan")}), "got nan nanoseconds in ffn_time;"),
        (times(ffn_time={"0": 0, "256": "9"}), "got '9' nanoseconds in ffn_time;"),
        (times(ffn_time={"0": 0, "256": 0}, attention_time={"0": 9, "1": 9}), "got times that do not grow"),
        (times(ffn_time={"0": 9, "256": 1}, attention_time={"0": 9, "1": 3}), "got times that do not grow"),
        ({"batch": 4}, r"expected batch 1, got 4 in .*: give batch=4, or a table for 1"),
    ],
)
def test_a_table_that_is_none_is_refused(change, message, table):
    file, sizes = table
    other = file.with_name("other.json")
    other.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    model = make_model(**sizes)
    attach(model, PruningConfig.create(speedup=2, length=16, latency_table=str(other)))
    with pytest.raises(ValueError, match=message):
        start(model, 20)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe\x00", b"null", b"3"])
def test_a_file_that_is_no_table_is_refused_without_its_content(content, tmp_path):
    file = tmp_path / "table.json"
    file.write_bytes(content)
    attach(model := make_model(), PruningConfig.create(speedup=2, latency_table=file))
    with pytest.raises(ValueError, match=r"got (a JSON \w+|what is no JSON \(\w+\)); make one with"):
        start(model, 20)


def test_a_table_for_longer_sequences_than_the_model_takes_is_refused(table):
    file, sizes = table
    long = file.with_name("long.json")
    long.write_text(json.dumps({**json.loads(file.read_text()), "length": 100_000}))
    attach(model := make_model(**sizes), PruningConfig.create(speedup=2, latency_table=long))
    with pytest.raises(ValueError, match=r"length: expected at most .* tokens, what the model takes"):
        start(model, 20)


def test_a_table_that_is_not_there_is_named(tmp_path):
    model = make_model()
    attach(model, PruningConfig.create(speedup=2, latency_table=tmp_path / "none.json"))
    with pytest.raises(FileNotFoundError, match=r"latency_table: expected a file, got .*none\.json"):
        start(model, 20)
