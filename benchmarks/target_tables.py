"""Tables of what `targets.py` and `several_sizes.py` measured, and of runs that had a target of time."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

from common import RESULTS
from tables import TASKS, Line, change_with_error, markdown, signed, standard_error


def against_density_table(lines: Iterable[Line], model: str) -> str:
    """`speedup=` beside `density=` of about the same latency: tasks x targets, means over the seeds."""
    groups: dict[tuple[str, str], list[Line]] = defaultdict(list)
    timed: set[tuple[str, int, float]] = set()
    mine = [line for line in lines if line["model"] == model and line["method"] == "default"]
    for line in mine:
        speedup = json.loads(line["settings"]).get("speedup")
        if speedup is not None:
            groups[line["task"], f"`speedup={speedup:g}`"].append(line)
            # Asked for the same density, a run would be the one to compare it with.
            timed.add((line["task"], line["seed"], line["target_density"]))
    for line in mine:
        if line["settings"] == "{}" and (line["task"], line["seed"], line["target_density"]) in timed:
            groups[line["task"], f"`density={line['target_density']:g}`"].append(line)
    body = []
    for task, target in sorted(groups, key=lambda key: (TASKS.index(key[0]), key[1])):
        group = groups[task, target]
        metric, density, speed = (
            statistics.fmean(line[name] for line in group) for name in ("metric", "density", "latency_ratio")
        )
        body.append([task, target, f"{metric:.1f} ({len(group)})", f"{speed:.2f}x", f"{100 * density:.0f} %"])
    return markdown(["task", "target", "metric", "measured speed", "weights"], body)


def targets_table(model: str) -> str:
    """Speedups that were asked for x engines and shapes: what was predicted and what was measured."""
    files = [RESULTS / f"targets_{model}{engine}.json" for engine in ("", "_onnx", "_openvino")]
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    rows = [row for each in found for row in each["rows"]]
    body = [
        [
            f"{row['engine']}, {row['shape'].replace('x', ' x ')}",
            *(f"{row[name]:.2f}x" for name in ("speedup", "predicted", "measured")),
            f"{signed(100 * row['error'])} %",
            f"{row['density']:.0%}".replace("%", " %"),
        ]
        for row in rows
    ]
    return markdown(["engine, tokens", "asked for", "predicted", "measured", "error", "weights"], body)


def several_sizes_table(lines: Iterable[Line]) -> str:
    """Tasks x sizes: the metric of a run for each size, of one run for all, and what it loses or wins."""
    groups: dict[tuple[str, float, float], list[Line]] = defaultdict(list)
    for line in lines:
        if "one run" in line:
            groups[line["task"], line["learning_rate"], line["more_steps"]].append(line)
    sizes = sorted(
        {size for group in groups.values() for size in group[0]["one run"]}, key=float, reverse=True
    )
    body = []
    for (task, rate, more), group in groups.items():
        own, one = (
            [[line[kind][size] for line in group] for size in sizes] for kind in ("a run for each", "one run")
        )
        start = [task, f"{rate:g}"]
        body.append(
            [
                *start,
                "a run for each size",
                *(f"{statistics.fmean(values):.1f} ({len(values)})" for values in own),
            ]
        )
        body.append([*start, f"one run, {more:g}x the steps", *map(_paired, own, one)])
    return markdown(["task", "learning rate", "", *(f"{100 * float(size):g} %" for size in sizes)], body)


def _paired(before: Sequence[float], after: Sequence[float]) -> str:
    """Mean difference of pairs, and its standard error."""
    changes = [new - old for old, new in zip(before, after, strict=True)]
    return change_with_error(statistics.fmean(changes), standard_error(changes))
