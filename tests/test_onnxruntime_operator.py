"""The operator of ONNX Runtime against torch's own product, and what it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument, InvalidGraph, RuntimeException

from hf_mlprune import kernels
from hf_mlprune.kernels import block_sparse_linear
from hf_mlprune.kernels.onnxruntime import DOMAIN, LIBRARY, OPERATOR, WHY_NOT, register
from hf_mlprune.kernels.operation import ACTIVATION_NUMBERS
from hf_mlprune.kernels.operation import INSTRUCTION_SETS as NUMBERS
from hf_mlprune.modeling.block_sparse import BlockSparseLinear, BlockSparseMatrix
from hf_mlprune.modeling.structure import grid_shape

INSTRUCTION_SETS = {"": [], "avx2": ["avx2"], "avx512": ["avx2", "avx512"]}[kernels.instruction_set()]
TYPES = {
    "x": TensorProto.FLOAT,
    "values": TensorProto.FLOAT,
    "crow_indices": TensorProto.INT32,
    "col_indices": TensorProto.INT32,
    "bias": TensorProto.FLOAT,
    "row_indices": TensorProto.INT64,
}

native = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


def make_model(inputs, constants, attributes):
    """The bytes of an ONNX file of one node; `inputs` are named, `constants` stand in the file."""
    node = helper.make_node(OPERATOR, [*inputs, *constants], ["y"], domain=DOMAIN, **attributes)
    graph = helper.make_graph(
        [node],
        "one product",
        [helper.make_tensor_value_info(name, TYPES[name], None) for name in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value.detach().numpy(), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def make_session(model, threads=1):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    register(options)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def make_matrix(rows, columns, block_shape, density, generator):
    keep = torch.rand(grid_shape((rows, columns), block_shape), generator=generator) < density
    return BlockSparseMatrix.from_dense(torch.randn(rows, columns, generator=generator), keep, block_shape)


def parts(matrix, bias, row_indices=None):
    found = {
        "values": matrix.values,
        "crow_indices": matrix.crow_indices,
        "col_indices": matrix.col_indices,
        "bias": bias,
    }
    return found if row_indices is None else found | {"row_indices": row_indices}


def attributes(activation="none", scatter_size=None, instruction_set=""):
    return {
        "activation": ACTIVATION_NUMBERS[activation],
        "scatter_size": scatter_size or 0,
        "instruction_set": NUMBERS[instruction_set],
    }


def run(session, x):
    (y,) = session.run(None, {"x": x.numpy()})
    return torch.from_numpy(y)


@st.composite
def products(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    block_shape = draw(st.sampled_from([(16, 16), (32, 32), (16, 4), (32, 1), (64, 32), (8, 8), (24, 20)]))
    rows, columns = 2 * draw(st.integers(1, 50)), draw(st.integers(1, 100))
    matrix = make_matrix(rows, columns, block_shape, draw(st.sampled_from([0.0, 0.2, 0.7, 1.0])), generator)
    tokens = draw(
        st.sampled_from([(), (0,), (1,), (2, 3), (2, 0), (1, 1, 7), (24,), (5, 5), (2, 100), (200,)])
    )
    x, bias = torch.randn(*tokens, columns, generator=generator), torch.randn(rows, generator=generator)
    others = {"activation": draw(st.sampled_from(list(ACTIVATION_NUMBERS)))}
    row_indices = None
    if draw(st.booleans()):
        others["scatter_size"] = rows + draw(st.integers(0, 40))
        row_indices = torch.randperm(others["scatter_size"], generator=generator)[:rows].sort().values
    return x, matrix, bias, row_indices, others


@native
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@settings(max_examples=200)
@given(case=products())
def test_it_is_torchs_product_to_the_bit(name, case):
    x, matrix, bias, row_indices, others = case
    constants = parts(matrix, bias, row_indices)
    found = run(make_session(make_model(["x"], constants, attributes(instruction_set=name, **others))), x)
    expected = block_sparse_linear(x, matrix, bias, row_indices=row_indices, instruction_set=name, **others)
    assert found.shape == expected.shape
    assert torch.equal(found, expected)


@native
@pytest.mark.parametrize("scatter", [None, tuple(range(5, 69))])
def test_a_layer_hands_its_tensors_over_as_they_are(scatter):
    layer = BlockSparseLinear(96, 64, (16, 16), 9, scatter=scatter, scatter_size=scatter and 80).eval()
    layer.activation = "gelu"
    constants = parts(layer.matrix(), layer.bias, layer.row_indices)
    session = make_session(make_model(["x"], constants, attributes(layer.activation, layer.scatter_size)))
    x = torch.randn(3, 17, 96)
    with torch.no_grad():
        assert torch.equal(run(session, x), layer(x))


@native
def test_one_session_takes_any_number_of_tokens():
    generator = torch.Generator().manual_seed(0)
    matrix, bias = make_matrix(70, 33, (16, 16), 0.5, generator), torch.randn(70, generator=generator)
    session = make_session(make_model(["x"], parts(matrix, bias), attributes()))
    for shape in ((1,), (200,), (3, 5), (0,), (), (2, 2, 2), (24,), (1,)):
        x = torch.randn(*shape, 33, generator=generator)
        assert torch.equal(run(session, x), block_sparse_linear(x, matrix, bias))


@native
def test_no_rows_and_no_columns():
    for rows, columns in ((0, 32), (32, 0)):
        matrix = BlockSparseMatrix.from_dense(
            torch.empty(rows, columns), torch.zeros(grid_shape((rows, columns), (16, 16))) > 0, (16, 16)
        )
        bias = torch.randn(rows)
        y = run(make_session(make_model(["x"], parts(matrix, bias), attributes())), torch.randn(3, columns))
        assert torch.equal(y, bias.expand(3, rows))


@native
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_threads_do_not_change_the_result(name):
    generator = torch.Generator().manual_seed(0)
    matrix, bias = make_matrix(300, 200, (16, 16), 0.4, generator), torch.randn(300, generator=generator)
    model = make_model(["x"], parts(matrix, bias), attributes(instruction_set=name))
    sessions = [make_session(model, threads) for threads in (1, 2, 3, 5)]
    for tokens in (1, 13, 16, 55, 100, 1000):
        x = torch.randn(tokens, 200, generator=generator)
        expected = block_sparse_linear(x, matrix, bias, instruction_set=name)
        # It learns from its first calls how many threads there are.
        assert all(torch.equal(run(session, x), expected) for session in sessions for _ in range(10)), tokens


@native
def test_calls_from_many_threads():
    generator = torch.Generator().manual_seed(0)
    matrix, bias = make_matrix(96, 80, (16, 16), 0.4, generator), torch.randn(96, generator=generator)
    session = make_session(make_model(["x"], parts(matrix, bias), attributes()), threads=3)
    inputs = [torch.randn(tokens, 80, generator=generator) for tokens in (1, 17, 64, 333) * 2]
    expected = [block_sparse_linear(x, matrix, bias) for x in inputs]
    wrong: list[int] = []

    def work(index):
        for _ in range(30):
            if not torch.equal(run(session, inputs[index]), expected[index]):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@native
def test_sessions_outlive_their_options_and_library_handles():
    generator = torch.Generator().manual_seed(0)
    matrix, bias = make_matrix(48, 48, (16, 16), 0.5, generator), torch.randn(48, generator=generator)
    model = make_model(["x"], parts(matrix, bias), attributes())
    x = torch.randn(5, 48, generator=generator)
    kept = make_session(model)
    for _ in range(20):
        assert torch.equal(run(make_session(model), x), run(kept, x))


WHOLE = {
    "x": torch.zeros(3, 32),
    "values": torch.zeros(2, 16, 16),
    "crow_indices": torch.tensor([0, 1, 2]).int(),
    "col_indices": torch.tensor([0, 1]).int(),
    "bias": torch.zeros(32),
    "row_indices": torch.arange(32),
}
IN_ONE_ROW = torch.tensor([0, 2, 2]).int()


@native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(())}, r"x: expected \(..., columns\)"),
        ({"x": torch.zeros(3, 16)}, "col_indices: expected columns of the grid of x"),
        ({"x": torch.zeros(0, 2**31)}, "expected sizes up to 2147483647, got 2147483648"),
        ({"x": torch.zeros(0, 2**20, 2**20, 32)}, "x: expected up to 2147483647 tokens"),
        ({"values": torch.zeros(2, 16)}, r"values: expected \(blocks, block columns, block rows\)"),
        ({"values": torch.zeros(2, 0, 16)}, "values: expected blocks of some size"),
        ({"bias": torch.zeros(2, 16)}, r"bias: expected \(rows,\)"),
        ({"bias": torch.zeros(16)}, r"crow_indices: expected \(grid rows \+ 1,\), here \(2,\)"),
        ({"crow_indices": torch.tensor([[0, 1, 2]]).int()}, "crow_indices: expected"),
        ({"crow_indices": torch.tensor([0, 1, 9]).int()}, "crow_indices: expected 0 to blocks"),
        ({"crow_indices": torch.tensor([0, -5, 2]).int()}, "rows that do not end before they begin"),
        ({"col_indices": torch.tensor([0]).int()}, "col_indices: expected one entry for each of 2 blocks"),
        ({"col_indices": torch.tensor([0, 9]).int()}, "col_indices: expected columns of the grid of x"),
        ({"col_indices": torch.tensor([-1, 0]).int()}, "col_indices: expected columns of the grid of x"),
        (
            {"crow_indices": IN_ONE_ROW, "col_indices": torch.tensor([1, 1]).int()},
            "increasing within each row",
        ),
        ({"row_indices": torch.arange(16)}, "row_indices: expected one place for each of 32 rows"),
        ({"row_indices": torch.zeros(32).long()}, "row_indices: expected increasing places"),
        ({"row_indices": torch.arange(32) + 9}, "row_indices: expected increasing places below scatter_size"),
    ],
)
def test_malformed_inputs_are_refused_in_words(change, message):
    session = make_session(make_model(list(WHOLE), {}, attributes(scatter_size=40)))
    feed = {name: value.numpy() for name, value in (WHOLE | change).items()}
    with pytest.raises(InvalidArgument, match=message):
        session.run(None, feed)
    (y,) = session.run(None, {name: value.numpy() for name, value in WHOLE.items()})
    assert y.shape == (3, 40)


@native
@pytest.mark.parametrize(
    ("given_attributes", "with_places", "message"),
    [
        (attributes() | {"activation": 4}, False, "activation: expected 0 to 3, got 4"),
        (attributes(scatter_size=-1), True, "scatter_size: expected 0 to 2147483647, got -1"),
        (attributes(scatter_size=40), False, "expected with a scatter_size above 0, or neither; got .* 40"),
        (attributes(), True, "expected with a scatter_size above 0, or neither; got scatter_size 0"),
        (attributes() | {"instruction_set": 3}, False, "instruction_set: expected a processor that has it"),
        ({"scatter_size": 0}, False, "expected an attribute activation, an integer; 0 is for none"),
        ({"activation": 1.0, "scatter_size": 0}, False, "expected an attribute activation, an integer"),
        ({"activation": 0}, False, "expected an attribute scatter_size, an integer; 0 is for rows that stay"),
    ],
)
def test_wrong_attributes_are_refused_in_words(given_attributes, with_places, message):
    names = list(WHOLE)[: None if with_places else -1]
    with pytest.raises((InvalidArgument, RuntimeException), match=message):
        make_session(make_model(names, {}, given_attributes)).run(
            None, {name: WHOLE[name].numpy() for name in names}
        )


@native
def test_a_gate_needs_two_equal_halves():
    matrix = make_matrix(7, 33, (16, 16), 0.6, torch.Generator().manual_seed(0))
    model = make_model(["x"], parts(matrix, torch.zeros(7)), attributes(activation="gated_gelu"))
    with pytest.raises(InvalidArgument, match="expected two equal halves of rows, got 7 rows"):
        run(make_session(model), torch.zeros(2, 33))


@native
def test_other_types_are_refused_when_a_model_is_loaded():
    matrix = make_matrix(32, 32, (16, 16), 1.0, torch.Generator().manual_seed(0))
    constants = parts(matrix, torch.zeros(32))
    for name, dtype in (("col_indices", torch.int64), ("values", torch.float64)):
        model = make_model(["x"], constants | {name: constants[name].to(dtype)}, attributes())
        with pytest.raises(InvalidGraph, match=f"of input parameter \\({name}\\)"):
            make_session(model)


WITHOUT_TORCH = """
import sys
import numpy as np
import onnxruntime
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(sys.argv[1] + "/operator.so")
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", options)
np.save(sys.argv[1] + "/y.npy", session.run(None, {"x": np.load(sys.argv[1] + "/x.npy")})[0])
assert "torch" not in sys.modules and "hf_mlprune" not in sys.modules
"""


@native
def test_a_copy_of_it_runs_without_torch_and_this_package(tmp_path):
    generator = torch.Generator().manual_seed(0)
    matrix, bias = make_matrix(64, 48, (16, 16), 0.5, generator), torch.randn(64, generator=generator)
    x = torch.randn(5, 48, generator=generator)
    shutil.copy(LIBRARY, tmp_path / "operator.so")
    (tmp_path / "model.onnx").write_bytes(make_model(["x"], parts(matrix, bias), attributes()))
    np.save(tmp_path / "x.npy", x.numpy())
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_TORCH, str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    y = torch.from_numpy(np.load(tmp_path / "y.npy"))
    assert torch.equal(y, block_sparse_linear(x, matrix, bias))


def test_it_is_there_where_it_should_be():
    """A build that fails in silence must not turn this file into skips."""
    if sys.platform == "linux" and os.uname().machine == "x86_64" and shutil.which("g++"):
        assert not WHY_NOT
