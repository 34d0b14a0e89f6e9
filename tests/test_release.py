"""What goes to the package index: a README whose links lead somewhere from there, too."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docs" / "release.py"
ADDRESS = "https://example.org/me/hf-mlprune"


def prepare(root: Path, address: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, root, address], capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path) -> Path:
    """What the script reads of the project, and all that links lead to."""
    for name in ("README.md", "pyproject.toml", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("docs", "examples", "benchmarks", "src/hf_mlprune"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return tmp_path


def test_links_lead_to_the_tag_of_this_version(copy):
    before = re.findall(r"\]\(([^)\s]+)\)", (copy / "README.md").read_text(encoding="utf-8"))
    done = prepare(copy, f"{ADDRESS}.git")
    assert done.returncode == 0, done.stderr
    after = re.findall(r"\]\(([^)\s]+)\)", (copy / "README.md").read_text(encoding="utf-8"))
    assert len(after) == len(before) > 30
    for old, new in zip(before, after, strict=True):
        if old.startswith("http"):
            assert new == old
            continue
        found = re.fullmatch(rf"{ADDRESS}/(raw|blob)/v[0-9.]+/(.+)", new)
        assert found is not None
        assert found[2] == old
        # A page of the repository is no picture.
        assert (found[1] == "raw") == old.endswith(".png")
    urls = tomllib.loads((copy / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    assert urls["Repository"] == ADDRESS
    assert all(url.startswith("https://") for url in urls.values())


@pytest.mark.parametrize(
    "address",
    [
        "",
        "/home/me/hf-mlprune",
        "git@example.org:me/hf-mlprune",
        "https://x.org",
        "https://me:secret@x.org/me/y",
    ],
)
def test_what_is_no_address_is_refused(address, copy):
    text = (copy / "README.md").read_bytes()
    done = prepare(copy, address)
    assert done.returncode == 1
    assert (
        f"REPOSITORY: expected the repository's address, as in https://HOST/OWNER/NAME, got {address!r}"
        in (done.stderr)
    )
    assert (copy / "README.md").read_bytes() == text


def test_a_link_to_nothing_is_refused(copy):
    with (copy / "README.md").open("a", encoding="utf-8") as stream:
        stream.write("[gone](docs/gone.md)\n")
    done = prepare(copy, ADDRESS)
    assert "expected links to files of the project, got 'docs/gone.md'" in done.stderr
    assert "[project.urls]" not in (copy / "pyproject.toml").read_text(encoding="utf-8")
