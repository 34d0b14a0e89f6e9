"""How losses reach the gradients of a training script that is not ours.

Micro-batches are weighted by their share of items, with or without a teacher: mask gradients would be
too large by the number of micro-batches otherwise. The distillation loss rides on whatever the model
returns: on ``outputs.loss``, and on the logits and states beside it, for scripts that compute a loss of
their own from those. Values stay what they were; the gradient is that of the whole objective, into which
the distillation loss enters once. The pruning penalty needs no carrier (see `gates`).
"""

from __future__ import annotations

import inspect
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..calls import Call, map_tensors, named_tensors
from ..config import PruningConfig
from ..encoders import inspect_encoders
from ..families import head_of
from ..state import is_attached, pruning_states
from .carry import Carry, Once
from .dropout import RecoveryDropout
from .losses import distillation_loss
from .recording import Encoded, EncoderRecorder
from .teacher import Teacher

#: Inputs that say what a model should have answered.
TARGETS = ("labels", "start_positions", "end_positions")
#: A distillation loss that is exactly 0 for so many steps is not heard.
SILENT_STEPS = 10


@dataclass
class Distiller:
    """Hooks of one model on what it returns in training mode: shares of its loss, and a teacher's loss.

    Attributes:
        model: the student.
        teacher: whose outputs are matched, if any; may be replaced while the hooks are out.
        config: the weights.
        autocast_dtype: dtype of the autocast that the script runs the student under, if any.
        accumulation: micro-batches of the present optimizer step.
        processes: factor by which Trainer multiplies the loss of a model that it passes
            ``num_items_in_batch``.
        smoothed: whether a loss from the logits is Trainer's smoothed one: a mean over its micro-batch,
            though it is passed the number of items (transformers 5.0).
        without_labels: whether the data have no labels, so that there is no task loss.
        rows_without_labels: whether a row without a label was met; kept over a resume, as shares of labelled
            items are no shares of rows from then on.
        loss_sum: sum of the distillation losses since it was last read.
        loss_count: how many those are.
    """

    model: nn.Module
    teacher: Teacher | None
    config: PruningConfig
    autocast_dtype: torch.dtype | None = None
    accumulation: int = 1
    processes: int = 1
    smoothed: bool = False
    without_labels: bool = False
    rows_without_labels: bool = False
    loss_sum: Tensor | float = 0.0
    loss_count: int = 0
    _steps: int = 0
    _silent: int = 0
    _handles: list[RemovableHandle] = field(default_factory=list)
    _student: list[EncoderRecorder] = field(default_factory=list)
    _taught: list[EncoderRecorder] = field(default_factory=list)
    _items: Any = None
    _counted: bool = False
    _said: tuple[Any, Any] | None = None
    _carried: int = 0
    _arrived: int = 0
    _attention: list[tuple[Any, str]] = field(default_factory=list)
    _dropout: RecoveryDropout | None = None

    def install(self) -> None:
        """Register the hooks; with an attention term, switch both models to eager attention."""
        own = inspect_encoders(self.model, self.config.encoder) if self.teacher is not None else []
        others = self.teacher.encoders if self.teacher is not None else ()
        attention = self.config.attention_weight > 0
        self._dropout = RecoveryDropout(self.model, own, self.config.recovery_dropout)
        self._student = [EncoderRecorder(encoder, attention=attention) for encoder in own]
        self._taught = [EncoderRecorder(encoder, attention=attention) for encoder in others]
        for encoder in (*own, *others) if attention else ():
            self._attention.append((encoder.module, encoder.module.config._attn_implementation))
            encoder.module.set_attn_implementation("eager")
        # Where the model is the encoder itself, recording begins and ends between these two.
        self._handles = [self.model.register_forward_pre_hook(self._before, with_kwargs=True)]
        for recorder in (*self._student, *self._taught):
            recorder.install()
        self._handles.append(self.model.register_forward_hook(self._after, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks out and restore both models' attention and the student's dropout."""
        for handle in self._handles:
            handle.remove()
        for recorder in (*self._student, *self._taught):
            recorder.remove()
        for model, implementation in self._attention:
            model.set_attn_implementation(implementation)
        self._handles, self._student, self._taught, self._attention = [], [], [], []
        if self._dropout is not None:
            self._dropout.reset()
            self._dropout = None

    def take_mean_loss(self) -> float | None:
        """Mean distillation loss since the last call; ``None`` if there was no training step.

        Raises:
            RuntimeError: it was exactly 0 for ten steps or more, though the student changes at each.
        """
        if not self.loss_count:
            return None
        mean = float(self.loss_sum) / self.loss_count
        # A model that teaches itself is equal to the student until something is removed.
        silent = not mean and not self._is_whole()
        self._silent = self._silent + self._steps if silent else 0
        self.loss_sum, self.loss_count, self._steps = 0.0, 0, 0
        if self._silent >= SILENT_STEPS:
            raise RuntimeError(
                f"distillation: the loss has been exactly 0 for {self._silent} steps, so that the "
                "teacher is not heard: what student and teacher return is the same whatever they compute; "
                "return logits, set hidden_weight=1, or train without a teacher"
            )
        return mean

    def _is_whole(self) -> bool:
        """Whether the student has masks, and all are open."""
        if not is_attached(self.model):
            return False
        return all(gate.open for state in pruning_states(self.model) for gate in state.all_gates())

    def check_arrived(self) -> None:
        """Call after backward: of the losses that were handed out in a step, one must be differentiated.

        A second pass may serve a detached target, or a figure for a log.

        Raises:
            RuntimeError: the script computes its loss from something else than the model's outputs, or does
                not call the model.
        """
        carried, arrived = self._carried, self._arrived
        self._carried = self._arrived = 0
        self._steps += 1
        if self.teacher is not None and not carried:
            raise RuntimeError(
                "distillation: the model was not called in training mode in this step, so the teacher is not "
                "heard: let the training script call the model itself and not parts of it, or train without "
                "a teacher"
            )
        if carried and not arrived:
            raise RuntimeError(
                f"distillation: none of {carried} losses reached the gradients: the training script "
                "computes its loss neither from `outputs.loss` nor from the logits or last hidden states of "
                "the model's outputs; use one of them, or train without a teacher"
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if not module.training:
            return None
        kwargs = dict(kwargs)
        # Without it the model returns a mean over this micro-batch; `_after` weights it by the
        # micro-batch's share of items. Most heads ignore it, so that stock runs that accumulate
        # get gradients too large by the number of micro-batches (transformers issue 47688).
        self._items, self._counted = None, "num_items_in_batch" in kwargs
        if "num_items_in_batch" not in inspect.signature(type(module).forward).parameters:
            self._items = kwargs.pop("num_items_in_batch", None)
        if self.teacher is not None:
            assert self._dropout is not None
            self._dropout.update()
            self._said = None
            if torch.is_grad_enabled():
                # Before the student: what the teacher needs on its way is gone when that keeps most. And
                # some models write into the containers and tensors that they are called with.
                self._said = self._teach(self.teacher, Call.remember(args, kwargs, copy=True))
            for recorder in self._student:
                recorder.begin()
        return args, kwargs

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        if not module.training:
            return None
        if self.teacher is None:
            return self._carry(out, kwargs, None)
        passes = [recorder.end() for recorder in self._student]
        said, self._said = self._said, None
        if said is None:
            return out
        if not all(passes):
            raise RuntimeError(
                "distillation: the model returned outputs without running its encoder; losses that use "
                "the outputs of one pass several times (MatryoshkaLoss, AdaptiveLayerLoss) cannot be taught: "
                "train without a teacher"
            )
        self._check_attention(passes)
        aux = distillation_loss(
            self.model,
            (out, passes),
            said,
            self.teacher,
            self.config,
            problem_type=self._problem_type(),
            labels=kwargs.get("labels"),
        )
        if not aux.requires_grad:
            raise RuntimeError(
                "distillation: the loss has no gradient: the model returns its outputs detached; return them "
                "with their graph, set hidden_weight=1, or train without a teacher"
            )
        self.loss_sum = self.loss_sum + aux.detach()
        self.loss_count += 1
        self._carried += 1
        return self._carry(out, kwargs, aux)

    def _problem_type(self) -> str | None:
        """What the config of the student or of the teacher says of their task."""
        assert self.teacher is not None
        configs = [getattr(model, "config", None) for model in (self.model, self.teacher.model)]
        return next((found for each in configs if (found := getattr(each, "problem_type", None))), None)

    def _check_attention(self, passes: list[list[Encoded]]) -> None:
        """Refuse attention weights that were computed without a graph."""
        found = [
            x for each in passes for encoded in each for x in encoded.attentions.values() if x is not None
        ]
        # Of an encoder that is frozen nothing has one.
        graph = any(encoded.hidden_states[-1].requires_grad for each in passes for encoded in each)
        if found and graph and not any(weights.requires_grad for weights in found):
            raise RuntimeError(
                "distillation: the attention weights have no gradient, as activation checkpointing with "
                "use_reentrant=True computes them; set use_reentrant=False, or attention_weight=0"
            )

    def _carry(self, out: Any, kwargs: dict[str, Any], aux: Tensor | None) -> Any:
        """The outputs with the share in the loss, and with the distillation loss in all their gradients."""
        once = Once(self._note_arrival)
        alpha = self.config.task_weight
        names = {name for name, tensor in named_tensors(out) if tensor.dim() == 0}
        loss = "loss" if "loss" in names else "0" if isinstance(out, (tuple, list)) and "0" in names else None
        task_share = self._share(kwargs)
        teacher_share: Tensor | float = self._part()
        labels = kwargs.get("labels")
        unlabelled = isinstance(labels, Tensor) and not bool(labels.ne(-100).any())
        if aux is None and task_share is None and not unlabelled:
            return out
        if (
            task_share is not None
            and isinstance(labels, Tensor)
            and not self._met_rows_without_labels(labels)
        ):
            teacher_share = task_share
        smoothed_share = teacher_share if self.smoothed else 1.0

        def carry(name: str, value: Tensor) -> Tensor:
            if name == loss:
                # A mean over no items is NaN.
                value = torch.nan_to_num(value) if unlabelled else value
                value = value if task_share is None else task_share * value
                if aux is None or not value.requires_grad:
                    return value
                return Carry.apply(value, teacher_share * aux, alpha, 1 - alpha, once, True)  # type: ignore[no-any-return, no-untyped-call]
            if aux is None or not value.requires_grad:
                return value
            # Trainer's own factors are in the gradient of the script's loss, which is not seen here.
            part = (1 - alpha) / self.accumulation
            return Carry.apply(value, aux, alpha * smoothed_share, part, once, False)  # type: ignore[no-any-return, no-untyped-call]

        carried = map_tensors(carry, out)
        if aux is not None and self.without_labels and loss is None:
            # There is no task loss: the distillation loss is the whole, where Trainer looks for a loss.
            whole = Carry.apply(aux.detach(), teacher_share * aux, 0.0, 1.0, once, True)  # type: ignore[no-untyped-call]
            if isinstance(carried, MutableMapping):
                carried["loss"] = whole
            elif isinstance(carried, tuple):
                carried = (whole, *carried)
        return carried

    def _part(self) -> float:
        """A micro-batch's part in an optimizer step, where Trainer does not divide by their number."""
        return 1.0 / (self.accumulation * self.processes) if self._counted else 1.0

    def _note_arrival(self) -> None:
        self._arrived += 1

    def _teach(self, teacher: Teacher, call: Call) -> Any:
        """What the teacher returns for a call of the student, and the passes of its encoders."""
        # No loss is asked for, except of a teacher that is not known to do without.
        unneeded = TARGETS if head_of(teacher.model) is not None else ()
        kwargs = {name: value for name, value in call.kwargs.items() if name not in unneeded}
        device = next(self.model.parameters()).device.type
        for recorder in self._taught:
            recorder.begin()
        # Forward hooks run outside the autocast that accelerate wraps around the model's forward.
        with (
            torch.no_grad(),
            torch.autocast(device, self.autocast_dtype, enabled=self.autocast_dtype is not None),
        ):
            out = teacher.model(*call.args, **kwargs)
        return out, [recorder.end() for recorder in self._taught]

    def _share(self, kwargs: dict[str, Any]) -> Tensor | float | None:
        """This micro-batch's share of the labelled items of an optimizer step; ``None`` if not known."""
        labels = kwargs.get("labels")
        if self._items is None or not isinstance(labels, Tensor):
            return None
        items = labels.ne(-100).sum()
        # A step may be without any label at all.
        return items / torch.as_tensor(self._items, device=items.device).clamp(min=1)

    def _met_rows_without_labels(self, labels: Tensor) -> bool:
        """Whether shares of labelled items are no shares of rows: for tokens, and rows without a label."""
        if labels.dim() > 1 and not labels.is_floating_point():
            return True
        self.rows_without_labels = self.rows_without_labels or not bool(labels.ne(-100).all())
        return self.rows_without_labels
