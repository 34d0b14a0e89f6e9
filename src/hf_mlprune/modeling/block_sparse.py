"""A matrix of which only some blocks are stored, and the linear layer over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from .structure import grid_shape


@dataclass(frozen=True)
class BlockSparseMatrix:
    """Block-compressed sparse row (BSR) matrix.

    Attributes:
        values: kept blocks, row by row, each transposed: ``(blocks, block columns, block rows)``. So
            the rows of one column are consecutive in memory, as `hf_mlprune.kernels` reads them. Where
            a block reaches over the matrix's edge, the part outside is ignored.
        crow_indices: ``(grid rows + 1,)``; blocks of grid row ``r`` are
            ``values[crow_indices[r]:crow_indices[r + 1]]``.
        col_indices: grid column of each block, ``(blocks,)``, increasing within a grid row.
        shape: ``(rows, columns)`` of the matrix.
    """

    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    shape: tuple[int, int]

    @classmethod
    def from_dense(cls, dense: Tensor, keep: Tensor, block_shape: tuple[int, int]) -> BlockSparseMatrix:
        """Take the kept blocks out of a dense matrix.

        Args:
            dense: ``(rows, columns)``.
            keep: bool, ``(grid rows, grid columns)``; True = stays.
            block_shape: ``(rows, columns)`` of a block.

        Raises:
            ValueError: ``keep`` does not have the shape of the grid.
        """
        rows, columns = dense.shape
        grid = grid_shape((rows, columns), block_shape)
        if tuple(keep.shape) != grid:
            raise ValueError(f"keep: expected the grid shape {grid}, got {tuple(keep.shape)}")
        kept_per_row = keep.sum(dim=1)
        return cls(
            values=split_blocks(dense, block_shape)[keep].transpose(1, 2).contiguous(),
            crow_indices=functional.pad(kept_per_row.cumsum(0), (1, 0)).to(torch.int32),
            col_indices=keep.nonzero()[:, 1].to(torch.int32),
            shape=(rows, columns),
        )

    def validate(self) -> None:
        """Check every index.

        Raises:
            ValueError: what was expected of which field, and what it holds.
        """
        blocks = len(self.values)
        grid = grid_shape(self.shape, self.block_shape)
        crow, col = self.crow_indices.long().cpu(), self.col_indices.long().cpu()
        if tuple(crow.shape) != (grid[0] + 1,):
            raise ValueError(f"crow_indices: expected {grid[0] + 1} entries, got {len(crow)}")
        if tuple(col.shape) != (blocks,):
            raise ValueError(f"col_indices: expected {blocks} entries, got {len(col)}")
        if crow[0] != 0 or crow[-1] != blocks or bool((crow.diff() < 0).any()):
            raise ValueError(f"crow_indices: expected increasing values from 0 to {blocks}")
        if blocks and not bool(((col >= 0) & (col < grid[1])).all()):
            raise ValueError(f"col_indices: expected values from 0 to {grid[1] - 1}")
        row = torch.repeat_interleave(torch.arange(grid[0]), crow.diff())
        if bool(((row * grid[1] + col).diff() <= 0).any()):
            raise ValueError("col_indices: expected increasing values within each grid row")

    @property
    def block_shape(self) -> tuple[int, int]:
        """``(rows, columns)`` of a block."""
        return self.values.shape[2], self.values.shape[1]

    def places(self) -> tuple[Tensor, Tensor]:
        """Grid row and grid column of each block, int64 ``(blocks,)`` each."""
        # How many rows have begun before each block. Not `repeat_interleave`, nor `searchsorted`: ONNX has
        # neither.
        begins = self.crow_indices[1:-1].long()
        begun = begins.new_zeros(len(self.values) + 1).scatter_add(0, begins, torch.ones_like(begins))
        return begun.cumsum(0)[:-1], self.col_indices.long()

    def to_dense(self) -> Tensor:
        """The matrix with zeros for the blocks that are not stored, ``(rows, columns)``."""
        block_shape = self.block_shape
        grid = grid_shape(self.shape, block_shape)
        blocks = self.values.new_zeros(*grid, *block_shape).index_put(
            self.places(), self.values.transpose(1, 2)
        )
        padded = blocks.transpose(1, 2).reshape(grid[0] * block_shape[0], grid[1] * block_shape[1])
        return padded[: self.shape[0], : self.shape[1]]


def split_blocks(dense: Tensor, block_shape: tuple[int, int]) -> Tensor:
    """All blocks of a matrix: ``(grid rows, grid columns, *block_shape)``; zeros past the edge."""
    rows, columns = dense.shape
    (grid_rows, grid_columns), (height, width) = grid_shape((rows, columns), block_shape), block_shape
    padded = functional.pad(dense, (0, grid_columns * width - columns, 0, grid_rows * height - rows))
    return padded.view(grid_rows, height, grid_columns, width).transpose(1, 2)


def gated_gelu(y: Tensor) -> Tensor:
    """A gelu of the first half of the features, which the second half is to gate."""
    first, gate = y.chunk(2, dim=-1)
    return torch.cat([functional.gelu(first), gate], dim=-1)


#: What a layer may apply to its output.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "gated_gelu": gated_gelu,
}


class Accelerator(Protocol):
    """A faster product than that with the dense matrix."""

    def prepare(self, linear: BlockSparseLinear) -> tuple[torch.dtype, ...]:
        """Called when a layer is put into a mode.

        Returns:
            Dtypes that :meth:`multiply` serves for this layer; it is not asked where there are none.
        """

    def multiply(self, linear: BlockSparseLinear, x: Tensor) -> Tensor | None:
        """The output of a layer in evaluation mode, activated, or ``None`` to have it computed here."""


class BlockSparseLinear(nn.Module):
    """``y = act(x W^T + b)`` with a block-sparse W, multiplied as a dense matrix where nothing faster serves.

    The blocks are stored under the key ``weight`` as a 3-D tensor (:attr:`BlockSparseMatrix.values`), so
    that a stock model that is pointed at the checkpoint raises a size mismatch instead of re-initialising
    the layer.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        block_shape: ``(rows, columns)`` of a block.
        blocks: number of stored blocks.
        bias: whether there is a bias, ``(out_features,)``.
        scatter: if given, the place of each row of W in an output of ``scatter_size`` features, increasing;
            the other output features are zero.
        scatter_size: see ``scatter``.

    Attributes:
        activation: ``"none"``, or a key of :data:`ACTIVATIONS`.
    """

    #: One slot, which `hf_mlprune.kernels` fills; empty where a checkpoint's own code runs.
    accelerator: ClassVar[Accelerator | None] = None

    weight: Tensor
    bias: nn.Parameter | None
    crow_indices: Tensor
    col_indices: Tensor
    row_indices: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block_shape: tuple[int, int],
        blocks: int,
        *,
        bias: bool = True,
        scatter: tuple[int, ...] | None = None,
        scatter_size: int | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.block_shape = block_shape
        self.rows = scatter
        self.scatter_size = scatter_size
        self.activation = "none"
        values = torch.empty(blocks, block_shape[1], block_shape[0]).normal_(std=0.02)
        if blocks:
            self.weight = nn.Parameter(values)
        else:
            # Nothing to train, and a parameter without elements is more than most tools expect.
            self.register_buffer("weight", values)
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)
        crow, col = self.any_layout()
        self.register_buffer("crow_indices", crow)
        self.register_buffer("col_indices", col)
        # In no checkpoint: the structure in config.json says it.
        places = None if scatter is None else row_places(scatter)
        self.register_buffer("row_indices", places, persistent=False)
        self._accelerated: tuple[torch.dtype, ...] = ()
        self._dense: tuple[Tensor, int, Tensor] | None = None

    def any_layout(self) -> tuple[Tensor, Tensor]:
        """Valid crow and col indices of so many blocks; a checkpoint or `set_matrix` brings the real ones."""
        rows, columns = grid_shape((self.out_features, self.in_features), self.block_shape)
        blocks = len(self.weight)
        crow = (torch.arange(rows + 1, dtype=torch.int32) * columns).clamp(max=blocks)
        return crow, torch.arange(blocks, dtype=torch.int32) % max(columns, 1)

    @torch.no_grad()
    def set_matrix(self, matrix: BlockSparseMatrix) -> None:
        """Take over a matrix of this layer's shape and number of blocks."""
        self.weight.copy_(matrix.values)
        self.crow_indices.copy_(matrix.crow_indices)
        self.col_indices.copy_(matrix.col_indices)

    def matrix(self) -> BlockSparseMatrix:
        """The layer's weight as a matrix; shares the layer's memory."""
        return BlockSparseMatrix(
            self.weight, self.crow_indices, self.col_indices, (self.out_features, self.in_features)
        )

    def train(self, mode: bool = True) -> BlockSparseLinear:
        """Also forgets the dense copy that inference keeps.

        Writes to the weight are noticed, except those past autograd (``weight.data``): call this after.
        """
        self._dense = None
        super().train(mode)
        self._prepare()
        return self

    def _prepare(self) -> None:
        self._accelerated = () if self.accelerator is None else self.accelerator.prepare(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dense": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # Copied to a process that may have another accelerator, or none.
        self._prepare()

    def _dense_weight(self) -> Tensor:
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.matrix().to_dense()
        weight = self.weight
        # Writes to an inference tensor are not counted.
        if weight.is_inference():
            return self.matrix().to_dense()
        if self._dense is not None:
            made_from, version, dense = self._dense
            same_kind = dense.dtype is weight.dtype and dense.device == weight.device
            if made_from is weight and version == weight._version and same_kind:
                return dense
        dense = self.matrix().to_dense()
        self._dense = (weight, weight._version, dense)
        return dense

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``, or ``(..., scatter_size)``."""
        if self._accelerated and self.accelerator is not None and not self.training:
            y = self.accelerator.multiply(self, x)
            if y is not None:
                if self._dense is not None:
                    self._dense = None
                return y
        if len(self.weight):
            y = functional.linear(x, self._dense_weight(), self.bias)
        else:
            bias = x.new_zeros(self.out_features) if self.bias is None else self.bias
            y = bias.expand(*x.shape[:-1], -1)
        if self.activation != "none":
            y = ACTIVATIONS[self.activation](y)
        if self.scatter_size is None:
            return y
        return scatter_rows(y, self.row_indices, self.scatter_size)

    def extra_repr(self) -> str:
        """Shapes, for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"block_shape={self.block_shape}, blocks={len(self.weight)}, "
            f"bias={self.bias is not None}, scatter_size={self.scatter_size}, activation={self.activation}"
        )


def row_places(rows: tuple[int, ...]) -> Tensor:
    """Places of kept rows as the index that :func:`scatter_rows` takes, int64."""
    return torch.tensor(rows, dtype=torch.int64)


def scatter_rows(y: Tensor, row_indices: Tensor, size: int) -> Tensor:
    """Write kept output features to their places among zeros: ``(..., rows)`` to ``(..., size)``."""
    # Not `index_copy`, which walks its index once per token and takes far longer.
    return y.new_zeros(*y.shape[:-1], size).scatter(-1, row_indices.expand_as(y), y)
