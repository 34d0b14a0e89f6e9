"""Outputs of a model before and after an edit, computed and compared exactly."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .calls import Call, named_tensors

#: Largest difference between outputs, relative to max(1, largest output), as a multiple of the dtype's
#: rounding unit: 1e-5 in float32.
TOLERANCE_UNITS = 1e-5 / torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Comparison:
    """How far the outputs of two models are apart.

    Attributes:
        difference: largest absolute difference; NaN if an output is NaN.
        largest: largest absolute finite output.
        dtype: what both were computed in.
    """

    difference: float
    largest: float
    dtype: torch.dtype

    @property
    def tolerance(self) -> float:
        """Largest difference that rounding explains."""
        return TOLERANCE_UNITS * torch.finfo(self.dtype).eps * max(1.0, self.largest)

    @property
    def equal(self) -> bool:
        """Whether the difference is rounding."""
        return self.difference <= self.tolerance


def proof_dtypes(model: nn.Module) -> tuple[torch.dtype, ...]:
    """What to compute a proof in: float32 first, as models are served, then float64.

    Half precision would hide errors in its rounding. Products of float32 may be rounded further, by a
    forward that switches autocast on, say; those of float64 are not.
    """
    dtype = next(model.parameters()).dtype
    return (torch.float64,) if dtype is torch.float64 else (torch.float32, torch.float64)


@torch.no_grad()
def outputs(model: nn.Module, calls: Sequence[Call], dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    """Floating-point outputs of a model in evaluation mode, by name, the same at every call.

    Attention weights ``(batch, heads, tokens, tokens)`` are left out: pruned heads have none. The model is
    computed in ``dtype`` with IEEE products, from one random state; all of that is put back.
    """
    device = next(model.parameters()).device
    with _evaluating(model), _cast(model, dtype), _ieee_products(), fixed_random_state(device):
        found = [item for call in calls for item in named_tensors(call.replay(model, dtype))]
    return [(name, x) for name, x in found if x.is_floating_point() and not _is_attention(x)]


def _is_attention(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.shape[-1] == tensor.shape[-2]


def compare(
    before: Sequence[tuple[str, Tensor]], after: Sequence[tuple[str, Tensor]], dtype: torch.dtype
) -> Comparison:
    """Compare outputs one by one.

    Raises:
        ValueError: there is nothing to compare, or the outputs are not of the same names and shapes.
    """
    if not before:
        raise ValueError(
            "expected tensors in what the model returns, as a tensor or in a mapping, sequence, dataclass or "
            "object with attributes, got none: without them the pruned model cannot be proved right"
        )
    described = [[(name, tuple(tensor.shape)) for name, tensor in found] for found in (before, after)]
    if described[0] != described[1]:
        raise ValueError(f"expected the outputs {described[0]} again, got {described[1]}")
    difference, largest = 0.0, 0.0
    for (_, a), (_, b) in zip(before, after, strict=True):
        # The loss of a batch without any label is NaN in both.
        if not a.numel() or (a.dim() == 0 and bool(a.isnan()) and bool(b.isnan())):
            continue
        apart = float(torch.where(a == b, 0.0, (a - b).abs()).max())
        # Not Python's max, which passes over NaN.
        difference = apart if apart != apart else max(apart, difference)
        if difference != difference:
            break
        largest = max(largest, float(torch.where(a.isfinite(), a, 0.0).abs().max()))
    return Comparison(difference, largest, dtype)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])
        # Parents first: parts that the script keeps in another mode than the model.
        for module, mode in modes:
            if module.training is not mode:
                module.train(mode)


@contextmanager
def _cast(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    before = [(tensor, tensor.data) for tensor in tensors if tensor.is_floating_point()]
    try:
        for tensor, data in before:
            tensor.data = data.to(dtype)
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


def _precision_switches() -> list[Any]:
    """Torch's switches of what float32 products are rounded to, parents first."""
    backends: Any = torch.backends
    return [
        backends,
        backends.cudnn,
        backends.mkldnn,
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
        backends.mkldnn.rnn,
    ]


@contextmanager
def _ieee_products() -> Iterator[None]:
    """Products of float32 as IEEE has them: not in TF32 or bfloat16, whatever the script has switched on."""
    changed: list[tuple[Any, str]] = []
    try:
        for switch in _precision_switches():
            # Those that follow their parent do so already, and shall go on to.
            if switch.fp32_precision != "ieee":
                changed.append((switch, switch.fp32_precision))
                switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, before in reversed(changed):
            switch.fp32_precision = before


@contextmanager
def fixed_random_state(device: torch.device) -> Iterator[None]:
    """The same state of every random generator each time; afterwards theirs is what it was."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
