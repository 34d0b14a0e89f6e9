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
from .editing import restored

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
        output: name of the output with that difference; empty for a bare tensor.
    """

    difference: float
    largest: float
    dtype: torch.dtype
    output: str = ""

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

    Attention weights are left out, as pruned heads have none, and losses beside other outputs. The model is
    computed in ``dtype`` with IEEE products, from one random state; all of that is put back, and what the
    forward pass writes into its buffers.
    """
    device = next(model.parameters()).device
    with restored(model), _ieee_products(), fixed_random_state(device):
        model.eval()
        _cast(model, dtype)
        found = [item for call in calls for item in named_tensors(call.replay(model, dtype))]
    found = [(name, x) for name, x in found if x.is_floating_point() and "attentions" not in name.split(".")]
    # A loss says nothing that other outputs do not, and may hold more than them: a penalty on weights, say.
    return [(name, x) for name, x in found if x.dim()] or found


def compare(
    before: Sequence[tuple[str, Tensor]], after: Sequence[tuple[str, Tensor]], dtype: torch.dtype
) -> Comparison:
    """Compare outputs one by one.

    Raises:
        ValueError: the outputs are not of the same names and shapes.
    """
    described = [[(name, tuple(tensor.shape)) for name, tensor in found] for found in (before, after)]
    pairs = list(zip(before, after, strict=False))
    # Of attention weights in a tuple, which has no names, fewer heads are left.
    unequal = [
        a for (a, b) in pairs if a[0] != b[0] or (a[1].shape != b[1].shape and not _lost_heads(a[1], b[1]))
    ]
    if unequal or len(before) != len(after):
        raise ValueError(f"expected the outputs {described[0]} again, got {described[1]}")
    difference, largest, worst = 0.0, 0.0, ""
    for (name, a), (_, b) in pairs:
        if a.shape != b.shape or not a.numel():
            continue
        apart = float(torch.where(a == b, 0.0, (a - b).abs()).max())
        if apart > difference or apart != apart:
            difference, worst = apart, name
        if difference != difference:
            break
        largest = max(largest, float(torch.where(a.isfinite(), a, 0.0).abs().max()))
    return Comparison(difference, largest, dtype, worst)


def _lost_heads(before: Tensor, after: Tensor) -> bool:
    """Whether these can be attention weights ``(batch, heads, tokens, tokens)`` of more and fewer heads."""
    square = before.dim() == 4 and before.shape[-1] == before.shape[-2]
    return (
        square
        and after.dim() == 4
        and (before.shape[0], before.shape[2:]) == (after.shape[0], after.shape[2:])
    )


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every module parameters and buffers of another dtype.

    New ones: what hangs on the old ones (the gradient hooks of DDP) does not survive a change of dtype.
    """
    new: dict[int, Tensor] = {}
    for module in model.modules():
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, tensor in own:
            if tensor.is_floating_point() and tensor.dtype is not dtype:
                if id(tensor) not in new:
                    cast = tensor.detach().to(dtype)
                    new[id(tensor)] = nn.Parameter(cast, False) if isinstance(tensor, nn.Parameter) else cast
                setattr(module, name, new[id(tensor)])


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
