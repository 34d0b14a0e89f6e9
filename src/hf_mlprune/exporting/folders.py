"""Folders that plain transformers loads, with no code of ours and no consent."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
import transformers

from ..encoders import inspect_encoder
from ..timing import using_threads
from .engine import Engine, Layers, Outputs, Runner, reference
from .source import Inputs, Source
from .stock import stock_model


def _write(smallest: bool, source: Source, folder: Path) -> Layers:
    if source.module is not source.model:
        raise TypeError(
            "export: expected a transformers model for a folder of transformers, got one of "
            "sentence-transformers; pass the transformers model in it, model[0].model"
        )
    stock_model(source.model, smallest=smallest).to(source.dtype).save_pretrained(folder)
    return {}


def load_folder(folder: Path, threads: int) -> Runner:
    """What runs the model in a folder."""
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
    call = reference(Source(model, model, inspect_encoder(model), (), None))

    def run(inputs: Inputs) -> Outputs:
        with using_threads(threads):
            return call(inputs)

    return run


STOCK = Engine((), partial(_write, True), load_folder)
DENSE = Engine((), partial(_write, False), load_folder)
