"""What the command reads from a terminal, and how it prints."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError
from transformers.utils import is_datasets_available
from transformers.utils import logging as transformers_logging

out, err = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)

#: Exit codes: of an error that is said in words, and of Ctrl-C.
FAILED, INTERRUPTED = 1, 130
#: Of this package and those below it, what a user can mend.
SAID_IN_WORDS = (
    ValueError,
    TypeError,
    OSError,
    RuntimeError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
)


@contextmanager
def errors_in_words(*, traceback: bool = False) -> Iterator[None]:
    """Print an error as one line and end the command with an exit code."""
    try:
        yield
    except typer.Exit:
        # Of typer, and a RuntimeError.
        raise
    except KeyboardInterrupt:
        err.print("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        in_words = isinstance(error, SAID_IN_WORDS)
        # Of the network: the hub's library uses now this, now that one, and they share no class of errors.
        of_network = type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3"))
        if traceback or not (in_words or of_network):
            raise
        said = str(error) if in_words else f"the hub cannot be reached: {error}"
        said = "\n".join([said, *getattr(error, "__notes__", [])])
        err.print(f"[red]error:[/red] {escape(said)}")
        raise typer.Exit(FAILED) from None


def be_quiet() -> None:
    """Leave the terminal to the command: other libraries log errors only, without bars."""
    for name in (None, "huggingface_hub", "onnxruntime", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)
    if is_datasets_available():
        import datasets

        datasets.disable_progress_bars()
        datasets.utils.logging.set_verbosity(logging.CRITICAL)


def pairs(given: list[str] | None, option: str) -> dict[str, Any]:
    """``["a=1", "b=x"]`` as ``{"a": 1, "b": "x"}``; values are read as JSON where they are JSON."""
    found: dict[str, Any] = {}
    for name, value in _named(given, option).items():
        try:
            found[name] = json.loads(value)
        except ValueError:
            if value.startswith(("[", "{")):
                raise typer.BadParameter(
                    f"expected JSON behind {name}=, got {value!r}", param_hint=option
                ) from None
            found[name] = value
    return found


def columns_of(given: list[str] | None) -> dict[str, str]:
    """``["text=review"]`` as role -> column."""
    return _named(given, "--column")


def _named(given: list[str] | None, option: str) -> dict[str, str]:
    found = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"expected NAME=VALUE, got {text!r}", param_hint=option)
        if name in found:
            raise typer.BadParameter(f"expected {name} once, got it twice", param_hint=option)
        found[name] = value
    return found


def show(data: dict[str, Any], *, as_json: bool) -> None:
    """Print a dictionary: as JSON, or one line for each entry."""
    if as_json:
        sys.stdout.write(json.dumps(data, indent=2) + "\n")
        return
    width = max(map(len, data))
    for name, value in data.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        text = ", ".join(map(str, text)) if isinstance(text, list) else text
        out.print(f"[bold]{name:<{width}}[/bold]  {escape(str(text))}")
