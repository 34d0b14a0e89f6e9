"""The state of a pruning run, as a module of the encoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .budgets import BUDGETS, Budget, Sizes
from .config import PruningConfig
from .encoders import Encoder
from .families import head_of
from .gates import Gate, GateOf
from .levels import check_gates
from .masked import MaskedLinear, Masks
from .modeling.block_sparse import BlockSparseLinear
from .modeling.layout import GROUPS, HIDDEN, SCORING, DenseLayer
from .modeling.pruned import build_linear, separate_activation, set_scatter
from .modeling.structure import LayerStructure, grid_shape

STATE_NAME = "pruning"


class PruningState(nn.Module):
    """All that a pruning run knows, as a submodule of the encoder: saved and resumed with it.

    Attributes:
        config: the settings.
        dense: one dense layer.
        base: the structure that masks were laid over, one entry per layer (a pruned model can be
            pruned further).
        layers: per layer, gates by name: ``heads``, ``attention_output``, ``fc1``, ``fc2`` and
            ``blocks_<matrix>``.
        modules_of: the layers, and the linears with masks of each by matrix.
        landed: int64 ``(1,)``; stages whose masks are final: 0, 1 (heads and rows) or 2 (all).
    """

    landed: Tensor

    def __init__(self, config: PruningConfig, encoder: Encoder) -> None:
        super().__init__()
        device = encoder.module.device
        self.config = config
        self.dense: DenseLayer = encoder.dense
        self.base: tuple[LayerStructure, ...] = encoder.structure.layers
        self.layers = nn.ModuleList(
            _make_gates(config, layer, encoder.dense, index, device) for index, layer in enumerate(self.base)
        )
        if config.targets:
            for gate in self.all_gates():
                gate.candidates = torch.ones_like(gate.keep)
        # A tuple, as they are no submodules of the state.
        self.modules_of: tuple[tuple[nn.Module, dict[str, MaskedLinear]], ...] = ()
        # What `loop.start` and the callback at work set up; never saved.
        self.run: object | None = None
        self.session: object | None = None
        self.register_buffer("landed", torch.zeros(1, dtype=torch.int64, device=device))
        for name, length in self.tables().items():
            self.register_buffer(name, torch.full((length,), -1, dtype=torch.int64, device=device))

    def __getstate__(self) -> dict[str, Any]:
        """Without what a run set up: copies and pickles of a model take no part in it."""
        return {**vars(self), "run": None, "session": None}

    def gates(self, index: int) -> dict[str, Gate]:
        """Gates of one layer by name."""
        layer = self.layers[index]
        assert isinstance(layer, nn.ModuleDict)
        return {name: gate for name, gate in layer.items() if isinstance(gate, Gate)}

    def all_gates(self) -> Iterator[Gate]:
        """Every gate, in a fixed order."""
        for index in range(len(self.layers)):
            yield from self.gates(index).values()

    @property
    def linears(self) -> tuple[MaskedLinear, ...]:
        """The linears with masks, in the order of the layers."""
        return tuple(linear for _, linears in self.modules_of for linear in linears.values())

    def included(self) -> list[int]:
        """Indices of the layers that are pruned."""
        return [i for i in range(len(self.base)) if i not in self.config.exclude]

    def tables(self) -> dict[str, int]:
        """Names and lengths of the buffers with measured costs; see :mod:`hf_mlprune.costs`."""
        return BUDGETS[self.config.target[0]].tables(self.dense)

    def budget(self, config: PruningConfig | None = None) -> Budget:
        """What masks cost in this run.

        Args:
            config: settings with the target; of the run, that is of its last target, if ``None``.

        Raises:
            ValueError: the costs are not measured yet.
        """
        measured = self.sizes().measured
        if any(bool((table < 0).all()) for table in measured.values()):
            raise ValueError(
                f"{self.config.target[0]}: costs are not measured yet; `start(model, ...)` does it"
            )
        return BUDGETS[self.config.target[0]](self.sizes(), vars(config or self.config))

    def sizes(self) -> Sizes:
        """What a budget needs to know of the encoder."""
        excluded = [
            [self.base[i].widths[group] for group in GROUPS] for i in sorted(set(self.config.exclude))
        ]
        linears = [item for _, linears in self.modules_of for item in linears.items()]
        return Sizes(
            self.dense,
            len(self.included()),
            torch.tensor(excluded, dtype=torch.int64).view(-1, len(GROUPS)),
            linears[0][1].weight.element_size(),
            sorted({name for name, linear in linears if linear.bias is not None}),
            {name: self.get_buffer(name) for name in self.tables()},
        )

    @property
    def length(self) -> int | None:
        """Tokens of the sequence that the target is counted for; ``None`` if it depends on none."""
        return int(self.get_buffer("target_length")) if "target_length" in self.tables() else None

    @property
    def structured_is_final(self) -> bool:
        """Whether the masks of heads and rows are final."""
        return int(self.landed) >= 1

    @property
    def is_final(self) -> bool:
        """Whether all masks are final."""
        return int(self.landed) >= 2

    def total_weights(self) -> int:
        """Weights of the prunable linears of the dense model: the denominator of density."""
        return self.dense.weights(self.dense.units) * len(self.included())

    def density(self) -> float:
        """Kept weights of the prunable linears / all of them in the dense model."""
        return _live_weights(self.linears) / self.total_weights()

    def layer_densities(self) -> list[float]:
        """The same of each pruned layer."""
        whole = self.dense.weights(self.dense.units)
        return [_live_weights(self.modules_of[index][1].values()) / whole for index in self.included()]

    def kept_structure(self, index: int) -> LayerStructure:
        """Kept units of one layer as indices into the dense layer, blocks not considered."""
        gates = self.gates(index)

        def kept(group: str, indices: tuple[int, ...]) -> tuple[int, ...]:
            if group not in gates:
                return indices
            keep = gates[group].keep.repeat_interleave(gates[group].size).tolist()
            return tuple(i for i, stays in zip(indices, keep, strict=True) if stays)

        return LayerStructure({group: kept(group, old) for group, old in self.base[index].kept.items()}, {})


def _live_weights(linears: Iterable[MaskedLinear]) -> int:
    """Weights that the masks of linears leave."""
    return sum(int(costs[keep].sum()) for costs, keep in (linear.live_blocks() for linear in linears))


def _make_gates(
    config: PruningConfig, kept: LayerStructure, dense: DenseLayer, index: int, device: torch.device
) -> nn.ModuleDict:
    gates: dict[str, nn.Module] = {}
    if index in config.exclude:
        return nn.ModuleDict(gates)
    if "heads" in config.levels and kept.kept["heads"]:
        gates["heads"] = Gate(len(kept.kept["heads"]), device)
    for level, group in (("attention", "heads"), ("ffn", "fc1")):
        if level in config.levels and kept.kept[group]:
            gates[group] = Gate(1, device, size=len(kept.kept[group]))
    for group in config.row_sites if "rows" in config.levels else ():
        # Rows of a matrix without columns weigh nothing.
        if not any(kept.is_empty(name, dense) for name in dense.layout.names(group)):
            gates[group] = Gate(len(kept.kept[group]), device)
    if config.blocks:
        for name in dense.layout.matrices:
            rows, columns = grid_shape(kept.shape(name, dense), config.block_shape)
            if rows * columns:
                gates[f"blocks_{name}"] = Gate(rows * columns, device)
    return nn.ModuleDict(gates)


def pruning_state(model: nn.Module) -> PruningState:
    """The state of a model of one encoder whose masks are learned.

    Raises:
        ValueError: the model has none, or several.
    """
    found = pruning_states(model)
    if len(found) > 1:
        raise ValueError(f"{type(model).__name__}: expected one encoder with masks, got {len(found)}")
    return found[0]


def pruning_states(model: nn.Module) -> list[PruningState]:
    """The states of a model whose masks are learned, one for each encoder.

    Raises:
        ValueError: the model has none.
    """
    found = _find_states(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no masks: call `attach(model, config)` before training it"
        )
    return found


def is_attached(model: nn.Module) -> bool:
    """Whether masks are being learned in this model."""
    return bool(_find_states(model))


def _find_states(model: nn.Module) -> list[PruningState]:
    if head_of(model) is not None:
        # Stock models say where their one encoder is.
        state = getattr(model.base_model, STATE_NAME, None)
        return [state] if isinstance(state, PruningState) else []
    return [module for module in model.modules() if isinstance(module, PruningState)]


def insert_masks(encoder: Encoder, config: PruningConfig, *, mask_queries_and_keys: bool) -> PruningState:
    """Cast the prunable linears of an encoder in place, and hang the state into it.

    Raises:
        ValueError: ``exclude`` names a layer that is not there, or every layer; a model that was pruned
            before has nothing left of what ``levels`` names; every module is always kept.
        TypeError: a prunable linear is not an ``nn.Linear``.
    """
    count = len(encoder.layers)
    if any(index >= count for index in config.exclude) or len(set(config.exclude)) == count:
        raise ValueError(f"exclude: expected some of the layers 0 to {count - 1}, got {list(config.exclude)}")
    for index in set(config.exclude):
        if any(isinstance(linear, BlockSparseLinear) for linear in encoder.layers[index].linears.values()):
            raise ValueError(
                f"exclude: layer {index} is stored as blocks, which a further run makes dense again; "
                "leave it out of exclude"
            )
    restore_dense_blocks(encoder)
    state = PruningState(config, encoder)
    names = {name for index in state.included() for name in state.gates(index)}
    check_gates(names, config.levels, config.row_sites, config.minimum_units)
    casts: list[tuple[nn.Linear, Masks]] = []
    for index in state.included():
        gates = state.gates(index)
        for name, linear in encoder.layers[index].linears.items():
            if type(linear) is not nn.Linear:
                raise TypeError(f"layer {index}, {name}: expected nn.Linear, got {type(linear).__name__}")
            assert isinstance(linear, nn.Linear)
            casts.append((linear, _masks_of(name, gates, encoder.dense, config, mask_queries_and_keys)))
    for linear, masks in casts:
        MaskedLinear.cast(linear, masks)
    state.modules_of = tuple(
        (layer.module, {name: x for name, x in layer.linears.items() if isinstance(x, MaskedLinear)})
        for layer in encoder.layers
    )
    encoder.module.add_module(STATE_NAME, state.train(encoder.module.training))
    return state


def _masks_of(
    name: str, gates: dict[str, Gate], dense: DenseLayer, config: PruningConfig, mask_queries_and_keys: bool
) -> Masks:
    matrix = dense.layout.matrices[name]
    rows = columns = None
    if matrix.rows in gates:
        masked = tuple(mask_queries_and_keys or part not in SCORING for part in dense.parts(name))
        # The attention term compares all heads, kept or not.
        heard = config.attention_weight > 0 and not all(masked)
        gate = gates[matrix.rows]
        rows = GateOf(gate, dense.span(matrix.rows) * gate.size, masked, heard)
    if matrix.columns != HIDDEN and matrix.columns in gates:
        gate = gates[matrix.columns]
        columns = GateOf(gate, dense.span(matrix.columns) * gate.size)
    return Masks(rows, columns, gates.get(f"blocks_{name}"), config.block_shape)


def restore_dense_blocks(encoder: Encoder) -> None:
    """Give a pruned model dense weights again where it had blocks; zeros stand for removed ones."""
    for layer in encoder.layers:
        separate_activation(layer.module, encoder.dense.layout)
        for name, linear in layer.linears.items():
            if isinstance(linear, BlockSparseLinear):
                plain = build_linear(linear, name, layer.structure, encoder.dense, None)
                assert isinstance(plain, nn.Linear)
                with torch.no_grad():
                    plain.weight.copy_(linear.matrix().to_dense())
                    if linear.bias is not None:
                        plain.bias.copy_(linear.bias)
                layer.module.set_submodule(encoder.dense.layout.matrices[name].path, plain)
                set_scatter(layer.module, name, layer.structure, encoder.dense)
                layer.linears[name] = plain
