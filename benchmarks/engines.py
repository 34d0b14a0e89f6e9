"""One linear layer in other engines, as callables: those that are installed."""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_mlprune.modeling.block_sparse import BlockSparseMatrix

Calls = dict[str, Callable[[], object]]


def torch_bsr(x: Tensor, matrix: BlockSparseMatrix, bias: Tensor) -> Callable[[], object]:
    """The block-sparse linear of torch itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in beta state"
        weight = torch.sparse_bsr_tensor(
            matrix.crow_indices, matrix.col_indices, matrix.values.transpose(1, 2).contiguous(), matrix.shape
        )
    return partial(functional.linear, x, weight, bias)


def dense_engines(x: Tensor, weight: Tensor, bias: Tensor) -> Calls:
    """Dense float32, and dynamic int8 of torch and ONNX Runtime."""
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data, linear.bias.data = weight, bias
    calls: Calls = {"torch_int8": partial(_torch_int8(linear), x)}
    if importlib.util.find_spec("onnx") is None:
        return calls
    model = _onnx(weight, bias)
    if importlib.util.find_spec("onnxruntime") is not None:
        calls["onnxruntime"] = _onnxruntime(model, x)
        calls["onnxruntime_int8"] = _onnxruntime(_quantized(model), x)
    if importlib.util.find_spec("openvino") is not None:
        calls["openvino"] = _openvino(model, x)
    return calls


def whole_model(model: nn.Module, tokens: Tensor) -> Calls:
    """A dense encoder in ONNX Runtime and OpenVINO, float32."""
    calls: Calls = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (),
                str(file),
                kwargs={"input_ids": tokens},
                input_names=["x"],
                dynamo=True,
                verbose=False,
            )
        if importlib.util.find_spec("onnxruntime") is not None:
            calls["onnxruntime"] = _onnxruntime(file, tokens)
        if importlib.util.find_spec("openvino") is not None:
            calls["openvino"] = _openvino(file, tokens)
    return calls


def _torch_int8(linear: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # announces its own end
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, torch.qint8)


def _onnx(weight: Tensor, bias: Tensor) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    rows, columns = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["xw"]), helper.make_node("Add", ["xw", "b"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", rows])],
        [
            numpy_helper.from_array(np.ascontiguousarray(weight.T.numpy()), "w"),
            numpy_helper.from_array(bias.numpy(), "b"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _quantized(model: Any) -> Any:
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source.onnx", Path(folder) / "target.onnx"
        onnx.save(model, source)
        quantize_dynamic(source, target)
        return onnx.load(target)


def _onnxruntime(model: Any, x: Tensor) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    data = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {session.get_inputs()[0].name: x.numpy()})


def _openvino(model: Any, x: Tensor) -> Callable[[], object]:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    read = core.read_model(str(model) if isinstance(model, Path) else model.SerializeToString())
    request = core.compile_model(read, "CPU", settings).create_infer_request()
    return partial(request.infer, [x.numpy()])
