"""The native block-sparse product against the dense one in float64, and what it refuses."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import hf_mlprune
from hf_mlprune import PruningConfig, attach, kernels, report, shrink
from hf_mlprune.encoders import inspect_encoder
from hf_mlprune.kernels import block_sparse_linear, explain
from hf_mlprune.kernels.dispatch import why_dense
from hf_mlprune.kernels.operation import WHY_NOT
from hf_mlprune.levels import LEVELS
from hf_mlprune.modeling.bert import PrunedBertForSequenceClassification
from hf_mlprune.modeling.block_sparse import ACTIVATIONS, BlockSparseLinear, BlockSparseMatrix
from hf_mlprune.modeling.structure import grid_shape
from support.models import make_batch, make_model, prune

ROOT = Path(__file__).parents[1]
INSTRUCTION_SETS = {"": [], "avx2": ["avx2"], "avx512": ["avx2", "avx512"]}[kernels.instruction_set()]

native = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


def random_matrix(rows, columns, block_shape, density, generator, dtype=torch.float32) -> BlockSparseMatrix:
    keep = torch.rand(grid_shape((rows, columns), block_shape), generator=generator) < density
    dense = torch.randn(rows, columns, generator=generator).to(dtype)
    return BlockSparseMatrix.from_dense(dense, keep, block_shape)


def dense_result(x, matrix, bias):
    y = x.double() @ matrix.to_dense().double().T
    return y if bias is None else y + bias.double()


@st.composite
def products(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    block_shape = draw(
        st.sampled_from([(16, 16), (32, 32), (16, 4), (32, 1), (64, 32), (8, 8), (1, 32), (24, 20), (4, 16)])
    )
    rows, columns = draw(st.integers(1, 100)), draw(st.integers(1, 100))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    density = draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
    matrix = random_matrix(rows, columns, block_shape, density, generator, dtype)
    tokens = draw(st.sampled_from([0, 1, 2, 3, 5, 7, 16, 24, 25, 49, 200]))
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype) if draw(st.booleans()) else None
    return x, matrix, bias


def tolerance(dtype):
    return 1e-5 if dtype is torch.float32 else 1e-2


@native
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@given(case=products())
def test_it_is_the_dense_product(name, case):
    x, matrix, bias = case
    y = block_sparse_linear(x, matrix, bias, instruction_set=name)
    expected = dense_result(x, matrix, bias)
    assert y.shape == expected.shape
    assert y.dtype is x.dtype
    bound = tolerance(x.dtype) * max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
    torch.testing.assert_close(y.double(), expected, atol=bound, rtol=0)


@native
def test_a_gate_needs_two_equal_halves():
    matrix = random_matrix(7, 33, (16, 16), 0.6, torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match="expected two equal halves of rows, got 7 rows"):
        block_sparse_linear(torch.randn(2, 33), matrix, activation="gated_gelu")


@native
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused_activations(activation, name):
    matrix = random_matrix(70, 33, (16, 16), 0.6, torch.Generator().manual_seed(0))
    x = torch.randn(9, 33) * 3
    y = block_sparse_linear(x, matrix, activation=activation, instruction_set=name)
    expected = ACTIVATIONS[activation](dense_result(x, matrix, None))
    torch.testing.assert_close(y.double(), expected, atol=2e-5, rtol=1e-5)


def assert_rounded(y, expected, dtype):
    """Sums in float32, rounded once to the nearest of `dtype`."""
    half_unit = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(y.double(), expected, atol=3e-5, rtol=half_unit * 1.01)


@native
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["none", *ACTIVATIONS])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("tokens", [1, 9])
def test_every_way_out_of_the_sums(tokens, scattered, activation, dtype, name):
    generator = torch.Generator().manual_seed(0)
    matrix = random_matrix(70, 33, (16, 16), 0.6, generator, dtype)
    x = (torch.randn(tokens, 33, generator=generator) * 3).to(dtype)
    bias = torch.randn(70, generator=generator).to(dtype)
    places = torch.arange(70) + (torch.arange(70) > 20) * 3
    y = block_sparse_linear(
        x,
        matrix,
        bias,
        activation=activation,
        instruction_set=name,
        **({"row_indices": places, "scatter_size": 75} if scattered else {}),
    )
    expected = dense_result(x, matrix, bias)
    if activation != "none":
        expected = ACTIVATIONS[activation](expected)
    if scattered:
        expected = torch.zeros(tokens, 75, dtype=torch.float64).index_copy(1, places, expected)
    assert_rounded(y, expected, dtype)
    x[:, 0] = float("nan")
    bad = block_sparse_linear(x, matrix, bias, activation=activation, instruction_set=name)
    reached = replace(matrix, values=torch.ones_like(matrix.values)).to_dense()[:, 0].bool()
    assert torch.equal(bad.isnan(), reached.expand(tokens, 70))


@native
@pytest.mark.skipif(len(INSTRUCTION_SETS) < 2, reason="one instruction set")
def test_the_instruction_set_asked_for_is_used():
    """They take their sums in different orders."""
    matrix = random_matrix(64, 512, (16, 16), 1.0, torch.Generator().manual_seed(0))
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(*(block_sparse_linear(x, matrix, instruction_set=n) for n in INSTRUCTION_SETS))


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_shape", [(16, 16), (32, 1), (24, 20)])
def test_what_reaches_over_the_edge_is_ignored(block_shape, dtype):
    generator = torch.Generator().manual_seed(0)
    matrix = random_matrix(70, 33, block_shape, 0.6, generator, dtype)
    x = torch.randn(9, 33, generator=generator).to(dtype)
    expected = block_sparse_linear(x, matrix)
    inside = BlockSparseMatrix.from_dense(torch.ones(70, 33), torch.ones_like(grid_of(matrix)), block_shape)
    outside = inside.values[grid_of(matrix).flatten()] == 0
    assert bool(outside.any())
    matrix.values[outside] = float("nan")
    assert torch.equal(block_sparse_linear(x, matrix), expected)


def grid_of(matrix):
    """Which blocks are kept, bool ``(grid rows, grid columns)``."""
    grid = torch.zeros(grid_shape(matrix.shape, matrix.block_shape), dtype=torch.bool)
    return grid.index_put(matrix.places(), torch.tensor(True))


@native
@pytest.mark.parametrize("blocks", [1, 6])
def test_values_and_bias_of_any_strides(blocks):
    generator = torch.Generator().manual_seed(0)
    matrix = BlockSparseMatrix(
        torch.randn(2 * blocks, 16, 16, generator=generator)[::2],
        torch.tensor([0, blocks]).int(),
        torch.arange(blocks).int(),
        (16, 96),
    )
    x, wide = torch.randn(5, 96, generator=generator), torch.randn(32, generator=generator)
    loose = replace(matrix, values=matrix.values.mT.contiguous().mT)
    for matrix_given in (matrix, loose):
        for bias in (wide[::2], wide[:1].expand(16)):
            y = block_sparse_linear(x, matrix_given, bias)
            torch.testing.assert_close(y.double(), dense_result(x, matrix, bias), atol=1e-4, rtol=0)


@native
def test_rows_need_one_place_each():
    matrix = random_matrix(40, 24, (16, 16), 0.5, torch.Generator().manual_seed(0))
    for places in ({"row_indices": torch.arange(33), "scatter_size": 50}, {"scatter_size": 50}):
        with pytest.raises(
            RuntimeError, match="row_indices: expected 40 entries and scatter_size, or neither"
        ):
            block_sparse_linear(torch.zeros(2, 24), matrix, **places)


@native
def test_what_does_not_fit_the_matrix_is_refused():
    # 30 columns in blocks of 4: the operation itself would take 29 to 32 for as good.
    matrix = random_matrix(40, 30, (16, 4), 0.5, torch.Generator().manual_seed(0))
    for shape in ((2, 32), (2, 29), (30, 2), (0, 31), ()):
        with pytest.raises(RuntimeError, match=re.escape(f"x: expected (..., 30), got {shape}")):
            block_sparse_linear(torch.zeros(shape), matrix)
    for shape in ((41,), (2, 20), (40, 1)):
        with pytest.raises(
            RuntimeError, match=re.escape(f"bias: expected one entry for each of 40 rows, got {shape}")
        ):
            block_sparse_linear(torch.zeros(2, 30), matrix, torch.zeros(shape))
    layer = BlockSparseLinear(30, 40, (16, 4), len(matrix.values)).eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"x: expected \(..., 30\), got \(2, 32\)"):
        layer(torch.zeros(2, 32))


@native
@given(seed=st.integers(0, 99), places=st.integers(0, 40))
def test_rows_go_to_their_places_among_zeros(seed, places):
    generator = torch.Generator().manual_seed(seed)
    matrix = random_matrix(37, 20, (16, 4), 0.5, generator)
    row_indices = torch.randperm(37 + places, generator=generator)[:37].sort().values
    x, bias = torch.randn(11, 20, generator=generator), torch.randn(37, generator=generator)
    y = block_sparse_linear(x, matrix, bias, row_indices=row_indices, scatter_size=37 + places)
    expected = torch.zeros(11, 37 + places, dtype=torch.float64)
    expected[:, row_indices] = dense_result(x, matrix, bias)
    torch.testing.assert_close(y.double(), expected, atol=1e-4, rtol=0)


@native
def test_any_leading_dimensions_and_strides():
    generator = torch.Generator().manual_seed(0)
    matrix = random_matrix(40, 24, (16, 16), 0.5, generator)
    base = torch.randn(3, 5, 48, 7, generator=generator)
    for x in (
        base[:, :, :24, 0],  # columns apart
        base.permute(3, 1, 0, 2)[..., ::2],  # leading dimensions in no common stride
        base.transpose(2, 3)[1, 1, :, :24],
        base[0, 0, :24, 0],  # one dimension
        base[:1, :1, :24, 0].expand(4, 6, 24),  # strides of 0
    ):
        y = block_sparse_linear(x, matrix)
        torch.testing.assert_close(y.double(), dense_result(x, matrix, None), atol=1e-4, rtol=0)
        assert y.is_contiguous()


@st.composite
def strided(draw):
    """``(..., 24)`` with up to four leading dimensions: permuted, cut out of larger ones, or repeated."""
    sizes = [*draw(st.lists(st.sampled_from([1, 1, 2, 3]), max_size=4)), 24]
    order = draw(st.one_of(st.just(range(len(sizes))), st.permutations(range(len(sizes)))))
    kinds = [draw(st.sampled_from(["whole", "cut", "every second", "repeated"])) for _ in sizes]
    # Stored sizes, as a factor and a constant.
    stored = {"whole": (1, 0), "cut": (1, 2), "every second": (2, 0), "repeated": (0, 1)}
    factor, more = zip(*(stored[kind] for kind in kinds), strict=True)
    base = torch.randn([factor[d] * sizes[d] + more[d] for d in order])
    x = base.permute([order.index(d) for d in range(len(sizes))])
    for d, kind in enumerate(kinds):
        if kind == "cut":
            x = x.narrow(d, 1, sizes[d])
        elif kind == "every second":
            x = x[(slice(None),) * d + (slice(None, None, 2),)]
    return x.expand(sizes)


@native
@settings(max_examples=1000)
@given(x=strided())
def test_every_stride(x):
    matrix = random_matrix(40, 24, (16, 16), 0.5, torch.Generator().manual_seed(0))
    y = block_sparse_linear(x, matrix)
    torch.testing.assert_close(y.double(), dense_result(x, matrix, None), atol=1e-4, rtol=0)


@native
@pytest.mark.parametrize("block_shape", [(16, 16), (8, 8), (32, 1)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_spread_as_far_as_kept_blocks_do(bad, block_shape):
    matrix = random_matrix(64, 64, block_shape, 0.5, torch.Generator().manual_seed(1))
    keep = BlockSparseMatrix(
        torch.ones_like(matrix.values), matrix.crow_indices, matrix.col_indices, matrix.shape
    ).to_dense()
    column = int(keep.mean(dim=0).sub(0.5).abs().argmin())
    reached = keep[:, column].bool()
    assert 0 < int(reached.sum()) < 64
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(2))
    x[3, column] = bad
    y = block_sparse_linear(x, matrix)
    assert not bool(y[3, reached].isfinite().any())
    assert bool(y[3, ~reached].isfinite().all())
    assert bool(torch.cat([y[:3], y[4:]]).isfinite().all())


@native
def test_values_in_another_layout_give_the_same():
    matrix = random_matrix(48, 48, (16, 16), 0.5, torch.Generator().manual_seed(0))
    loose = BlockSparseMatrix(
        matrix.values.mT.contiguous().mT, matrix.crow_indices, matrix.col_indices, matrix.shape
    )
    x = torch.randn(5, 48)
    assert torch.equal(block_sparse_linear(x, matrix), block_sparse_linear(x, loose))


@native
@pytest.mark.parametrize("block_shape", [(16, 16), (64, 32), (16, 4), (32, 1), (16, 1)])
@pytest.mark.parametrize("density", [0.0, 1.0, 0.5])
def test_contiguous_blocks_are_not_copied(block_shape, density):
    matrix = random_matrix(64, 32, block_shape, density, torch.Generator().manual_seed(0))
    x, bias = torch.randn(3, 32), torch.randn(64)
    with torch.profiler.profile() as profile:
        block_sparse_linear(x, matrix, bias)
    assert [event.key for event in profile.key_averages()] == ["hf_mlprune::block_sparse_linear"]


@native
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_threads_do_not_change_the_result(name):
    matrix = random_matrix(300, 200, (16, 16), 0.4, torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        for tokens in (1, 7, 13, 16, 55, 100, 1000):
            x = torch.randn(tokens, 200)
            found = []
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                found.append(block_sparse_linear(x, matrix, instruction_set=name))
            assert all(torch.equal(found[0], other) for other in found), tokens
    finally:
        torch.set_num_threads(before)


@native
def test_calls_from_many_threads():
    matrix = random_matrix(96, 80, (16, 16), 0.4, torch.Generator().manual_seed(0))
    inputs = [torch.randn(tokens, 80) for tokens in (1, 17, 64, 333) * 2]
    expected = [block_sparse_linear(x, matrix) for x in inputs]
    wrong: list[int] = []

    def work(index):
        for _ in range(30):
            if not torch.equal(block_sparse_linear(inputs[index], matrix), expected[index]):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_no_layout_changes_under_an_optimizer(tmp_path):
    """A fused optimizer walks weight and moments side by side in memory."""
    pruned_model().half().save_pretrained(tmp_path)

    def trained(fused, look):
        student = PrunedBertForSequenceClassification.from_pretrained(tmp_path).float().train()
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, fused=fused)
        for step in range(6):
            student(**make_batch(seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if look and step % 2:
                student.eval()(**make_batch())
                student.train()
        return torch.cat([parameter.detach().flatten() for parameter in student.parameters()])

    expected = trained(fused=False, look=False)
    for fused, look in ((False, True), (True, False), (True, True)):
        torch.testing.assert_close(trained(fused, look), expected, rtol=0, atol=1e-3)


@native
def test_second_derivatives_are_those_of_the_dense_product():
    matrix = random_matrix(32, 32, (16, 16), 0.5, torch.Generator().manual_seed(0))
    dense = matrix.to_dense()
    x = torch.randn(32)
    found, expected = (
        torch.autograd.functional.hessian(lambda x, product=product: product(x).pow(3).sum(), x)
        for product in (lambda x: block_sparse_linear(x, matrix), lambda x: functional.linear(x, dense))
    )
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


TRANSFORMS = {
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1],
    "jacfwd": lambda layer, x: torch.func.jacfwd(layer)(x),
    "jacrev": lambda layer, x: torch.func.jacrev(layer)(x),
    "vmap": lambda layer, x: torch.func.vmap(layer)(x),
    "grad": lambda layer, x: torch.func.grad(lambda x: layer(x).square().sum())(x),
}


@native
@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*:DeprecationWarning"
)  # torch's own, about forward-mode rules
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_function_transforms_are_right(name, frozen):
    layer = BlockSparseLinear(32, 48, (16, 16), 4).eval().requires_grad_(not frozen)
    linear = partial(functional.linear, weight=layer.matrix().to_dense().detach(), bias=layer.bias)
    x = torch.randn(3, 32)
    torch.testing.assert_close(TRANSFORMS[name](layer, x), TRANSFORMS[name](linear, x))


@native
def test_the_operation_itself_refuses_transforms_and_warns_without_gradients():
    matrix = random_matrix(32, 32, (16, 16), 0.5, torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match=r"no torch\.func, no forward-mode differentiation; use torch\.nn"):
        torch.func.vmap(lambda x: block_sparse_linear(x, matrix))(torch.randn(3, 32))
    x = torch.randn(3, 32, requires_grad=True)
    parts = (matrix.values, matrix.crow_indices, matrix.col_indices, torch.zeros(32))
    y = torch.ops.hf_mlprune.block_sparse_linear(x, *parts)
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        y.sum().backward()


@native
def test_traced_layers_are_saved(tmp_path):
    layer = BlockSparseLinear(32, 48, (16, 16), 4).eval()
    x = torch.randn(3, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.trace(layer, (x,)).save(tmp_path / "layer.pt")
        loaded = torch.jit.load(tmp_path / "layer.pt")
    torch.testing.assert_close(loaded(x), layer(x))


@native
def test_layers_without_bias_and_of_made_up_weights():
    layer = BlockSparseLinear(32, 48, (16, 16), 4, bias=False).eval()
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), functional.linear(x, layer.matrix().to_dense()))
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", torch.nn.Hardtanh(-0.01, 0.01))
    with torch.no_grad():
        for scale in (1.0, 0.0):
            layer.parametrizations.weight.original.mul_(scale)
            torch.testing.assert_close(layer(x), functional.linear(x, layer.matrix().to_dense()))


@native
@pytest.mark.parametrize("shape", [(0, 32), (48, 0)])
def test_gradients_of_nothing(shape):
    rows, columns = shape
    matrix = BlockSparseMatrix.from_dense(
        torch.empty(shape), torch.zeros(grid_shape(shape, (16, 16))) > 0, (16, 16)
    )
    x = torch.randn(3, columns, requires_grad=True)
    block_sparse_linear(x, matrix, torch.zeros(rows, requires_grad=True)).sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, columns))


@native
@pytest.mark.parametrize("activation", ["none", *ACTIVATIONS])
def test_gradients_are_those_of_the_dense_product(activation):
    generator = torch.Generator().manual_seed(0)
    matrix = random_matrix(40, 24, (16, 16), 0.5, generator)
    places = torch.arange(0, 80, 2)
    leaves = [torch.randn(6, 24, generator=generator), matrix.values, torch.randn(40, generator=generator)]
    weight = torch.randn(6, 80, generator=generator)
    found = []
    for dense in (False, True):
        x, values, bias = (leaf.detach().clone().requires_grad_() for leaf in leaves)
        own = BlockSparseMatrix(values, matrix.crow_indices, matrix.col_indices, matrix.shape)
        if dense:
            rows = functional.linear(x, own.to_dense(), bias)
            rows = rows if activation == "none" else ACTIVATIONS[activation](rows)
            y = torch.zeros(6, 80).index_copy(1, places, rows)
        else:
            y = block_sparse_linear(x, own, bias, row_indices=places, scatter_size=80, activation=activation)
        (y * weight).sum().backward()
        found.append((x.grad, values.grad, bias.grad))
    for native_gradient, dense_gradient in zip(*found, strict=True):
        torch.testing.assert_close(native_gradient, dense_gradient, atol=1e-4, rtol=1e-5)


@native
def test_opcheck():
    matrix = random_matrix(40, 24, (16, 4), 0.5, torch.Generator().manual_seed(0))
    tensors = (matrix.values, matrix.crow_indices, matrix.col_indices)
    operation = torch.ops.hf_mlprune.block_sparse_linear
    for x in (torch.randn(3, 5, 24), torch.randn(0, 24)):
        torch.library.opcheck(operation.default, (x, *tensors, torch.randn(40), 1))
        torch.library.opcheck(operation.scattered, (x, *tensors, torch.randn(40), torch.arange(40) + 2, 50))


@native
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
def test_compiled_whole_and_exported_with_any_number_of_tokens(tmp_path):
    layer = BlockSparseLinear(24, 40, (16, 4), 9)
    model = torch.nn.Sequential(layer, torch.nn.GELU()).eval()
    assert not why_dense(layer)
    x = torch.randn(7, 24)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        tokens = torch.export.Dim("tokens", min=2, max=4096)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: tokens},), strict=False)
        assert "block_sparse_linear" in str(program.graph)
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        other = torch.randn(33, 24)
        torch.testing.assert_close(loaded(other), model(other))
    gradients = []
    for differentiable in (model, compiled):
        layer.zero_grad()
        differentiable(x).square().sum().backward()
        gradients.append(layer.weight.grad)
    torch.testing.assert_close(*gradients)


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


BOTH_IN_ONE_ROW = torch.tensor([0, 2, 2], dtype=torch.int32)


@native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"col_indices": torch.tensor([0, 9], dtype=torch.int32)}, "columns of the grid"),
        ({"col_indices": torch.tensor([0, -1], dtype=torch.int32)}, "columns of the grid"),
        ({"col_indices": torch.tensor([-(2**31), 0], dtype=torch.int32)}, "columns of the grid"),
        (
            {"crow_indices": BOTH_IN_ONE_ROW, "col_indices": torch.tensor([1, 0]).int()},
            "increasing within each row",
        ),
        (
            {"crow_indices": BOTH_IN_ONE_ROW, "col_indices": torch.tensor([1, 1]).int()},
            "increasing within each row",
        ),
        (
            {"crow_indices": BOTH_IN_ONE_ROW, "col_indices": torch.tensor([0, -(2**31)]).int()},
            "columns of the grid",
        ),
        ({"col_indices": torch.tensor([0], dtype=torch.int32)}, "one entry per block"),
        (
            {"values": torch.zeros(2, 16, 16, device="meta")},
            "expected all tensors on one device, got cpu, meta",
        ),
        ({"col_indices": torch.tensor([0, 1])}, "int32"),
        ({"crow_indices": torch.tensor([0, 1, 9], dtype=torch.int32)}, "0 to blocks"),
        ({"crow_indices": torch.tensor([1, 1, 2], dtype=torch.int32)}, "0 to blocks"),
        ({"crow_indices": torch.tensor([0, -5, 2], dtype=torch.int32)}, "do not end before they begin"),
        ({"crow_indices": torch.tensor([0, 9, 1, 9, 2, 9], dtype=torch.int32)[::2]}, "contiguous int32"),
        ({"col_indices": torch.tensor([0, 9, 1, 9], dtype=torch.int32)[::2]}, "contiguous int32"),
        ({"values": torch.empty(0, 1, 2**63 - 1), "crow_indices": torch.zeros(0).int()}, "sizes up to"),
        ({"x": torch.zeros(1).expand(2, 2**60)}, "sizes up to"),
        ({"x": torch.zeros(1).expand(2**20, 2**20, 32)}, "tokens"),
        ({"x": freed(torch.zeros(3, 32))}, "storage was freed"),
        ({"crow_indices": freed(torch.zeros(3).int())}, "storage was freed"),
        ({"bias": freed(torch.zeros(32))}, "storage was freed"),
        ({"crow_indices": torch.tensor([0, 2], dtype=torch.int32)}, "grid rows"),
        ({"values": torch.zeros(2, 16)}, "block columns, block rows"),
        ({"values": torch.zeros(2, 16, 16, dtype=torch.float64)}, "dtype of x"),
        ({"values": torch.zeros(2, 0, 16)}, "blocks of some size"),
        ({"x": torch.zeros(3, 32, dtype=torch.float64)}, "float32 or bfloat16"),
        ({"bias": torch.zeros(16)}, "grid rows"),
        ({"bias": torch.zeros(2, 16)}, r"bias: expected \(rows,\)"),
        ({"bias": torch.zeros(32, dtype=torch.bfloat16)}, r"bias: expected \(rows,\) of the dtype of x"),
        ({"row_indices": torch.full((32,), 99)}, "increasing places below scatter_size"),
        ({"row_indices": torch.arange(-1, 31)}, "increasing places below scatter_size"),
        ({"row_indices": torch.zeros(32).long()}, "increasing places below scatter_size"),
        ({"row_indices": torch.arange(64)[::2], "scatter_size": 64}, "contiguous int64"),
        ({"scatter_size": -1}, "scatter_size: expected 0 to"),
        ({"row_indices": torch.arange(32, dtype=torch.int32)}, "one place per row"),
        ({"row_indices": torch.arange(16)}, "one place per row"),
        ({"scatter_size": 31}, "increasing places below scatter_size"),
        ({"x": torch.zeros(3, 16)}, "columns of the grid"),
        ({"x": torch.zeros(())}, r"x: expected \(..., columns\)"),
        ({"activation": 4}, "activation: expected 0 to 3, got 4"),
        ({"instruction_set": 3}, "instruction_set: expected a processor that has it"),
    ],
)
def test_malformed_structures_never_reach_native_memory(change, message):
    arguments = {
        "x": torch.zeros(3, 32),
        "values": torch.zeros(2, 16, 16),
        "crow_indices": torch.tensor([0, 1, 2], dtype=torch.int32),
        "col_indices": torch.tensor([0, 1], dtype=torch.int32),
        "bias": torch.zeros(32),
        "row_indices": torch.arange(32),
        "scatter_size": 32,
        "activation": 0,
        "instruction_set": 0,
    }
    arguments |= change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hf_mlprune.block_sparse_linear.scattered(*arguments.values())
    if not change.keys() & {"row_indices", "scatter_size"}:
        del arguments["row_indices"], arguments["scatter_size"]
        with pytest.raises(RuntimeError, match=message):
            torch.ops.hf_mlprune.block_sparse_linear.default(*arguments.values())


def pruned_model(block_shape=(16, 16), **sizes):
    model = make_model(hidden_size=64, intermediate_size=96, **sizes)
    prune(model, PruningConfig.create(0.3, levels=LEVELS, structured_density=0.7, block_shape=block_shape))
    shrink(model)
    return model


@pytest.mark.parametrize(
    ("family", "activation", "expected"),
    [
        ("bert", "gelu", "gelu"),
        ("bert", "relu", "relu"),
        ("bert", "silu", "none"),
        # Half of its FC1 has an activation, and gates the other half.
        ("modernbert", "gelu", "gated_gelu"),
        ("modernbert", "relu", "none"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_activations_behind_blocks_are_applied_once(family, activation, expected, training, tmp_path):
    model = make_model(family=family, hidden_size=64, intermediate_size=96, hidden_act=activation)
    prune(model, PruningConfig.create(0.3, levels=LEVELS, structured_density=0.7, block_shape=(16, 16)))
    masked = model.train(training)(**make_batch()).logits.detach()
    shrink(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).train(training)
    for pruned in (model.train(training), loaded):
        every = [layer.linears["fc1"] for layer in inspect_encoder(pruned).layers]
        fused = {linear.activation for linear in every if isinstance(linear, BlockSparseLinear)}
        assert fused == {expected}
        for gradients in (torch.no_grad(), torch.enable_grad()):
            with gradients:
                torch.testing.assert_close(pruned(**make_batch()).logits, masked, atol=1e-5, rtol=0)
    # Pruned further, it stands behind the linear again.
    attach(loaded, PruningConfig.create(0.2))
    torch.testing.assert_close(loaded.train(training)(**make_batch()).logits, masked, atol=1e-5, rtol=0)


@native
def test_loaded_models_use_it_and_hold_no_dense_copy(tmp_path):
    model = pruned_model()
    expected = model.train()(**make_batch()).logits.detach()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    every = [module for module in loaded.modules() if isinstance(module, BlockSparseLinear)]
    layers = [layer for layer in every if not why_dense(layer)]
    assert explain(loaded)[f"native ({kernels.instruction_set()})"] == len(layers) > 4
    assert sum(explain(loaded).values()) == len(every)
    assert report(loaded).multiplied == explain(loaded)
    assert all(layer.weight.is_contiguous() for layer in layers)
    for gradients in (torch.no_grad(), torch.enable_grad()):
        with gradients:
            torch.testing.assert_close(loaded(**make_batch()).logits, expected, atol=1e-5, rtol=0)
    assert all(layer._dense is None for layer in layers)
    # Trained on and saved again, it is still the same kind of file.
    loaded.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(**make_batch()).logits, expected, atol=1e-5, rtol=0)


@native
def test_low_blocks_are_dense_and_say_why():
    layer = BlockSparseLinear(64, 64, (4, 16), 40).eval()
    assert "as blocks of 4 rows fill 16" in why_dense(layer)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), functional.linear(x, layer.matrix().to_dense(), layer.bias))


@native
def test_autocast_and_other_dtypes_are_dense_and_right():
    layer = BlockSparseLinear(64, 64, (16, 16), 6).eval()
    x = torch.randn(3, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    double = layer.double()
    expected = functional.linear(x.double(), double.matrix().to_dense(), double.bias)
    torch.testing.assert_close(double(x.double()), expected)
    assert "no torch.float64" in why_dense(double)


@native
def test_a_layer_is_native_again_once_its_dtype_allows_it():
    layer = BlockSparseLinear(64, 64, (16, 16), 6).eval()
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = layer(x)
        layer.double()(x.double())
        assert not why_dense(layer.float())
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
        halves = layer.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert halves.dtype is torch.bfloat16
    torch.testing.assert_close(halves.float(), expected, rtol=0.05, atol=0.05)


@native
def test_bfloat16_is_native_up_to_half_of_the_matrix():
    for blocks, served in ((8, True), (9, False)):
        layer = BlockSparseLinear(64, 64, (16, 16), blocks).eval().bfloat16()
        assert bool(why_dense(layer)) is not served
        x = torch.randn(3, 64).bfloat16()
        with torch.no_grad():
            expected = functional.linear(x, layer.matrix().to_dense(), layer.bias)
            torch.testing.assert_close(layer(x), expected, atol=1e-2, rtol=1e-2)
        assert (layer._dense is None) is served
    assert why_dense(layer) == (
        "0.56 of the matrix would be computed; 0.5 is the most that is faster in torch.bfloat16"
    )
    assert not why_dense(layer.float())


@native
def test_computed_weights_are_explained():
    layer = BlockSparseLinear(64, 64, (16, 16), 6).eval()
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", torch.nn.Identity())
    assert explain(layer) == {"dense: its weight or bias is computed from something else": 1}


@native
def test_the_dense_copy_goes_when_native_code_serves_again():
    layer = BlockSparseLinear(64, 64, (16, 16), 6).eval()
    x = torch.randn(3, 64)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        assert layer._dense is not None
        assert pickle.loads(pickle.dumps(layer))._dense is None
        layer(x)
    assert layer._dense is None


def test_weights_made_in_inference_mode():
    x = torch.randn(3, 64)
    with torch.inference_mode():
        for layer in (
            BlockSparseLinear(64, 64, (4, 16), 60).eval(),
            BlockSparseLinear(64, 64, (16, 16), 6).eval().double(),
        ):
            for scale in (1.0, 2.0):
                layer.weight.mul_(scale)
                given = x.to(layer.weight.dtype)
                expected = functional.linear(given, layer.matrix().to_dense(), layer.bias)
                torch.testing.assert_close(layer(given), expected)


def test_pickled_layers_run_where_nothing_is_native(monkeypatch):
    layer = BlockSparseLinear(64, 64, (16, 16), 6).eval()
    x = torch.randn(3, 64)
    expected, data = layer(x), pickle.dumps(layer)
    monkeypatch.setattr(BlockSparseLinear, "accelerator", None)
    torch.testing.assert_close(pickle.loads(data)(x), expected)


WITHOUT_COMPILER = """
import sys, torch, hf_mlprune
from hf_mlprune import kernels
from hf_mlprune.kernels import onnxruntime
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
(reason, count), = kernels.explain(model).items()
assert "native code was not built (CompileError" in reason and count > 0, reason
assert kernels.instruction_set() == ""
assert "onnxruntime_operator.so was not built (CompileError" in onnxruntime.WHY_NOT, onnxruntime.WHY_NOT
batch = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(**batch).logits, sys.argv[3])
"""


def test_without_a_compiler_it_builds_loads_and_is_right(tmp_path):
    """A real build of the source tree with no compiler on the path."""
    source = tmp_path / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(".*", "build", "*.so", "*.not_built.txt", "*.egg-info", "tmp_trainer"),
    )
    tools = tmp_path / "tools"
    tools.mkdir()
    environment = {**os.environ, "PATH": str(tools), "CC": "no-such-compiler", "CXX": "no-such-compiler"}
    environment.pop("PYTHONPATH", None)
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=source, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-2000:]
    for library in ("native", "onnxruntime_operator"):
        assert f"{library}.so left out: CompileError" in built.stderr
    model = pruned_model()
    batch = {name: value for name, value in make_batch().items() if name != "labels"}
    model.save_pretrained(tmp_path / "model")
    torch.save(batch, tmp_path / "batch.pt")
    files = [str(tmp_path / name) for name in ("model", "batch.pt", "out.pt")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER, *files],
        env={**os.environ, "PYTHONPATH": str(source / "src")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "block-sparse layers are multiplied as dense ones: native code was not built" in done.stderr
    with torch.no_grad():
        torch.testing.assert_close(
            torch.load(tmp_path / "out.pt"), model.eval()(**batch).logits, atol=1e-5, rtol=0
        )


def test_native_code_is_there_where_it_should_be():
    """A build that fails in silence must not turn this file into skips."""
    if sys.platform == "linux" and os.uname().machine == "x86_64" and shutil.which("g++"):
        assert not WHY_NOT


def test_public_names_stand_for_something():
    assert set(kernels.__all__) <= set(dir(hf_mlprune.kernels))
