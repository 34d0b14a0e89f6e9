"""Compute only what is kept, while the parameters keep their size.

Once the masks of heads and rows are final, a run needs nothing of what they remove. Parameters are read
through kept indices, so that the optimizer, its state and checkpoints are those of the masked model.
"""

from __future__ import annotations

import dataclasses

from .gates import Gate
from .masked import Kept
from .modeling.layout import RESIDUAL
from .modeling.pruned import set_heads
from .state import PruningState


def compute_kept(state: PruningState) -> None:
    """Have an encoder compute the kept heads and rows only."""
    for index, (layer, linears) in enumerate(state.modules_of):
        groups = {name for name, gate in state.gates(index).items() if _is_narrow(state, name, gate)}
        for name, linear in linears.items():
            matrix, masks = state.dense.layout.matrices[name], linear.masks
            rows = masks.rows if matrix.rows in groups else None
            columns = masks.columns if matrix.columns in groups else None
            kept = Kept(
                rows.places() if rows else None,
                columns.places() if columns else None,
                scatter=matrix.rows in RESIDUAL,
            )
            linear.masks = dataclasses.replace(masks, kept=kept, layout=None)
        if "heads" in groups:
            set_heads(layer, state.kept_structure(index), state.dense)


def compute_all(state: PruningState) -> None:
    """Have an encoder compute everything, masks multiplied; undoes :func:`compute_kept`."""
    for index, (layer, linears) in enumerate(state.modules_of):
        if any(linear.masks.kept is not None for linear in linears.values()):
            set_heads(layer, state.base[index], state.dense)
        for linear in linears.values():
            linear.masks = dataclasses.replace(linear.masks, kept=None, layout=None)


def _is_narrow(state: PruningState, group: str, gate: Gate) -> bool:
    """Whether only the kept units of a group are to be computed."""
    if group not in state.dense.units or gate.open:
        return False
    # The attention term compares all heads with the teacher's. A layer without any would need another module.
    return bool(gate.keep.any()) and not (group == "heads" and state.config.attention_weight > 0)
