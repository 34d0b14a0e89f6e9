"""Masks -> structure -> pruned model, in place and proved equal to the masked one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from .attaching import swap_class
from .calls import Call
from .editing import edited
from .encoders import Encoder, inspect_encoders, random_batch
from .families import head_of, plain_config
from .modeling.pretrained import PrunedMixin
from .modeling.pruned import set_fingerprint
from .modeling.structure import Structure
from .narrowing import compute_all
from .proof import Comparison, compare, fixed_random_state, outputs, proof_dtypes
from .resizing import plan, replace
from .state import PruningState, pruning_states

Batch = Mapping[str, Any]
ModelType = TypeVar("ModelType", bound=nn.Module)


class ShrinkError(RuntimeError):
    """The model cannot be shrunk: it would not compute what the masked one does. It is as it was."""


@dataclass(frozen=True)
class ShrinkReport:
    """What a shrink did.

    Attributes:
        structures: what is left of each encoder, by its path in the model.
        max_difference: largest absolute difference between the outputs of the masked and the shrunk model.
            If the models return nothing to compare, the outputs of their encoders are used.
        max_output: largest absolute output.
        tolerance: difference that was allowed.
        dtype: dtype in which both models were computed, ``"float32"`` or ``"float64"``.
        real_batches: number of real batches in the comparison; 0 if random tokens were used.
    """

    structures: Mapping[str, Structure]
    max_difference: float
    max_output: float
    tolerance: float
    dtype: str
    real_batches: int


def shrink(model: nn.Module, batches: Sequence[Batch | Call] = ()) -> ShrinkReport:
    """Remove, in place, everything that the masks remove.

    A ``PrunableBertFor...`` becomes a ``PrunedBertFor...``; ``save_pretrained`` then writes a
    checkpoint that loads through the Auto classes. After any error, and after Ctrl-C, the model is the same
    as before, with its masks.

    Args:
        model: a model with masks.
        batches: model inputs for the comparison of the masked and the shrunk model: dicts of keyword
            arguments, or `Call` objects. If there are none, random tokens are used for a class of
            transformers. The encoder is always compared on random tokens.

    Returns:
        What is left, and how equal the two models are.

    Raises:
        ValueError: the model has no masks, or a run that was begun is not over.
        ShrinkError: outputs differ by more than rounding, or cannot be compared.
    """
    if any(state.run is not None and not state.is_final for state in pruning_states(model)):
        raise ValueError(
            "the run is not over: its masks are not final; call `advance` after each of its steps"
        )
    return _shrink(model, batches)


def rehearse(
    model: nn.Module, batches: Sequence[Batch | Call], inspect: Callable[[ShrinkReport], None]
) -> None:
    """Shrink by trial masks that remove every second unit, then put everything back.

    Of modules that may go as a whole, those of every second layer are removed.

    So what cannot work at the end of a run is known at its start.

    Args:
        model: a model with masks.
        batches: see :func:`shrink`.
        inspect: is called while the model is small.

    Raises:
        ShrinkError: see :func:`shrink`.
        Exception: whatever the model or ``inspect`` raises.
    """
    states = pruning_states(model)
    try:
        # A resumed run rehearses at another step than the straight one, and must draw as that does.
        with edited(model), fixed_random_state(states[0].landed.device):
            for state in states:
                _set_trial_masks(state)
            inspect(_shrink(model, batches))
            raise _RehearsedError
    except _RehearsedError:
        return


def _set_trial_masks(state: PruningState) -> None:
    for layer in range(len(state.layers)):
        for gate in state.gates(layer).values():
            kept = gate.keep.nonzero()[::2]
            may_be_empty = state.config.minimum_units == 0
            if len(kept) == 1 and may_be_empty and layer % 2 == 0:
                kept = kept[:0]
            gate.keep.fill_(False)
            gate.keep[kept] = True


class _RehearsedError(Exception):
    """Has a rehearsed shrink taken back."""


def shrunk_copy(model: ModelType, batches: Sequence[Batch | Call] = ()) -> tuple[ModelType, ShrinkReport]:
    """A shrunk copy of a model with masks, in evaluation mode, and what was done; the model stays as it is.

    Hooks are copied with the model: take out those that hold other models first. Args and errors are
    those of :func:`shrink`.
    """
    copy = deepcopy(model)
    done = shrink(copy, batches)
    return copy.eval(), done


def _shrink(model: nn.Module, batches: Sequence[Batch | Call]) -> ShrinkReport:
    calls = [batch if isinstance(batch, Call) else Call((), dict(batch)) for batch in batches]
    dtypes = proof_dtypes(model)
    for dtype in dtypes[:-1]:
        try:
            return _shrink_and_prove(model, calls, dtype)
        except _UnequalError as error:
            unequal = error
    try:
        return _shrink_and_prove(model, calls, dtypes[-1])
    except _UnequalError as error:
        raise _difference(error.comparison) from None
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if len(dtypes) == 1:
            raise
        # A device or a forward that has no float64: the verdict in float32 stands.
        raise _difference(unequal.comparison) from error


def _difference(found: Comparison) -> ShrinkError:
    return ShrinkError(
        f"shrunk outputs differ from masked ones by {found.difference:.3g}, expected at most "
        f"{found.tolerance:.3g} (output {found.output!r}); nothing was removed. Usual causes: in evaluation "
        "the model draws random numbers shaped like pruned layers, or computes with sizes or weights of its "
        "encoder"
    )


class _UnequalError(Exception):
    """Outputs differ in the dtype that they were compared in."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison


def _shrink_and_prove(model: nn.Module, calls: Sequence[Call], dtype: torch.dtype) -> ShrinkReport:
    encoders, real = inspect_encoders(model, pruning_states(model)[0].config.encoder), len(calls)
    if not calls and head_of(model) is not None:
        # How a class of the user's own is called is not known.
        calls = [Call((), random_batch(model, encoders[0], 2, 32))]
    # Always the encoders, too: a model may return tags, text, or what does not come from its encoder.
    compared = [
        (model, calls),
        *((encoder.module, [Call((), random_batch(encoder.module, encoder, 2, 32))]) for encoder in encoders),
    ]
    with edited(model):
        for state in pruning_states(model):
            # What the masks say, not the run's short cut, is compared.
            compute_all(state)
        before = [outputs(module, made, dtype) for module, made in compared]
        # New layers draw their first weights.
        with fixed_random_state(encoders[0].module.device):
            plans = [(encoder, *plan(encoder)) for encoder in encoders]
        for encoder, linears, structure in plans:
            replace(encoder, linears, structure)
            _become_pruned(model, encoder, structure)
        after = [outputs(module, made, dtype) for module, made in compared]
        try:
            found = [compare(a, b, dtype) for a, b in zip(before, after, strict=True) if a or b]
        except ValueError as error:
            raise ShrinkError(f"masked and shrunk model cannot be compared: {error}") from error
        for comparison in found:
            if not comparison.equal:
                raise _UnequalError(comparison)
    # Of the model; of its encoders, if that returns nothing to compare.
    worst = found[0] if before[0] else max(found, key=lambda one: one.difference)
    return ShrinkReport(
        structures={encoder.path: structure for encoder, _, structure in plans},
        max_difference=worst.difference,
        max_output=worst.largest,
        tolerance=worst.tolerance,
        dtype=str(dtype).removeprefix("torch."),
        real_batches=real,
    )


def _become_pruned(model: nn.Module, encoder: Encoder, structure: Structure) -> None:
    old = encoder.module.config
    new = encoder.family.config.from_dict(plain_config(old))
    new.structure = structure.to_dict()
    swap_class(model, encoder.module, new)
    set_fingerprint(encoder.module, structure)
    for module in model.modules():
        if isinstance(module, PrunedMixin):
            # Of an earlier run, if there are any.
            module.pruning_report = module.pruning_card = None
