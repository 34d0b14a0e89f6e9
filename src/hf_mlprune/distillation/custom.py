"""Distillation in a training loop of one's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..config import PruningConfig
from ..encoders import Encoder, inspect_encoders
from ..shrinking import shrunk_copy
from ..state import STATE_NAME, is_attached, pruning_states
from .hooks import Distiller
from .teacher import Teacher, load_teacher


class Distillation:
    """What :func:`distilled` gives: one call per optimizer step.

    Args:
        distiller: its hooks, in place.
        taught_by_step1: whether the model as it was after heads and rows teaches already.
    """

    def __init__(self, distiller: Distiller, *, taught_by_step1: bool = False) -> None:
        self._distiller = distiller
        self._taught_by_step1 = taught_by_step1

    @property
    def teacher(self) -> nn.Module:
        """The model that teaches now."""
        assert self._distiller.teacher is not None
        return self._distiller.teacher.model

    def update(self) -> None:
        """Call after `advance`: checks that the teacher's loss was used in this step.

        With ``block_teacher="step1"``, the model as it was after heads and rows teaches from then on.

        Raises:
            RuntimeError: no loss of this step came from the outputs of the model.
        """
        self._distiller.check_arrived()
        model, config = self._distiller.model, self._distiller.config
        if not config.step1_teaches or self._taught_by_step1 or not is_attached(model):
            return
        states = pruning_states(model)
        if all(state.structured_is_final and not state.is_final for state in states):
            with self.paused():
                self._distiller.teacher = load_teacher(shrunk_copy(model)[0], model, config)
            self._taught_by_step1 = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the teacher out for a while, in which the model can be copied and the copy shrunk."""
        self._distiller.remove()
        try:
            yield
        finally:
            self._distiller.install()

    def mean_loss(self) -> float | None:
        """Mean distillation loss since the last call; see :meth:`Distiller.take_mean_loss`."""
        return self._distiller.take_mean_loss()


@contextmanager
def distilled(
    model: nn.Module,
    teacher: str | nn.Module,
    settings: PruningConfig | None = None,
    *,
    accumulation: int = 1,
    autocast_dtype: torch.dtype | None = None,
) -> Iterator[Distillation]:
    """Add a teacher's loss to the gradients of a model while it trains, with or without masks.

    In training mode, the outputs of the model keep their values, but ``backward`` also adds the gradient of
    the distillation loss::

        with distilled(model, teacher) as distillation:
            for step, batch in enumerate(batches, start=1):
                model(**batch).loss.backward()
                collect(model)
                optimizer.step()
                optimizer.zero_grad()
                advance(model, step)
                distillation.update()

    Args:
        model: the student.
        teacher: a module that takes the same inputs as the model (it is put into evaluation mode), or the
            folder or hub name of a model of the student's class. With ``block_teacher="step1"``, a loop that
            is taken up in its block phase passes ``distillation.teacher`` of the interrupted one.
        settings: the weights of the terms; those of the model's masks, if ``None``.
        accumulation: backward passes per optimizer step.
        autocast_dtype: dtype of the autocast that the loop runs the model under, if any.

    Raises:
        ValueError: there are no settings, or the teacher cannot teach this model; see ``load_teacher``. Or
            the loop is in its block phase, and the teacher is not the model as it was after heads and rows.
    """
    if settings is None and not is_attached(model):
        raise ValueError(
            f"distilled: {type(model).__name__} has no masks, so the weight of each term is not known: "
            "pass settings=PruningConfig.create(density), or call `attach(model, config)` first"
        )
    config = settings or pruning_states(model)[0].config
    distiller = Distiller(
        model,
        load_teacher(teacher, model, config),
        config,
        autocast_dtype=autocast_dtype,
        accumulation=accumulation,
    )
    states = pruning_states(model) if is_attached(model) else []
    in_blocks = bool(states) and all(state.structured_is_final and not state.is_final for state in states)
    in_blocks = in_blocks and config.step1_teaches
    assert distiller.teacher is not None
    if in_blocks and not _is_step1(distiller.teacher, inspect_encoders(model, config.encoder)):
        raise ValueError(
            "distilled: this loop is in its block phase, where the model as it was after heads and rows "
            "teaches: pass `distillation.teacher` of the interrupted loop, or set block_teacher='teacher'"
        )
    try:
        distiller.install()
        yield Distillation(distiller, taught_by_step1=in_blocks)
    finally:
        distiller.remove()


def _is_step1(teacher: Teacher, encoders: Sequence[Encoder]) -> bool:
    """Whether a teacher kept the heads and rows that the masks of these encoders keep."""
    for theirs, ours in zip(teacher.encoders, encoders, strict=True):
        state = getattr(ours.module, STATE_NAME)
        kept = [state.kept_structure(index).kept for index in range(len(ours.layers))]
        if [layer.structure.kept for layer in theirs.layers] != kept:
            return False
    return True
