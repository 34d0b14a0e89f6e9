"""Figures that the processes of a distributed run must agree on."""

from __future__ import annotations

from torch import Tensor, distributed


def average_over_processes(values: Tensor) -> Tensor:
    """Average a tensor over the processes of the run, in place; alone, it stays as it is."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values)
        values /= distributed.get_world_size()
    return values
