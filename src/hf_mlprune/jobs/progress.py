"""One bar for each of the two trainings of a job, on standard error."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

#: Parts of a run after which a line is printed where there is no terminal.
PARTS = 10


class Bar(TrainerCallback):
    """Shows step, time left, loss, density and phase; in place of Trainer's bar and dictionaries.

    Args:
        what: is done.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task(what, total=None, figures="")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin at the step that a run is resumed at."""
        self.progress.update(self.task, total=state.max_steps, completed=state.global_step)
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move on."""
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Show the figures."""
        if "loss" not in logs:
            return
        figures = f"loss {logs['loss']:.3f}"
        if "density" in logs:
            figures += f", {logs['density']:.1%} of the weights, {logs['pruning_phase']}"
        self.progress.update(self.task, figures=figures)
        part = max(1, state.max_steps // PARTS)
        if not self.console.is_terminal and state.global_step % part < args.logging_steps:
            self.console.print(f"{self.what}: step {state.global_step} of {state.max_steps}, {figures}")

    def close(self) -> None:
        """End the bar, also of a run that failed."""
        self.progress.stop()
