"""The two stages of a job, fine-tuning and pruning, by the stock Trainer; and what their models are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments, set_seed

from ..trainer.resuming import last_complete_checkpoint
from .agreement import agreement
from .batches import LengthTrainer
from .interrupting import SaveOnInterrupt
from .preparing import Prepared
from .progress import Bar

#: Stages by number; their folders in that of the work.
STAGES = ("fine-tuning", "pruning")
#: Checkpoints that a stage writes.
CHECKPOINTS = 10


def train(trainer: Trainer, saver: SaveOnInterrupt, stage: int, *, resume: bool) -> None:
    """Train from the last checkpoint, if there is one to resume from."""
    checkpoint = last_complete_checkpoint(trainer.args.output_dir) if resume else None
    bar = Bar(STAGES[stage])
    trainer.add_callback(bar)
    try:
        with saver.listening():
            trainer.train(resume_from_checkpoint=checkpoint)
        if saver.interrupted:
            # It came after the last step, while the model was made small.
            raise KeyboardInterrupt
    finally:
        bar.close()
        trainer.remove_callback(bar)


def make_trainer(
    prepared: Prepared, model: PreTrainedModel, work: Path, stage: int, callbacks: list[Any]
) -> tuple[Trainer, SaveOnInterrupt]:
    """The stock Trainer of one of the two stages, and what listens to Ctrl-C."""
    saver = SaveOnInterrupt()
    # Each stage by itself draws the same, whether the one before was interrupted or not.
    set_seed(prepared.job.seed)
    trainer = LengthTrainer(
        model=model,
        args=arguments_of(prepared, work, stage),
        train_dataset=prepared.tokens["train"],
        eval_dataset=prepared.tokens["test"],
        data_collator=prepared.task.collator(prepared.tokenizer),
        compute_metrics=None if prepared.task.teaches_itself else prepared.task.compute_metrics,
        processing_class=prepared.tokenizer,
        callbacks=[*callbacks, saver],
    )
    # With our bar nobody needs its dictionaries.
    trainer.remove_callback(PrinterCallback)
    return trainer, saver


def arguments_of(prepared: Prepared, work: Path, stage: int) -> TrainingArguments:
    """Those of the Trainer of one of the two stages."""
    job, steps = prepared.job, prepared.steps[stage]
    return TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=job.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=prepared.rates[stage],
        warmup_steps=round(0.06 * steps),
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        logging_steps=max(1, steps // 50),
        save_strategy="steps",
        save_steps=max(1, steps // CHECKPOINTS),
        save_total_limit=1,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        seed=job.seed,
    )


def evaluate(prepared: Prepared, trainer: Trainer, dense: str | None) -> dict[str, float]:
    """Figures of the trainer's model; of embeddings the agreement with those of a dense model."""
    if prepared.task.teaches_itself:
        same = 100.0 if dense is None else agreement(prepared.model(dense), trainer.model, prepared)
        return {"agreement": same}
    found = trainer.evaluate()
    ours = {name.removeprefix("eval_"): value for name, value in found.items()}
    return {name: float(ours[name]) for name in prepared.task.metrics}
