"""A self-contained page about a pruned model, for a browser: figures, maps of every layer, curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from ..modeling.checkpoint import write_text
from ..modeling.structure import TITLES
from .folder import PrunedFolder
from .picture import LEVELS
from .plot import CURVES, SHARES, curve


def write_page(found: PrunedFolder, file: Path) -> None:
    """Write the page; it needs no network.

    Args:
        found: the folder.
        file: HTML.

    Raises:
        ValueError: a file of another kind.
    """
    if file.suffix not in (".html", ".htm"):
        raise ValueError(f"html: expected a file of .html, got {file}")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, page(found))


def page(found: PrunedFolder) -> str:
    """The page as text."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.get_template("page.html")
    report = found.report
    return template.render(
        name=Path(found.name).name,
        report=report,
        lines=found.lines(),
        settings=report.settings,
        levels={title: field for title, field in LEVELS.items() if field != "blocks" or report.has_blocks},
        data=json.dumps(_data(found)).replace("<", "\\u003c"),
    )


def _data(found: PrunedFolder) -> dict[str, Any]:
    """What the page's script draws."""
    return {
        "layers": [
            {
                "name": f"{layer.encoder} {layer.index}".strip(),
                "units": {
                    label: "".join("1" if left else "0" for left in layer.kept[group])
                    for group, label in TITLES.items()
                    if group in ("heads", "fc1") or not all(layer.kept[group])
                },
                "blocks": {
                    name: ["".join("1" if left else "0" for left in row) for row in grid]
                    for name, grid in layer.blocks.items()
                },
                "weights": report.weights,
            }
            for layer, report in zip(found.layers, found.report.layers, strict=True)
        ],
        "curves": {CURVES[name]: points for name in SHARES if (points := curve(found.history, name))},
    }
