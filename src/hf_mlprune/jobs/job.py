"""One whole job: fine-tune if need be, prune with that model as the teacher, evaluate, write."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer, set_seed

from ..files import write_folder, write_json
from ..modeling.checkpoint import write_text
from ..modeling.pretrained import REPORT_FILE, PrunedMixin
from ..reports.folder import CARD, JOB
from ..reports.report import Report
from ..trainer.callback import PruningCallback
from ..trainer.checks import check_arguments
from ..trainer.publishing import Publisher
from ..trainer.resuming import last_complete_checkpoint
from ..trainer.targets import target_folder
from .plan import Job, Say
from .preparing import Prepared, check_reachable, prepare
from .sentences import save_sentence_model
from .training import STAGES, arguments_of, evaluate, make_trainer, train

#: Folders of a job in its output; the underscore keeps them out of hub uploads.
DENSE, WORK = "_dense", "_work"
#: Times that were measured for a target of time, as ``latency_table`` reads them.
TIMES = "_latency_table.json"


@dataclass(frozen=True)
class JobReport:
    """What a job did.

    Attributes:
        out: folder of the pruned model.
        dense: folder or name of the model that it was pruned from.
        task: of the job.
        metric: name of the main metric.
        dense_metrics: of the dense model, on the test examples.
        pruned_metrics: of the pruned one.
        report: what is left, measured.
        others: with several targets: folder of each larger model (inside ``out``) -> its metrics.
    """

    out: str
    dense: str
    task: str
    metric: str
    dense_metrics: dict[str, float]
    pruned_metrics: dict[str, float]
    report: Report
    others: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**dataclasses.asdict(self), "report": self.report.to_dict()}


def prune(job: Job, *, resume: bool = False, say: Say = lambda text: None) -> JobReport:
    """Run a job; at the end its folder has the pruned model, its tokenizer, report and model card.

    Args:
        job: what to do.
        resume: go on with a job that was interrupted.
        say: function that gets messages about the progress.

    Raises:
        FileExistsError: the folder contains other files, or an interrupted job.
        FileNotFoundError: there is nothing to resume.
        ValueError: an argument or the data does not fit, or the job to resume had other arguments.
        KeyboardInterrupt: after Ctrl-C; a checkpoint was written before.
    """
    out = Path(job.out)
    check_folder(job, resume=resume)
    prepared = prepare(job)
    _say_found(prepared, say)
    # Those of pruning are refused before there is a fine-tuned model.
    check_arguments(arguments_of(prepared, out / WORK, 1))
    table = None if resume else check_reachable(prepared, say)
    write_json(out / WORK / JOB, job.to_dict())
    if table is not None:
        write_json(out / TIMES, table)
    try:
        return _run(prepared, out, resume=resume, say=say)
    except BaseException:
        _forget_if_nothing_is_done(out)
        raise


def _run(prepared: Prepared, out: Path, *, resume: bool, say: Say) -> JobReport:
    """What :func:`prune` does, from the first step on."""
    job, work, times, dense = prepared.job, out / WORK, out / TIMES, prepared.job.model
    if prepared.fine_tune:
        dense = str(out / DENSE)
        _fine_tune(prepared, work / STAGES[0], Path(dense), resume=resume, say=say)
    settings = {**job.settings, "latency_table": str(times)} if times.is_file() else job.settings
    model, callback = prepared.model(dense), PruningCallback(teacher=dense, **settings)
    # What the card names as the model that this one was made from.
    model.config._name_or_path = job.model
    if prepared.task.teaches_itself:
        # Those of words are not pruned, and the teacher's are the same.
        model.get_input_embeddings().requires_grad_(False)
    trainer, saver = make_trainer(prepared, model, work / STAGES[1], 1, [callback])
    # By the trainer that prunes: so the card has the figures of both.
    dense_metrics = evaluate(prepared, trainer, None)
    say(f"dense: {_figures(dense_metrics)}")
    say(f"pruning to {job.config().goal}, {prepared.steps[1]} steps")
    train(trainer, saver, 1, resume=resume)
    assert callback.report is not None
    pruned_metrics = evaluate(prepared, trainer, dense)
    say(f"pruned: {_figures(pruned_metrics)}")
    others = _keep_others(prepared, trainer, callback.publisher, dense)
    for name, metrics in others.items():
        say(f"{name}: {_figures(metrics)}")
    found = JobReport(
        str(out),
        dense,
        job.task,
        prepared.task.metrics[0],
        dense_metrics,
        pruned_metrics,
        callback.report,
        others,
    )
    _write(prepared, model, trainer, out, found)
    shutil.rmtree(work)
    return found


def check_folder(job: Job, *, resume: bool) -> None:
    """Refuse a folder that holds something else; see :func:`prune`."""
    out = Path(job.out)
    record = out / WORK / JOB
    if resume:
        if not record.is_file():
            raise FileNotFoundError(
                f"resume: expected an interrupted job in {out}, got "
                + ("one that is finished" if (out / JOB).is_file() else "none; leave out --resume")
            )
        differences = job.differences(json.loads(record.read_text(encoding="utf-8")))
        if differences:
            raise ValueError(f"resume: expected the same arguments as before, {', '.join(differences)}")
        return
    if record.is_file():
        raise FileExistsError(f"out: {out} holds an interrupted job; add --resume, or name a new folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out: expected a new or an empty folder, got {out}, which holds something")


def _forget_if_nothing_is_done(out: Path) -> None:
    """Free the folder of a job that ended before its first checkpoint: other arguments may follow."""
    work = out / WORK
    if (out / DENSE).is_dir() or any(last_complete_checkpoint(str(work / each)) for each in STAGES):
        return
    shutil.rmtree(work, ignore_errors=True)
    (out / TIMES).unlink(missing_ok=True)
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()


def stored_report(folder: Path) -> dict[str, Any]:
    """The report beside a pruned model, in JSON form."""
    return dict(json.loads((folder / REPORT_FILE).read_text(encoding="utf-8")))


def interrupted(job: Job) -> str:
    """How to go on after Ctrl-C."""
    if (Path(job.out) / WORK / JOB).is_file():
        return "interrupted; the same command with --resume goes on from the last checkpoint"
    return "interrupted before any training; give the same command again"


def _say_found(prepared: Prepared, say: Say) -> None:
    sizes = f"{len(prepared.data['train'])} training examples, {len(prepared.data['test'])} test examples"
    say(f"data: {sizes}; columns: {', '.join(f'{r}={c}' for r, c in prepared.task.columns.items())}")
    if prepared.task.labels is not None:
        names = [repr(name) for name in prepared.task.labels]
        say(f"classes: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''} ({len(names)})")
    for role in ("text", "text2"):
        column = prepared.task.columns.get(role)
        empty = 0 if column is None else sum(text in (None, "") for text in prepared.data["train"][column])
        if empty:
            say(f"note: {empty} training examples have nothing in {column!r}")
    action = f"fine-tuning first, {prepared.steps[0]} steps" if prepared.fine_tune else "no fine-tuning"
    say(f"{action}: {prepared.why}")


def _fine_tune(prepared: Prepared, work: Path, dense: Path, *, resume: bool, say: Say) -> None:
    """Fine-tune the model into a folder, if that is not there already."""
    if dense.is_dir():
        return
    # The head's first weights are drawn.
    set_seed(prepared.job.seed)
    model = prepared.model(prepared.job.model)
    say(f"fine-tuning, {prepared.steps[0]} steps")
    train(*make_trainer(prepared, model, work, 0, []), 0, resume=resume)

    def write(partial: Path) -> None:
        model.save_pretrained(partial)
        prepared.tokenizer.save_pretrained(partial)

    write_folder(dense, write)


def _keep_others(
    prepared: Prepared, pruner: Trainer, publisher: Publisher, dense: str
) -> dict[str, dict[str, float]]:
    """Take the models of earlier targets out of the folder of work, evaluate them, and write their cards."""
    out, work = Path(prepared.job.out), Path(pruner.args.output_dir)
    settings, found = prepared.job.config(), {}
    for index in range(len(settings.targets) - 1):
        written = target_folder(work, settings.with_target(index))
        kept = out / written.name
        # Not there, if a resumed job took it before it stopped.
        if written.exists():
            shutil.rmtree(kept, ignore_errors=True)
            shutil.move(written, kept)
        model = prepared.model(str(kept))
        trainer, _ = make_trainer(prepared, model, work, 1, [])
        found[kept.name] = evaluate(prepared, trainer, dense)
        counted = Report.from_dict(stored_report(kept))
        # The agreement of embeddings is ours, not one of Trainer's metrics, and is in no card.
        metrics = None if prepared.task.teaches_itself else found[kept.name]
        publisher.describe(model, counted, pruner.args, pruner.state, metrics=metrics)
        if not _write_sentence_model(prepared, model, kept):
            assert isinstance(model, PrunedMixin)
            assert model.pruning_card is not None
            write_text(kept / CARD, model.pruning_card)
    return found


def _write_sentence_model(prepared: Prepared, model: PreTrainedModel, folder: Path) -> bool:
    """Write a model as the SentenceTransformer that it came out of, with our card; whether it did."""
    card = model.pruning_card if isinstance(model, PrunedMixin) else None
    written = save_sentence_model(prepared.job.model, model, folder)
    if written and card is not None:
        # sentence-transformers writes a card of its own, which knows nothing of pruning.
        write_text(folder / "README.md", card)
    return written


def _figures(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in metrics.items()) or "no figures"


def _write(prepared: Prepared, model: PreTrainedModel, trainer: Trainer, out: Path, found: JobReport) -> None:
    """Put the pruned model and what is known of it into the folder."""
    if not _write_sentence_model(prepared, model, out):
        # Not by the Trainer, which writes a pickle beside.
        model.save_pretrained(out)
        prepared.tokenizer.save_pretrained(out)
    # With the curves, and without paths of this machine.
    trainer.state.stateful_callbacks = {}
    trainer.state.save_to_json(str(out / "trainer_state.json"))
    record = {**found.to_dict(), "job": prepared.job.to_dict()}
    write_json(out / JOB, record)
    for name, metrics in found.others.items():
        report = stored_report(out / name)
        own = {"out": str(out / name), "pruned_metrics": metrics, "report": report, "others": {}}
        write_json(out / name / JOB, {**record, **own})
