"""Block-sparse layers as engines without our kernel can hold them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.onnxruntime import DOMAIN, OPERATOR
from ..kernels.operation import ACTIVATION_NUMBERS
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


class OperatorBlocks(nn.Module):
    """A block-sparse layer as a node of our own operator in an ONNX graph. It computes nothing in torch.

    Args:
        layer: the layer; its values are copied.
    """

    weight: Tensor
    bias: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    row_indices: Tensor

    def __init__(self, layer: BlockSparseLinear) -> None:
        super().__init__()
        self.size = layer.out_features if layer.scatter_size is None else layer.scatter_size
        self.attributes: dict[str, Any] = {
            "activation": ACTIVATION_NUMBERS[layer.activation],
            "scatter_size": layer.scatter_size or 0,
        }
        bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach().clone()
        self.register_buffer("weight", layer.weight.detach().clone())
        self.register_buffer("bias", bias)
        for name in ("crow_indices", "col_indices", "row_indices"):
            self.register_buffer(name, getattr(layer, name))

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        inputs = [x, self.weight, self.crow_indices, self.col_indices, self.bias]
        if self.row_indices is not None:
            inputs.append(self.row_indices)
        y: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OPERATOR}",
            inputs,
            attrs=self.attributes,
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.size),
            version=1,
        )
        return y


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
