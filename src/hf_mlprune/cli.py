"""The command ``hf-mlprune``: its verbs are functions of this package, called with what was typed."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from .budgets import TARGETED
from .installed import check_installed
from .methods import METHODS
from .terminal import INTERRUPTED, be_quiet, columns_of, err, errors_in_words, out, pairs, show

#: What jobs read data with, and count metrics by.
JOB_PACKAGES = ("accelerate", "datasets", "sklearn")

app = typer.Typer(
    help="Prune BERT-family encoders: small and fast models from your own data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Folder = Annotated[str, typer.Argument(help="folder of a pruned model")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead")]
Column = Annotated[list[str] | None, typer.Option(help="ROLE=COLUMN, as in text=review; may be repeated")]
Trace = Annotated[bool, typer.Option("--traceback", help="print where an error comes from", hidden=True)]


@app.callback()
def quiet() -> None:
    """Prune BERT-family encoders: small and fast models from your own data."""
    be_quiet()


def say(text: str) -> None:
    """Tell how a job goes on, beside what the command prints."""
    err.print(escape(text))


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="folder or hub name of the model, fine-tuned or not")],
    data: Annotated[
        str, typer.Option(help="CSV, TSV, JSON lines or Parquet file, a folder, or a hub data set")
    ],
    out_folder: Annotated[str, typer.Option("--out", help="folder for the pruned model")],
    task: Annotated[
        str,
        typer.Option(
            help="text-classification, regression, token-classification, question-answering, embeddings"
        ),
    ] = "text-classification",
    test: Annotated[str | None, typer.Option(help="file with the test examples")] = None,
    column: Column = None,
    density: Annotated[float | None, typer.Option(help="share of encoder weights to keep (0.25)")] = None,
    speedup: Annotated[
        float | None, typer.Option(help="or: times as fast, on the device that trains")
    ] = None,
    latency: Annotated[str | None, typer.Option(help="or: time of a forward pass, as '12 ms'")] = None,
    size: Annotated[str | None, typer.Option(help="or: bytes of the file, as '30 MB'")] = None,
    multiply_adds: Annotated[
        float | None, typer.Option(help="or: share of the encoder's multiply-adds to keep")
    ] = None,
    method: Annotated[str | None, typer.Option(help=f"{', '.join(METHODS)}; else the preset's")] = None,
    preset: Annotated[str, typer.Option(help="default, or paper")] = "default",
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE of any other setting of PruningConfig")
    ] = None,
    fine_tune: Annotated[
        bool | None,
        typer.Option("--fine-tune/--no-fine-tune", help="fine-tune first, or not (guessed from the model)"),
    ] = None,
    epochs: Annotated[float, typer.Option(help="epochs of pruning")] = 6.0,
    fine_tune_epochs: Annotated[float, typer.Option(help="epochs of fine-tuning")] = 3.0,
    steps: Annotated[int | None, typer.Option(help="steps of pruning, in place of epochs")] = None,
    fine_tune_steps: Annotated[
        int | None, typer.Option(help="steps of fine-tuning, in place of epochs")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="examples per step")] = 32,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="of pruning (6 times that of fine-tuning; density 0.5 and more: 2 times; embeddings: 1e-3)"
        ),
    ] = None,
    fine_tune_learning_rate: Annotated[
        float | None, typer.Option(help="of fine-tuning (1e-4; from 512 features up 5e-5)")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="most tokens of an example (128; question answering: 384)")
    ] = None,
    seed: Annotated[int, typer.Option(help="of all random numbers")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would happen, and end")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on with an interrupted job")] = False,
    as_json: AsJson = False,
    traceback: Trace = False,
) -> None:
    """Fine-tune a model on your data if need be, prune it, evaluate it, and write it with report and card."""
    with errors_in_words(traceback=traceback):
        check_installed(JOB_PACKAGES, extra="train", needed_by="prune")
        from .jobs import Job
        from .jobs import prune as do_job
        from .jobs.job import check_folder, interrupted
        from .jobs.preparing import check_reachable, describe, prepare

        named = {
            "density": density, "speedup": speedup, "latency": latency, "size": size,
            "multiply_adds": multiply_adds, "method": method,
        }  # fmt: skip
        settings = {name: value for name, value in named.items() if value is not None}
        more = pairs(setting, "--set")
        if twice := sorted(set(settings) & set(more)):
            raise ValueError(f"--set: expected each setting once, got {twice} by an option of its own, too")
        settings |= {"preset": preset, **more}
        if set(TARGETED).isdisjoint(settings):
            settings["density"] = 0.25
        job = Job(
            model=model, data=data, out=out_folder, task=task, settings=settings, test=test,
            columns=columns_of(column), fine_tune=fine_tune, epochs=epochs, fine_tune_epochs=fine_tune_epochs,
            batch_size=batch_size,
            steps=steps, fine_tune_steps=fine_tune_steps,
            learning_rate=learning_rate, fine_tune_learning_rate=fine_tune_learning_rate,
            max_length=max_length, seed=seed,
        )  # fmt: skip
        if dry_run:
            check_folder(job, resume=resume)
            prepared = prepare(job)
            check_reachable(prepared, say)
            show(describe(prepared), as_json=as_json)
            return
        try:
            found = do_job(job, resume=resume, say=say)
        except KeyboardInterrupt:
            err.print(interrupted(job))
            raise typer.Exit(INTERRUPTED) from None
        if as_json:
            show(found.to_dict(), as_json=True)
            return
        from .jobs.showing import summary

        out.print(summary(found))


@app.command()
def report(
    folder: Folder,
    html: Annotated[
        Path | None, typer.Option(help="write a page with maps of every layer to this file")
    ] = None,
    as_json: AsJson = False,
    traceback: Trace = False,
) -> None:
    """What a pruned model has left: heads, rows, blocks, weights, size, speed."""
    with errors_in_words(traceback=traceback):
        from .reports.folder import read_folder
        from .reports.page import write_page

        found = read_folder(folder)
        if html is not None:
            write_page(found, html)
            err.print(f"written: {escape(str(html))}")
        if as_json:
            show(found.report.to_dict(), as_json=True)
        elif html is None:
            out.print(found.report.table())
            for line in found.lines():
                out.print(escape(line))


@app.command()
def bench(
    folder: Folder,
    against: Annotated[
        str | None, typer.Option(help="model to compare with (its dense form, random weights)")
    ] = None,
    engine: Annotated[list[str] | None, typer.Option(help="torch, onnx, openvino; may be repeated")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="batch x tokens, as 1x128; may be repeated")] = None,
    threads: Annotated[int | None, typer.Option(help="of the processor (as many as torch has)")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="the pruned model in int8, too (onnx)")] = False,
    as_json: AsJson = False,
    traceback: Trace = False,
) -> None:
    """Measure a pruned model against its dense form, in turn, on this machine."""
    with errors_in_words(traceback=traceback):
        from .exporting.bench import bench as measure

        found = measure(
            folder,
            against=against,
            engines=engine or ["torch"],
            shapes=shape or ["1x128"],
            threads=threads,
            int8=int8,
        )
        if as_json:
            show(found.to_dict(), as_json=True)
        else:
            out.print(found.table())


@app.command()
def plot(
    folder: Folder,
    file: Annotated[Path, typer.Option("--out", help="PNG, SVG or PDF file")],
    traceback: Trace = False,
) -> None:
    """Draw what is left per layer, the maps, and the curves of training."""
    with errors_in_words(traceback=traceback):
        from .reports.folder import read_folder
        from .reports.plot import write_plot

        write_plot(read_folder(folder), file)
        err.print(f"written: {escape(str(file))}")


@app.command()
def export(
    folder: Folder,
    target: Annotated[str, typer.Option("--out", help="folder for the export")],
    to: Annotated[
        str, typer.Option(help="onnx, onnx-blocks, openvino, torch, aotinductor, stock, dense")
    ] = "onnx",
    int8: Annotated[bool, typer.Option("--int8", help="smaller and faster; may cost accuracy")] = False,
    data: Annotated[
        str | None, typer.Option(help="file with labelled examples: int8 may lose --max-drop points on them")
    ] = None,
    column: Column = None,
    max_length: Annotated[
        int | None, typer.Option(help="most tokens of an example; as in the job that made the model")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="most points that int8 may lose on the data (0.5)")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="of the engine (as many as torch has)")] = None,
    as_json: AsJson = False,
    traceback: Trace = False,
) -> None:
    """Export a model for an engine; outputs are compared with the original, and the speed is measured."""
    with errors_in_words(traceback=traceback):
        from .exporting.export import export as write

        labelled: dict[str, Any] = {}
        if data is None and column:
            raise ValueError("column: expected --data, whose columns it names, got none")
        if data is None and max_length is not None:
            raise ValueError("max_length: expected --data, whose examples it cuts, got none")
        if data is not None:
            if not int8:
                raise ValueError("data: expected --int8, which is held to the metric on them, got none")
            check_installed(JOB_PACKAGES, extra="train", needed_by="data")
            from .exporting.export import check_request
            from .jobs.judging import read_labelled

            check_request(target, to, int8=int8, has_data=True, threads=threads)
            labelled = read_labelled(folder, data, columns_of(column), max_length).arguments
        # Standard output is for the report; NNCF draws its bars there.
        with redirect_stdout(sys.stderr):
            found = write(folder, target, to, int8=int8, max_drop=max_drop, threads=threads, **labelled)
        if as_json:
            show(found.to_dict(), as_json=True)
        else:
            out.print(escape(str(found)))
            err.print(f"written: {escape(str(target))}")


@app.command()
def compare(first: Folder, second: Folder, as_json: AsJson = False, traceback: Trace = False) -> None:
    """Two pruned models side by side."""
    with errors_in_words(traceback=traceback):
        from .reports.folder import compare as side_by_side
        from .reports.folder import comparison_table

        found = side_by_side(first, second)
        if as_json:
            show(found, as_json=True)
        else:
            out.print(comparison_table(found))


@app.command()
def push(
    folder: Folder,
    repository: Annotated[str, typer.Argument(help="name on the hub, with its owner")],
    private: Annotated[bool, typer.Option("--private", help="make a new repository private")] = False,
    traceback: Trace = False,
) -> None:
    """Upload a pruned model, with tokenizer, report and card."""
    with errors_in_words(traceback=traceback):
        from .reports.folder import push as upload

        out.print(escape(upload(folder, repository, private=private)))


def main() -> None:
    """Run the command."""
    app()
