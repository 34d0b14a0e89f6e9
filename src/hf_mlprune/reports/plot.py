"""Pictures of a pruned model: bars per layer, maps of units and blocks, curves of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..installed import check_installed
from .folder import LayerMap, PrunedFolder
from .picture import LEVELS

ENDINGS = (".png", ".svg", ".pdf")
#: Curves of Trainer's log, if the run wrote them.
CURVES = {
    "density": "density",
    "density_target": "target",
    "cost": "cost of the layers",
    "cost_target": "target of the cost",
    "lambda": "λ",
    "penalty": "penalty",
    "threshold": "θ",
}
#: Those that are shares.
SHARES = ("density", "density_target", "cost", "cost_target")
LEFT, GONE = "#1f6f8b", "#d9d9d9"


def write_plot(found: PrunedFolder, file: Path) -> None:
    """Draw a folder into one file.

    Args:
        found: the folder.
        file: PNG, SVG or PDF.

    Raises:
        ValueError: a file of another kind.
        ImportError: matplotlib is not installed.
    """
    if file.suffix.lower() not in ENDINGS:
        raise ValueError(f"out: expected a file of {', '.join(ENDINGS)}, got {file}")
    check_installed(["matplotlib"], extra="plot", needed_by="plot")
    from matplotlib.figure import Figure

    curves = {name: points for name in CURVES if (points := curve(found.history, name))}
    shown = {name: points for name, points in curves.items() if name in SHARES or _moves(points)}
    figure = Figure(figsize=(10, 3.5 * (2 + bool(shown))), layout="constrained")
    axes = figure.subplots(2 + bool(shown), 1, squeeze=False)[:, 0]
    _bars(axes[0], found)
    draw_maps(axes[1], found.layers)
    if shown:
        _curves(axes[2], shown, found.history)
    figure.suptitle(f"{Path(found.name).name}: {found.report.density:.1%} of the encoder's weights")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def curve(history: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Steps and values of one figure in Trainer's log."""
    return [(entry["step"], float(entry[name])) for entry in history if name in entry]


def _moves(points: Sequence[tuple[int, float]]) -> bool:
    return len({value for _, value in points}) > 1


def _bars(axes: Any, found: PrunedFolder) -> None:
    """Share that is left per layer and level."""
    layers = found.report.layers
    levels = {
        name: field
        for name, field in LEVELS.items()
        if name == "weights" or any(getattr(layer, field)[0] < getattr(layer, field)[1] for layer in layers)
    }
    width = 0.8 / len(levels)
    for place, (name, field) in enumerate(levels.items()):
        pairs = [getattr(layer, field) for layer in layers]
        heights = [100 * kept / total if total else 100.0 for kept, total in pairs]
        axes.bar([i + place * width for i in range(len(layers))], heights, width, label=name)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(layers))], [str(layer.index) for layer in layers])
    axes.set(ylabel="% left", xlabel="layer", ylim=(0, 100), title="left per layer")
    axes.legend(ncols=len(levels), fontsize="small")


def draw_maps(axes: Any, layers: Sequence[LayerMap]) -> None:
    """One line per layer: heads, FFN rows, and what is stored of each matrix in blocks."""
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("left", [GONE, LEFT])
    matrices = list(dict.fromkeys(name for layer in layers for name in layer.blocks))
    names = ["heads", "FC1 rows", *matrices]
    for row, layer in enumerate(layers):
        parts: dict[int, Sequence[float]] = {0: layer.kept["heads"], 1: layer.kept["fc1"]}
        # Of each row of blocks, how many are stored. A layer may have lost a matrix.
        for name, grid in layer.blocks.items():
            if grid:
                parts[names.index(name, 2)] = [sum(row) / len(row) for row in grid]
        for place, units in parts.items():
            axes.imshow(
                [units], cmap=colors, vmin=0, vmax=1, aspect="auto", interpolation="nearest",
                extent=(place, place + 0.94, row + 0.42, row - 0.42),
            )  # fmt: skip
    axes.set_xticks([i + 0.47 for i in range(len(names))], names)
    axes.set_yticks(range(len(layers)), [str(layer.index) for layer in layers])
    axes.set(
        xlim=(-0.05, len(names)),
        ylim=(len(layers) - 0.5, -0.5),
        ylabel="layer",
        title="the darker, the more is left",
    )


def _curves(axes: Any, curves: dict[str, list[tuple[int, float]]], history: Sequence[dict[str, Any]]) -> None:
    """Figures over steps: shares on the left, thin lines those of the layers, all else on the right."""
    other = None
    layers = [
        (entry["step"], entry["density_of_layers"]) for entry in history if "density_of_layers" in entry
    ]
    for index in range(len(layers[0][1]) if layers else 0):
        axes.plot([step for step, _ in layers], [each[index] for _, each in layers], color=GONE, linewidth=1)
    for name, points in curves.items():
        target = axes
        if name not in SHARES:
            other = target = other or axes.twinx()
        style = "-" if name in ("density", "cost") else "--"
        target.plot(
            *zip(*points, strict=True), style, label=CURVES[name], color=None if target is axes else "tab:red"
        )
    axes.set(xlabel="step", ylabel="share that is left", ylim=(0, 1.05), title="training")
    lines = [line for each in (axes, other) if each is not None for line in each.get_lines()]
    lines = [line for line in lines if not str(line.get_label()).startswith("_")]
    axes.legend(lines, [line.get_label() for line in lines], fontsize="small")
