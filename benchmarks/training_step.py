"""Cost of a training step with masks against the stock step: time, memory, attach, rehearsal, shrink, save.

MiniLM-L6 shapes (or those of six layers of ModernBERT-base), no teacher, all three levels. Stock and masked
steps are run in turn in one process; peak memory is that of a fresh process each.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, ModernBertConfig, PreTrainedModel

from common import peak_megabytes, print_peak_memory, write_result
from hf_mlprune import PruningConfig, advance, attach, collect, shrink, start
from hf_mlprune.config import LEVELS
from hf_mlprune.run import current_run
from hf_mlprune.schedule import Phase, make_schedule
from hf_mlprune.state import pruning_state
from hf_mlprune.timing import interleave
from hf_mlprune.trainer.session import Session

STOCK = "stock"
VARIANTS = [
    f"{preset}:{phase.name}" for preset in ("default", "paper") for phase in (Phase.STRUCTURED, Phase.BLOCKS)
]
DENSITY = 0.2
RUN_STEPS = 10_000  # so long that every measured step lies inside its phase
NUM_LABELS = 77
MEMORY_STEPS = 3
SHAPES = {
    "minilm-l6": BertConfig(
        hidden_size=384, num_attention_heads=12, num_hidden_layers=6, intermediate_size=1536
    ),
    "modernbert": ModernBertConfig(num_hidden_layers=6),
}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or hub name (default: random weights)")
    parser.add_argument("--shape", choices=SHAPES, default="minilm-l6", help="of random weights")
    parser.add_argument("--result", default="training_step", help="name of the file of results")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_model(args: argparse.Namespace) -> PreTrainedModel:
    """A stock classifier."""
    torch.manual_seed(0)
    if args.model:
        return AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=NUM_LABELS)
    config = copy.deepcopy(SHAPES[args.shape])
    config.num_labels = NUM_LABELS
    return AutoModelForSequenceClassification.from_config(config)


class StockStep:
    """One optimizer step as Trainer takes it."""

    def __init__(self, model: PreTrainedModel, args: argparse.Namespace) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        vocabulary = model.config.vocab_size
        generator = torch.Generator().manual_seed(0)
        self.batch = {
            "input_ids": torch.randint(0, vocabulary, (args.batch, args.length), generator=generator),
            "labels": torch.randint(0, NUM_LABELS, (args.batch,), generator=generator),
        }

    def __call__(self) -> None:
        """Forward, backward, clip, update."""
        self.model(**self.batch).loss.backward()
        self.before_update()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def before_update(self) -> None:
        """Where a masked step learns from its masks' gradients."""


class PruningStep(StockStep):
    """The same in a run on masks that was started; ``step`` counts what it has taken."""

    step = 0

    def before_update(self) -> None:
        """Learn from the masks' gradients."""
        collect(self.model)

    def __call__(self) -> None:
        """The stock step, and the masks for the next one."""
        super().__call__()
        self.step += 1
        advance(self.model, self.step)


class MaskedStep(PruningStep):
    """The same inside a phase of a run."""

    def __init__(
        self, model: PreTrainedModel, args: argparse.Namespace, phase: Phase, **settings: Any
    ) -> None:
        # Steps are skipped below, which is no stall to be warned of.
        config = PruningConfig.create(DENSITY, stall_steps=RUN_STEPS, **settings)
        self.preset = config.preset
        began = time.perf_counter()
        attach(model, config)
        self.attach_seconds = time.perf_counter() - began
        super().__init__(model, args)
        schedule = make_schedule(config, RUN_STEPS)
        # Blocks are entered through the boundary, where the masks of heads and rows land.
        self.step = schedule.bounds(phase)[0] - (phase is Phase.BLOCKS)
        start(model, RUN_STEPS, self.step)
        self.run = current_run(pruning_state(model))
        while self.run.phase is not phase:
            self()

    def rehearse_seconds(self) -> float:
        """Time what the callback does once, after the first step."""
        session = Session(self.model, None, None)
        session.watch()
        self()
        began = time.perf_counter()
        session.rehearse()
        seconds = time.perf_counter() - began
        session.close()
        return seconds

    def shrink_and_save_seconds(self) -> float:
        """Land all masks, then time what `train()` and `save_model` do at the end."""
        for phase in (Phase.BLOCKS, Phase.FINAL):
            if self.run.phase < phase:
                self.step = self.run.step = self.run.schedule.bounds(phase)[0] - 1
                self()
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            shrink(self.model)
            self.model.save_pretrained(folder)
            return time.perf_counter() - began


def make_masked_step(args: argparse.Namespace, variant: str) -> MaskedStep:
    """A step by the name of its variant, ``<preset>:<phase>``."""
    preset, _, phase = variant.partition(":")
    return MaskedStep(make_model(args), args, Phase[phase], preset=preset, levels=LEVELS)


def run_for_memory(args: argparse.Namespace) -> None:
    """Run a few steps of one variant in this process, then print its peak memory."""
    stock = args.peak_of == STOCK
    step = StockStep(make_model(args), args) if stock else make_masked_step(args, args.peak_of)
    for _ in range(MEMORY_STEPS):
        step()
    if args.rehearse and isinstance(step, MaskedStep):
        step.rehearse_seconds()
    print_peak_memory()


def measure(args: argparse.Namespace, variant: str, megabytes: dict[str, float]) -> dict[str, Any]:
    """All figures of one preset in one phase."""
    stock = StockStep(make_model(args), args)
    masked = make_masked_step(args, variant)
    phase = masked.run.phase
    timing = interleave([stock, masked], rounds=args.rounds)
    if masked.run.phase is not phase:
        raise SystemExit(f"expected every step in {phase.name}: {args.rounds} rounds ran past it; take fewer")
    density = pruning_state(masked.model).density()
    return {
        "preset": masked.preset,
        "phase": phase.name.lower(),
        "rounds": timing.rounds,
        "stock_step_seconds": timing.seconds[0],
        "masked_step_seconds": timing.seconds[1],
        "step_cost_ratio": 1 / timing.ratios[1],
        "stock_peak_megabytes": megabytes[STOCK],
        "masked_peak_megabytes": megabytes[variant],
        "peak_memory_ratio": megabytes[variant] / megabytes[STOCK],
        "rehearsal_peak_megabytes": megabytes[f"{variant} rehearsed"],
        "rehearsal_in_stock_steps": masked.rehearse_seconds() / timing.seconds[0],
        "attach_seconds": masked.attach_seconds,
        "density_while_measured": density,
        "shrink_and_save_seconds": masked.shrink_and_save_seconds(),
    }


def main() -> None:
    """Measure every variant."""
    args = parse_arguments()
    if args.peak_of:
        run_for_memory(args)
        return
    megabytes = {variant: peak_megabytes(["--peak-of", variant]) for variant in (STOCK, *VARIANTS)}
    for variant in VARIANTS:
        megabytes[f"{variant} rehearsed"] = peak_megabytes(["--peak-of", variant, "--rehearse"])
    rows = []
    for variant in VARIANTS:
        rows.append(measure(args, variant, megabytes))
        print(json.dumps(rows[-1], indent=2))
    weights = "pretrained" if args.model else "random"
    shared = {"weights": weights, "batch": args.batch, "length": args.length}
    if not args.model:
        shared["shape"] = args.shape
    path = write_result({**shared, "results": rows}, name=args.result)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
