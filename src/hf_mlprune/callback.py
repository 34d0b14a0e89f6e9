"""PruningCallback: events of the stock Trainer -> calls to the files above."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from .anatomy import find_encoder
from .card import model_card
from .carrier import Distiller
from .config import PruningConfig
from .distill import Teacher, load_teacher
from .files import write_folder, write_json
from .loop import (
    advance,
    collect,
    current_run,
    is_attached,
    measure_density,
    pruning_state,
    start,
)
from .masked import PruningState
from .modeling.bert import REPORT_FILE
from .prunable import attach, auto_class_name, kinds_of, reset_state
from .reporting import measure_latency, report
from .shrinking import Batch, shrink, shrunk_copy

logger = logging.getLogger(__name__)

#: Written when blocks are taught by the step-1 model. The underscore keeps it out of hub uploads.
STEP1_TEACHER = "_step1_teacher"


@dataclass
class Session:
    """What one `train()` holds besides the run; lives on the model's state, never saved.

    Attributes:
        teacher: as the user gave it, loaded and checked.
        distiller: hooks of the distillation, if there is a teacher.
        batches: the last inputs of the model, without labels, by whether it was training.
    """

    teacher: Teacher | None
    distiller: Distiller | None = None
    batches: dict[bool, Batch] = field(default_factory=dict)
    _handle: RemovableHandle | None = None

    def watch(self, model: nn.Module) -> None:
        """Remember the last inputs of a model."""
        self._handle = model.register_forward_pre_hook(self._remember, with_kwargs=True)

    def close(self) -> None:
        """Take all hooks out."""
        if self.distiller is not None:
            self.distiller.remove()
        if self._handle is not None:
            self._handle.remove()

    def _remember(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.batches[module.training] = {
            name: value.detach()
            for name, value in kwargs.items()
            if isinstance(value, torch.Tensor)
            and name not in ("labels", "start_positions", "end_positions", "num_items_in_batch")
        }


class PruningCallback(TrainerCallback, ExportableState):
    """Prunes the Trainer's model while it is fine-tuned (model pruning, not trial pruning).

        trainer = Trainer(model=model, ..., callbacks=[PruningCallback(density=0.2)])

    Training ends with the model physically small, in place, so that ``save_model``, ``evaluate`` and
    ``push_to_hub`` see the small one.

    Args:
        density: share of the encoder's weights to keep, in ``(0, 1]``. May be left out if the model
            has masks already (``attach``, or a ``PrunableBertFor...``).
        teacher: a model, or the folder or hub name of one, fine-tuned on the same labels.
        settings: any other setting of :class:`~hf_mlprune.config.PruningConfig`, by name.

    Raises:
        ValueError: a setting is unknown or out of its range.
    """

    def __init__(
        self,
        density: float | None = None,
        *,
        teacher: str | PreTrainedModel | None = None,
        **settings: Any,
    ) -> None:
        if density is None and settings:
            raise ValueError(f"density is missing, but {sorted(settings)} are given")
        self.teacher = teacher
        self.config = None if density is None else PruningConfig.create(density, **settings)
        self.planned_steps: int | None = None
        self.taught_by_object = isinstance(teacher, PreTrainedModel)

    def state(self) -> dict[str, Any]:
        """JSON form, kept in ``trainer_state.json`` so that a resumed run is the same run."""
        teacher = self.teacher if isinstance(self.teacher, str) else None
        return {
            "args": {**(self.config.to_dict() if self.config else {}), "teacher": teacher},
            "attributes": {
                "planned_steps": self.planned_steps,
                "taught_by_object": self.taught_by_object,
            },
        }

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> None:
        """Refuse what is not supported; put masks into the model, before a checkpoint is loaded."""
        _check_arguments(args)
        if isinstance(state.stateful_callbacks.get(type(self).__name__), list):
            raise ValueError("expected one PruningCallback, got several: one run has one density")
        self._prepare(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        """Begin or take up the run.

        Raises:
            ValueError: the optimizer does not hold the model's weights, or a resumed run differs
                from the one that was interrupted.
        """
        _check_optimizer(model, optimizer)
        if state.global_step and not is_attached(model):
            raise ValueError(
                "the checkpoint was loaded before the model had masks (a model from `model_init`, or a "
                "callback added after the Trainer was made): call `attach(model, config)` inside "
                "`model_init`, or pass the callback to the Trainer"
            )
        session = self._prepare(model)
        pruning = pruning_state(model)
        stored = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step:
            self._check_resumed(stored, state.max_steps)
        else:
            reset_state(pruning)
        self.planned_steps = state.max_steps
        # A checkpoint written without this callback lacks the entry that Trainer fills at saving.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        start(model, state.max_steps, state.global_step)
        session.close()
        session.watch(model)
        if session.teacher is not None:
            teacher = session.teacher
            if pruning.config.block_teacher == "step1" and _past_step1(pruning):
                teacher = load_teacher(_find_step1_teacher(args), model, pruning.config)
            session.distiller = Distiller(
                model,
                teacher,
                pruning.config,
                autocast_dtype=torch.bfloat16 if args.bf16 else None,
            )
            session.distiller.install()

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> None:
        """Forget a best metric of a model that is not yet pruned (see `on_evaluate`)."""
        if not _landed(pruning_state(model)):
            state.best_metric = None

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> None:
        """Learn from the gradients of the masks."""
        distiller = _session(model).distiller
        if distiller is not None:
            distiller.check_arrived()
        collect(model)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> None:
        """Set the masks for the next step."""
        pruning = pruning_state(model)
        before = _past_step1(pruning)
        advance(model, state.global_step)
        session = _session(model)
        step1 = pruning.config.block_teacher == "step1" and session.distiller is not None
        if step1 and not before and _past_step1(pruning) and not _landed(pruning):
            self._teach_by_step1(args, state, model, session)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: PreTrainedModel,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Add our figures to the bar, printed logs and ``trainer_state.json``.

        ``loss`` stays the task loss. Reporters that run before user callbacks do not see these.
        """
        if not is_attached(model) or pruning_state(model).run is None:
            return
        pruning = pruning_state(model)
        run = current_run(pruning)
        if "loss" in logs:
            figures = {
                "density": run.density,
                "density_target": run.press.target,
                "lambda": run.press.lambda_,
                "penalty": run.press.penalty,
                "pruning_phase": float(run.phase),
            }
            distiller = _session(model).distiller
            mean = distiller.take_mean_loss() if distiller is not None else None
            if mean is not None:
                figures["distillation_loss"] = mean
        elif any(name.startswith("eval_") for name in logs):
            figures = {"eval_density": run.density}
        else:
            return
        for name, value in figures.items():
            logs.setdefault(name, value)
            state.log_history[-1].setdefault(name, value)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: PreTrainedModel,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Keep a model that is not yet pruned from being the best one, and early stopping quiet.

        The metric was logged already. Early stopping counts nothing while there is no best metric.
        """
        if not is_attached(model) or pruning_state(model).run is None:
            return
        if _landed(pruning_state(model)) or args.metric_for_best_model is None:
            return
        state.best_metric = None
        name = "eval_" + args.metric_for_best_model.removeprefix("eval_")
        if name in metrics:
            metrics[name] = float("-inf") if args.greater_is_better else float("inf")

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> None:
        """Shrink the model in place, prove it equal, report.

        Raises:
            RuntimeError: training ended before all masks were final.
            ShrinkError: see :func:`~hf_mlprune.shrinking.shrink`.
        """
        pruning = pruning_state(model)
        session = _session(model)
        session.close()
        for gate in pruning.all_gates():
            gate.refresh()
        target, density = pruning.config.density, measure_density(model)
        if not _landed(pruning) or density > target + 1e-9:
            raise RuntimeError(
                f"training ended at step {state.global_step} of {state.max_steps}, before pruning did: "
                f"density {density:.4f}, target {target:g}; checkpoints of this run are whole: resume "
                "from the last one, or train with fewer steps from the start"
            )
        done = shrink(model, list(session.batches.values()))
        rows = _measure(model, session)
        found = report(model, shrunk=done, latency=rows)
        kinds = kinds_of(model)
        model.pruning_report = found.to_dict()
        if kinds is not None:
            model.pruning_card = model_card(found, auto_class_name(kinds))
        if state.is_world_process_zero:
            write_json(Path(args.output_dir) / REPORT_FILE, found.to_dict())
            console = Console(stderr=True)
            console.print(found.table())
            for row in rows:
                console.print(
                    f"{row.batch} x {row.length} tokens on {row.device}, {row.threads} threads: "
                    f"{row.dense_seconds * 1e3:.1f} ms dense, {row.pruned_seconds * 1e3:.1f} ms pruned "
                    f"({row.speedup:.2f}x)"
                )
            console.print(
                f"landed at density {density:.4f} (target {target:g}); masked and shrunk outputs "
                f"differ by {done.max_difference:.1e} at most"
            )

    def _prepare(self, model: PreTrainedModel) -> Session:
        """Attach masks and a session to a model that has none; check the teacher."""
        if not is_attached(model):
            if self.config is None:
                raise ValueError(
                    "density is missing: give PruningCallback(density=0.2), or a model with masks"
                )
            attach(model, self.config)
        pruning = pruning_state(model)
        if self.config is not None and pruning.config != self.config:
            raise ValueError(
                f"the model has masks of other settings than the callback: {pruning.config} and "
                f"{self.config}; give the callback no settings to use the model's"
            )
        if not isinstance(pruning.session, Session):
            given = self.teacher
            teacher = None if given is None else load_teacher(given, model, pruning.config)
            pruning.session = Session(teacher)
        return pruning.session

    def _check_resumed(self, stored: Any, max_steps: int) -> None:
        if not isinstance(stored, dict) or "args" not in stored:
            raise ValueError("the checkpoint is not of a pruning run: start the run anew from its weights")
        now = self.state()["args"]
        for name in sorted(set(stored["args"]) | set(now)):
            before = stored["args"].get(name)
            if before != now.get(name):
                raise ValueError(
                    f"resume: expected {name}={before!r} as in the interrupted run, got {now.get(name)!r}"
                )
        steps = stored["attributes"]["planned_steps"]
        if steps != max_steps:
            raise ValueError(
                f"resume: expected {steps} steps in all as in the interrupted run, got {max_steps}; "
                "phases are fractions of the run, so it cannot be made longer or shorter half-way"
            )
        if stored["attributes"]["taught_by_object"] and self.teacher is None:
            raise ValueError("resume: the interrupted run had a teacher; pass the same model again")

    def _teach_by_step1(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: PreTrainedModel,
        session: Session,
    ) -> None:
        """Write the model as it is after heads and rows, and go on with it as the teacher."""
        assert session.distiller is not None
        session.close()
        copy = shrunk_copy(model, list(session.batches.values()))
        if state.is_world_process_zero:
            write_folder(Path(args.output_dir) / STEP1_TEACHER, copy.save_pretrained)
        session.watch(model)
        session.distiller.install()
        session.distiller.set_teacher(load_teacher(copy, model, pruning_state(model).config))


def _session(model: nn.Module) -> Session:
    session = pruning_state(model).session
    assert isinstance(session, Session)
    return session


def _past_step1(pruning: PruningState) -> bool:
    return int(pruning.landed) >= 1


def _landed(pruning: PruningState) -> bool:
    return int(pruning.landed) >= 2


def _find_step1_teacher(args: TrainingArguments) -> str:
    folder = Path(args.output_dir) / STEP1_TEACHER
    if not folder.is_dir():
        raise ValueError(
            f"resume: expected the step-1 teacher in {folder}, which the interrupted run wrote; "
            "restore it, or resume from a checkpoint before the block phase"
        )
    return str(folder)


def _measure(model: PreTrainedModel, session: Session) -> list[Any]:
    lengths = [batch["input_ids"].shape[-1] for batch in session.batches.values() if "input_ids" in batch]
    length = max(lengths, default=min(128, model.config.max_position_embeddings))
    measured = [measure_latency(model, batch, length, rounds=30, budget_seconds=5.0) for batch in (1, 32)]
    return [row for row in measured if row is not None]


def _check_optimizer(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [
        name for name, p in find_encoder(model)[1].named_parameters() if p.requires_grad and id(p) not in held
    ]
    if missing:
        raise ValueError(
            f"expected every trainable encoder weight in the optimizer, but {len(missing)} are not "
            f"there, e.g. {missing[0]!r}: it was made for another model, or before this one was "
            "shrunk; make a new Trainer (or optimizer) for this model"
        )


def _check_arguments(args: TrainingArguments) -> None:
    if args.fp16:
        raise ValueError(
            "fp16=True: mask gradients would be scaled by the loss scaler; use bf16=True, or neither"
        )
    if args.deepspeed or args.fsdp:
        raise ValueError(
            "DeepSpeed and FSDP shard the weights that masks multiply, which is not supported: use "
            "one process, or DistributedDataParallel (`torchrun`)"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"expected one GPU per process, got {args.n_gpu} in one (DataParallel): start with "
            "`torchrun --nproc_per_node=...`, or set CUDA_VISIBLE_DEVICES"
        )
