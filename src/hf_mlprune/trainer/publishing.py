"""What a run says of its model on the hub: its card, as facts come in, and the cards of its pushes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from ..families import head_of
from ..loop import is_running
from ..modeling.cards import may_replace
from ..modeling.checkpoint import write_text
from ..modeling.pretrained import PrunedMixin
from ..reports.card import TAGS, CardFacts, model_card, unfinished_card
from ..reports.evaluation import Evaluations, find_evaluations, metrics_of
from ..reports.origin import HubDataset, Origin, find_dataset, find_origin
from ..reports.report import Report
from ..state import is_attached, pruning_states

#: Our card beside the README.md that `Trainer.create_model_card` and `Trainer.push_to_hub` write.
CARD_FILE = "PRUNING.md"


def note(model: nn.Module, found: Report, facts: CardFacts) -> None:
    """Hand a pruned model its report, card and tags, which it is saved and pushed with.

    A stock model inside a module of the script's own gets the report alone.
    """
    for module in model.modules():
        if isinstance(module, PrunedMixin):
            module.pruning_report = found.to_dict()
    head = head_of(model)
    if head is not None:
        assert isinstance(model, PrunedMixin)
        model.add_model_tags(list(TAGS))
        model.pruning_card = model_card(found, head, facts, model.model_tags)


@dataclass
class Publisher:
    """Collects what the card of one run says.

    Attributes:
        dense: metrics of the model before the run.
        trained_on: its training data, if known on the hub.
        evaluated_on: its evaluation data, likewise.
        report: of the pruned model, once there is one.
        step: optimizer step of the weights that the run ended with.
        ended: entries of Trainer's log when it ended.
        written: the card as it was last made.
    """

    dense: dict[str, float] = field(default_factory=dict)
    trained_on: HubDataset | None = None
    evaluated_on: HubDataset | None = None
    report: Report | None = None
    step: int = 0
    ended: int = 0
    written: str | None = None
    _origin: Origin | None = None

    def begin(self, train_dataloader: Any) -> None:
        """Note what a run learns from."""
        self.trained_on = find_dataset(getattr(train_dataloader, "dataset", None))

    def finish(self, model: nn.Module, report: Report, args: TrainingArguments, state: TrainerState) -> None:
        """Make the card of the pruned model.

        Args:
            model: pruned.
            report: of it.
            args: of the run.
            state: at its end.
        """
        best = state.best_global_step if args.load_best_model_at_end else None
        self.step, self.ended = state.global_step if best is None else best, len(state.log_history)
        self.report = report
        self._make(model, report, args, state)

    def describe(
        self,
        model: nn.Module,
        report: Report,
        args: TrainingArguments,
        state: TrainerState,
        *,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Make the card of a model that the run does not end with, and that has no repository of its own.

        Args:
            model: pruned.
            report: of it.
            args: of the run.
            state: of the run.
            metrics: of the model, by their names, once it was evaluated.
        """
        facts = dataclasses.replace(self._facts(model, args, state), repository=None)
        if metrics is not None:
            facts = dataclasses.replace(
                facts, evaluations=dataclasses.replace(facts.evaluations, after=metrics)
            )
        note(model, report, facts)

    def evaluated(
        self,
        model: nn.Module,
        args: TrainingArguments,
        state: TrainerState,
        *,
        metrics: Mapping[str, Any],
        dataloader: Any,
    ) -> None:
        """Take up an evaluation: of a model that is still dense, or of the pruned one.

        Those within a run are in Trainer's log, which outlives an interrupted one.

        Args:
            model: that was evaluated.
            args: of the run.
            state: of the run; its log has the evaluation.
            metrics: what was measured.
            dataloader: of the evaluation data.
        """
        found = metrics_of(metrics)
        if not found:
            return
        self.evaluated_on = find_dataset(getattr(dataloader, "dataset", None))
        if self.report is not None:
            # Unless somebody wrote another card since.
            if isinstance(model, PrunedMixin) and model.pruning_card == self.written:
                self._make(model, self.report, args, state)
        elif is_attached(model) and not is_running(model) and _density(model) == 1.0:
            self.dense |= found

    def push(self, model: nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        """Leave a card where Trainer is about to push from.

        At the end of a run Trainer writes a README.md of its own over ours; before that, none.
        """
        if not state.is_world_process_zero:
            return
        head, readme = head_of(model), Path(args.output_dir) / "README.md"
        if isinstance(model, PrunedMixin):
            if model.pruning_card is not None:
                write_text(readme.with_name(CARD_FILE), model.pruning_card)
        elif head is not None and is_attached(model) and may_replace(readme):
            density, target = _density(model), pruning_states(model)[0].config.goal
            tags = getattr(model, "model_tags", None) or ()
            facts = self._facts(model, args, state)
            write_text(readme, unfinished_card(head, facts, density=density, target=target, tags=tags))

    def _make(self, model: nn.Module, report: Report, args: TrainingArguments, state: TrainerState) -> None:
        note(model, report, self._facts(model, args, state))
        if isinstance(model, PrunedMixin):
            self.written = model.pruning_card
            self.push(model, args, state)

    def _facts(self, model: nn.Module, args: TrainingArguments, state: TrainerState) -> CardFacts:
        """All that is known by now; the hub is asked once, by runs that push there."""
        if not isinstance(model, PreTrainedModel):
            return CardFacts()
        if self._origin is None:
            online = args.push_to_hub and state.is_world_process_zero
            self._origin = find_origin(model.config.name_or_path, online=online)
        measured = Evaluations()
        if self.report is not None:
            history = state.log_history
            measured = find_evaluations(history, step=self.step, ended=self.ended, dense=self.dense)
        repository = args.hub_model_id
        return CardFacts(
            origin=self._origin,
            evaluations=measured,
            trained_on=self.trained_on,
            evaluated_on=self.evaluated_on,
            repository=repository if repository and "/" in repository else None,
        )


def _density(model: nn.Module) -> float:
    """Of the encoder that has most left."""
    return max(pruning.density() for pruning in pruning_states(model))
