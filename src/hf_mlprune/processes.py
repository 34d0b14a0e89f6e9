"""Figures that the processes of a distributed run must agree on."""

from __future__ import annotations

from torch import Tensor, distributed


def average_over_processes(values: Tensor) -> Tensor:
    """Average a tensor over the processes of the run, in place; alone, it stays as it is."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values)
        values /= distributed.get_world_size()
    return values


def same_in_all_processes(values: Tensor) -> Tensor:
    """Give all processes of the run the first one's tensor, in place."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast(values, src=0)
    return values
