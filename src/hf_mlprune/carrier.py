"""How losses reach the gradients of a training script that is not ours.

Micro-batches are weighted by their share of items, with or without a teacher: mask gradients would be
too large by the number of micro-batches otherwise. The distillation loss rides on ``outputs.loss``: its
value stays the task loss, its gradient is that of the whole objective. The pruning penalty needs no
carrier (see `gates`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .config import PruningConfig
from .distill import Teacher, distillation_loss


@dataclass
class Distiller:
    """Hooks of one model on the loss that it returns in training mode: shares, and a teacher's loss.

    Attributes:
        model: the student.
        teacher: whose outputs are matched, if any; may be replaced while the hooks are out.
        config: the weights.
        autocast_dtype: dtype of the autocast that the script runs the student under, if any.
        loss_sum: sum of the distillation losses since it was last read.
        loss_count: how many those are.
    """

    model: PreTrainedModel
    teacher: Teacher | None
    config: PruningConfig
    autocast_dtype: torch.dtype | None = None
    loss_sum: Tensor | float = 0.0
    loss_count: int = 0
    _handles: list[RemovableHandle] = field(default_factory=list)
    _items: Any = None
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
                "the training script does not use the loss that the model returns (a `compute_loss` "
                "of its own, say); use `outputs.loss`, or train without a teacher"
            )

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
        kwargs["return_dict"] = True
        if self.config.hidden_weight:
            kwargs["output_hidden_states"] = True
        if self.config.attention_weight:
            kwargs["output_attentions"] = True
        return args, kwargs

    def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        if not module.training:
            return None
        if self.teacher is None:
            if self._items is not None and isinstance(out, ModelOutput) and out.get("loss") is not None:
                weight, task = self._share(kwargs, out["loss"])
                out["loss"] = weight * task
            return out
        if out.get("loss") is None:
            raise RuntimeError(
                "distillation: the model got no labels and returned no loss, because the training "
                "script computes the loss itself (label smoothing, `compute_loss_func`); let the "
                "model compute it, or train without a teacher"
            )
        aux = self._distillation(self.teacher, args, kwargs, out)
        self.loss_sum = self.loss_sum + aux.detach()
        self.loss_count += 1
        weight, task = self._share(kwargs, out["loss"])
        alpha = self.config.task_weight
        objective = alpha * task + (1 - alpha) * aux
        # Its gradient is the objective's, its value the task loss.
        carried = weight * (objective + (task - objective).detach())
        if carried.requires_grad:
            self._carried += 1
            carried.register_hook(self._note_arrival)  # type: ignore[no-untyped-call]
        out["loss"] = carried
        return out

    def _note_arrival(self, gradient: Tensor) -> None:
        self._arrived += 1

    def _distillation(self, teacher: Teacher, args: Any, kwargs: dict[str, Any], out: Any) -> Tensor:
        inputs = {
            name: value
            for name, value in kwargs.items()
            if name not in ("labels", "start_positions", "end_positions")
        }
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
