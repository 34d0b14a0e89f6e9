"""int8 recipes for ONNX Runtime and, over the same graph, for OpenVINO."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import onnx, openvino
from .int8 import Quantize
from .source import Inputs

_KEPT = (onnx.MODEL, f"{onnx.MODEL}.data", openvino.MODEL, Path(openvino.MODEL).with_suffix(".bin").name)


def _names(float_nodes: Sequence[str]) -> list[str]:
    """Nodes as the quantizer knows them: it makes products of Gemm nodes first, and names them anew."""
    return [name for node in float_nodes for name in (node, f"{node}_MatMul")]


def dynamic(calibration: Sequence[Inputs]) -> Quantize:
    """Weights in int8 per row, inputs of products quantized as they come: no calibration.

    Weights take 7 of 8 bits: processors without VNNI add two products in 16 bits, which overflow with 8.
    """

    def config(float_nodes: Sequence[str]) -> Any:
        from transformers.exporters import OnnxRuntimeDynamicConfig

        return OnnxRuntimeDynamicConfig(
            per_channel=True, reduce_range=True, nodes_to_exclude=_names(float_nodes)
        )

    return _quantizer(config, calibration)


def static(calibration: Sequence[Inputs]) -> Quantize:
    """Weights and inputs of products in int8, with ranges of inputs that calibration batches had."""

    def config(float_nodes: Sequence[str]) -> Any:
        from transformers.exporters import OnnxRuntimeStaticConfig

        return OnnxRuntimeStaticConfig(
            op_types_to_quantize=list(onnx.PRODUCTS),
            per_channel=True,
            reduce_range=True,
            nodes_to_exclude=_names(float_nodes),
        )

    return _quantizer(config, calibration)


def _quantizer(config: Callable[[Sequence[str]], Any], calibration: Sequence[Inputs]) -> Quantize:
    def quantize(floats: Path, folder: Path, float_nodes: Sequence[str]) -> None:
        import onnx_ir
        from transformers.exporters import ExportFormat, OnnxExporter, OnnxRuntimeQuantizer

        _copy_others(floats, folder)
        program = onnx_ir.load(floats / onnx.MODEL)
        quantizer = OnnxRuntimeQuantizer(config(float_nodes), calibration_dataset=list(calibration))
        quantized = quantizer.quantize(program, dict(calibration[0]), ExportFormat.ONNX)
        OnnxExporter.save_program(quantized, folder / onnx.MODEL)

    return quantize


def openvino_static(calibration: Sequence[Inputs]) -> Quantize:
    """NNCF's recipe for transformers: weights and inputs in int8, calibrated."""

    def quantize(floats: Path, folder: Path, float_nodes: Sequence[str]) -> None:
        import nncf
        import openvino as engine
        from transformers.exporters import ExportFormat, NNCFOpenVINOQuantizer, NNCFQuantizationConfig

        _copy_others(floats, folder)
        scope = nncf.IgnoredScope(names=list(float_nodes)) if float_nodes else None
        config = NNCFQuantizationConfig(ignored_scope=scope, subset_size=len(calibration))
        quantizer = NNCFOpenVINOQuantizer(config, list(calibration))
        model = engine.Core().read_model(floats / openvino.MODEL)
        quantized = quantizer.quantize(model, dict(calibration[0]), ExportFormat.OPENVINO)
        engine.save_model(quantized, folder / openvino.MODEL, compress_to_fp16=False)

    return quantize


def _copy_others(floats: Path, folder: Path) -> None:
    for file in floats.iterdir():
        if file.name not in _KEPT:
            shutil.copyfile(file, folder / file.name)


#: Engine and recipe -> what makes it of calibration batches.
RECIPES: dict[tuple[str, str], Callable[[Sequence[Inputs]], Quantize]] = {
    ("onnx", "dynamic"): dynamic,
    ("onnx", "static"): static,
    ("onnx-blocks", "dynamic"): dynamic,
    ("openvino", "static"): openvino_static,
}
