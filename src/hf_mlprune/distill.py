"""Distillation: the losses between student and teacher outputs, and the checks on a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertModel,
    PreTrainedModel,
)

from .anatomy import anatomy
from .attaching import auto_class_name, kinds_of
from .config import PruningConfig
from .modeling.bert import unloaded_keys

#: Models of whose config `num_labels` and `id2label` say nothing.
UNLABELLED = (BertModel, BertForMaskedLM, BertForMultipleChoice, BertForQuestionAnswering)

Positions = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Teacher:
    """A model in evaluation mode, and the heads that it shares with the student.

    Attributes:
        model: the teacher, on the student's device.
        student_heads: per layer, positions of the shared heads among the student's.
        teacher_heads: the same heads' positions among the teacher's.
        student_layers: layers of the student that have heads, and so emit attention weights.
        teacher_layers: the same of the teacher.
    """

    model: PreTrainedModel
    student_heads: tuple[tuple[int, ...], ...]
    teacher_heads: tuple[tuple[int, ...], ...]
    student_layers: tuple[int, ...]
    teacher_layers: tuple[int, ...]


def load_teacher(source: str | PreTrainedModel, student: PreTrainedModel, config: PruningConfig) -> Teacher:
    """Load a teacher, or take over a model, and check that it can teach this student.

    Args:
        source: a folder, a hub name, or a model (put into evaluation mode, gradients off).
        student: the model to teach.
        config: names the terms that are wanted.

    Raises:
        ValueError: other labels or vocabulary than the student's, or of another width or depth while
            hidden-state or attention terms are wanted.
        TypeError: the student is not of a stock class, so the name alone does not say what to load.
    """
    if isinstance(source, PreTrainedModel):
        if source is student:
            raise ValueError("teacher: expected another model than the one that is pruned")
        model = source
    else:
        kinds = kinds_of(student)
        if kinds is None:
            raise TypeError(
                f"teacher: {type(student).__name__} is not a stock class; load the teacher yourself "
                "and pass the model"
            )
        auto = getattr(transformers, auto_class_name(kinds))
        model, info = auto.from_pretrained(source, dtype=student.dtype, output_loading_info=True)
        missing = sorted(key for key in unloaded_keys(info) if not key.startswith("pooler."))
        if missing:
            raise ValueError(
                f"teacher: expected a fine-tuned {type(student).__name__.removeprefix('Prunable')} in "
                f"{source}, but it lacks {len(missing)} weights, e.g. {missing[0]!r}: fine-tune it first"
            )
    _check_head(model, student)
    _check_labels(model, student)
    heads = _shared_heads(model, student, config)
    model.requires_grad_(False)
    return Teacher(model.to(student.device).eval(), *heads)


def _check_head(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    theirs, ours = kinds_of(teacher), kinds_of(student)
    if theirs is not None and ours is not None and theirs != ours:
        raise ValueError(
            f"teacher: expected a {ours.stock.__name__} as the student is, got a {theirs.stock.__name__}"
        )


def _check_labels(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    labelled = not isinstance(student, UNLABELLED)
    for name in ("vocab_size", "num_labels") if labelled else ("vocab_size",):
        theirs, ours = getattr(teacher.config, name, None), getattr(student.config, name, None)
        if theirs != ours:
            raise ValueError(f"teacher: expected {name}={ours} as in the student, got {theirs}")
    if not labelled:
        return
    labels = [
        {int(index): label for index, label in (model.config.id2label or {}).items()}
        for model in (teacher, student)
    ]
    named = [any(label != f"LABEL_{index}" for index, label in mapping.items()) for mapping in labels]
    if all(named) and labels[0] != labels[1]:
        raise ValueError(
            f"teacher: expected the student's labels {labels[1]}, got {labels[0]}; give both the "
            "same id2label"
        )


def _shared_heads(
    teacher: PreTrainedModel, student: PreTrainedModel, config: PruningConfig
) -> tuple[Positions, Positions, tuple[int, ...], tuple[int, ...]]:
    if not (config.hidden_weight or config.attention_weight):
        return (), (), (), ()
    try:
        theirs, ours = anatomy(teacher), anatomy(student)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"teacher: hidden-state and attention terms need a teacher of the student's family "
            f"({error}); for logits only set hidden_weight=0 and attention_weight=0"
        ) from error
    size = (theirs.sizes.hidden_size, len(theirs.layers))
    expected = (ours.sizes.hidden_size, len(ours.layers))
    heads = (theirs.sizes.num_heads, ours.sizes.num_heads)
    if size != expected or (config.attention_weight and heads[0] != heads[1]):
        raise ValueError(
            f"teacher: expected hidden size, layers and heads {(*expected, heads[1])} as in the "
            f"student, got {(*size, heads[0])}; a teacher of another width or depth can teach by "
            "its logits only: set hidden_weight=0 and attention_weight=0"
        )
    shared = [
        sorted(set(a.structure.heads) & set(b.structure.heads))
        for a, b in zip(theirs.layers, ours.layers, strict=True)
    ]

    def positions(layers: Sequence[Any]) -> Positions:
        return tuple(
            tuple(layer.structure.heads.index(head) for head in common)
            for layer, common in zip(layers, shared, strict=True)
        )

    def emitting(layers: Sequence[Any]) -> tuple[int, ...]:
        return tuple(index for index, layer in enumerate(layers) if layer.structure.heads)

    return (
        positions(ours.layers),
        positions(theirs.layers),
        emitting(ours.layers),
        emitting(theirs.layers),
    )


def distillation_loss(
    student: Any,
    teacher_out: Any,
    teacher: Teacher,
    config: PruningConfig,
    *,
    attention_mask: Tensor | None,
    problem_type: str | None,
) -> Tensor:
    """``logits + hidden_weight · Σ MSE hidden + attention_weight · Σ MSE attention``.

    The reference's distillation loss, except that padding takes no part: each term is the mean over sequences
    of a mean over real tokens, so that a batch in parts adds up to the batch. Scalar, fp32.

    Args:
        student: outputs of the student, with gradients.
        teacher_out: outputs of the teacher for the same inputs.
        teacher: whose outputs they are.
        config: the weights.
        attention_mask: ``(batch, tokens)``, 1 = real, or ``None``.
        problem_type: ``config.problem_type`` of a sequence classifier.
    """
    loss = logits_loss(student, teacher_out, attention_mask, problem_type, config.distillation_temperature)
    if config.hidden_weight:
        loss = loss + config.hidden_weight * hidden_loss(
            student.hidden_states, teacher_out.hidden_states, attention_mask
        )
    if config.attention_weight:
        loss = loss + config.attention_weight * attention_loss(
            student.attentions, teacher_out.attentions, teacher, attention_mask
        )
    return loss


def logits_loss(
    student: Any,
    teacher: Any,
    attention_mask: Tensor | None,
    problem_type: str | None,
    temperature: float,
) -> Tensor:
    """The logits term of each kind of head; 0 for a model without a head.

    Classes and choices: KL divergence. Regression: mean squared error. Multi-label: Bernoulli KL.
    Tokens: KL of the real tokens. Spans: mean KL of start and end over the real positions.
    """
    if "start_logits" in student:
        return 0.5 * sum(
            (
                _span_loss(student[key], teacher[key], attention_mask, temperature)
                for key in ("start_logits", "end_logits")
            ),
            start=torch.zeros((), device=student["start_logits"].device),
        )
    if "logits" not in student:
        return torch.zeros((), device=student[0].device)
    ours, theirs = student["logits"].float(), teacher["logits"].float()
    if ours.dim() == 3:
        return _mean_over_real(token_divergence(ours, theirs, temperature), attention_mask)
    if problem_type == "regression":
        return functional.mse_loss(ours, theirs)
    if problem_type == "multi_label_classification":
        return bernoulli_divergence(ours, theirs, temperature)
    return class_divergence(ours, theirs, temperature)


def token_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T² · KL(teacher / T || student / T)`` of each distribution, ``(..., classes)`` to ``(...)``."""
    return temperature**2 * functional.kl_div(
        functional.log_softmax(student / temperature, dim=-1),
        functional.log_softmax(teacher / temperature, dim=-1),
        reduction="none",
        log_target=True,
    ).sum(dim=-1)


def class_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """:func:`token_divergence`, mean over the batch ``(batch, classes)``."""
    return token_divergence(student, teacher, temperature).mean()


def bernoulli_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T² ·`` KL of independent labels, summed over labels, mean over the batch."""
    pair = [
        torch.stack([functional.logsigmoid(-x / temperature), functional.logsigmoid(x / temperature)])
        for x in (student, teacher)
    ]
    divergence = (pair[1].exp() * (pair[1] - pair[0])).sum()
    return temperature**2 * divergence / len(student)


def _span_loss(student: Tensor, teacher: Tensor, attention_mask: Tensor | None, temperature: float) -> Tensor:
    if attention_mask is not None:
        padding = ~attention_mask.bool()
        # Finite, so that a masked position contributes 0 to the divergence and not 0 · inf.
        student = student.float().masked_fill(padding, -1e4)
        teacher = teacher.float().masked_fill(padding, -1e4)
    return class_divergence(student, teacher, temperature)


def hidden_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], attention_mask: Tensor | None
) -> Tensor:
    """``Σ_l MSE(H_s, H_t)`` over embeddings and layers, ``(batch, tokens, hidden)`` each."""
    _check_layers("hidden states", student, teacher)
    terms = []
    for ours, theirs in zip(student, teacher, strict=True):
        error = (ours.float() - theirs.float()).square().mean(dim=-1)
        terms.append(_mean_over_real(error, attention_mask))
    return torch.stack(terms).sum()


def attention_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    shared: Teacher,
    attention_mask: Tensor | None,
) -> Tensor:
    """``Σ_l MSE(A_s, A_t)`` over the heads that both have, ``(batch, heads, tokens, tokens)``."""
    # A layer without heads emits no attention weights at all.
    expected = len(shared.student_layers), len(shared.teacher_layers)
    got = len(student or ()), len(teacher or ())
    if got != expected or not all(got):
        raise ValueError(
            f"attention term: expected attention weights of {expected[0]} layers of the student and "
            f"{expected[1]} of the teacher, got {got[0]} and {got[1]}: both need eager attention"
        )
    ours = dict(zip(shared.student_layers, student, strict=True))
    theirs = dict(zip(shared.teacher_layers, teacher, strict=True))
    terms = []
    for index in sorted(ours.keys() & theirs.keys()):
        a = ours[index][:, list(shared.student_heads[index])].float()
        b = theirs[index][:, list(shared.teacher_heads[index])].float()
        if a.shape[1]:
            error = (a - b).square().mean(dim=1)
            # Over real keys: padding gets no attention, but its width would be divided by.
            keys = error.mean(dim=-1)
            if attention_mask is not None:
                keys = error.sum(dim=-1) / attention_mask.sum(dim=-1, keepdim=True).clamp(min=1)
            terms.append(_mean_over_real(keys, attention_mask))
    return torch.stack(terms).sum() if terms else torch.zeros((), device=student[0].device)


def _mean_over_real(error: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Mean of ``(batch, tokens)`` over each sequence's real tokens, and over sequences."""
    if attention_mask is None:
        return error.mean()
    real = attention_mask.to(error.dtype)
    return ((error * real).sum(dim=-1) / real.sum(dim=-1).clamp(min=1)).mean()


def _check_layers(what: str, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    ours, theirs = len(student or ()), len(teacher or ())
    if ours != theirs or not ours:
        raise ValueError(f"{what}: expected as many from student and teacher, got {ours}, {theirs}")
