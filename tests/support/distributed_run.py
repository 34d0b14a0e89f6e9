"""Runs, in as many processes as a launcher started; each writes what it saw (test_distributed.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback

from hf_mlprune import PruningCallback
from hf_mlprune.state import pruning_state
from support.models import make_dataset, make_model
from support.training import training_arguments

WROTE: list[str] = []


def note_writing(event: str, arguments: tuple) -> None:
    """An audit hook: every file that this process opens to write or renames."""
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes or event in ("os.rename", "os.mkdir"):
        WROTE.append(str(arguments[0]))


class Watch(TrainerCallback):
    """Masks after each step."""

    def __init__(self) -> None:
        self.masks: list[torch.Tensor] = []

    def on_step_end(self, args, state, control, *, model, **kwargs):
        self.masks.append(torch.cat([gate.keep for gate in pruning_state(model).all_gates()]))


def main(folder: str, rows: str, taught: str, *runs: str) -> None:
    """All runs in these processes, each into a folder of its own."""
    sys.addaudithook(note_writing)
    for index, settings in enumerate(runs):
        WROTE.clear()
        run(f"{folder}/{index}", json.loads(settings), taught, int(rows))


def run(folder: str, settings: dict, taught: str, rows: int) -> None:
    """Train 24 steps, or 48 where there are two targets, of so many rows per process, and export."""
    Path(folder).mkdir(exist_ok=True)
    watch = Watch()
    dtype = torch.bfloat16 if taught == "bfloat16" else torch.float64
    teacher = make_model(seed=3).double() if taught == "taught" else None
    trainer = Trainer(
        model=make_model().to(dtype),
        args=training_arguments(
            Path(folder) / "run", max_steps=48 if "targets" in settings else 24,
            per_device_train_batch_size=rows, lr_scheduler_type="constant",
            use_cpu=True, save_strategy="steps", save_steps=12,
        ),
        train_dataset=make_dataset(),
        callbacks=[
            PruningCallback(0.3, teacher=teacher, **settings),
            watch,
        ],
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(Path(folder) / "model"))
    seen = {
        "masks": torch.stack(watch.masks),
        "weights": trainer.model.state_dict(),
        "wrote": WROTE,
        "processes": trainer.args.world_size,
    }
    torch.save(seen, Path(folder) / f"rank{trainer.args.process_index}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
