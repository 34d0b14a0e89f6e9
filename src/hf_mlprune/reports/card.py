"""The model card: what a pruned model is, how it is loaded, what is left, what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from huggingface_hub import EvalResult, ModelCardData
from transformers.modelcard import METRIC_TAGS

from ..modeling.cards import CARD_MARK, CARD_PLACE, sealed
from ..modeling.family import Head
from .evaluation import Evaluations
from .origin import HubDataset, Origin
from .picture import GONE, KEPT, picture
from .report import Report

TAGS = ("pruning", "model-compression", "hf-mlprune")
#: Auto classes -> tasks of the hub. Heads of pretraining and of next sentences have none.
TASKS = {
    "AutoModel": "feature-extraction",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModelForImageClassification": "image-classification",
}


@dataclass(frozen=True)
class CardFacts:
    """What a card says besides the report.

    Attributes:
        origin: what the model was made from.
        evaluations: what was measured of it.
        trained_on: its training data.
        evaluated_on: its evaluation data.
        repository: name on the hub that it is pushed to, with its owner.
    """

    origin: Origin = field(default_factory=Origin)
    evaluations: Evaluations = field(default_factory=Evaluations)
    trained_on: HubDataset | None = None
    evaluated_on: HubDataset | None = None
    repository: str | None = None


def task_of(head: Head) -> str | None:
    """The hub's name for what a head does (``pipeline_tag``)."""
    if head.auto == "AutoModel" and head.stock.main_input_name == "pixel_values":
        return "image-feature-extraction"
    return TASKS.get(head.auto)


def model_card(report: Report, head: Head, facts: CardFacts, tags: Sequence[str] = ()) -> str:
    """Markdown with front matter, as the Hub reads it.

    Args:
        report: of the pruned model.
        head: of the model.
        facts: what else is known.
        tags: of the model, besides ours.
    """
    kept, dense = report.parameters
    name = model_name(head, facts)
    sections = [
        f"# {name}",
        f"{_made_from(facts)} {report.density:.1%} of the encoder's weights are left. The model has {kept:,} "
        f"of {dense:,} parameters; {report.embedding_parameters:,} are embeddings, which are not pruned.",
        *([f"It was {report.run_line}."] if report.run_line else []),
        "## Loading",
        _loading(head, facts.repository or CARD_PLACE),
        *_evaluation(facts.evaluations),
        "## What is left",
        f"Of each layer, kept ({KEPT}) and removed ({GONE}), where any was:",
        f"```text\n{picture(report.layers)}\n```",
        report.markdown(),
        *_latency(report),
    ]
    if report.max_difference is not None:
        sections.append(
            f"Outputs differ from those of the masked model by {report.max_difference:.1e} at most "
            f"({report.difference_allowed:.1e} allowed)."
        )
    return _with_front_matter(_card_data(head, facts, name, tags), sections)


def unfinished_card(
    head: Head, facts: CardFacts, *, density: float, target: str, tags: Sequence[str] = ()
) -> str:
    """The card of a checkpoint that is pushed in the middle of a run.

    Args:
        head: of the model.
        facts: what is known.
        density: share of the weights whose masks are open.
        target: what the run goes to.
        tags: of the model, besides ours.
    """
    name = model_name(head, facts)
    sections = [
        f"# {name}",
        f"{_made_from(facts)} Training is in progress: masks leave {density:.1%} of the encoder's weights, "
        f"the target is {target}. At its end the model becomes small, and this card is replaced.",
        "## Loading",
        "A checkpoint with masks has the dense weights and needs the package.",
        _code(head, facts.repository or CARD_PLACE, package=True),
    ]
    return _with_front_matter(_card_data(head, facts, name, tags), sections)


def model_name(head: Head, facts: CardFacts) -> str:
    """What a card calls the model; never the name of a folder."""
    if facts.repository is not None:
        return facts.repository.rpartition("/")[2]
    base = facts.origin.base_model
    return f"{base.rpartition('/')[2] if base else head.stock.config_class.model_type}-pruned"


def _with_front_matter(data: ModelCardData, sections: Sequence[str]) -> str:
    text = "\n\n".join([CARD_MARK, *sections])
    return sealed(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def _card_data(head: Head, facts: CardFacts, name: str, tags: Sequence[str]) -> ModelCardData:
    origin, after = facts.origin, facts.evaluations.after
    task, data = task_of(head), facts.evaluated_on
    # The hub takes no result without a task; of other models than this one it has no place for any.
    results = [
        EvalResult(
            task_type=task,
            dataset_type=data.name if data else "unknown",
            dataset_name=data.name if data else "evaluation data of the run",
            dataset_config=data.config if data else None,
            dataset_split=data.split if data else None,
            metric_type=metric,
            metric_name=_title(metric),
            metric_value=value,
        )
        for metric, value in after.items()
        if task is not None
    ]
    card = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        base_model=origin.base_model,
        language=origin.language,
        license=origin.license,
        license_name=origin.license_name,
        license_link=origin.license_link,
        datasets=[facts.trained_on.name] if facts.trained_on else None,
        metrics=[metric for metric in after if metric in METRIC_TAGS] or None,
        tags=[*TAGS, *tags],
        model_name=name if results else None,
        eval_results=results or None,
    )
    if origin.base_model is not None:
        # The hub knows adapters, merges, quantized models and this.
        card["base_model_relation"] = "finetune"
    return card


def _made_from(facts: CardFacts) -> str:
    base = facts.origin.base_model
    what = f"[{base}](https://huggingface.co/{base})," if base else "An encoder that was"
    data = facts.trained_on
    where = f" on [{data.name}](https://huggingface.co/datasets/{data.name})" if data else ""
    return f"{what} pruned with hf-mlprune while it was fine-tuned{where}."


def _loading(head: Head, place: str) -> str:
    return "\n\n".join(
        [
            "With the package (`pip install hf-mlprune`), with its kernel for block-sparse layers on CPUs:",
            _code(head, place, package=True),
            "Without it, by the model code beside the weights, which imports torch and transformers only:",
            _code(head, place, package=False),
            "With neither, transformers cannot load it: the shapes do not match those of its own classes.",
        ]
    )


def _code(head: Head, place: str, *, package: bool) -> str:
    lines = ["import hf_mlprune"] if package else []
    trust = "" if package else ", trust_remote_code=True"
    lines += [
        f"from transformers import {head.auto}",
        "",
        f'model = {head.auto}.from_pretrained("{place}"{trust})',
    ]
    return "\n".join(["```python", *lines, "```"])


def _evaluation(found: Evaluations) -> list[str]:
    """The table of metrics; nothing if the pruned model was not evaluated."""
    if not found.after:
        return []
    head, rule = "| metric |", "|:---|"
    if found.before:
        head += f" all weights (step {found.before_step}) |"
        rule += "---:|"
    rows = [f"{head} pruned |", f"{rule}---:|"]
    for metric, value in found.after.items():
        cells = [_title(metric)]
        if found.before:
            cells.append(f"{found.before[metric]:.4g}" if metric in found.before else "")
        rows.append(f"| {' | '.join([*cells, f'{value:.4g}'])} |")
    return [
        "## Evaluation",
        "Measured by Trainer in the run that pruned the model. Training after that run is not included.",
        "\n".join(rows),
    ]


def _title(metric: str) -> str:
    """A metric's name for people: ``pearson_correlation`` -> ``Pearson correlation``."""
    text = metric.replace("_", " ")
    return text[:1].upper() + text[1:]


def _latency(report: Report) -> list[str]:
    """The table of times; nothing if none were measured."""
    if not report.latency:
        return []
    several = len({row.encoder for row in report.latency}) > 1
    names = ["hardware", "threads", "batch x tokens", "dense ms", "pruned ms", "dense / pruned"]
    rows = [["encoder"] * several + names, [":---"] * (1 + several) + ["---:"] * 5]
    for row in report.latency:
        cells = [row.device, str(row.threads), f"{row.batch} x {row.length}"]
        cells += [f"{row.dense_seconds * 1e3:.2f}", f"{row.pruned_seconds * 1e3:.2f}", f"{row.speedup:.2f}"]
        rows.append([row.encoder] * several + cells)
    return [
        "## Latency",
        "One forward pass of the encoder against the stock one with the dense sizes, in turn; medians.",
        "\n".join(f"| {' | '.join(cells)} |" for cells in rows),
    ]
