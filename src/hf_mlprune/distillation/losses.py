"""Distillation: the losses between what a student and its teacher compute of the same inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..calls import named_tensors
from ..config import PruningConfig
from ..families import head_of
from ..modeling.family import PREDICTIONS
from .recording import Encoded
from .teacher import Positions, Teacher

#: Outputs that are no predictions: hidden states have a term of their own.
NO_PREDICTIONS = PREDICTIONS["AutoModel"]
SPANS = PREDICTIONS["AutoModelForQuestionAnswering"]


def distillation_loss(
    model: nn.Module,
    student: tuple[Any, Sequence[Sequence[Encoded]]],
    taught: tuple[Any, Sequence[Sequence[Encoded]]],
    teacher: Teacher,
    config: PruningConfig,
    *,
    problem_type: str | None,
    labels: Tensor | None = None,
) -> Tensor:
    """``predictions + hidden_weight · Σ MSE hidden + attention_weight · Σ MSE attention``.

    The reference's distillation loss, except that padding takes no part: each term is the mean over sequences
    of a mean over real tokens, so that a batch in parts adds up to the batch; and over the passes of the
    encoder, where a model makes several. Scalar, fp32.

    Args:
        model: the student.
        student: its outputs, with gradients, and the passes of each of its encoders.
        taught: the same of the teacher for the same inputs.
        teacher: whose outputs they are.
        config: the weights.
        problem_type: ``config.problem_type`` of a sequence classifier, if a config says it.
        labels: of the call, if it has any; numbers shaped like the logits tell the problem where no config
            does.

    Raises:
        ValueError: there is nothing that both compute, in one shape.
    """
    first = student[1][0]
    mask = first[0].attention_mask if len(student[1]) == len(first) == 1 else None
    predicted, wanted = predictions(model, student[0]), predictions(teacher.model, taught[0])
    problem_type = problem_type or problem_of(predicted, labels)
    terms = prediction_terms(predicted, wanted, mask, problem_type, config.distillation_temperature)
    if config.hidden_weight or config.attention_weight:
        for number, (ours, theirs) in enumerate(zip(student[1], taught[1], strict=True)):
            heads = teacher.student_heads[number], teacher.teacher_heads[number]
            terms += _encoder_terms(ours, theirs, heads, config)
    if not terms:
        raise ValueError(
            "teacher: expected predictions to match, got a model that returns none beside its loss: let it "
            "return its logits, too, or set hidden_weight=1"
        )
    return torch.stack(terms).sum()


def _encoder_terms(
    ours: Sequence[Encoded],
    theirs: Sequence[Encoded],
    heads: tuple[Positions, Positions],
    config: PruningConfig,
) -> list[Tensor]:
    """The terms of the passes of one encoder."""
    if len(ours) != len(theirs) or not ours:
        raise ValueError(
            f"teacher: expected as many passes of its encoder as of the student's, {len(ours)}, got "
            f"{len(theirs)}: both are called with the same inputs, and must use them alike; for "
            "predictions only set hidden_weight=0 and attention_weight=0"
        )
    terms = []
    for a, b in zip(ours, theirs, strict=True):
        if config.hidden_weight:
            loss = hidden_loss(a.hidden_states, b.hidden_states, a.attention_mask)
            terms.append(config.hidden_weight / len(ours) * loss)
        if config.attention_weight:
            loss = attention_loss(a, b, *heads)
            terms.append(config.attention_weight / len(ours) * loss)
    return terms


def predictions(model: nn.Module, out: Any) -> dict[str, Tensor]:
    """What a model predicts, by name: its floating-point outputs but losses, hidden states and attention.

    Tuples have no names. Those of the stock heads hold ``logits``, or ``start_logits`` and ``end_logits``;
    those of others ``output 0``, ``output 1`` and so on, scalars not counted, and ``output 0 logits`` for a
    tensor with one entry per label of the model's config.
    """
    found = {
        name: tensor for name, tensor in named_tensors(out) if tensor.is_floating_point() and tensor.dim()
    }
    if isinstance(out, (Tensor, tuple, list)) and not hasattr(out, "_fields"):
        found = dict(zip(_names(model, list(found.values())), found.values(), strict=False))
    head = head_of(model)
    if head is not None and head.judges_tokens and "logits" in found:
        # Of their shape, classes of a sequence would look the same.
        found["logits"] = found["logits"].unsqueeze(-1)
    # Logits of any kind; of other outputs those that hold a vector or a number per row.
    return {
        name: x
        for name, x in found.items()
        if name not in NO_PREDICTIONS and (name.endswith("logits") or x.dim() <= 2)
    }


def _names(model: nn.Module, tensors: Sequence[Tensor]) -> list[str]:
    """What to call the tensors of a tuple that a model returned."""
    head = head_of(model)
    if head is not None:
        return list(head.predictions)
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    return [
        f"output {number} logits" if tensor.dim() >= 2 and tensor.shape[-1] == labels else f"output {number}"
        for number, tensor in enumerate(tensors)
    ]


def problem_of(predicted: Mapping[str, Tensor], labels: Tensor | None) -> str | None:
    """The problem that labels are for, in transformers' words: those of classes are whole numbers."""
    if not isinstance(labels, Tensor) or labels.dim() != 2 or not labels.is_floating_point():
        return None
    if not any(name.endswith("logits") and x.shape == labels.shape for name, x in predicted.items()):
        return None
    shares = bool(((labels >= 0) & (labels <= 1)).all())
    return "multi_label_classification" if shares else "regression"


def prediction_terms(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    attention_mask: Tensor | None,
    problem_type: str | None,
    temperature: float,
) -> list[Tensor]:
    """One scalar term for each prediction that both make.

    ``start_logits`` and ``end_logits``: half the KL divergence over the real positions, each. Other names
    that end in ``logits``: :func:`logits_loss`. Anything else, as embeddings and scores: squared distance.

    Raises:
        ValueError: the student predicts what the teacher does not, or in another shape.
    """
    shared = [name for name in student if name in teacher]
    if student and not shared:
        raise ValueError(
            f"teacher: expected predictions that the student makes, too, {sorted(student)}, got "
            f"{sorted(teacher)}: let both return them under one name"
        )
    terms = []
    for name in shared:
        ours, theirs = student[name].float(), teacher[name].float()
        if ours.shape != theirs.shape:
            raise ValueError(
                f"teacher: expected {name} of the student's shape {tuple(ours.shape)}, got "
                f"{tuple(theirs.shape)}"
            )
        if name in SPANS:
            terms.append(0.5 * _span_loss(ours, theirs, attention_mask, temperature))
        elif name.endswith("logits"):
            terms.append(logits_loss(ours, theirs, attention_mask, problem_type, temperature))
        else:
            terms.append(_squared_distance(ours, theirs).mean())
    return terms


def logits_loss(
    student: Tensor,
    teacher: Tensor,
    attention_mask: Tensor | None,
    problem_type: str | None,
    temperature: float,
) -> Tensor:
    """The term of one tensor of logits.

    Classes and choices: KL divergence. Regression, and any single logit, of which a softmax is always 1:
    mean squared error. Multi-label: Bernoulli KL. ``(batch, tokens, classes)``: the same of the real tokens;
    of another middle dimension, of all.
    """
    single = student.dim() == 1 or student.shape[-1] == 1
    if single or (problem_type == "regression" and student.dim() == 2):
        error = (student - teacher).square()
        error = error if student.dim() == 1 else error.mean(dim=-1)
    elif problem_type == "multi_label_classification" and student.dim() == 2:
        return bernoulli_divergence(student, teacher, temperature)
    else:
        error = token_divergence(student, teacher, temperature)
    # Of another shape than the mask, they are no tokens: several tasks, say, or pairs.
    tokens = attention_mask is not None and attention_mask.shape == error.shape
    return _mean_over_real(error, attention_mask) if tokens else error.mean()


def _squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Of vectors ``(batch, features)``, or of numbers ``(batch,)``, to ``(batch,)``."""
    error = (student - teacher).square()
    return error if error.dim() == 1 else error.sum(dim=-1)


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
    student: Encoded, taught: Encoded, student_heads: Positions, teacher_heads: Positions
) -> Tensor:
    """``Σ_l MSE(A_s, A_t)`` over the heads that both have, ``(batch, heads, tokens, tokens)``.

    Args:
        student: attention weights of one pass.
        taught: those of the teacher.
        student_heads: per layer, positions of the shared heads among the student's.
        teacher_heads: the same heads' positions among the teacher's.

    Raises:
        ValueError: attention weights were not computed.
    """
    missing = [x for encoded in (student, taught) for x in encoded.attentions.values() if x is None]
    if missing or not student.attentions or not taught.attentions:
        raise ValueError(
            "attention term: expected attention weights of student and teacher, got none: both need eager "
            "attention, in layers that have heads; load them with attn_implementation='eager' where this "
            "version of transformers cannot switch it"
        )
    terms = []
    for index in sorted(student.attentions.keys() & taught.attentions.keys()):
        ours, theirs = student.attentions[index], taught.attentions[index]
        assert ours is not None
        assert theirs is not None
        a = ours[:, list(student_heads[index])].float()
        b = theirs[:, list(teacher_heads[index])].float()
        if a.shape[1]:
            error = (a - b).square().mean(dim=1)
            # Over real keys: padding gets no attention, but its width would be divided by.
            keys = error.mean(dim=-1)
            mask = student.attention_mask
            if mask is not None:
                keys = error.sum(dim=-1) / mask.sum(dim=-1, keepdim=True).clamp(min=1)
            terms.append(_mean_over_real(keys, mask))
    first = next(iter(student.attentions.values()))
    assert first is not None
    return torch.stack(terms).sum() if terms else torch.zeros((), device=first.device)


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
