"""What an encoder costs on this machine, and in a file: measured once, as a run begins.

What is found are int64 buffers of the state, so that checkpoints hold it and a resumed run counts as before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from .budgets.bytes import dense_bytes
from .encoders import check_length, inspect_encoder, tokens_of, usual_length
from .latency_table import read_table
from .part_times import measure_times
from .processes import same_in_all_processes
from .state import STATE_NAME, PruningState
from .timing import using_threads


def measure_costs(model: nn.Module, states: Sequence[PruningState], length: int | None = None) -> None:
    """Fill the tables that the budgets of a run need.

    Args:
        model: a model with masks.
        states: its states.
        length: tokens of a typical sequence, where the settings do not say it; 128, if it is not known.
    """
    for state in states:
        if not state.tables():
            continue
        encoder = inspect_encoder(
            next(module for module in model.modules() if getattr(module, STATE_NAME, None) is state)
        )
        config = state.config
        if config.length is not None:
            check_length(encoder, config.length)
        tokens = tokens_of(encoder) or config.length or usual_length(encoder, length)
        if "target_length" in state.tables():
            state.get_buffer("target_length").fill_(tokens)
        if "other_bytes" in state.tables():
            state.get_buffer("other_bytes").fill_(other_bytes(model))
            state.get_buffer("linear_bytes").fill_(sum(dense_bytes(each.sizes()) for each in states))
        if "rest_time" in state.tables():
            if config.latency_table is not None:
                found = read_table(Path(config.latency_table), state, encoder)
            else:
                with using_threads(config.threads):
                    found = measure_times(encoder, config.batch, tokens)
            for name, table in found.items():
                state.get_buffer(name).copy_(table)
        for name in state.tables():
            same_in_all_processes(state.get_buffer(name))


def other_bytes(model: nn.Module) -> int:
    """Bytes of ``model.safetensors`` without the linears of masked encoders, those of excluded layers too."""
    tensors: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if f"{STATE_NAME}." not in name:
            tensors.setdefault(tensor.data_ptr() or id(tensor), (name, tensor))
    linears = {
        parameter.data_ptr()
        for module in model.modules()
        if isinstance(getattr(module, STATE_NAME, None), PruningState)
        for layer in inspect_encoder(module).layers
        for linear in layer.linears.values()
        for parameter in linear.parameters()
    }
    total = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors.values())
    header = {name: {"dtype": "F32", "shape": list(t.shape), "data_offsets": [total, total]}
              for name, t in tensors.values()}  # fmt: skip
    free = sum(t.numel() * t.element_size() for place, (_, t) in tensors.items() if place in linears)
    return total - free + len(json.dumps(header))
