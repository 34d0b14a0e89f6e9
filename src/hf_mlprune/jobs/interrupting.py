"""Ctrl-C: a checkpoint is written before a run ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback


class SaveOnInterrupt(TrainerCallback):
    """Writes a checkpoint behind the step at which Ctrl-C came, then raises ``KeyboardInterrupt``."""

    def __init__(self) -> None:
        self.interrupted = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint."""
        if self.interrupted:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """It is written: end."""
        if self.interrupted:
            raise KeyboardInterrupt

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take Ctrl-C while a trainer trains; the second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            # Only the main thread hears of signals.
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
