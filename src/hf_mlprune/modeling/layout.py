"""An encoder layer as data: its matrices, where they lie, and which units own their rows and columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor, nn

Number = TypeVar("Number", int, Tensor)

#: Groups of units in each layer. A unit of the first is a head; of the others, a row.
GROUPS = ("heads", "attention_output", "fc1", "fc2")
#: Those whose rows are places in the residual stream: removed ones are written as zeros.
RESIDUAL = ("attention_output", "fc2")
#: Columns that read the residual stream, which is not pruned.
HIDDEN = "hidden"
#: Parts of which attention scores are made. A head's context is decided by its value alone.
SCORING = ("query", "key", "position_query", "position_key")


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of one dense encoder layer: the ranges that kept indices are counted in.

    Attributes:
        hidden_size: D, width of the residual stream.
        num_heads: H.
        head_size: d; the attention width is ``A = H * d``.
        ffn_size: F, units of FC1.
    """

    hidden_size: int
    num_heads: int
    head_size: int
    ffn_size: int


@dataclass(frozen=True)
class Matrix:
    """One prunable linear of a layer.

    Attributes:
        path: of the linear, from the layer.
        rows: the group of :data:`GROUPS` whose units own its rows.
        columns: the group whose units own its columns, or :data:`HIDDEN`.
        parts: names of the equal row ranges that are fused in it, in their order; a unit owns rows of each.
            Without any, the matrix is one part, named as in :attr:`Layout.matrices`.
    """

    path: str
    rows: str
    columns: str = HIDDEN
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """Where the encoders of one family keep what is pruned.

    Attributes:
        layers: path of the list of layers, from the encoder.
        embeddings: path of what computes the first hidden states, from the encoder.
        attention: path of what computes the heads, from a layer; it is replaced where no head is left.
        matrices: the prunable linears of a layer by name, in the order of the forward pass.
        activation: path of what is applied to FC1, from a layer; ``None`` for a function of the forward pass.
        followers: group of :data:`RESIDUAL` -> path of the module right behind its matrix, from a layer. Kept
            rows are written to their places there; without one, behind the module that holds the linear and
            that puts out, alone or first, what the linear gave it, dropped out at most.
        head_counts: attribute of the attention -> what it holds: ``"heads"``, their number, or ``"width"``,
            of all of them together.
        select_heads: is told which heads an attention keeps, for families in which it reads something that
            has an entry for every dense head.
    """

    layers: str
    embeddings: str
    attention: str
    matrices: Mapping[str, Matrix]
    activation: str | None = None
    followers: Mapping[str, str] = field(default_factory=dict)
    head_counts: Mapping[str, str] = field(
        default_factory=lambda: {"num_attention_heads": "heads", "all_head_size": "width"}
    )
    select_heads: Callable[[nn.Module, tuple[int, ...]], None] | None = None

    def names(self, group: str) -> tuple[str, ...]:
        """Matrices whose rows belong to a group."""
        return tuple(name for name, matrix in self.matrices.items() if matrix.rows == group)

    def is_gated(self) -> bool:
        """Whether a unit of FC1 is a product of several rows."""
        return sum(max(1, len(self.matrices[name].parts)) for name in self.names("fc1")) > 1


#: Of BERT and the families that took over its code.
BERT_LAYOUT = Layout(
    layers="encoder.layer",
    embeddings="embeddings",
    attention="attention.self",
    matrices={
        "query": Matrix("attention.self.query", rows="heads"),
        "key": Matrix("attention.self.key", rows="heads"),
        "value": Matrix("attention.self.value", rows="heads"),
        "attention_output": Matrix("attention.output.dense", rows="attention_output", columns="heads"),
        "fc1": Matrix("intermediate.dense", rows="fc1"),
        "fc2": Matrix("output.dense", rows="fc2", columns="fc1"),
    },
    activation="intermediate.intermediate_act_fn",
    followers={"attention_output": "attention.output.dropout", "fc2": "output.dropout"},
)


#: Of ViT and DeiT. No module of their own stands behind O or FC2.
VIT_LAYOUT = Layout(
    layers="layers",
    embeddings="embeddings",
    attention="attention",
    matrices={
        "query": Matrix("attention.q_proj", rows="heads"),
        "key": Matrix("attention.k_proj", rows="heads"),
        "value": Matrix("attention.v_proj", rows="heads"),
        "attention_output": Matrix("attention.o_proj", rows="attention_output", columns="heads"),
        "fc1": Matrix("mlp.fc1", rows="fc1"),
        "fc2": Matrix("mlp.fc2", rows="fc2", columns="fc1"),
    },
    activation="mlp.activation_fn",
    head_counts={"num_attention_heads": "heads"},
)
#: The same in transformers 5.0.
VIT_5_0_LAYOUT = dataclasses.replace(
    BERT_LAYOUT,
    attention="attention.attention",
    matrices={
        name: dataclasses.replace(matrix, path=matrix.path.replace("attention.self", "attention.attention"))
        for name, matrix in BERT_LAYOUT.matrices.items()
    },
)


@dataclass(frozen=True)
class DenseLayer:
    """One dense layer: its layout with its sizes. All shapes and weights are computed here.

    Widths of groups are numbers of units: whole numbers, or tensors of any numbers (for derivatives).
    """

    layout: Layout
    sizes: LayerSizes

    @property
    def units(self) -> dict[str, int]:
        """Units of each group."""
        hidden = self.sizes.hidden_size
        counts = (self.sizes.num_heads, hidden, self.sizes.ffn_size, hidden)
        return dict(zip(GROUPS, counts, strict=True))

    def span(self, group: str) -> int:
        """Rows, or columns, that one unit of a group owns in each part of a matrix."""
        return self.sizes.head_size if group == "heads" else 1

    def parts(self, name: str) -> tuple[str, ...]:
        """Names of the row ranges of a matrix."""
        return self.layout.matrices[name].parts or (name,)

    def shape(self, name: str, widths: Mapping[str, Number]) -> tuple[Number, Number]:
        """``(rows, columns)`` of a matrix at these widths."""
        matrix = self.layout.matrices[name]
        rows = widths[matrix.rows] * (self.span(matrix.rows) * len(self.parts(name)))
        if matrix.columns == HIDDEN:
            # Of the type of the widths.
            return rows, widths[matrix.rows] * 0 + self.sizes.hidden_size
        return rows, widths[matrix.columns] * self.span(matrix.columns)

    def weights(self, widths: Mapping[str, Number]) -> Number:
        """Weights of a layer at these widths: the sum over its matrices of rows · columns.

        For a BERT, with ``a·H``, ``o·D``, ``f·F`` and ``g·D`` for the widths, ``3·a·A·D + o·D·a·A + f·F·D +
        g·D·f·F``: the numerator of the paper's remaining ratio for heads and rows. For BERT-base, its sum
        over 144 D² (reference code).
        """
        products = [rows * columns for rows, columns in (self.shape(n, widths) for n in self.layout.matrices)]
        total = products[0]
        for product in products[1:]:
            total = total + product
        return total

    def unit_weights(self, group: str, widths: Mapping[str, int]) -> int:
        """Weights that one unit of a group takes, rows and columns, at these widths."""
        total = 0
        for name, matrix in self.layout.matrices.items():
            rows, columns = self.shape(name, widths)
            if matrix.rows == group:
                total += self.span(group) * len(self.parts(name)) * columns
            if matrix.columns == group:
                total += self.span(group) * rows
        return total
