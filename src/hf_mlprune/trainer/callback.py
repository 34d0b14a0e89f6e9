"""PruningCallback: events of the stock Trainer -> calls to the files above."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..budgets import TARGETED
from ..config import PruningConfig
from ..loop import advance, collect, densities_of_layers, figures, finished_target, is_running, start
from ..part_times import MEASURING
from ..reports.report import Report
from ..state import is_attached, pruning_states
from .checks import check_arguments, check_module, check_optimizer, check_writable
from .data import has_no_labels, micro_batches, typical_length
from .ending import end_run, rescue
from .publishing import Publisher
from .resuming import check_complete, check_resumed, warn_of_incomplete
from .session import Session, forget_best, open_session, use_evaluation_weights
from .targets import check_targets, write_target


class PruningCallback(TrainerCallback, ExportableState):
    """Prunes the Trainer's model while it is fine-tuned (it prunes weights, not Optuna trials).

    One line of a script::

        trainer = Trainer(model=model, ..., callbacks=[PruningCallback(density=0.2)])

    At the end of training the model object itself is small. So ``save_model``, ``evaluate`` and
    ``push_to_hub`` use the small model.

    Args:
        density: share of the encoder's weights to keep, in ``(0, 1]``. For another target, ``speedup=3``,
            ``latency="12 ms"``, ``size="30 MB"`` or ``multiply_adds=0.25``; for several models from one
            run ``targets=[0.5, 0.35, 0.2]``. All may be left out if the model has masks already
            (``attach``, or a ``PrunableBertFor...``).
        teacher: a module of any class that takes the same inputs as the model, or the folder or hub name of
            a model of the same class. It must be fine-tuned on the same labels.
        settings: any other setting of :class:`~hf_mlprune.config.PruningConfig`, by name.

    Raises:
        ValueError: a setting is unknown or out of its range.
        TypeError: the teacher is no module and no name.
    """

    def __init__(
        self,
        density: float | None = None,
        *,
        teacher: str | os.PathLike[str] | nn.Module | None = None,
        **settings: Any,
    ) -> None:
        if any(isinstance(value, PruningConfig) for value in (density, *settings.values())):
            raise TypeError(
                "settings: expected them one by one, as in density=0.2, got a PruningConfig; or call "
                "`attach(model, config)`, and give the callback no settings"
            )
        targeted = density is not None or not set(TARGETED).isdisjoint(settings)
        if settings and not targeted:
            meant = [near for name in settings for near in difflib.get_close_matches(name, TARGETED, n=1)]
            hint = f"; did you mean {meant[0]}=?" if meant else ""
            raise ValueError(f"density is missing, but {sorted(settings)} are given{hint}")
        if teacher is not None and not isinstance(teacher, (str, os.PathLike, nn.Module)):
            raise TypeError(
                f"teacher: expected a torch module, a folder or a hub name, got {type(teacher).__name__}"
            )
        self.teacher = os.fspath(teacher) if isinstance(teacher, os.PathLike) else teacher
        self.config = PruningConfig.create(density, **settings) if targeted else None
        self.planned_steps: int | None = None
        self.teacher_fingerprint: str | None = None
        # Of the pruned model, once there is one.
        self.report: Report | None = None
        self.taught_by_object = isinstance(teacher, nn.Module)
        self._settings: PruningConfig | None = self.config
        self._session: Session | None = None

    def state(self) -> dict[str, Any]:
        """JSON form, kept in ``trainer_state.json`` so that a resumed run is the same run."""
        teacher = self.teacher if isinstance(self.teacher, str) else None
        return {
            "args": {**(self._settings.to_dict() if self._settings else {}), "teacher": teacher},
            "attributes": {
                "planned_steps": self.planned_steps,
                "taught_by_object": self.taught_by_object,
                "teacher_fingerprint": self.teacher_fingerprint,
                "rows_without_labels": self._session is not None and self._session.rows_without_labels,
            },
        }

    @property
    def publisher(self) -> Publisher:
        """What is known of the run that its card says; there once a run has begun."""
        assert self._session is not None
        return self._session.publisher

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Refuse what is not supported; put masks into the model, before a checkpoint is loaded."""
        check_module(model)
        check_arguments(args)
        self._check_alone(state)
        if state.is_world_process_zero:
            warn_of_incomplete(Path(args.output_dir))
        self._prepare(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any,
        train_dataloader: Any,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Begin or take up the run.

        Raises:
            ValueError: the optimizer does not hold the model's weights, or a resumed run differs
                from the one that was interrupted.
        """
        check_module(model)
        check_arguments(args)
        self._check_alone(state)
        known = pruning_states(model)[0].config if is_attached(model) else self._settings
        check_optimizer(model, optimizer, known.encoder if known else ())
        if state.is_world_process_zero:
            check_writable(Path(args.output_dir))
        if state.global_step:
            check_complete(args, optimizer, lr_scheduler)
        if state.global_step and not is_attached(model):
            raise ValueError(
                "the checkpoint was loaded before the model had masks (a model from `model_init`, or a "
                "callback added after the Trainer was made): call `attach(model, config)` inside "
                "`model_init`, or pass the callback to the Trainer"
            )
        session = self._prepare(model)
        if state.is_world_process_zero:
            check_targets(
                Path(args.output_dir),
                pruning_states(model)[0].config,
                processing_class,
                is_search=state.is_hyper_param_search,
            )
        stored = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step:
            check_resumed(stored, self.state(), state.max_steps)
        self.planned_steps = state.max_steps
        # A checkpoint written without this callback lacks the entry that Trainer fills at saving.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        first = pruning_states(model)[0]
        wanted = first.length is not None
        length = typical_length(getattr(train_dataloader, "dataset", None)) if wanted else None
        if first.config.measures_times and not state.global_step and state.is_world_process_zero:
            Console(stderr=True).print(MEASURING)
        start(model, state.max_steps, state.global_step, length=length)
        session.close()  # of a run that failed
        session.publisher.begin(train_dataloader)
        resumed = stored["attributes"] if state.global_step else {}
        session.begin(
            args,
            without_labels=has_no_labels(model, train_dataloader, args),
            rows_without_labels=resumed.get("rows_without_labels", False),
        )

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note where an epoch begins, which a resumed run may begin anew (``ignore_data_skip``)."""
        if args.ignore_data_skip:
            self._at_work().epoch_began = state.global_step

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        train_dataloader: Any,
        **kwargs: Any,
    ) -> None:
        """Tell the distillation how many micro-batches there are; see :func:`forget_best`."""
        session = self._at_work()
        if session.distiller is not None:
            parts = micro_batches(args, state, train_dataloader, session.epoch_began)
            session.distiller.accumulation = parts
        forget_best(model, state)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        """Learn from the gradients of the masks; with several targets, cool down towards each."""
        session = self._at_work()
        if session.distiller is not None:
            session.distiller.check_arrived()
        collect(model)
        session.cool_down(optimizer)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Restore the learning rates of the schedule."""
        self._at_work().warm_up()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Set the masks for the next step; after the first, rehearse the export.

        The model of a target that others follow is written before.
        """
        pruning = pruning_states(model)[0]
        session = self._at_work()
        session.rehearse()
        before = pruning.structured_is_final
        finished = finished_target(model, state.global_step)
        if finished is not None:
            # In every process: their weights must stay the same.
            use_evaluation_weights(optimizer)
        if finished is not None and state.is_world_process_zero:
            try:
                write_target(session, finished, args, state, processing_class)
            except BaseException as error:
                error.add_note(rescue(model, Path(args.output_dir)))
                raise
        advance(model, state.global_step)
        if control.should_training_stop:
            use_evaluation_weights(optimizer)
        step1 = pruning.config.step1_teaches and session.teacher is not None
        if step1 and not before and pruning.structured_is_final and not pruning.is_final:
            use_evaluation_weights(optimizer)
            session.teach_by_step1(Path(args.output_dir), write=state.is_world_process_zero)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Add our figures to the bar, printed logs and ``trainer_state.json``.

        ``loss`` stays the task loss. Reporters that run before user callbacks do not see these.
        """
        if not is_running(model):
            return
        if "loss" in logs:
            found = figures(model)
            distiller = self._at_work().distiller
            mean = distiller.take_mean_loss() if distiller is not None else None
            if mean is not None:
                found["distillation_loss"] = mean
        elif any(name.startswith("eval_") for name in logs):
            found = {"eval_density": figures(model)["density"]}
        else:
            return
        for name, value in found.items():
            logs.setdefault(name, value)
            state.log_history[-1].setdefault(name, value)
        if "loss" in logs:
            # Reporters take single numbers only.
            state.log_history[-1].setdefault("density_of_layers", densities_of_layers(model))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        metrics: dict[str, Any],
        eval_dataloader: Any,
        **kwargs: Any,
    ) -> None:
        """Forget the best metric, for evaluations with no step between them; rehearse with their inputs.

        What was measured goes into the card.
        """
        if is_running(model):
            self._at_work().rehearse()
            forget_best(model, state)
        if self._session is not None and self._session.model is model:
            self._session.publisher.evaluated(model, args, state, metrics=metrics, dataloader=eval_dataloader)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        """Shrink the model in place, prove it equal, report; see :func:`~.ending.end_run` for errors."""
        session = self._at_work()
        session.close()
        use_evaluation_weights(optimizer)
        try:
            end_run(session, args, state)
        finally:
            self.report = session.report
        session.release()

    def on_push_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Leave our card beside the one that Trainer is about to write over it."""
        if self._session is not None and self._session.model is model:
            self._session.publisher.push(model, args, state)

    def _prepare(self, model: nn.Module) -> Session:
        """The session of this callback for a model; at first the teacher is checked and masks attached."""
        if self._session is None or self._session.model is not model or not is_attached(model):
            teacher = self.teacher
            earlier = pruning_states(model)[0].session if is_attached(model) else None
            if isinstance(earlier, Session):
                # Of a run on this model that failed, its hooks are still there.
                earlier.close()
                if teacher is None and self.taught_by_object and earlier.teacher is not None:
                    # Trainer made this callback anew from its state, which cannot hold a model.
                    teacher = earlier.teacher.model
            self._session = open_session(model, self.config, teacher)
            for pruning in pruning_states(model):
                pruning.session = self._session
                self._settings = pruning.config
            self.teacher_fingerprint = self._session.teacher_fingerprint
        return self._session

    def _at_work(self) -> Session:
        """The session of the run that goes on."""
        assert self._session is not None
        return self._session

    def _check_alone(self, state: TrainerState) -> None:
        if isinstance(state.stateful_callbacks.get(type(self).__name__), list):
            raise ValueError("expected one PruningCallback, got several: one run has one density")
