"""Contact sheets that show what the numbers of an autoencoder mean."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from ldmkit.metrics.latents import LatentHealth
from ldmkit.pixels import grid, to_pixels
from ldmkit.tensors import Images, Latents, Noise

Sheet = UInt8[Tensor, "_shown _height _width"]
"""Pixels of a contact sheet; it may show fewer channels than the pictures have."""
Decode = Callable[[Latents], Images]
COLUMNS = 8
ERROR_GAIN = 2.0
MAP_SIDE = 256


def pairs_sheet(images: Images, reconstructions: Images) -> Sheet:
    """Originals, reconstructions, and absolute errors times `ERROR_GAIN`, a row each."""
    reconstructions = reconstructions.clamp(-1.0, 1.0)
    errors = (images - reconstructions).abs() * ERROR_GAIN - 1.0
    return grid(shown(torch.cat([images, reconstructions, errors])), len(images))


def error_map_sheet(errors: Float[Tensor, "height width"]) -> Sheet:
    """The error map in grey, black for none and white for the largest, enlarged if small."""
    scaled = errors / errors.max().clamp_min(1e-9) * 2.0 - 1.0
    factor = max(1, MAP_SIDE // min(errors.shape))
    return to_pixels(F.interpolate(scaled[None, None], scale_factor=factor, mode="nearest"))[0]


def prior_sheet(decode: Decode, health: LatentHealth, like: Latents, noise: Noise) -> Sheet:
    """What the decoder makes of noise: unit Gaussian above, with the latents' mean and std below.

    Neither knows of structure across positions and channels; that is what stage 2 learns.

    Args:
        decode: raw latents to images.
        health: of the latents.
        like: latents whose shape and device are taken.
        noise: where the numbers come from.
    """
    drawn = noise(like.new_empty(COLUMNS, *like.shape[1:]))
    variance = health.std.square()
    if health.noise_std is not None:
        variance = variance + health.noise_std.square()
    mean, std = (values.to(drawn).view(1, -1, 1, 1) for values in (health.mean, variance.sqrt()))
    return grid(shown(decode(torch.cat([drawn, mean + std * drawn]))), COLUMNS)


def interpolation_sheet(decode: Decode, latents: Latents) -> Sheet:
    """Decoded latents on the straight line between two pictures', a pair each row.

    Args:
        decode: raw latents to images.
        latents: an even number; the first and second are a pair, and so on.
    """
    weights = torch.linspace(0.0, 1.0, COLUMNS, device=latents.device).view(1, -1, 1, 1, 1)
    between = torch.lerp(latents[0::2, None], latents[1::2, None], weights)
    return grid(shown(decode(between.flatten(0, 1))), COLUMNS)


def shown(images: Images) -> UInt8[Tensor, "batch _shown height width"]:
    """Pixels that a PNG can hold: of several channels the first three, of two the first."""
    return to_pixels(images[:, : 3 if images.shape[1] >= 3 else 1])
