"""Block-sparse matrices against dense ones."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_mlprune.modeling.block_sparse import BlockSparseLinear, BlockSparseMatrix
from hf_mlprune.modeling.structure import format_ranges, grid_shape, parse_ranges

sides = st.integers(1, 20)


@st.composite
def matrices(draw):
    shape = draw(st.tuples(sides, sides))
    block = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dense = torch.randn(shape, generator=generator, dtype=torch.float64)
    keep = torch.rand(grid_shape(shape, block), generator=generator) < draw(st.floats(0, 1))
    return dense, keep, block


def masked(dense, keep, block):
    return (
        dense
        * keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[
            : dense.shape[0], : dense.shape[1]
        ]
    )


@given(matrices())
def test_there_and_back(case):
    dense, keep, block = case
    matrix = BlockSparseMatrix.from_dense(dense, keep, block)
    matrix.validate()
    assert torch.equal(matrix.to_dense(), masked(dense, keep, block))
    assert len(matrix.values) == int(keep.sum())


@given(matrices(), st.integers(0, 3))
def test_linear_and_its_gradient_are_the_dense_ones(case, rows):
    dense, keep, block = case
    layer = BlockSparseLinear(dense.shape[1], dense.shape[0], block, int(keep.sum())).double()
    layer.set_matrix(BlockSparseMatrix.from_dense(dense, keep, block))
    weight = masked(dense, keep, block).requires_grad_()
    x = torch.randn(rows, 2, dense.shape[1], dtype=torch.float64)
    y, expected = layer(x), torch.nn.functional.linear(x, weight, layer.bias)
    torch.testing.assert_close(y, expected)
    if not len(layer.weight):
        assert not dict(layer.named_parameters()).keys() - {"bias"}
        return
    y.sum().backward()
    expected.sum().backward()
    found = BlockSparseMatrix(layer.weight.grad, layer.crow_indices, layer.col_indices, dense.shape)
    torch.testing.assert_close(found.to_dense(), masked(weight.grad, keep, block))


def example() -> BlockSparseLinear:
    keep = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.bool)
    layer = BlockSparseLinear(12, 8, (4, 4), 4)
    layer.set_matrix(BlockSparseMatrix.from_dense(torch.randn(8, 12), keep, (4, 4)))
    return layer.eval()


def test_inference_follows_every_change_of_the_weights():
    layer, x = example(), torch.randn(3, 12)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(first, layer(x))
        layer.weight.mul_(2)
        assert not torch.allclose(first, layer(x))
        layer.load_state_dict(example().state_dict())
        other = copy.deepcopy(layer)
        torch.testing.assert_close(layer(x), other(x))
        layer.double()
        assert layer(x.double()).dtype is torch.float64


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("crow_indices", [0, 2], "crow_indices: expected 3 entries, got 2"),
        ("crow_indices", [0, 3, 2], "crow_indices: expected increasing values from 0 to 4"),
        ("crow_indices", [1, 2, 4], "crow_indices: expected increasing values from 0 to 4"),
        ("crow_indices", [0, -2, 4], "crow_indices: expected increasing values from 0 to 4"),
        ("col_indices", [0, 2, 1], "col_indices: expected 4 entries, got 3"),
        ("col_indices", [0, 3, 1, 2], "col_indices: expected values from 0 to 2"),
        ("col_indices", [-1, 2, 1, 2], "col_indices: expected values from 0 to 2"),
        ("col_indices", [2, 0, 1, 2], "col_indices: expected increasing values within each grid row"),
        ("col_indices", [0, 0, 1, 2], "col_indices: expected increasing values within each grid row"),
    ],
)
def test_malformed_indices_are_refused(name, value, message):
    matrix = example().matrix()
    fields = {**vars(matrix), name: torch.tensor(value, dtype=torch.int32)}
    with pytest.raises(ValueError, match=message):
        BlockSparseMatrix(**fields).validate()


@given(st.sets(st.integers(0, 60)))
def test_ranges_there_and_back(indices):
    ordered = tuple(sorted(indices))
    assert parse_ranges("x", format_ranges(ordered), 61) == ordered


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (3, "expected ranges such as '0-3,7', got int"),
        ("1,,2", "expected ranges"),
        ("-1", "expected ranges"),
        ("1-", "expected ranges"),
        ("٣", "expected ranges"),
        ("0-10", "expected indices below 10"),
        ("5-4", "expected increasing indices"),
        ("1,1", "expected increasing indices"),
        ("0-99999999999999999999", "expected indices below 10"),
    ],
)
def test_malformed_ranges_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_ranges("x", text, 10)
