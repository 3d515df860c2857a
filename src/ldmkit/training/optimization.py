"""Learning rate and gradient norms."""

import torch
from torch.optim import Optimizer

from ldmkit.configs import TrainingConfig


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
