"""Whitening by channel, for projects whose latents are scaled by one number."""

import torch
from torch import Tensor

from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.errors import DataError
from ldmkit.interop.layout import Tensors

UNIFORM = 1e-6
"""Means and differences of standard deviations below this share of a standard deviation are none."""


def with_one_scale(autoencoder: Autoencoder, mean: Tensor, std: Tensor) -> tuple[Tensors, float]:
    """An autoencoder whose latents times one number are whitened.

    Where one number is all that the whitening has, the tensors stay as they are. Else the autoencoder
    itself makes whitened latents, by its 1x1 convolutions around them: exact, as these pad nothing.

    Args:
        autoencoder: the one that the whitening is for.
        mean: of its raw latents, `[z]`.
        std: of its raw latents, `[z]`.

    Returns:
        Its tensors under our names, and the number.

    Raises:
        DataError: it has a codebook and standard deviations that differ: which code is nearest would
            change.
    """
    tensors = dict(autoencoder.state_dict())
    mean, std = mean.double().cpu(), std.double().cpu()
    uniform = bool((std - std[0]).abs().max() <= UNIFORM * std[0])
    if uniform and mean.abs().max() <= UNIFORM * std[0]:
        return tensors, 1.0 / std[0].item()
    if autoencoder.codebook is not None:
        if not uniform:
            raise DataError(
                "the latents of this model are whitened by channel and its autoencoder has a codebook: "
                "the ldm layout scales latents by one number before the nearest code is looked up"
            )
        std = std[:1].expand(len(std))
        codes = (tensors["codebook.codes"].double() - mean) / std
        tensors["codebook.codes"] = codes.float()
    tensors |= _whitening_encoder(tensors, mean, std)
    weight, bias = (tensors[f"from_latents.{leaf}"].double() for leaf in ("weight", "bias"))
    tensors["from_latents.weight"] = (weight * std[None, :, None, None]).float()
    tensors["from_latents.bias"] = (bias + weight[:, :, 0, 0] @ mean).float()
    return tensors, 1.0


def _whitening_encoder(tensors: Tensors, mean: Tensor, std: Tensor) -> Tensors:
    """The convolution to means and, behind them where there is noise, log-variances."""
    weight, bias = (tensors[f"to_moments.{leaf}"].double() for leaf in ("weight", "bias"))
    z, noisy = len(mean), len(bias) > len(mean)
    factor = torch.cat([1.0 / std, torch.ones(z).double()]) if noisy else 1.0 / std
    shift = torch.cat([mean / std, 2.0 * std.log()]) if noisy else mean / std
    return {
        "to_moments.weight": (weight * factor[:, None, None, None]).float(),
        "to_moments.bias": (bias * factor - shift).float(),
    }
