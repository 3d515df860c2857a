"""The scale of latents in other projects, and the whitening in ours: from one to the other.

Others multiply latents by one number; ours are whitened by channel. So the whitening is moved into the
1x1 convolutions around the latents, which is exact up to rounding: zero padding comes behind them.
"""

import copy
from typing import Any, NamedTuple

import torch

from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.errors import DataError
from ldmkit.facts import Whitening

UNIFORM = 1e-6
"""Means and differences of standard deviations below this share of a standard deviation are none."""


class Scaled(NamedTuple):
    """An autoencoder whose latents times one number are whitened."""

    autoencoder: Autoencoder
    factor: float


def whitening_of(scaling: dict[str, Any], channels: int, source: str) -> Whitening:
    """The whitening that `scaling_factor`, `shift_factor`, `latents_mean` and `latents_std` stand for.

    Args:
        scaling: those of them that are stated.
        channels: of the latents.
        source: how to name it in errors.

    Raises:
        DataError: a factor is 0 or below, or a list has another length.
    """
    factor = float(scaling.get("scaling_factor", 1.0))
    mean = scaling.get("latents_mean") or [scaling.get("shift_factor") or 0.0] * channels
    std = scaling.get("latents_std") or [1.0] * channels
    if factor <= 0 or any(value <= 0 for value in std):
        raise DataError(f"{source}: a scale of latents is 0 or below (scaling_factor {factor})")
    if not len(mean) == len(std) == channels:
        raise DataError(
            f"{source}: its latents_mean and latents_std are not of {channels} channels"
        )
    return Whitening(mean=tuple(mean), std=tuple(value / factor for value in std))


def with_one_scale(autoencoder: Autoencoder, whitening: Whitening) -> Scaled | None:
    """An autoencoder whose latents times one number are whitened.

    Where one number is all that the whitening has, it is the autoencoder as it is.

    Args:
        autoencoder: the one that the whitening is for.
        whitening: of its raw latents.

    Returns:
        It and the number; None where it has a codebook and standard deviations that differ: which
        code is nearest would change.
    """
    std = whitening.std[0]
    if is_uniform(whitening) and max(map(abs, whitening.mean)) <= UNIFORM * std:
        return Scaled(autoencoder, 1.0 / std)
    return Scaled(folded(autoencoder, whitening), 1.0) if folds(autoencoder, whitening) else None


def is_uniform(whitening: Whitening) -> bool:
    """Whether one factor scales all channels; their means may differ."""
    return max(whitening.std) - min(whitening.std) <= UNIFORM * whitening.std[0]


def folds(model: Autoencoder, whitening: Whitening) -> bool:
    """Whether `folded` can take this whitening in.

    Scaling channels differently changes which code is nearest; shifting them does not.
    """
    return model.codebook is None or is_uniform(whitening)


@torch.no_grad()
def folded(model: Autoencoder, whitening: Whitening) -> Autoencoder:
    """The same autoencoder with whitened latents as its raw ones.

    Args:
        model: any but the identity.
        whitening: per-channel mean and standard deviation; one standard deviation for a codebook.

    Raises:
        ValueError: `folds` is false.
    """
    if not folds(model, whitening):
        raise ValueError("a codebook's latents can be scaled by one factor only")
    result, z = copy.deepcopy(model), model.latent_channels
    mean, std = (
        torch.tensor(values, dtype=torch.float64) for values in (whitening.mean, whitening.std)
    )
    if model.codebook is not None:
        std = std[:1].expand(z)
    into, out = (result.get_submodule(name) for name in ("to_moments", "from_latents"))
    weight, bias = into.get_parameter("weight"), into.get_parameter("bias")
    weight[:z] = (weight[:z].double() / std.view(-1, 1, 1, 1)).to(weight.dtype)
    bias[:z] = ((bias[:z].double() - mean) / std).to(bias.dtype)
    if len(bias) > z:  # log-variances
        bias[z:] -= (2.0 * std.log()).to(bias.dtype)
    weight, bias = out.get_parameter("weight"), out.get_parameter("bias")
    matrix = weight[:, :, 0, 0].double()
    bias.copy_(bias.double() + matrix @ mean)
    weight.copy_((matrix * std)[:, :, None, None])
    if result.codebook is not None:
        codes = result.codebook.codes
        codes.copy_((codes.double() - mean) / std)
    return result
