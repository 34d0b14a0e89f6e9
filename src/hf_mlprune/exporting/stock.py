"""Pruned model -> a stock one of the same outputs, which transformers loads without our code."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..encoders import Encoder, EncoderLayer, check_plain, inspect_encoder
from ..families import head_of, plain_config
from ..modeling.block_sparse import BlockSparseLinear
from ..modeling.family import Head
from ..modeling.layout import HIDDEN, DenseLayer
from ..modeling.pretrained import PrunedMixin, encoder_layers
from ..modeling.pruned import FINGERPRINT
from ..proof import fixed_random_state
from ..reports.counting import report
from ..state import is_attached

#: The FFN width that all layers share is rounded up to a multiple of this: dense products of other widths are
#: slower, by more than the zeros that this adds.
FFN_MULTIPLE = 16
#: Attention code that every CPU has. What another kind asks for may not even be installed here.
CPU_ATTENTION = ("eager", "sdpa")


@dataclass(frozen=True)
class StockCost:
    """What a pruned model costs, and the stock model that was made of it.

    Attributes:
        parameters: of the pruned model, of the stock one, whose zeros are counted.
        bytes: of their tensors in a file.
        multiply_adds: of their encoders for one sequence of ``multiply_adds_length`` tokens.
        multiply_adds_length: tokens.
    """

    parameters: tuple[int, int]
    bytes: tuple[int, int]
    multiply_adds: tuple[int, int]
    multiply_adds_length: int

    @property
    def multiply_adds_share(self) -> float:
        """Of the multiply-adds of the stock encoder, those that the pruned one needs."""
        return self.multiply_adds[0] / self.multiply_adds[1]


def stock_cost(model: PreTrainedModel, stock: PreTrainedModel) -> StockCost:
    """Compare a pruned model with what :func:`stock_model` made of it."""
    pruned, dense = report(model), report(stock)
    return StockCost(
        parameters=(pruned.parameters[0], dense.parameters[0]),
        bytes=(_bytes(model), _bytes(stock)),
        multiply_adds=(pruned.multiply_adds[0], dense.multiply_adds[0]),
        multiply_adds_length=pruned.multiply_adds_length,
    )


def _bytes(model: nn.Module) -> int:
    # Tied ones are stored once.
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def stock_model(model: PreTrainedModel, *, smallest: bool) -> PreTrainedModel:
    """A stock model with the outputs of a pruned one, on the CPU, in evaluation mode, of the same dtype.

    Zeros stand for what was removed, as far as the stock class cannot be built without it. The pruned model
    stays as it is. A stock model is copied.

    Args:
        model: a whole pruned model of a known head.
        smallest: leave out FFN rows, and heads where the family's config can say the size of a head, that no
            layer needs. Otherwise the stock model has the sizes of the dense one, and every weight its old
            place.

    Raises:
        TypeError: the model has masks, or is no plain model of a known head.
        ValueError: outside of its layers, it has other tensors than the stock class.
    """
    head = _known_head(model)
    if type(model) is head.stock:
        return copy.deepcopy(model).cpu().eval()
    encoder = inspect_encoder(model)
    packed = _packed_groups(encoder) if smallest else ()
    chosen = [{group: _chosen(encoder, layer, group) for group in packed} for layer in encoder.layers]
    stock = _build(head, encoder, chosen)
    placed = _layer_tensors(stock, encoder, chosen)
    state = _other_tensors(model, stock, encoder) | placed
    expected = stock.state_dict().keys()
    if state.keys() != expected:
        missing, others = sorted(expected - state.keys()), sorted(state.keys() - expected)
        raise ValueError(
            f"expected the tensors of a {head.stock.__name__}, got a model without {missing[:3]} and with "
            f"{others[:3]} besides, whose config does not say so; save it as it is"
        )
    # As they are, each of its own dtype.
    stock.load_state_dict(state, assign=True)
    # Only what is equal: a model whose config ties weights may have been given others.
    stock.tie_weights(missing_keys=set())
    return stock.eval()


def _known_head(model: PreTrainedModel) -> Head:
    head, name = head_of(model), type(model).__name__
    if is_attached(model):
        raise TypeError(f"expected a pruned model, got {name} with masks: `shrink(model)` it first")
    inner = None if head is None else isinstance(model.base_model, PrunedMixin)
    if head is None or inner is not (type(model) is head.pruned):
        raise TypeError(
            f"expected a whole transformers model of a known head, pruned or stock, got {name}: transformers "
            "loads no other without code; save this one as it is, or put its weights into such a model"
        )
    check_plain(model)
    return head


def _packed_groups(encoder: Encoder) -> tuple[str, ...]:
    """Groups whose units the stock class can be built with fewer of, the same number in all layers.

    Rows of O and FC2 are places in the residual stream, which is as wide as the embeddings. Heads are as
    many as the width of the residual stream holds, unless the config says their size.
    """
    fields = encoder.family.config.config_fields
    return ("fc1",) if fields.head_size is None else ("fc1", "heads")


def _chosen(encoder: Encoder, layer: EncoderLayer, group: str) -> tuple[int, ...]:
    """Kept units of a group whose output is read, by their places among the kept ones.

    Where all blocks behind a unit are gone, it is not.
    """
    count = len(layer.structure.kept[group])
    is_read = torch.zeros(count, dtype=torch.bool)
    for name, matrix in encoder.dense.layout.matrices.items():
        if matrix.columns == group and name in layer.linears:
            columns = (_weight(layer.linears[name]) != 0).any(dim=0)
            is_read |= columns.view(count, -1).any(dim=1).cpu()
    return tuple(is_read.nonzero().flatten().tolist())


def _weight(linear: nn.Module) -> Tensor:
    """What is left of a matrix, zeros for its missing blocks."""
    if isinstance(linear, BlockSparseLinear):
        return linear.matrix().to_dense()
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight


def _build(head: Head, encoder: Encoder, chosen: Sequence[Mapping[str, Sequence[int]]]) -> PreTrainedModel:
    """A stock model, with random weights, wide enough for the chosen units of every layer."""
    family, sizes, old = encoder.family, encoder.dense.sizes, encoder.module
    fields = family.config.config_fields
    # A stock layer has one head and one row at least.
    widest = {group: max(1, *(len(layer[group]) for layer in chosen)) for group in chosen[0]}
    data = {**plain_config(old.config), "architectures": [head.stock.__name__]}
    if "fc1" in widest:
        rounded = -(-widest["fc1"] // FFN_MULTIPLE) * FFN_MULTIPLE
        data[fields.ffn_size] = min(rounded, sizes.ffn_size)
    if fields.head_size is not None and widest.get("heads", sizes.num_heads) < sizes.num_heads:
        data |= {fields.num_heads: widest["heads"], fields.head_size: sizes.head_size}
    config = family.stock_config.from_dict(data)
    if old.config._attn_implementation in CPU_ATTENTION:
        config._attn_implementation = old.config._attn_implementation
    cpu = torch.device("cpu")
    with cpu, fixed_random_state(cpu):
        stock = head.stock(config)
    if getattr(old, "pooler", old) is None:
        # Whoever loaded it left it out; most heads do.
        stock.base_model.pooler = None
    return stock


def _layer_tensors(
    stock: PreTrainedModel, encoder: Encoder, chosen: Sequence[Mapping[str, Sequence[int]]]
) -> dict[str, Tensor]:
    """Tensors of the prunable linears of a stock model, by their names in it: what is left, among zeros."""
    found: dict[str, Tensor] = {}
    wide = encoder.family.config.dense_layer(stock.config)
    new_layers = encoder_layers(stock.get_submodule(encoder.path), wide.layout)
    for index, (new_layer, layer) in enumerate(zip(new_layers, encoder.layers, strict=True)):
        for name, matrix in wide.layout.matrices.items():
            new = new_layer.get_submodule(matrix.path)
            tensors = {
                kind: torch.zeros(parameter.shape, dtype=encoder.module.dtype)
                for kind, parameter in new.named_parameters()
            }
            if layer.structure.kept[matrix.rows]:
                old = layer.module.get_submodule(matrix.path)
                parts = len(wide.parts(name))
                from_rows, to_rows = _places(layer, wide, matrix.rows, chosen[index], parts)
                from_columns, to_columns = _places(layer, wide, matrix.columns, chosen[index], 1)
                weight = _weight(old).detach().cpu()
                tensors["weight"][to_rows[:, None], to_columns] = weight[from_rows[:, None], from_columns]
                if "bias" in tensors:
                    tensors["bias"][to_rows] = old.get_parameter("bias").detach().cpu()[from_rows]
            found |= {f"{_prefix(encoder, index)}{matrix.path}.{kind}": x for kind, x in tensors.items()}
    return found


def _places(
    layer: EncoderLayer, wide: DenseLayer, group: str, chosen: Mapping[str, Sequence[int]], parts: int
) -> tuple[Tensor, Tensor]:
    """Rows, or columns, of a group in a matrix of a pruned layer, and their places in that of a stock one.

    Args:
        layer: of the pruned model.
        wide: a layer of the stock model.
        group: whose rows they are, or :data:`HIDDEN`.
        chosen: units of packed groups, by their places among the kept ones.
        parts: row ranges of the matrix, in each of which a unit owns rows.

    Returns:
        Two int64 tensors of the same length.
    """
    if group == HIDDEN:
        all_of_them = torch.arange(wide.sizes.hidden_size)
        return all_of_them, all_of_them
    kept = layer.structure.kept[group]
    source = chosen.get(group, range(len(kept)))
    target = range(len(source)) if group in chosen else kept
    span = wide.span(group)
    return _rows(source, len(kept), span, parts), _rows(target, wide.units[group], span, parts)


def _rows(units: Sequence[int], count: int, span: int, parts: int) -> Tensor:
    """Rows that some of ``count`` units own in a matrix, ``span`` of them in each of its parts."""
    own = torch.tensor(units, dtype=torch.int64)[:, None] * span + torch.arange(span)
    return (torch.arange(parts)[:, None] * (count * span) + own.flatten()).flatten()


def _other_tensors(model: PreTrainedModel, stock: PreTrainedModel, encoder: Encoder) -> dict[str, Tensor]:
    """Copies of a pruned model's tensors that are not of its prunable linears."""
    linears: list[str] = []
    gone: list[str] = []
    for index, layer in enumerate(encoder.layers):
        layout, prefix = encoder.dense.layout, _prefix(encoder, index)
        linears += [f"{prefix}{matrix.path}." for matrix in layout.matrices.values()]
        if not layer.structure.kept["heads"]:
            gone.append(f"{prefix}{layout.attention}.")
    # Rotary frequencies that some versions of transformers keep there: as the class makes them.
    made = {name: x for name, x in stock.state_dict().items() if name.startswith(tuple(gone))}
    carried = {
        name: x.detach().to("cpu", copy=True)
        for name, x in model.state_dict().items()
        if not name.startswith(tuple(linears)) and not name.endswith(FINGERPRINT)
    }
    return made | carried


def _prefix(encoder: Encoder, index: int) -> str:
    """What the names of a layer's tensors begin with in the whole model."""
    return ".".join((*filter(None, [encoder.path]), encoder.dense.layout.layers, str(index), ""))
