"""Learning rate and gradient norms."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ldmkit.configs import TrainDiffusionConfig, TrainingConfig
from ldmkit.tensors import Scalar
from ldmkit.training.sharding import divided, whole


def learning_rate(peak: float, step: int, config: TrainingConfig) -> float:
    """The rate of a step: a linear rise over the warm-up, constant, a linear fall at the end."""
    rise = (step + 1) / max(config.warmup, 1)
    fall = (config.steps - step) / max(config.cooldown, 1)
    return peak * min(1.0, rise, fall)


def lr_decay(step: int, config: TrainDiffusionConfig) -> float:
    """What the learning rate of a step is multiplied by beside warm-up and cooldown, 0 to 1.

    cosine: (1 + cos(pi s)) / 2, s the share of the way from where it begins to the last step
    (Loshchilov and Hutter 2017). inverse-sqrt: sqrt(begin / max(step, begin)) (Vaswani et al. 2017;
    Karras et al. 2024, Eq. 15).
    """
    begin = config.decay_start or config.warmup
    if config.lr_decay == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * max(step - begin, 0) / (config.steps - begin))
    if config.lr_decay == "inverse-sqrt":
        return math.sqrt(begin / max(step, begin))
    return 1.0


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give all parameters this rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(optimizer: Optimizer, norm: float) -> None:
    """Scale the gradients of an optimizer's parameters down to this norm, together; 0 = leave them."""
    if norm > 0:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, norm)


def gradient_norm(parameters: Iterable[Parameter], clip_norm: float) -> Scalar:
    """The norm of all gradients together, which are then scaled down to `clip_norm`; 0 = they stay.

    Not finite if any gradient is not. Nothing waits for the device.
    """
    parts, plain = divided(p for p in parameters if p.grad is not None)
    groups = [parts, plain] if parts and plain else [parts or plain]
    norms = [whole(_norm([p.grad for p in group if p.grad is not None])) for group in groups]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if clip_norm > 0:
        for group in groups:
            torch.nn.utils.clip_grads_with_norm_(group, clip_norm, norm)
    return norm


def _norm(gradients: list[Tensor]) -> Tensor:
    """Of all together; on the CPU by products, which take half of the time and round less."""
    if all(one.device.type == "cpu" and type(one) is Tensor for one in gradients):
        flat = [one.flatten() for one in gradients]
        return torch.stack([torch.dot(one, one) for one in flat]).sum().sqrt()
    return torch.nn.utils.get_total_norm(gradients)
