"""Block-sparse layers as engines without our kernel can hold them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..modeling.block_sparse import ACTIVATIONS, BlockSparseLinear, scatter_rows


class DenseBlocks(nn.Module):
    """A block-sparse layer multiplied as the dense one, with zeros for the blocks that are gone.

    Args:
        layer: the layer; its values are copied.
    """

    row_indices: Tensor

    def __init__(self, layer: BlockSparseLinear) -> None:
        super().__init__()
        rows, columns = layer.out_features, layer.in_features
        self.linear = nn.Linear(columns, rows, bias=layer.bias is not None)
        with torch.no_grad():
            self.linear.weight.copy_(layer.matrix().to_dense())
            if layer.bias is not None:
                self.linear.bias.copy_(layer.bias)
        self.activation = layer.activation
        self.scatter_size = layer.scatter_size
        self.register_buffer("row_indices", layer.row_indices)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``, or ``(..., scatter_size)``."""
        y: Tensor = self.linear(x)
        if self.activation != "none":
            y = ACTIVATIONS[self.activation](y)
        return y if self.scatter_size is None else scatter_rows(y, self.row_indices, self.scatter_size)


def blocks_of(module: nn.Module) -> list[BlockSparseLinear]:
    """Its layers that store blocks."""
    return [part for part in module.modules() if isinstance(part, BlockSparseLinear) and len(part.weight)]


def replace_blocks(module: nn.Module, make: Callable[[BlockSparseLinear], nn.Module]) -> None:
    """Put another module in the place of every block-sparse layer, in place.

    A layer that lost all its blocks becomes its bias, so that no empty matrix is in an export.
    """
    for path, layer in list(module.named_modules()):
        if isinstance(layer, BlockSparseLinear):
            new = make(layer) if len(layer.weight) else NoBlocks(layer)
            module.set_submodule(path, new.train(layer.training))


class NoBlocks(nn.Module):
    """A layer that lost all its blocks: its bias at every token."""

    output: Tensor

    def __init__(self, layer: BlockSparseLinear) -> None:
        super().__init__()
        with torch.no_grad():
            # The same for every input.
            output = layer(torch.zeros(1, layer.in_features))[0]
        self.register_buffer("output", output.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """``(..., any)`` to ``(..., features)``."""
        return self.output.expand(*x.shape[:-1], len(self.output))
