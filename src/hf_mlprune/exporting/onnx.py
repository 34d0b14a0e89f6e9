"""ONNX files, run by ONNX Runtime."""

from __future__ import annotations

import ast
import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import torch

from ..encoders import most_tokens
from ..families import plain_config
from ..kernels import onnxruntime as operator
from .engine import Engine, Layers, Outputs, Runner
from .plain import DenseBlocks, OperatorBlocks
from .source import Inputs, Source

MODEL = "model.onnx"
#: What both kinds of products with a constant matrix are called.
PRODUCTS = ("MatMul", "Gemm")
_SCOPES = "pkg.torch.onnx.name_scopes"
PACKAGES = ("onnx", "onnxscript", "onnxruntime", "transformers.exporters")


def write_onnx(source: Source, folder: Path) -> Layers:
    """Write ``model.onnx``, its weights beside it, and the config that transformers' own loader reads.

    Block-sparse layers become dense ones.
    """
    return write_graph(source.with_blocks_as(DenseBlocks), folder)


def write_onnx_with_blocks(source: Source, folder: Path) -> Layers:
    """As :func:`write_onnx`, but block-sparse layers become nodes of our operator, which is put beside it.

    Raises:
        RuntimeError: there is no such operator on this machine.
    """
    if operator.WHY_NOT:
        raise RuntimeError(
            f'to="onnx-blocks": expected the operator for ONNX Runtime, but {operator.WHY_NOT}; use to="onnx"'
        )
    layers = write_graph(source.with_blocks_as(OperatorBlocks), folder)
    shutil.copyfile(operator.LIBRARY, folder / operator.LIBRARY.name)
    return layers


def write_graph(source: Source, folder: Path) -> Layers:
    """Write a model without layers of ours as an ONNX graph, with dynamic batch and length."""
    from transformers.exporters import OnnxConfig, OnnxExporter

    example = source.batch(2, 24)
    shapes = dynamic_shapes(source, example)
    # torch reports its progress on standard output.
    with contextlib.redirect_stdout(io.StringIO()):
        exported = OnnxExporter().export(
            source.module, dict(example), config=OnnxConfig(dynamic_shapes=shapes)
        )
    _name_axes(exported.program, example)
    exported.config = stock_config(source)
    exported.save_pretrained(folder)
    return layers_of(exported.program)


def dynamic_shapes(source: Source, example: Inputs) -> dict[str, dict[int, Any]]:
    """Axes of the inputs that may have any size: of images the first, of tokens all."""
    batch = torch.export.Dim("batch")
    if source.encoder.family.takes_images:
        return {name: {0: batch} for name in example}
    # Stock models slice a table of positions even where these are relative only.
    most = min(most_tokens(source.encoder), source.encoder.module.config.max_position_embeddings)
    sequence = torch.export.Dim("sequence", max=most)
    # Between the two, the choices of a multiple-choice head.
    choices = torch.export.Dim("choices")
    return {
        name: {0: batch, tensor.dim() - 1: sequence, **({1: choices} if tensor.dim() > 2 else {})}
        for name, tensor in example.items()
    }


def layers_of(program: Any) -> Layers:
    """The nodes with weights of a graph, by encoder layer, or by module outside of the layers."""
    found: dict[str, list[str]] = {}
    for node in program.graph:
        # The indices of a Gather may be constant, too.
        tables = node.op_type == "Gather" and node.inputs[0].is_initializer()
        products = node.op_type in PRODUCTS and any(
            value is not None and value.is_initializer() for value in node.inputs
        )
        if tables or products:
            found.setdefault(_layer(node), []).append(node.name)
    return found


def _layer(node: Any) -> str:
    """Path of the layer that a node was made from."""
    scopes = ast.literal_eval(node.metadata_props[_SCOPES])
    path = scopes[-2].split(".")
    numbers = [index for index, part in enumerate(path) if part.isdigit()]
    # Of sentence-transformers' modules, the first number counts those.
    numbers = [index for index in numbers if path[index - 1] != "parts"]
    return ".".join(path[: numbers[0] + 1] if numbers else path)


def stock_config(source: Source) -> Any:
    """The config of the stock model: labels and sizes of the dense model, and no code to load."""
    config = source.encoder.family.stock_config.from_dict(plain_config(source.model.config))
    config.architectures = None
    return config


def _name_axes(program: Any, example: Inputs) -> None:
    """Call the dynamic axes what they are."""
    names = {}
    for value in program.graph.inputs:
        last = len(value.shape) - 1
        names[str(value.shape[0])] = "batch"
        if not example[value.name].is_floating_point():
            names[str(value.shape[last])] = "sequence"
    for value in (*program.graph.inputs, *program.graph.outputs):
        for axis, size in enumerate(value.shape):
            if str(size) in names:
                value.shape[axis] = names[str(size)]


def session(path: Path, threads: int) -> Any:
    """An ONNX Runtime session of a file on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    library = path.parent / operator.LIBRARY.name
    if library.is_file():
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def load_onnx(folder: Path, threads: int) -> Runner:
    """What runs the file in a folder."""
    opened = session(folder / MODEL, threads)
    names = [value.name for value in opened.get_outputs()]
    taken = [value.name for value in opened.get_inputs()]

    def run(inputs: Inputs) -> Outputs:
        found = opened.run(names, {name: inputs[name].numpy() for name in taken})
        return dict(zip(names, found, strict=True))

    return run


ONNX = Engine(PACKAGES, write_onnx, load_onnx)
ONNX_BLOCKS = Engine(PACKAGES, write_onnx_with_blocks, load_onnx, keeps_blocks=True)
