"""Short runs of the stock Trainer."""

from __future__ import annotations

from pathlib import Path

from transformers import Trainer, TrainingArguments

from hf_mlprune import PruningCallback

from .models import make_dataset


def training_arguments(folder: Path, **changes) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 24,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "logging_steps": 4,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **changes,
        }
    )


def make_trainer(
    folder: Path,
    model,
    callback: PruningCallback | None = None,
    *,
    head=None,
    family="bert",
    callbacks=(),
    model_init=None,
    **changes,
) -> Trainer:
    data = make_dataset(head, family=family)
    return Trainer(
        model=model,
        model_init=model_init,
        args=training_arguments(folder, **changes),
        train_dataset=data,
        eval_dataset=data.select(range(16)),
        callbacks=[*([callback] if callback else []), *callbacks],
    )


def distillation_losses(trainer):
    return [entry["distillation_loss"] for entry in trainer.state.log_history if "distillation_loss" in entry]
