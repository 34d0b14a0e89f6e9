"""Tables and plots of what `accuracy.py` and its ablations measured, written into the pages that show them.

python benchmarks/accuracy_tables.py
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from accuracy import DENSE, PRUNING_RATE, finished
from accuracy import METHODS as PRUNED
from common import RESULTS
from tables import TASKS, Line, change_with_error, markdown, standard_error
from target_tables import against_density_table, several_sizes_table, targets_table

ROOT = Path(__file__).parents[1]
#: As the tables have them, top to bottom.
METHODS = (*DENSE, *PRUNED)
#: Of an ablation that does not say another.
USUAL_DENSITY = 0.2
#: Density -> learning rate, where another than the usual one was better on held-back rows.
CHOSEN_RATES = {0.5: 2e-4}
#: Of fields in a plot.
COLUMNS = 3
#: Of methods in a plot, for each ten that share the same colours.
MARKERS = ("o", "^", "s")


@dataclass(frozen=True)
class Cell:
    """One method on one task, over its seeds.

    Attributes:
        metric: mean, 0 to 100.
        change: mean difference to the dense run of the same seed.
        error: standard error of that mean; ``None`` of a single seed.
        seeds: how many.
        density: mean share of encoder weights in the file.
    """

    metric: float
    change: float
    error: float | None
    seeds: int
    density: float


class Key(NamedTuple):
    """What a cell is of.

    Attributes:
        method: of pruning, or of a dense model.
        density: that was asked for.
        more: number of steps, over the plan's.
        rate: learning rate of pruning.
        task: its name.
    """

    method: str
    density: float
    more: int
    rate: float
    task: str


def cells(lines: Iterable[Line], model: str) -> dict[Key, Cell]:
    """All cells of one model."""
    mine = [line for line in lines if line["model"] == model and line["settings"] == "{}"]
    dense = {(line["task"], line["seed"]): line for line in mine if line["method"] == "dense"}
    groups = defaultdict(list)
    for line in mine:
        if (line["task"], line["seed"]) in dense:
            more = round(line["steps"] / dense[line["task"], line["seed"]]["steps"])
            rate = PRUNING_RATE if line["method"] in DENSE else line["learning_rate"]
            groups[Key(line["method"], line["target_density"], more, rate, line["task"])].append(line)
    return {key: _cell(group, dense) for key, group in groups.items()}


def _cell(group: Sequence[Line], dense: dict[tuple[str, int], Line]) -> Cell:
    changes = [line["metric"] - dense[line["task"], line["seed"]]["metric"] for line in group]
    mean = {name: statistics.fmean(line[name] for line in group) for name in ("metric", "density")}
    error = standard_error(changes)
    return Cell(mean["metric"], statistics.fmean(changes), error, len(group), mean["density"])


def speedups(lines: Iterable[Line], model: str) -> dict[tuple[str, float], float]:
    """Of one model: method, density asked for -> median speed over dense, of all tasks and seeds.

    Ratios differ from machine to machine. So only those of the machine with the most runs count; a method
    that did not run there has none.
    """
    mine = [line for line in lines if line["model"] == model and line["settings"] == "{}"]
    machines = Counter(line["machine"]["processor"] for line in mine)
    groups = defaultdict(list)
    for line in mine:
        if line["machine"]["processor"] == machines.most_common(1)[0][0]:
            groups[line["method"], line["target_density"]].append(line["latency_ratio"])
    return {key: statistics.median(group) for key, group in groups.items()}


def main_table(lines: Iterable[Line], model: str) -> str:
    """Methods x tasks: the dense metric, and what the others lose or win against it."""
    lines = list(lines)
    found, speeds = cells(lines, model), speedups(lines, model)
    rows = sorted({key[:-1] for key in found}, key=lambda row: (METHODS.index(row[0]), -row[1], *row[2:]))
    tasks = [task for task in TASKS if any(key.task == task for key in found)]
    head = ["method", "weights", "speed", *tasks]
    body = []
    for row in rows:
        mine = {task: found[Key(*row, task)] for task in tasks if Key(*row, task) in found}
        method, density, more, rate = row
        share = 100 * statistics.fmean(cell.density for cell in mine.values())
        speed = f"{speeds[method, density]:.1f}x" if (method, density) in speeds else ""
        name = method if more == 1 else f"{method}, {more}x the steps"
        name += "" if rate == PRUNING_RATE else f", learning rate {rate:g}"
        shown = [_shown(mine.get(task), is_dense=method == "dense") for task in tasks]
        body.append([name, f"{share:.0f} %", speed, *shown])
    return markdown(head, body)


def _shown(cell: Cell | None, *, is_dense: bool) -> str:
    if cell is None:
        return ""
    if is_dense:
        return f"{cell.metric:.1f} ({cell.seeds})"
    return f"{change_with_error(cell.change, cell.error)} ({cell.seeds})"


def ablation_table(lines: Iterable[Line]) -> str:
    """One change at a time x tasks: metric and loss on held-back training rows, means over the seeds."""
    groups: dict[tuple[str, str, str], dict[str, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        groups[line["model"], line["method"], _changes(line)][line["task"]].append(line)
    tasks = [task for task in TASKS if any(task in group for group in groups.values())]
    rows = sorted(groups, key=lambda row: (row[0], METHODS.index(row[1])))  # of one method, as they were run
    body = [[*row, *(_ablated(groups[row].get(task, [])) for task in tasks)] for row in rows]
    return markdown(["model", "method", "change", *tasks], body)


def _changes(line: Line) -> str:
    if line["method"] in DENSE:
        return ""
    changes = [f"`{name}={value}`" for name, value in json.loads(line["settings"]).items()]
    if line["target_density"] != USUAL_DENSITY:
        changes.append(f"density {100 * line['target_density']:g} %")
    if line["learning_rate"] != PRUNING_RATE:
        changes.append(f"learning rate {line['learning_rate']:g}")
    return ", ".join(changes)


def _ablated(group: Sequence[Line]) -> str:
    if not group:
        return ""
    metric = statistics.fmean(line["metric"] for line in group)
    loss = statistics.fmean(line["metrics"]["loss"] for line in group)
    return f"{metric:.1f}, {loss:.3f} ({len(group)})"


def blocks() -> dict[str, Callable[[], str]]:
    """Name of a marked part of a page -> what stands in it."""
    return {
        "accuracy of MiniLM-L6": lambda: main_table(finished(RESULTS / "accuracy.jsonl"), "L6"),
        "accuracy of MiniLM-L3": lambda: main_table(finished(RESULTS / "accuracy.jsonl"), "L3"),
        "speedup against density": lambda: against_density_table(finished(RESULTS / "accuracy.jsonl"), "L6"),
        "several sizes": lambda: several_sizes_table(finished(RESULTS / "several_sizes.jsonl")),
        "targets of MiniLM-L6": lambda: targets_table("MiniLM-L6"),
        "targets of BERT-base": lambda: targets_table("BERT-base"),
        "ablations": lambda: ablation_table(finished(RESULTS / "ablations.jsonl")),
    }


def filled(page: str) -> str:
    """A page with its marked parts as they were measured.

    Raises:
        KeyError: a mark has an unknown name.
    """

    def part(match: re.Match[str]) -> str:
        return f"{match[1]}\n{blocks()[match[2]]()}\n{match[3]}"

    marks = r"(<!-- measured: (.*?) -->)\n.*?(<!-- end -->)"
    return re.sub(marks, part, page, flags=re.DOTALL)


def pages() -> list[Path]:
    """Pages that may have marked parts."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _rate_counts(key: Key, found: Container[Key]) -> bool:
    """Whether a cell is of the learning rate that was chosen for its density, or that one is missing."""
    chosen = CHOSEN_RATES.get(key.density, PRUNING_RATE)
    return key.rate == chosen or key._replace(rate=chosen) not in found


def plot(lines: Iterable[Line], model: str, across: str, file: Path) -> None:
    """Difference to dense over density or speed, one field per task, one line per method.

    Differences, as not all methods have all seeds.
    """
    import matplotlib.pyplot as plt  # only to draw

    lines = list(lines)
    found, speeds = cells(lines, model), speedups(lines, model)
    if across == "speedup":
        found = {key: cell for key, cell in found.items() if (key.method, key.density) in speeds}
    found = {key: cell for key, cell in found.items() if _rate_counts(key, found)}
    tasks = [task for task in TASKS if any(key.task == task for key in found)]
    methods = [method for method in METHODS if any(key.method == method for key in found)]
    columns = min(COLUMNS, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.2 * columns + 1.6, 3.2 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(tasks) :]:
        axis.set_axis_off()
    for axis, task in zip(axes.flat, tasks, strict=False):
        for method in methods:
            points = sorted(
                (
                    speeds[key.method, key.density] if across == "speedup" else cell.density,
                    cell.change,
                    cell.error or 0,
                )
                for key, cell in found.items()
                if (key.method, key.more, key.task) == (method, 1, task)
            )
            if points:
                axis.errorbar(
                    *zip(*points, strict=True),
                    marker=MARKERS[methods.index(method) // 10],
                    label=method,
                    color=f"C{methods.index(method)}",
                )
        axis.set(title=task, xlabel=LABELS[across])
    for row in axes:
        row[0].set_ylabel("difference from dense, points")
    handles = {
        name: handle
        for axis in axes.flat
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    names = [name for name in methods if name in handles]
    figure.legend([handles[name] for name in names], names, loc="outside right center", frameon=False)
    figure.savefig(file, dpi=120)


LABELS = {"density": "encoder weights kept", "speedup": "speed over dense, 1 x 128"}


def main() -> None:
    """Fill the pages, draw the plots."""
    for page in pages():
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    lines = finished(RESULTS / "accuracy.jsonl")
    for across, name in (("density", "accuracy_density"), ("speedup", "accuracy_latency")):
        if lines:
            plot(lines, "L6", across, RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
