"""OpenVINO's files, made from the ONNX graph, which it reads as it is."""

from __future__ import annotations

import tempfile
from pathlib import Path

from . import onnx
from .engine import Engine, Layers, Outputs, Runner
from .source import Inputs, Source

MODEL = "openvino_model.xml"


def write_openvino(source: Source, folder: Path) -> Layers:
    """Write ``openvino_model.xml`` and ``.bin``, and the config. Block-sparse layers become dense ones."""
    import openvino

    with tempfile.TemporaryDirectory(dir=folder) as inside:
        graph = Path(inside)
        layers = onnx.write_onnx(source, graph)
        model = openvino.convert_model(graph / onnx.MODEL)
        # Half-precision weights would be the default.
        openvino.save_model(model, folder / MODEL, compress_to_fp16=False)
    onnx.stock_config(source).save_pretrained(folder)
    return layers


def load_openvino(folder: Path, threads: int) -> Runner:
    """What runs the files in a folder."""
    import openvino

    # In float32 also where the processor multiplies bfloat16 faster.
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = openvino.Core().compile_model(folder / MODEL, "CPU", settings)
    names = [port.get_any_name() for port in compiled.outputs]
    known = {port.get_any_name() for port in compiled.inputs}

    def run(inputs: Inputs) -> Outputs:
        taken = {name: tensor.numpy() for name, tensor in inputs.items() if name in known}
        found = compiled(taken)
        return {name: found[port].copy() for name, port in zip(names, compiled.outputs, strict=True)}

    return run


OPENVINO = Engine((*onnx.PACKAGES, "openvino"), write_openvino, load_openvino)
