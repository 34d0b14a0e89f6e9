"""The command `hf-mlprune`: what it prints, writes and exits with."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from transformers import AutoModel, AutoModelForSequenceClassification

from hf_mlprune import report as report_of
from hf_mlprune.reports.folder import LayerMap, read_folder
from hf_mlprune.reports.plot import draw_maps
from hf_mlprune.reports.report import Report
from support.browser import page_of
from support.command import run
from support.hub import OWNER, Hub
from test_jobs import rows_of, write

VERBS = ("prune", "report", "bench", "plot", "export", "compare", "push")


@pytest.fixture(scope="module")
def small(tiny_bert, tmp_path_factory) -> Path:
    """A folder that `prune` wrote."""
    folder = tmp_path_factory.mktemp("command")
    data = write(rows_of(), folder / "mine.csv")
    run(
        "prune", tiny_bert, "--data", data, "--out", folder / "small", "--density", 0.5, "--steps", 24,
        "--column", "text=review", "--column", "label=topic", "--fine-tune-steps", 20, "--batch-size", 8,
        "--max-length", 16, "--set", "minimum_units=2",
    )  # fmt: skip
    return folder / "small"


def test_every_verb_says_what_it_does():
    said = run("--help")
    for verb in VERBS:
        assert verb in said
        assert "Usage" in run(verb, "--help")


def test_prune_writes_a_model_that_the_other_verbs_read(small):
    found = read_folder(str(small))
    assert found.report.density <= 0.5
    assert found.report.settings["minimum_units"] == 2
    said = run("report", small)
    assert "FC1 rows" in said
    assert "blocks" not in said
    assert "on disk" in said
    data = json.loads(run("report", small, "--json"))
    assert Report.from_dict(data) == found.report
    compared = json.loads(run("compare", small, small, "--json"))
    assert compared["figures"]["parameters"] == [found.report.parameters[0]] * 2
    assert compared["figures"]["accuracy"][0] == found.metrics["accuracy"][1]
    assert "weights of the encoder" in run("compare", small, small)
    assert "accuracy: " in said


def test_int8_that_no_engine_makes_is_refused(small):
    said = run("bench", small, "--int8", code=1)
    assert "int8: expected an engine of ['onnx'], whose int8 needs no data, got ['torch']" in said


def test_weights_can_be_read_by_whoever_reads_the_config(small):
    assert (small / "model.safetensors").stat().st_mode == (small / "config.json").stat().st_mode


def test_a_dry_run_is_json_where_that_is_wanted(tiny_bert, tmp_path):
    data = write(rows_of(), tmp_path / "mine.csv")
    words = ("prune", tiny_bert, "--data", data, "--out", tmp_path / "x", "--column", "text=review")
    words += ("--column", "label=topic", "--set", "multiply_adds=0.6", "--dry-run", "--batch-size", 4)
    found = json.loads(run(*words, "--json"))
    assert found["target"] == "multiply_adds=0.6"
    assert found["examples"] == {"train": 54, "test": 6}
    assert "because" in run(*words)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("report", "./nowhere"), "error: expected the folder of a model, got ./nowhere, where nothing is"),
        (("bench", "{small}", "--engine", "tensorrt"), "error: engine: expected one of .* got 'tensorrt'"),
        (("bench", "{small}", "--shape", "1by2"), "error: shape: expected batch x tokens, .* got '1by2'"),
        (("bench", "{small}", "--shape", "1x100000"), "error: shape: expected at most .* tokens"),
        (("bench", "{small}", "--threads", "0"), "error: threads: expected a whole number from 1 up, got 0"),
        (("report", "no-such-model"), "error: expected the folder .* got 'no-such-model'"),
        (("prune", "{small}", "--data", "d.csv", "--out", "x", "--density", "0.5", "--set", "density=0.4"),
         "error: --set: expected each setting once, got .'density'."),
        (("report", "{small}/_dense"), "error: expected a pruned model, got .* has no structure"),
        (("report", "{small}", "--html", "page.txt"), "error: html: expected a file of .html, got page.txt"),
        (("plot", "{small}", "--out", "plot.doc"), "error: out: expected a file of .png, .* got plot.doc"),
        (("export", "{small}", "--out", "x", "--to", "coreml"), "error: to: expected one of .* got 'coreml'"),
        (("export", "{small}", "--out", "x", "--max-length", "9"), "error: max_length: expected --data"),
        (("push", "{small}", "no-owner"), "error: expected a name with its owner, such as me/my-model"),
        (("prune", "{small}", "--data", "none.csv", "--out", "x"), "error: data: expected a file or folder"),
        (("prune", "{small}", "--data", "d.csv", "--out", "x", "--density", "7"), "error: density: expected"),
        (("prune", "{small}", "--data", "d.csv", "--out", "x", "--density", "0.5", "--size", "1 MB"),
         "error: expected one target, got density, size"),
        (("prune", "{small}", "--data", "d.csv", "--out", "x", "--multiply-adds", "2"),
         "error: multiply_adds: expected a value in .0, 1., got 2.0"),
        (("prune", "{small}", "--data", "d.csv", "--out", "x", "--set", "nothing=1"), "error: .*nothing"),
    ],
)  # fmt: skip
def test_errors_are_said_in_one_line(words, message, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = run(*(word.format(small=small) for word in words), code=1)
    assert re.search(message, " ".join(said.split())), said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_a_job_without_its_packages_says_how_to_get_them(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    said = " ".join(run("prune", small, "--data", "d.csv", "--out", tmp_path / "x", code=1).split())
    assert 'prune: expected sklearn to be installed; pip install "hf-mlprune[train]"' in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "expected .* with a config.json that can be read, got"),
        ("model.safetensors", "x", "error: "),
        # JSON of no tokenizer, and a file that ends too early: these raise errors of different kinds.
        ("tokenizer.json", "{}", "files of a tokenizer .* that can be read, got KeyError"),
        ("tokenizer.json", "[]", "files of a tokenizer .* that can be read, got TypeError"),
        (
            "tokenizer.json",
            '{"added',
            "files of a tokenizer .* that can be read, got JSONDecodeError",
        ),
    ],
)
def test_damaged_models_are_said_in_one_line(file, content, message, small, tmp_path):
    shutil.copytree(small / "_dense", tmp_path / "dense")
    (tmp_path / "dense" / file).write_text(content)
    (tmp_path / "data.csv").write_text("text,label\n" + "a b,x\nc d,y\n" * 20)
    said = run(
        "prune", tmp_path / "dense", "--data", tmp_path / "data.csv", "--out", tmp_path / "out", code=1
    )
    assert re.search(message, " ".join(said.split())), said
    assert "Traceback" not in said


def test_names_with_brackets_are_no_markup(small, tmp_path):
    (tmp_path / "p[").mkdir()
    run("report", small, "--html", tmp_path / "p[" / "b].html")
    assert (tmp_path / "p[" / "b].html").is_file()


def test_wrong_words_are_usage_errors():
    assert "expected a once" in run(
        "prune", "x", "--data", "d", "--out", "o", "--column", "a=1", "--column", "a=2", code=2
    )
    assert "NAME=VALUE" in run("prune", "x", "--data", "d", "--out", "o", "--set", "density", code=2)
    assert "expected JSON behind levels=" in run(
        "prune", "x", "--data", "d", "--out", "o", "--set", "levels=[1", code=2
    )
    assert "No such command" in run("prnue", code=2)


def test_bench_measures_both_models_in_turn(small):
    found = json.loads(run("bench", small, "--shape", "1x8", "--shape", "2x8", "--engine", "torch",
                           "--engine", "onnx", "--int8", "--threads", 1, "--json"))  # fmt: skip
    assert [(row["batch"], row["way"]) for row in found["rows"]] == [
        (batch, way)
        for batch in (1, 2)
        for way in (
            "dense in torch",
            "pruned in torch",
            "dense in onnx",
            "pruned in onnx",
            "pruned int8 in onnx",
        )
    ]
    assert all(row["milliseconds"] > 0 for row in found["rows"])
    assert all(row["speedup"] == 1 for row in found["rows"] if row["way"] == "dense in torch")
    assert "pruned in torch" in run("bench", small, "--shape", "1x8", "--against", small / "_dense")


def test_export_writes_a_folder(small, tmp_path):
    run("export", small, "--out", tmp_path / "stock", "--to", "stock", "--threads", 1)
    assert (tmp_path / "stock" / "export_report.json").is_file()


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plot_draws_layers_maps_and_curves(ending, small, tmp_path):
    file = tmp_path / "new" / f"plot.{ending}"
    run("plot", small, "--out", file)
    if ending == "svg":
        words = {element.text for element in ElementTree.parse(file).iter() if element.text}
        assert len(words) > 0
    else:
        assert file.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_shows_every_layer_in_a_browser(scheme, small, tmp_path):
    run("report", small, "--html", tmp_path / "page.html")
    found = read_folder(str(small))
    with page_of(tmp_path / "page.html", scheme) as page:
        assert page.locator("#layers tbody tr").count() == len(found.layers)
        assert page.locator("#title").inner_text() == f"Maps of layer {name_of(found.layers[0])}"
        ink = page.evaluate("getComputedStyle(document.body).color")
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(numbers(ink)) > sum(numbers(paper))) == (scheme == "dark")
        # Blocks have a column only where there are any.
        titles = page.locator("#layers th").all_inner_texts()
        assert titles == ["layer", "heads", "O rows", "FC1 rows", "FC2 rows", "weights"]
        assert page.locator("#hint").inner_text() == "Point at a unit to see its number."
        page.locator("#layers tbody tr").nth(1).click()
        assert page.locator("#title").inner_text() == f"Maps of layer {name_of(found.layers[1])}"
        kept, units = sum(found.layers[1].kept["fc1"]), len(found.layers[1].kept["fc1"])
        captions = page.locator("figcaption").all_inner_texts()
        assert f"FC1 rows: {kept} of {units}" in captions
        # As many pixels of the canvas are of the colour of what is left.
        canvas = page.locator("canvas").nth(captions.index(f"FC1 rows: {kept} of {units}"))
        canvas.hover(position={"x": 3, "y": 3})
        state = "left" if found.layers[1].kept["fc1"][0] else "gone"
        assert page.locator("#hint").inner_text() == f"FC1 rows: number 0 is {state}"
        page.locator("#layers tbody tr").nth(0).press("Enter")
        assert page.locator("#title").inner_text() == f"Maps of layer {name_of(found.layers[0])}"
        assert page.locator("#curves polyline").count() == 2
        # Nothing is wider than a small window.
        page.set_viewport_size({"width": 400, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 400


def name_of(layer) -> str:
    return f"{layer.encoder} {layer.index}".strip()


def numbers(color: str) -> list[float]:
    return [float(part) for part in color.removeprefix("rgb(").removesuffix(")").split(",")]


def test_a_page_of_blocks_has_their_maps(pruned_folder, tmp_path):
    run("report", pruned_folder, "--html", tmp_path / "page.html")
    found = read_folder(str(pruned_folder))
    assert any(layer.blocks for layer in found.layers)
    for layer, counted in zip(found.layers, found.report.layers, strict=True):
        assert sum(sum(row) for grid in layer.blocks.values() for row in grid) <= counted.blocks[0]
    with page_of(tmp_path / "page.html", "light") as page:
        assert any(text.startswith("blocks of ") for text in page.locator("figcaption").all_inner_texts())
        assert "blocks" in page.locator("#layers th").all_inner_texts()
    run("plot", pruned_folder, "--out", tmp_path / "plot.png")


def test_a_map_stands_under_the_name_of_its_matrix():
    from matplotlib.figure import Figure

    grid = [[True, False]]
    whole = dict.fromkeys(("query", "key", "value", "attention_output", "fc1", "fc2"), grid)
    kept = {"heads": [True, False], "fc1": [True, True]}
    layers = [
        LayerMap("", 0, {**kept, "heads": [False, False]}, {"fc1": grid, "fc2": grid}),
        LayerMap("", 1, kept, whole),
    ]
    axes = Figure().subplots()
    draw_maps(axes, layers)
    names = [label.get_text() for label in axes.get_xticklabels()]
    drawn = {(round(image.get_extent()[3] + 0.42), int(image.get_extent()[0])) for image in axes.get_images()}
    assert {names[place] for row, place in drawn if row == 0} == {"heads", "FC1 rows", "fc1", "fc2"}
    assert {names[place] for row, place in drawn if row == 1} == {"heads", "FC1 rows", *whole}


def test_a_report_shows_itself_in_a_notebook(small):
    html = read_folder(str(small)).report._repr_html_()
    assert ElementTree.fromstring(f"<div>{html}</div>").find("table/caption") is not None


@pytest.mark.parametrize("folder", ["small", "pruned_folder"])
def test_a_model_shows_in_a_notebook_what_its_report_counts(folder, request):
    folder = str(request.getfixturevalue(folder))
    html = AutoModelForSequenceClassification.from_pretrained(folder)._repr_html_()
    rows = ElementTree.fromstring(f"<div>{html}</div>").findall("table/tr")[1:]
    counted = read_folder(folder).report.layers
    assert len(rows) == len(counted)
    for row, layer in zip(rows, counted, strict=True):
        pairs = [layer.heads, layer.attention_output, layer.fc1, layer.fc2]
        pairs += [layer.blocks] if layer.blocks[1] else []
        assert [cell.text for cell in row][1:] == [f"{kept}/{total}" for kept, total in pairs]


def test_a_report_of_another_version_is_refused(small):
    data = read_folder(str(small)).report.to_dict()
    with pytest.raises(ValueError, match="report: expected version 1, got 9"):
        Report.from_dict({**data, "version": 9})
    with pytest.raises(ValueError, match="report: expected the fields of a report, got KeyError"):
        Report.from_dict({"version": 1})


def test_a_report_can_be_read_from_what_it_wrote(small):
    found = report_of(AutoModel.from_pretrained(small), length=16)
    assert Report.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_the_command_is_installed():
    program = Path(sys.executable).with_name("hf-mlprune")
    command = (
        [str(program)]
        if program.exists()
        else [sys.executable, "-c", "from hf_mlprune.cli import main; main()"]
    )
    done = subprocess.run([*command, "report", "./nowhere"], capture_output=True, text=True, check=False,
                          env={**os.environ, "COLUMNS": "80"})  # fmt: skip
    assert done.returncode == 1
    assert "expected the folder of a model" in done.stderr


def test_push_uploads_the_model_and_not_the_dense_one(small, tmp_path):
    hub = Hub()
    try:
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_token", "HF_HOME": str(tmp_path / "cache"),
                       "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}  # fmt: skip
        program = [sys.executable, "-W", "ignore", "-c", "from hf_mlprune.cli import main; main()"]
        done = subprocess.run(
            [*program, "push", str(small), f"{OWNER}/small", "--private"],
            capture_output=True, text=True, check=False, env={**os.environ, **environment}, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        files = hub.repositories[f"{OWNER}/small"]
        assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(files)
        assert not [name for name in files if name.startswith("_") or name == "job.json"]
        assert f'from_pretrained("{OWNER}/small")' in files["README.md"].decode()
        assert "this-repository" not in files["README.md"].decode()
        hub.repositories[f"{OWNER}/small"]["README.md"] = b"# My own words"
        done = subprocess.run(
            [*program, "push", str(small), f"{OWNER}/small"],
            capture_output=True, text=True, check=False, env={**os.environ, **environment}, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert hub.repositories[f"{OWNER}/small"]["README.md"] == b"# My own words"
    finally:
        hub.close()
    assert AutoModelForSequenceClassification.from_pretrained(small).config.num_labels == 2


def test_ctrl_c_exits_with_its_own_code(tiny_bert, tmp_path):
    data = write(rows_of(), tmp_path / "mine.csv")
    program = [sys.executable, "-W", "ignore", "-c", "from hf_mlprune.cli import main; main()"]
    words = ["prune", tiny_bert, "--data", data, "--out", tmp_path / "out", "--column", "text=review"]
    words += ["--column", "label=topic", "--steps", 4000, "--fine-tune-steps", 4000]
    running = subprocess.Popen([*program, *map(str, words)], stderr=subprocess.PIPE, text=True)
    for line in running.stderr:
        if line.startswith("fine-tuning, 4000"):
            break
    while running.poll() is None and not (tmp_path / "out" / "_work" / "fine-tuning").is_dir():
        time.sleep(0.05)
    time.sleep(1)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=300)
    assert running.returncode == 130, said
    assert "the same command with --resume goes on" in said
    assert "error" not in said
