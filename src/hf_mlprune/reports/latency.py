"""Time of a forward pass of a pruned model against the stock dense one's."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..editing import restored
from ..encoders import Encoder, random_batch, stock_encoder, tokens_of
from ..timing import interleave, synchronize


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass, dense and pruned in turn.

    Attributes:
        encoder: path of what was timed in the model; empty if it is the model.
        batch: sequences, or images.
        length: tokens per sequence.
        threads: torch threads.
        device: processor or GPU.
        dense_seconds: median of the stock encoder with the dense sizes.
        pruned_seconds: median of the pruned encoder.
        speedup: median over rounds of dense / pruned.
        rounds: rounds counted.
    """

    encoder: str
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
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return (
            f"{self.batch} x {self.length} tokens on {self.device}, {threads}: "
            f"{self.dense_seconds * 1e3:.1f} ms dense, {self.pruned_seconds * 1e3:.1f} ms pruned "
            f"({self.speedup:.2f}x)"
        )


def measure_latency(
    encoder: Encoder, batch: int, length: int, *, rounds: int = 20, budget_seconds: float = 10.0
) -> Latency | None:
    """Time a forward pass of the encoder against a stock dense one with random weights, in turn.

    Args:
        encoder: of a pruned model; put into evaluation mode and back.
        batch: sequences.
        length: tokens per sequence; images have their own.
        rounds: at most this many rounds.
        budget_seconds: no new round is begun after this long, warm-up included; one is always counted.

    Returns:
        The times, or ``None`` if a dense model does not fit into memory beside the pruned one.
    """
    module = encoder.module
    inputs = random_batch(module, encoder, batch, length)
    # As most served batches of one length are called.
    inputs.pop("attention_mask", None)

    def call(network: nn.Module) -> None:
        network(**inputs)
        synchronize(module.device)

    try:
        dense = stock_encoder(encoder).to(module.device, module.dtype).eval()
        with restored(module), torch.inference_mode():
            module.eval()
            timing = interleave(
                [lambda: call(dense), lambda: call(module)], rounds=rounds, budget_seconds=budget_seconds
            )
    except torch.OutOfMemoryError:
        return None
    return Latency(
        encoder=encoder.path,
        batch=batch,
        length=tokens_of(encoder) or inputs["input_ids"].shape[-1],
        threads=torch.get_num_threads(),
        device=device_name(module.device),
        dense_seconds=timing.seconds[0],
        pruned_seconds=timing.seconds[1],
        speedup=timing.ratios[1],
        rounds=timing.rounds,
    )


def device_name(device: torch.device) -> str:
    """What the processor or GPU calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = processor_name()
    return f"{name} ({cpu_capability()})" if name else cpu_capability()


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What the processor calls itself; empty if it does not say.

    Args:
        cpuinfo: where Linux says it.
    """
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return " ".join((names[0] if names else platform.processor()).split())


def cpu_capability() -> str:
    """Of the processor, as torch uses it."""
    return f"{torch.backends.cpu.get_cpu_capability()} {platform.machine()}"
