"""Averages of the weights over training."""

import copy
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def averaged_copy(module: Module) -> Module:
    """A frozen copy of a module, to hold the average of its weights."""
    return copy.deepcopy(module).requires_grad_(False).eval()


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, step: int, decay: float) -> None:
    """Move the average towards the weights after the update of `step` (counted from 0).

    The decay is warmed up: min(decay, (1 + n) / (10 + n)), n updates so far.
    """
    warmed = min(decay, (1 + step) / (10 + step))
    for kept, current in zip(average.parameters(), module.parameters(), strict=True):
        kept.lerp_(current, 1.0 - warmed)
    for kept, current in zip(average.buffers(), module.buffers(), strict=True):
        kept.copy_(current)
