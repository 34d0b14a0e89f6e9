"""What an encoder costs on this machine, and in a file: measured once, as a run begins.

What is found are int64 buffers of the state, so that checkpoints hold it and a resumed run counts as before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .budgets.time import PARTS
from .encoders import Encoder, inspect_encoder, random_batch, stock_encoder
from .modeling.pruned import apply_structure
from .modeling.structure import LayerStructure, Structure
from .processes import same_in_all_processes
from .state import STATE_NAME, PruningState
from .timing import interleave, using_threads

#: Layers of the encoders that are timed: parts of a layer are differences between them.
PROBED_LAYERS = 2
#: Points of a table: shares of an FFN's rows, and at most so many counts of heads.
FFN_POINTS = 24
HEAD_POINTS = 12
ROUNDS = 15
BUDGET_SECONDS = 90.0


def measure_costs(model: nn.Module, states: Sequence[PruningState]) -> None:
    """Fill the tables that the budgets of a run need.

    Args:
        model: a model with masks.
        states: its states.
    """
    for state in states:
        if "other_bytes" in state.tables():
            state.get_buffer("other_bytes").fill_(other_bytes(model, state))
        if "rest_time" in state.tables():
            encoder = next(module for module in model.modules() if getattr(module, STATE_NAME, None) is state)
            config = state.config
            with using_threads(config.threads):
                found = measure_times(inspect_encoder(encoder), config.batch, config.length)
            for name, table in found.items():
                state.get_buffer(name).copy_(table)
        for name in state.tables():
            same_in_all_processes(state.get_buffer(name))


def other_bytes(model: nn.Module, state: PruningState) -> int:
    """Bytes of ``model.safetensors`` that no mask can free: all but the prunable linears, and the header."""
    tensors: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if f"{STATE_NAME}." not in name:
            tensors.setdefault(tensor.data_ptr() or id(tensor), (name, tensor))
    pruned = {
        parameter.data_ptr()
        for linear in state.linears
        for parameter in (linear.weight, linear.bias)
        if parameter is not None
    }
    total = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors.values())
    header = {name: {"dtype": "F32", "shape": list(t.shape), "data_offsets": [total, total]}
              for name, t in tensors.values()}  # fmt: skip
    free = sum(t.numel() * t.element_size() for place, (_, t) in tensors.items() if place in pruned)
    return total - free + len(json.dumps(header))


def measure_times(encoder: Encoder, batch: int, length: int) -> dict[str, Tensor]:
    """Nanoseconds of a layer's attention by kept heads, of its FFN by kept rows, and of all else.

    Small encoders with random weights are timed in turn. What two of them differ by is the part that they
    differ in; all are brought to the time of the dense encoder, which is timed among them.

    Args:
        encoder: gives family, sizes, device and dtype.
        batch: sequences, or images.
        length: tokens per sequence.
    """
    dense, count = encoder.dense, len(encoder.layers)
    probed = min(PROBED_LAYERS, count)
    heads, rows = points(dense.units["heads"], HEAD_POINTS), points(dense.units["fc1"], FFN_POINTS)
    full = (dense.units["heads"], dense.units["fc1"])
    shapes = [(*full, count), (0, 0, count), (*full, probed)]
    shapes += [(each, full[1], probed) for each in heads[:-1]] + [
        (full[0], each, probed) for each in rows[:-1]
    ]
    # Without the padding of the middle sequence: as most served batches of one length are called.
    inputs = random_batch(encoder.module, encoder, batch, length)
    inputs.pop("attention_mask", None)
    variants = [_call(_thin(encoder, *shape), inputs) for shape in shapes]
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        timing = interleave(variants, rounds=ROUNDS, budget_seconds=BUDGET_SECONDS)
    # By ratios: a machine that drifts slows all variants of a round alike.
    whole, bare, probe, *others = (1e9 * timing.seconds[0] / ratio for ratio in timing.ratios)
    tables = {name: torch.full((dense.units[group] + 1,), -1.0) for group, name in PARTS.items()}
    for name, widths, found in (
        ("attention_time", heads, others[: len(heads) - 1]),
        ("ffn_time", rows, others[len(heads) - 1 :]),
    ):
        for width, time in zip(widths, [*found, probe], strict=True):
            tables[name][width] = max(0.0, (time - found[0]) / probed)
    parts = count * sum(float(table[-1]) for table in tables.values())
    scale = (whole - bare) / parts
    return {
        "rest_time": torch.tensor([round(bare)]),
        **{
            name: torch.where(table < 0, -1, (table * scale).round()).to(torch.int64)
            for name, table in tables.items()
        },
    }


def points(most: int, count: int) -> list[int]:
    """Widths to measure: 0, ``most``, and up to so many at equal distances between them."""
    step = max(1, -(-most // count))
    return sorted({*range(0, most, step), most})


def _thin(encoder: Encoder, heads: int, rows: int, layers: int) -> nn.Module:
    """A stock encoder of so many layers, cut to so many heads and FFN rows in each."""
    kept = {group: tuple(range(units)) for group, units in encoder.dense.units.items()}
    layer = LayerStructure({**kept, "heads": tuple(range(heads)), "fc1": tuple(range(rows))}, {})
    found: nn.Module = stock_encoder(encoder, layers)
    modules = found.get_submodule(encoder.dense.layout.layers).children()
    apply_structure(modules, Structure((layer,) * layers, None), encoder.dense)
    found.to(encoder.module.device, encoder.module.dtype)
    return found.eval()


def _call(network: nn.Module, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
    device = next(network.parameters()).device

    def call() -> None:
        network(**inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call
