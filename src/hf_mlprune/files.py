"""Files that are found, and written whole: the final name holds the old content or the new, never a part."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from transformers.utils import cached_file

from .modeling.checkpoint import write_text


def find_file(source: str, name: str) -> Path | None:
    """A file of a folder or of a model of the hub; ``None`` if there is none, or it cannot be reached.

    Args:
        source: folder or hub name.
        name: of the file.
    """
    found = cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file under its final name only once it is complete, and the folders above it.

    Raises:
        OSError: it could not be written; what was there before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(data, indent=2) + "\n")


def write_into(folder: Path, write: Callable[[Path], None]) -> None:
    """Have files written beside a folder, and move them into it once all are whole; its other files stay.

    Args:
        folder: made, if it is not there.
        write: fills the folder that it is called with.

    Raises:
        OSError: they could not be written; what was there before is untouched.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.partial-") as partial:
        write(Path(partial))
        for file in sorted(path for path in Path(partial).rglob("*") if path.is_file()):
            target = folder / file.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder under a temporary name, then give it its final one, replacing an old one.

    A process killed between the two renames leaves no folder of that name, but the old one whole beside it.

    Raises:
        OSError: it could not be written; what was there before is untouched.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by process number: in containers it repeats, and what a killed process left would be in the way.
    partial = path.with_name(f"{path.name}.partial-{uuid4().hex}")
    replaced = path.with_name(f"{path.name}.old-{uuid4().hex}")
    partial.mkdir()
    try:
        write(partial)
        if path.exists():
            path.replace(replaced)
        partial.replace(path)
        # With what killed processes left, and nothing that somebody else named.
        own = re.compile(re.escape(path.name) + r"\.(partial|old)-[0-9a-f]{32}")
        for stale in [folder for folder in path.parent.iterdir() if own.fullmatch(folder.name)]:
            shutil.rmtree(stale)
    except BaseException:
        if replaced.exists() and not path.exists():
            replaced.replace(path)
        shutil.rmtree(partial, ignore_errors=True)
        raise
