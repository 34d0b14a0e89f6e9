"""Small real models, data and Trainers shared by the tests."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
from pathlib import Path

# One thread each: small models are faster so, and tests that run side by side do not wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from datasets import Dataset
from hypothesis import settings
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_mlprune import PruningCallback, PruningConfig, advance, attach, collect, start
from hf_mlprune.config import LEVELS

settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("default")

#: A process that has imported everything and run nothing: its forks start at once.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["accelerate", "datasets", "hf_mlprune"])

VOCABULARY = 64
TOKENS = 12
LABELS = 3

HEADS = {
    "model": BertModel,
    "sequence": BertForSequenceClassification,
    "token": BertForTokenClassification,
    "span": BertForQuestionAnswering,
    "masked": BertForMaskedLM,
    "choice": BertForMultipleChoice,
}


def bert_config(**changes) -> BertConfig:
    return BertConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 32,
            "num_labels": LABELS,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            **changes,
        }
    )


def make_model(head: str = "sequence", seed: int = 0, **changes):
    set_seed(seed)
    labels = {"num_labels": 2} if head == "span" else {}
    model = HEADS[head](bert_config(**labels, **changes))
    with torch.no_grad():
        # Biases start at zero in a fresh BERT: a lost or misplaced one would not be noticed.
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def make_batch(head: str = "sequence", rows: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, 2, TOKENS) if head == "choice" else (rows, TOKENS)
    tokens = torch.randint(1, VOCABULARY, shape, generator=generator)
    mask = torch.ones_like(tokens)
    mask[..., TOKENS - 3 :] = 0
    mask[0] = 1
    batch = {"input_ids": tokens, "attention_mask": mask}
    if head == "sequence":
        batch["labels"] = tokens[:, 1] % LABELS
    elif head == "token":
        batch["labels"] = (tokens % LABELS).masked_fill(mask == 0, -100)
    elif head == "masked":
        batch["labels"] = tokens.masked_fill(mask == 0, -100)
    elif head == "choice":
        batch["labels"] = tokens[:, 0, 1] % 2
    elif head == "span":
        batch["start_positions"] = tokens[:, 1] % 5
        batch["end_positions"] = tokens[:, 1] % 5 + 2
    return batch


def make_dataset(head: str = "sequence", rows: int = 64) -> Dataset:
    batch = make_batch(head, rows, seed=1)
    return Dataset.from_dict({name: value.tolist() for name, value in batch.items()})


def loss_of(model, batch):
    out = model(**batch)
    return out.loss if "loss" in out else out.last_hidden_state.square().mean()


def prune(model, config: PruningConfig, *, head: str = "sequence", steps: int = 20) -> None:
    """A custom loop from dense to final masks, without a Trainer."""
    attach(model, config)
    start(model, steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    model.train()
    for step in range(1, steps + 1):
        loss_of(model, make_batch(head, seed=step)).backward()
        collect(model)
        optimizer.step()
        optimizer.zero_grad()
        advance(model, step)


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
    head="sequence",
    callbacks=(),
    model_init=None,
    **changes,
) -> Trainer:
    data = make_dataset(head)
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


def run_forked(target, *arguments) -> int:
    """Exit code of a process of its own, which may kill itself."""
    process = FORKS.Process(target=target, args=arguments)
    process.start()
    process.join(timeout=300)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode


def outputs(model, batch) -> dict[str, torch.Tensor]:
    model.eval()
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return {k: v for k, v in model(**inputs).items() if isinstance(v, torch.Tensor)}


def assert_same_outputs(first, second, batch, tolerance: float = 1e-5) -> None:
    a, b = outputs(first, batch), outputs(second, batch)
    assert a.keys() == b.keys()
    for name in a:
        bound = tolerance * max(1.0, float(a[name].abs().max()))
        assert float((a[name] - b[name]).abs().max()) <= bound, name


@pytest.fixture(scope="session")
def pruned_folder(tmp_path_factory) -> Path:
    """A pruned checkpoint with small heads, rows and blocks, as `Trainer.save_model` writes it."""
    folder = tmp_path_factory.mktemp("pruned")
    model = make_model()
    trainer = make_trainer(
        folder / "run", model, PruningCallback(density=0.3, levels=LEVELS, block_shape=(8, 4))
    )
    trainer.train()
    trainer.save_model(str(folder / "model"))
    return folder / "model"


def clone(model):
    return copy.deepcopy(model)
