"""Time of a forward pass of a pruned model against the stock dense one's."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from .attaching import kinds_of, plain_config
from .shrinking import random_batch
from .timing import interleave


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass, dense and pruned in turn.

    Attributes:
        batch: sequences.
        length: tokens per sequence.
        threads: torch threads.
        device: processor or GPU.
        dense_seconds: median of the stock model with these sizes.
        pruned_seconds: median of the pruned model.
        speedup: median over rounds of dense / pruned.
        rounds: rounds counted.
    """

    batch: int
    length: int
    threads: int
    device: str
    dense_seconds: float
    pruned_seconds: float
    speedup: float
    rounds: int

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"{self.batch} x {self.length} tokens on {self.device}, {self.threads} threads: "
            f"{self.dense_seconds * 1e3:.1f} ms dense, {self.pruned_seconds * 1e3:.1f} ms pruned "
            f"({self.speedup:.2f}x)"
        )


def dense_model(model: nn.Module) -> PreTrainedModel | None:
    """A stock model of the dense sizes with random weights; ``None`` for a user's own class."""
    kinds = kinds_of(model)
    if kinds is None or not isinstance(model, PreTrainedModel):
        return None
    config = kinds.stock.config_class.from_dict(plain_config(model.config))
    config._attn_implementation = model.config._attn_implementation
    return kinds.stock(config)


def measure_latency(
    model: nn.Module, batch: int, length: int, *, rounds: int = 20, budget_seconds: float = 10.0
) -> Latency | None:
    """Time a forward pass against the stock dense model's, in turn; ``None`` for a user's own class.

    Args:
        model: a pruned model; put into evaluation mode and back.
        batch: sequences.
        length: tokens per sequence.
        rounds: at most this many rounds.
        budget_seconds: no new round is begun after this long.
    """
    dense = dense_model(model)
    if dense is None:
        return None
    assert isinstance(model, PreTrainedModel)
    dense = dense.to(model.device, model.dtype).eval()
    tokens = random_batch(model, batch, length)["input_ids"]
    training = model.training
    model.eval()

    def call(network: nn.Module) -> None:
        network(input_ids=tokens)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)

    with torch.inference_mode():
        timing = interleave(
            [lambda: call(dense), lambda: call(model)],
            rounds=rounds,
            budget_seconds=budget_seconds,
        )
    model.train(training)
    return Latency(
        batch=batch,
        length=length,
        threads=torch.get_num_threads(),
        device=device_name(model.device),
        dense_seconds=timing.seconds[0],
        pruned_seconds=timing.seconds[1],
        speedup=timing.ratios[1],
        rounds=timing.rounds,
    )


def device_name(device: torch.device) -> str:
    """What the processor or GPU calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability() + " " + platform.machine()
