"""The dropout of an encoder after its masks are final, when what is left recovers.

What is left of a model has little to overfit with, and noise costs it more than it cost the whole.
"""

from __future__ import annotations

from .state import PruningState


def set_dropout(state: PruningState) -> None:
    """Give an encoder the probability that its settings name for the recovery."""
    probability = state.config.recovery_dropout
    if probability is not None:
        for module, name, _ in state.dropouts:
            setattr(module, name, probability)


def reset_dropout(state: PruningState) -> None:
    """Give an encoder its own probabilities again; undoes :func:`set_dropout`."""
    for module, name, probability in state.dropouts:
        setattr(module, name, probability)
