"""Programs of torch: exported, and compiled ahead of time by AOTInductor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..timing import using_threads
from .engine import Engine, Layers, Outputs, Runner, flat_outputs
from .onnx import dynamic_shapes, stock_config
from .source import Inputs, Source

PROGRAM = "model.pt2"


def _exported(source: Source) -> Any:
    from transformers.exporters import DynamoConfig, DynamoExporter

    example = source.batch(2, 24)
    config = DynamoConfig(dynamic_shapes=dynamic_shapes(source, example))
    exported = DynamoExporter().export(source.module, dict(example), config=config)
    exported.config = stock_config(source)
    return exported


def write_program(source: Source, folder: Path) -> Layers:
    """Write ``model.pt2``, which ``torch.export.load`` reads; with blocks, import ``hf_mlprune`` before."""
    _exported(source).save_pretrained(folder)
    return {}


def load_program(folder: Path, threads: int) -> Runner:
    """What runs the program in a folder."""
    return _runner(torch.export.load(str(folder / PROGRAM)).module(), threads)


def write_package(source: Source, folder: Path) -> Layers:
    """Write ``model.pt2``, compiled for this processor; ``torch._inductor.aoti_load_package`` loads it."""
    exported = _exported(source)
    torch._inductor.aoti_compile_and_package(exported.program, package_path=str(folder / PROGRAM))
    stock_config(source).save_pretrained(folder)
    return {}


def load_package(folder: Path, threads: int) -> Runner:
    """What runs the package in a folder."""
    package = torch._inductor.aoti_load_package(str(folder / PROGRAM))

    def call(**inputs: Tensor) -> Any:
        # It misreads others, without an error.
        return package(**{name: tensor.contiguous() for name, tensor in inputs.items()})

    return _runner(call, threads)


def _runner(call: Any, threads: int) -> Runner:
    def run(inputs: Inputs) -> Outputs:
        with torch.inference_mode(), using_threads(threads):
            return flat_outputs(call(**inputs))

    return run


TORCH = Engine(("transformers.exporters",), write_program, load_program, keeps_blocks=True)
AOTINDUCTOR = Engine(("transformers.exporters",), write_package, load_package, keeps_blocks=True)
