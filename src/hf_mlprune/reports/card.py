"""The model card of a pruned folder: what it is, how to load it, what was measured."""

from __future__ import annotations

from ..modeling.pretrained import CARD_MARK
from .report import Report


def model_card(report: Report, class_name: str) -> str:
    """Markdown with front matter, as the Hub reads it.

    Args:
        report: of the pruned model.
        class_name: the Auto class that loads it, e.g. ``AutoModelForSequenceClassification``.
    """
    kept, dense = report.parameters
    lines = [
        "---",
        "library_name: transformers",
        "tags: [pruning, model-compression, hf-mlprune]",
        "---",
        "",
        CARD_MARK,
        "",
        "# A pruned encoder",
        "",
        f"{report.density:.1%} of the encoder's weights are left: {kept:,} of {dense:,} parameters, of which "
        f"{report.embedding_parameters:,} are embeddings, which are not pruned.",
        "",
        "## Loading",
        "",
        "```python",
        "import hf_mlprune  # pip install hf-mlprune",
        f"from transformers import {class_name}",
        "",
        f'model = {class_name}.from_pretrained("this-folder")',
        "```",
        "",
        "Without the package, `from_pretrained(..., trust_remote_code=True)` runs the model code that is in "
        "this folder (torch and transformers are all it imports). With neither, transformers refuses to load "
        "it, and a stock class named by hand fails on the shapes.",
        "",
        "## What is left",
        "",
        report.markdown(),
        "",
    ]
    if report.latency:
        lines += ["## Latency", ""]
        lines += [f"- {line}" for line in report.latency_lines()]
        lines.append("")
    if report.max_difference is not None:
        lines += [
            f"Outputs differ from those of the masked model by {report.max_difference:.1e} at most "
            f"({report.difference_allowed:.1e} allowed).",
            "",
        ]
    return "\n".join(lines)
