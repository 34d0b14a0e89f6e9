"""The dropout of a student after its masks are final, when what is left recovers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..encoders import Encoder
from ..run import current_run
from ..state import is_attached, pruning_states


class RecoveryDropout:
    """Gives the encoders of a student another probability of dropout once all its masks are final.

    Of a run with several targets, those of the first.

    What is left of a model has little to overfit with, and a teacher says more than labels do; noise then
    costs more than it brings.

    Args:
        model: the student.
        encoders: its encoders.
        probability: for the recovery; ``None`` to leave theirs.
    """

    def __init__(self, model: nn.Module, encoders: Sequence[Encoder], probability: float | None) -> None:
        self._probability = probability
        self._states = pruning_states(model) if is_attached(model) and probability is not None else []
        self._own = [place for encoder in encoders for place in dropouts_of(encoder.module)]

    def update(self) -> None:
        """Call before each pass of training."""
        # Asked for anew each time: masks become final between two passes.
        if self._states and all(state.run and current_run(state).is_recovering for state in self._states):
            for module, name, _ in self._own:
                setattr(module, name, self._probability)

    def reset(self) -> None:
        """Give the encoders their own probabilities again."""
        for module, name, probability in self._own:
            setattr(module, name, probability)


def dropouts_of(encoder: nn.Module) -> tuple[tuple[nn.Module, str, float], ...]:
    """Modules of an encoder, the attribute in which each has its probability of dropout, and that."""
    found = []
    for module in encoder.modules():
        names = ("p",) if isinstance(module, nn.Dropout) else ("attention_dropout", "dropout")
        for name in names:
            value = vars(module).get(name)
            if isinstance(value, float):
                found.append((module, name, value))
    return tuple(found)
