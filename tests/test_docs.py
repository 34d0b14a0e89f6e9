"""What README and docs say is there is there."""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import hf_mlprune
from hf_mlprune import PruningConfig
from hf_mlprune.families import FAMILIES, FILES
from hf_mlprune.methods import METHODS

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "hf_mlprune"
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_parse_and_import_what_there_is(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module == "hf_mlprune":
                assert {alias.name for alias in node.names} <= set(hf_mlprune.__all__)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "PruningCallback":
                known = {field.name for field in fields(PruningConfig)} | {"teacher"}
                assert {keyword.arg for keyword in node.keywords} <= known


def rows_of_tables(page):
    """Lines of all tables of a page, without headers."""
    lines = page.splitlines()
    heads = {i for i, line in enumerate(lines) if line.startswith("|---")}
    heads |= {i - 1 for i in heads}
    return [line for i, line in enumerate(lines) if line.startswith("|") and i not in heads]


@pytest.mark.parametrize(("name", "least"), [("trainer-features.md", 25), ("serving.md", 10)])
def test_pages_of_features_name_tests_that_there_are(name, least):
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    written = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    rows = rows_of_tables(page)
    assert len(rows) > least
    for row in rows:
        assert re.findall(r"`(test_\w+)`", row), row
    assert [name for name in re.findall(r"`(test_\w+)`", page) if f"def {name}(" not in written] == []


def test_every_formula_stands_where_the_method_page_says():
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    places = re.findall(r"`([\w/]+\.py): ([\w., ]+)`", page)
    assert len(places) > 8
    for file, names in places:
        source = (SOURCES / file).read_text(encoding="utf-8")
        for name in names.split(", "):
            assert re.search(rf"(def|class) {name.split('.')[-1]}\b", source), (file, name)


def test_the_architecture_page_names_every_file_and_no_other():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    house = page.split("```")[1]
    named, folder = set(), ""
    for line in house.splitlines()[2:]:
        indent = len(line) - len(line.lstrip())
        # What stands before the first word that is no file.
        for name in itertools.takewhile(re.compile(r"\w+(\.py|/)$").match, line.split()):
            if name.endswith("/"):
                folder = name if indent == 2 else folder
            elif indent <= 4:
                named.add((folder if indent == 4 else "") + name)
    there = {path.relative_to(SOURCES).as_posix() for path in SOURCES.rglob("*.py")}
    there -= {f"modeling/{file}.py" for file in FILES}
    assert named == {name for name in there if not name.endswith("__init__.py")}


def test_the_table_of_families_and_heads_is_that_of_the_records():
    page = (ROOT / "README.md").read_text(encoding="utf-8").split("## Works with")[1].split("\n## ")[0]
    header, _, *rows = [line[1:-1].split("|") for line in page.splitlines() if line.startswith("|")]
    autos = re.search(r"heads \(([^)]*)\)", page).group(1)
    columns = [
        name if name.startswith("Auto") else f"AutoModel{name}" for name in re.findall(r"`(\w+)`", autos)
    ]
    assert len(columns) == len(header) - 1
    written = {}
    for name, *cells in rows:
        marked = [auto for auto, cell in zip(columns, cells, strict=True) if cell.strip()]
        written[re.search(r"`([\w-]+)`", name).group(1)] = set(marked)
    assert written == {family.name: {head.auto for head in family.heads} for family in FAMILIES}


RESULTS = ROOT / "benchmarks" / "results"


def served_rows(batch: int) -> list[str]:
    """Lines of the table of engines, from the figures that were measured."""
    found = [
        row
        for file in ("serving_1", "serving_base_1")
        for row in json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))["results"]
        if row["batch"] == batch
    ]
    lines = []
    for model, kind in dict.fromkeys((row["model"], row["kind"]) for row in found):
        by_way = {row["way"]: row for row in found if (row["model"], row["kind"]) == (model, kind)}
        ways = ["torch", "onnx", "onnx int8", "openvino", "openvino int8"]
        if kind == "blocks":
            ways[1:3] = ["onnx blocks", "onnx blocks int8"]
        served = [by_way[way] for way in ways]
        times = [f"{row['over_dense_torch']:.1f}x" for row in served]
        sizes = [
            f"{min(row[name] for row in served[1:]) / 1e6:.0f} MB" for name in ("file_bytes", "peak_bytes")
        ]
        lines.append("| " + " | ".join([f"{model}, {kind}", *times, *sizes]) + " |")
    return lines


@pytest.mark.parametrize(("page", "batch"), [("README.md", 1), ("benchmarks/README.md", 32)])
def test_the_tables_of_engines_hold_what_was_measured(page, batch):
    written = (ROOT / page).read_text(encoding="utf-8").splitlines()
    assert len(served_rows(batch)) == 9
    assert [line for line in served_rows(batch) if line not in written] == []


@pytest.mark.parametrize("file", sorted(RESULTS.glob("example_*.json")), ids=lambda file: file.stem)
def test_the_page_of_examples_holds_what_was_measured(file):
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["command"] in page
    for figure, pair in found["figures"].items():
        shown = [f"{value:,}" if isinstance(value, int) else f"{value:.1f}" for value in pair]
        assert f"| {figure} | {shown[0]} | {shown[1]} |" in page.splitlines()


@pytest.fixture
def accuracy_tables(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("accuracy_tables")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_of_accuracy_hold_what_was_measured(page, accuracy_tables):
    written = page.read_text(encoding="utf-8")
    assert written == accuracy_tables.filled(written)


def test_changes_are_to_the_dense_run_of_the_same_seed(accuracy_tables):
    def line(method, seed, metric, density=1.0):
        shared = {"model": "L6", "task": "CoLA", "settings": "{}", "steps": 10, "latency_ratio": 4.0}
        return {
            **shared, "method": method, "seed": seed, "metric": metric, "density": density,
            "target_density": density, "machine": {"processor": "one"}, "learning_rate": 6e-4,
        }  # fmt: skip

    lines = [line("dense", 0, 50.0), line("dense", 1, 60.0), line("default", 0, 49.0, 0.2)]
    lines += [line("default", 1, 57.0, 0.2), line("default", 2, 0.0, 0.2)]
    table = accuracy_tables.main_table(lines, "L6").splitlines()
    # Without a dense run of its seed, a run is in no table.
    assert table[2] == "| dense | 100 % | 4.0x | 55.0 (2) |"
    assert table[3] == "| default | 20 % | 4.0x | −2.0 ± 1.0 (2) |"

    # Speeds are those of one machine.
    other = {"latency_ratio": 9.0, "machine": {"processor": "other"}}
    slow = lines[3] | {"latency_ratio": 2.0}
    table = accuracy_tables.main_table([*lines[:2], lines[2] | other, slow], "L6").splitlines()
    assert table[3] == "| default | 20 % | 2.0x | −2.0 ± 1.0 (2) |"
    table = accuracy_tables.main_table([*lines[:2], lines[2] | other], "L6").splitlines()
    assert table[3] == "| default | 20 % |  | −1.0 (1) |"

    # Another learning rate has a row of its own; that of the dense model does not matter.
    dense = [each | {"learning_rate": 1e-4} for each in lines[:2]]
    table = accuracy_tables.main_table(
        [*dense, lines[2], lines[3] | {"learning_rate": 2e-4}], "L6"
    ).splitlines()
    assert table[3:] == [
        "| default, learning rate 0.0002 | 20 % | 4.0x | −3.0 (1) |",
        "| default | 20 % | 4.0x | −1.0 (1) |",
    ]


def test_the_messages_that_troubleshooting_explains_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    explained = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    said = [
        node.value
        for path in SOURCES.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert len(explained) > 20
    assert [words for words in explained if not any(words in text for text in said)] == []


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"auto\w+:: hf_mlprune\.([\w.]+)", page))
    families = {name for name in hf_mlprune.__all__ if name.startswith("Prunable")}
    assert {*hf_mlprune.__all__} - families - {"kernels"} <= named


def test_public_names_are_documented():
    for name in hf_mlprune.__all__:
        assert (getattr(hf_mlprune, name).__doc__ or "").strip(), name


def test_every_setting_is_documented():
    for kind in (PruningConfig, *(method.Settings for method in METHODS.values())):
        documented = set(re.findall(r"^        (\w+): ", kind.__doc__ or "", re.MULTILINE))
        assert documented == {field.name for field in fields(kind)}
    for name in METHODS:
        assert f'"{name}"' in (ROOT / "docs" / "method.md").read_text(encoding="utf-8"), name


def test_importing_for_serving_needs_no_training_packages():
    code = (
        "import sys, hf_mlprune\n"
        "assert not {'datasets', 'evaluate', 'sklearn', 'matplotlib'} & set(sys.modules), 'training packages'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_version_stands_once_and_where_it_is_cited():
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {hf_mlprune.__version__}\n" in cited
