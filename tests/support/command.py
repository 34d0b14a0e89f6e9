"""The command, called in this process."""

from __future__ import annotations

import logging
import warnings

import datasets
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from hf_mlprune.cli import app

#: Loggers that the command quiets; the root is ``None``.
QUIETED = (None, "onnxruntime", "torch.onnx")


def run(*words: object, code: int = 0) -> str:
    """What the command prints on standard output; on standard error, if it is to fail.

    It quiets its process, which is that of the tests here: they hear what they heard before.
    """
    verbosity = transformers_logging.get_verbosity(), datasets.utils.logging.get_verbosity()
    levels = {name: logging.getLogger(name).level for name in QUIETED}
    try:
        with warnings.catch_warnings():
            done = CliRunner().invoke(app, list(map(str, words)))
    finally:
        transformers_logging.set_verbosity(verbosity[0])
        datasets.utils.logging.set_verbosity(verbosity[1])
        transformers_logging.enable_progress_bar()
        datasets.enable_progress_bars()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    assert done.exit_code == code, (done.stdout, done.stderr, done.exception)
    return done.stderr if code else done.stdout
