"""Learning rate and averaged weights."""

import copy
from typing import TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from ldmkit.configs import TrainingConfig

Module = TypeVar("Module", bound=nn.Module)


def learning_rate(peak: float, step: int, config: TrainingConfig) -> float:
    """The rate of a step: a linear rise over the warm-up, constant, a linear fall at the end."""
    rise = (step + 1) / max(config.warmup, 1)
    fall = (config.steps - step) / max(config.cooldown, 1)
    return peak * min(1.0, rise, fall)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give all parameters this rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(optimizer: Optimizer, norm: float) -> None:
    """Scale the gradients of an optimizer's parameters down to this norm, together; 0 = leave them."""
    if norm > 0:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, norm)


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
