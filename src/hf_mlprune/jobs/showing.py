"""What a job did, for a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from ..reports.report import Report
from .job import JobReport, stored_report

#: Points by which a pruned model that is better than the dense one says that this one was trained too little.
UNFINISHED = 1.0


def summary(found: JobReport) -> Group:
    """Figures of the dense and the pruned model side by side, and what to do next."""
    table = Table("", "dense", "pruned", *found.others)
    for name, value in found.dense_metrics.items():
        others = (f"{metrics[name]:.1f}" for metrics in found.others.values())
        table.add_row(name, f"{value:.1f}", f"{found.pruned_metrics[name]:.1f}", *others)
    stored = [stored_report(Path(found.out) / name) for name in found.others]
    reports = [found.report, *map(Report.from_dict, stored)]
    dense = found.report.parameters[1]
    table.add_row("parameters", f"{dense:,}", *(f"{each.parameters[0]:,}" for each in reports))
    table.add_row("weights of the encoder", "100%", *(f"{each.density:.1%}" for each in reports))
    for rows in list(zip(*(each.latency for each in reports), strict=False))[:2]:
        first = rows[0]
        times = (f"{row.pruned_seconds * 1e3:.1f} ({row.speedup:.1f}x)" for row in rows)
        shape = f"ms, {first.batch} x {first.length} tokens"
        table.add_row(shape, f"{first.dense_seconds * 1e3:.1f}", *times)
    notes = []
    if found.pruned_metrics[found.metric] > found.dense_metrics[found.metric] + UNFINISHED:
        notes.append(
            "note: the pruned model is better because it was trained for longer; the dense one has not "
            "learned all it can. Raise --fine-tune-epochs for a better teacher and a fair comparison"
        )
    folder = escape(str(found.out))
    return Group(
        table,
        *notes,
        f"written: {folder}",
        f"next: hf-mlprune report {folder} --html report.html, hf-mlprune export {folder} --out onnx",
    )
