"""How losses reach the gradients of a training script that is not ours.

Micro-batches are weighted by their share of items, with or without a teacher: mask gradients would be
too large by the number of micro-batches otherwise. The distillation loss rides on whatever the model
returns: on ``outputs.loss``, and on the logits and states beside it, for scripts that compute a loss of
their own from those. Values stay what they were; the gradient is that of the whole objective, into which
the distillation loss enters once. The pruning penalty needs no carrier (see `gates`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .config import PruningConfig
from .distill import Teacher, distillation_loss

#: Inputs that say what a model should have answered.
TARGETS = ("labels", "start_positions", "end_positions")


@dataclass
class _Once:
    """Whether the distillation loss of one forward pass has entered the gradients."""

    note: Callable[[], None]
    entered: bool = False


class _Carry(torch.autograd.Function):
    """The carrier's value; its gradient weighted, and that of another loss added to the graph."""

    @staticmethod
    def forward(
        ctx: Any, carrier: Tensor, aux: Tensor, carrier_weight: float, aux_weight: float, once: _Once
    ) -> Tensor:
        ctx.weights, ctx.once, ctx.scalar = (carrier_weight, aux_weight), once, carrier.dim() == 0
        # Not a view, which scripts could not change in place as they do a loss.
        return carrier.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        carrier_weight, aux_weight = ctx.weights
        aux_gradient = None
        if not ctx.once.entered:
            ctx.once.entered = True
            ctx.once.note()
            # A loss is scaled as the script scales it; of other outputs the gradient says nothing about that.
            aux_gradient = aux_weight * (gradient if ctx.scalar else gradient.new_ones(()))
        return carrier_weight * gradient, aux_gradient, None, None, None


@dataclass
class Distiller:
    """Hooks of one model on the loss that it returns in training mode: shares, and a teacher's loss.

    Attributes:
        model: the student.
        teacher: whose outputs are matched, if any; may be replaced while the hooks are out.
        config: the weights.
        autocast_dtype: dtype of the autocast that the script runs the student under, if any.
        accumulation: micro-batches per optimizer step.
        processes: by how many Trainer multiplies a loss that it passes the number of items.
        smoothed: whether a loss from the logits is Trainer's smoothed one: a mean over its micro-batch,
            though it is passed the number of items (transformers 5.0).
        loss_sum: sum of the distillation losses since it was last read.
        loss_count: how many those are.
    """

    model: PreTrainedModel
    teacher: Teacher | None
    config: PruningConfig
    autocast_dtype: torch.dtype | None = None
    accumulation: int = 1
    processes: int = 1
    smoothed: bool = False
    loss_sum: Tensor | float = 0.0
    loss_count: int = 0
    _handles: list[RemovableHandle] = field(default_factory=list)
    _items: Any = None
    _asked: set[str] = field(default_factory=set)
    _carried: int = 0
    _arrived: int = 0
    _attention: list[tuple[PreTrainedModel, str]] = field(default_factory=list)

    def install(self) -> None:
        """Hang the hooks in; with an attention term, switch both models to eager attention."""
        if self.teacher is not None and self.config.attention_weight:
            for model in (self.model, self.teacher.model):
                self._attention.append((model, model.config._attn_implementation))
                model.set_attn_implementation("eager")
        self._handles = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Take the hooks out and restore both models' attention."""
        for handle in self._handles:
            handle.remove()
        for model, implementation in self._attention:
            model.set_attn_implementation(implementation)
        self._handles, self._attention = [], []

    def take_mean_loss(self) -> float | None:
        """Mean distillation loss since the last call; ``None`` if there was no training step."""
        if not self.loss_count:
            return None
        mean = float(self.loss_sum) / self.loss_count
        self.loss_sum, self.loss_count = 0.0, 0
        return mean

    def check_arrived(self) -> None:
        """Call after backward: every loss that was handed out must have been differentiated.

        Raises:
            RuntimeError: the script computes its loss from something else than ``outputs.loss``.
        """
        carried, arrived = self._carried, self._arrived
        self._carried = self._arrived = 0
        if arrived < carried:
            raise RuntimeError(
                f"distillation: {carried - arrived} of {carried} losses did not reach the gradients: "
                "the training script computes its loss neither from `outputs.loss` nor from the logits or "
                "last hidden states of the model's outputs; use one of them, or train without a teacher"
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if not module.training:
            return None
        kwargs = dict(kwargs)
        # Without it the model returns a mean over this micro-batch; `_after` weights it by the
        # micro-batch's share of items. Most heads ignore it, so that stock runs that accumulate
        # get gradients too large by the number of micro-batches (transformers issue 47688).
        self._items = kwargs.pop("num_items_in_batch", None)
        if self.teacher is None:
            return args, kwargs
        # Only what the script asked for can be in its loss.
        self._asked = {
            name
            for name, switch in (
                ("hidden_states", "output_hidden_states"),
                ("attentions", "output_attentions"),
            )
            if kwargs.get(switch, getattr(module.config, switch, False))
        }
        kwargs["return_dict"] = True
        if self.config.hidden_weight:
            kwargs["output_hidden_states"] = True
        if self.config.attention_weight:
            kwargs["output_attentions"] = True
        return args, kwargs

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        if not module.training:
            return None
        if self.teacher is None:
            if self._items is not None and isinstance(out, ModelOutput) and out.get("loss") is not None:
                weight, task = self._share(kwargs, out["loss"])
                out["loss"] = weight * task
            return out
        aux = self._distillation(self.teacher, args, kwargs, out)
        self.loss_sum = self.loss_sum + aux.detach()
        self.loss_count += 1
        if not aux.requires_grad:
            return out
        self._carried += 1
        alpha, once = self.config.task_weight, _Once(self._note_arrival)
        scale = self._part() if self.smoothed else 1.0

        def carry(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(carry, value))
            if not isinstance(value, Tensor) or not value.requires_grad:
                return value
            # Trainer's own factors are in the gradient of the script's loss, which is not seen here.
            return _Carry.apply(value, aux, alpha * scale, (1 - alpha) / self.accumulation, once)  # type: ignore[no-untyped-call]

        for name, value in list(out.items()):
            if name != "loss" and not (isinstance(value, tuple) and name not in self._asked):
                out[name] = carry(value)
        if out.get("loss") is not None:
            weight, task = self._share(kwargs, out["loss"])
            # Tokens without a label are taught, too.
            part = self._part() if "logits" in out and out["logits"].dim() == 3 else weight
            out["loss"] = _Carry.apply(weight * task, part * aux, alpha, 1 - alpha, once)  # type: ignore[no-untyped-call]
        return out

    def _part(self) -> float:
        """A micro-batch's part in an optimizer step, where Trainer does not divide by their number."""
        return 1.0 if self._items is None else 1.0 / (self.accumulation * self.processes)

    def _note_arrival(self) -> None:
        self._arrived += 1

    def _distillation(self, teacher: Teacher, args: Any, kwargs: dict[str, Any], out: Any) -> Tensor:
        inputs = {name: value for name, value in kwargs.items() if name not in TARGETS}
        device = self.model.device.type
        # Forward hooks run outside the autocast that accelerate wraps around the model's forward.
        with (
            torch.no_grad(),
            torch.autocast(device, self.autocast_dtype, enabled=self.autocast_dtype is not None),
        ):
            teacher_out = teacher.model(*args, **inputs)
        mask = kwargs.get("attention_mask")
        return distillation_loss(
            out,
            teacher_out,
            teacher,
            self.config,
            # Multiple choice flattens its choices before the encoder.
            attention_mask=mask.flatten(0, -2) if mask is not None else None,
            problem_type=getattr(self.model.config, "problem_type", None),
        )

    def _share(self, kwargs: dict[str, Any], task: Tensor) -> tuple[Tensor | float, Tensor]:
        """This micro-batch's share of the items of an optimizer step, and its mean task loss."""
        labels = kwargs.get("labels")
        if self._items is None or labels is None:
            return 1.0, task
        items = labels.ne(-100).sum()
        if int(items) == 0:
            # A mean over no items is NaN.
            task = torch.nan_to_num(task)
        return items / self._items, task
