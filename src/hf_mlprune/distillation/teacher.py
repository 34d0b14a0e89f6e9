"""Teachers: loading one, checking that it can teach a student, and telling it from another."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from ..config import PruningConfig
from ..encoders import Encoder, inspect_encoders
from ..families import family_of, head_of, known_encoders, read_config
from ..modeling.checkpoint import POOLER
from ..modeling.pretrained import unloaded_keys

Positions = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Teacher:
    """A model in evaluation mode, and the heads that it shares with the student.

    Attributes:
        model: the teacher, on the student's device.
        encoders: its encoders, if hidden states or attention weights are matched.
        student_heads: per encoder and layer, positions of the shared heads among the student's.
        teacher_heads: the same heads' positions among the teacher's.
    """

    model: nn.Module
    encoders: tuple[Encoder, ...]
    student_heads: tuple[Positions, ...]
    teacher_heads: tuple[Positions, ...]


def load_teacher(source: str | nn.Module, student: nn.Module, config: PruningConfig) -> Teacher:
    """Load a teacher, or take over a model, and check that it can teach this student.

    Args:
        source: a folder, a hub name, or a module that is called as the student is (put into evaluation
            mode; no gradient is computed in it).
        student: the model to teach.
        config: names the terms that are wanted.

    Raises:
        ValueError: other labels or vocabulary than the student's, or of another width or depth while
            hidden-state or attention terms are wanted.
        TypeError: the student's class is none of transformers: the name alone does not say what to load.
    """
    if isinstance(source, nn.Module):
        if source is student:
            raise ValueError("teacher: expected another model than the one that is pruned")
        model = source
    else:
        model = _load(source, student)
    _check_shared(model, student)
    _check_head(model, student)
    _check_labels(model, student)
    encoders = _shared_encoders(model, student, config)
    heads = [_shared_heads(theirs, ours, config) for theirs, ours in encoders]
    device = next(student.parameters()).device
    return Teacher(
        model.to(device).eval(),
        tuple(theirs for theirs, _ in encoders),
        tuple(ours for ours, _ in heads),
        tuple(theirs for _, theirs in heads),
    )


def _load(source: str, student: nn.Module) -> PreTrainedModel:
    head = head_of(student)
    if head is None:
        raise TypeError(
            f"teacher: {type(student).__name__} is not a class of transformers; load the teacher yourself "
            "and pass the model"
        )
    auto = getattr(transformers, head.auto)
    assert isinstance(student, PreTrainedModel)
    _, family, _ = known_encoders(student)[0]
    alike: dict[str, Any] = {}
    if family_of(read_config(source, "teacher: expected a folder")) is family:
        # Attention of another kind rounds otherwise. Another family may not have this kind.
        alike["attn_implementation"] = student.config._attn_implementation
    model, info = auto.from_pretrained(source, dtype=student.dtype, output_loading_info=True, **alike)
    missing = sorted(key for key in unloaded_keys(info) if not key.startswith(POOLER))
    if missing:
        raise ValueError(
            f"teacher: expected a fine-tuned {type(student).__name__.removeprefix('Prunable')} in "
            f"{source}, but it lacks {len(missing)} weights, e.g. {missing[0]!r}: fine-tune it first"
        )
    assert isinstance(model, PreTrainedModel)
    return model


def fingerprint(model: nn.Module) -> str:
    """What a model is, however it is spelled: 32 hexadecimal digits.

    Of names, shapes and values of its weights, and of what its encoder's config adds to them; not of where it
    lies, of the dtype that holds these values, of a bare encoder's pooler, which a checkpoint may lack, or of
    what its config says of names and training.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.named_parameters()):
        if not name.startswith(POOLER):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().contiguous().cpu().numpy().data)
    for config, names in _computed_by(model):
        for name in names:
            digest.update(f"{name} {getattr(config, name, None)}".encode())
    return digest.hexdigest()


def _computed_by(model: nn.Module) -> list[tuple[Any, tuple[str, ...]]]:
    """Configs of a model's encoders, and the fields of each that change outputs and no weight's shape."""
    try:
        encoders = known_encoders(model)
    except TypeError:
        return []  # It teaches by its predictions.
    found = []
    for _, family, encoder in encoders:
        fields = family.config.config_fields
        numbers = (name for name in fields.numbers if "dropout" not in name)
        names = (fields.num_heads, fields.activation, "layer_norm_eps", *fields.bounds, *numbers)
        found.append((encoder.config, names))
    return found


def _check_shared(teacher: nn.Module, student: nn.Module) -> None:
    """Refuse a teacher whose weights are trained with the student's."""
    own = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    shared = [name for name, parameter in teacher.named_parameters() if id(parameter) in own]
    if shared:
        raise ValueError(
            f"teacher: expected weights of its own, but {len(shared)} are the student's, e.g. {shared[0]!r}, "
            "and would be trained with it; load it anew, or pass a copy.deepcopy"
        )


def _check_head(teacher: nn.Module, student: nn.Module) -> None:
    theirs, ours = head_of(teacher), head_of(student)
    if theirs is not None and ours is not None and theirs.auto != ours.auto:
        raise ValueError(
            f"teacher: expected a {ours.stock.__name__} as the student is, got a {theirs.stock.__name__}"
        )


def _check_labels(teacher: nn.Module, student: nn.Module) -> None:
    if not isinstance(teacher, PreTrainedModel) or not isinstance(student, PreTrainedModel):
        return  # What a module of the script's own says of its labels is not known.
    head = head_of(student)
    labelled = head is None or head.has_labels
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


def _shared_encoders(
    teacher: nn.Module, student: nn.Module, config: PruningConfig
) -> list[tuple[Encoder, Encoder]]:
    """Encoders of which hidden states or attention weights are matched: the teacher's, the student's."""
    if not (config.hidden_weight or config.attention_weight):
        return []
    try:
        pair = [inspect_encoders(model, config.encoder) for model in (teacher, student)]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"teacher: hidden-state and attention terms need a teacher with the student's encoders "
            f"({error}); for logits only set hidden_weight=0 and attention_weight=0"
        ) from error
    return list(zip(*pair, strict=True))


def _shared_heads(theirs: Encoder, ours: Encoder, config: PruningConfig) -> tuple[Positions, Positions]:
    """Positions of the heads that both have, per layer: the student's, the teacher's."""
    words = [getattr(encoder.module.config, "vocab_size", None) for encoder in (theirs, ours)]
    if words[0] != words[1]:
        raise ValueError(f"teacher: expected vocab_size={words[1]} as in the student, got {words[0]}")
    size = (theirs.dense.sizes.hidden_size, len(theirs.layers))
    expected = (ours.dense.sizes.hidden_size, len(ours.layers))
    heads = (theirs.dense.sizes.num_heads, ours.dense.sizes.num_heads)
    if size != expected or (config.attention_weight and heads[0] != heads[1]):
        raise ValueError(
            f"teacher: expected hidden size, layers and heads {(*expected, heads[1])} as in the "
            f"student, got {(*size, heads[0])}; a teacher of another width or depth can teach by "
            "its logits only: set hidden_weight=0 and attention_weight=0"
        )
    shared = [
        sorted(set(a.structure.kept["heads"]) & set(b.structure.kept["heads"]))
        for a, b in zip(theirs.layers, ours.layers, strict=True)
    ]

    def positions(layers: Sequence[Any]) -> Positions:
        return tuple(
            tuple(layer.structure.kept["heads"].index(head) for head in common)
            for layer, common in zip(layers, shared, strict=True)
        )

    return positions(ours.layers), positions(theirs.layers)
