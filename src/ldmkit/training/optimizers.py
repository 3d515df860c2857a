"""The optimizers by name, as torch ships them but for one, and which weights each of them moves."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from ldmkit.configs import TrainDiffusionConfig
from ldmkit.training.adamw8bit import BLOCK, LEAST, AdamW8bit

Groups = list[dict[str, object]]


def build_optimizers(module: nn.Module, config: TrainDiffusionConfig) -> dict[str, Optimizer]:
    """The optimizers that move a module's weights, each weight in exactly one of them.

    Weights that need no gradient are in none.

    Args:
        module: what is trained.
        config: `optimizer`, `peak_lr`, `betas`, `weight_decay`, `decay_all`.

    Returns:
        Name -> optimizer; "model" is always there, and "muon" beside it.
    """
    return OPTIMIZERS[config.optimizer](module, config)


def adamw(module: nn.Module, config: TrainDiffusionConfig) -> dict[str, Optimizer]:
    """AdamW (Loshchilov and Hutter 2019) for all weights."""
    return {"model": _adamw(_trained(module), config)}


def adamw_8bit(module: nn.Module, config: TrainDiffusionConfig) -> dict[str, Optimizer]:
    """AdamW for all weights, with moments of a byte each."""
    return {"model": AdamW8bit(_groups(_trained(module), config), config.peak_lr, config.betas)}


def adafactor(module: nn.Module, config: TrainDiffusionConfig) -> dict[str, Optimizer]:
    """Adafactor (Shazeer and Stern 2018): a step is `lr` times the size (RMS) of the weight."""
    groups = _groups(_trained(module), config)
    return {"model": torch.optim.Adafactor(groups, config.peak_lr)}


def muon(module: nn.Module, config: TrainDiffusionConfig) -> dict[str, Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of linear layers, AdamW for everything else.

    A step of Muon is scaled to the RMS of AdamW's (Liu et al. 2025, "Muon is scalable"), so that one
    learning rate serves both. Tables of embeddings and convolutions are AdamW's.
    """
    linear = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear)}
    trained = _trained(module)
    matrices = [p for p in trained if id(p) in linear]
    rest = [p for p in trained if id(p) not in linear]
    return {
        "model": _adamw(rest, config),
        "muon": torch.optim.Muon(
            matrices,
            config.peak_lr,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
    }


def _adamw(parameters: list[Parameter], config: TrainDiffusionConfig) -> Optimizer:
    groups = _groups(parameters, config)
    return torch.optim.AdamW(groups, config.peak_lr, config.betas, fused=True)


def _groups(parameters: list[Parameter], config: TrainDiffusionConfig) -> Groups:
    """All in one group, or norms and biases (whatever is a vector) in one without decay."""
    decayed = [p for p in parameters if config.decay_all or p.ndim > 1]
    plain = [p for p in parameters if not config.decay_all and p.ndim <= 1]
    groups = [(decayed, config.weight_decay), (plain, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def _trained(module: nn.Module) -> list[Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def moment_bytes(module: nn.Module, config: TrainDiffusionConfig) -> int:
    """Bytes of what the optimizers remember of each weight after the first step.

    AdamW keeps two numbers for each, or two bytes and two numbers for a block, Muon one, Adafactor one for each
    row and column of a matrix.
    """
    linear = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear)}
    total = 0
    for weight in _trained(module):
        count, size = weight.numel(), weight.element_size()
        if config.optimizer == "adamw-8bit" and count >= LEAST:
            total += 2 * (count + 4 * math.ceil(count / BLOCK))
        elif config.optimizer == "adafactor" and weight.ndim > 1:
            total += size * (count // weight.shape[-1] + count // weight.shape[-2])
        elif config.optimizer == "adafactor" or (
            config.optimizer == "muon" and id(weight) in linear
        ):
            total += size * count
        else:
            total += size * 2 * count
    return total


def parameters_of(optimizers: Iterable[Optimizer]) -> list[Parameter]:
    """Every weight that these optimizers move."""
    return [p for one in optimizers for group in one.param_groups for p in group["params"]]


OPTIMIZERS: dict[str, Callable[[nn.Module, TrainDiffusionConfig], dict[str, Optimizer]]] = {
    "adamw": adamw,
    "adamw-8bit": adamw_8bit,
    "adafactor": adafactor,
    "muon": muon,
}
"""Keep in step with `configs.TrainDiffusionConfig.optimizer`; a test compares them."""
