"""A small version of the picture, concatenated as it is: super-resolution (Rombach et al. 2022, Sec. 4.4).

Noise may be added to it, and its level told, so that the model does not rely on details that the
input at sampling lacks (Ho et al. 2022, "Cascaded diffusion models", Sec. 4.2). As in the image
variations of Stable Diffusion 2 (unCLIP) the schedule is the cosine one; Stable Diffusion's upscaler has a linear
one of 1000 steps, whose step 350, its highest, is about as noisy as level 0.64 here.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from ldmkit.condition_configs import LowResCondition, LowResOptions
from ldmkit.conditioning.condition import Condition
from ldmkit.conditioning.kind import Kind, Reader, Sides, Widths
from ldmkit.conditioning.picture_files import read_values
from ldmkit.data.latent_set import LatentSet
from ldmkit.errors import DataError
from ldmkit.networks.blocks import timestep_embedding
from ldmkit.tensors import Images

LowRes = Float[Tensor, "batch channels_and_level h w"]
Level = Float[Tensor, " batch"]
OFFSET = 0.008
"""Of the cosine schedule (Nichol and Dhariwal 2021, Eq. 17)."""
LEVEL_STEPS = 1000.0
"""Levels are embedded like time steps of a schedule of so many."""


class LowResConditioner(nn.Module):
    """A low-resolution picture as channels, the level of noise in it as a vector.

    Args:
        image_channels: of the picture, and of what is concatenated.
        width: of the vector, the width of the U-Net's time embedding; a multiple of 8.
        ratio: how many times smaller than the pictures the low-resolution ones are.
        factor: how many times smaller than the pictures the latents are.
    """

    def __init__(self, image_channels: int, width: int, ratio: int, factor: int) -> None:
        super().__init__()
        self.channels, self.width, self.ratio, self.factor = image_channels, width, ratio, factor
        self.embed = nn.Linear(width // 4, width)
        self.out = nn.Linear(width, width)

    def empty(self, values: LowRes) -> LowRes:
        """Mid-grey at level 1, where noise has drowned the picture.

        Level 0 would say that the picture is grey and that this is certain.
        """
        nothing = torch.zeros_like(values)
        nothing[:, -1] = 1.0
        return nothing

    def forward(self, values: LowRes) -> Condition:
        """Channels `[batch, c, H, W]` at the latents' size and a vector `[batch, width]`.

        Args:
            values: `[batch, c + 1, h, w]`, pictures in about [-1, 1] and, last, the level of the
                noise that was added to each, 0 to 1, in every pixel.
        """
        pictures, level = values[:, :-1], values[:, -1, 0, 0]
        sinusoids = timestep_embedding(level * LEVEL_STEPS, self.width // 4)
        vector = self.out(F.silu(self.embed(sinusoids.to(self.embed.weight))))
        height, width = (side * self.ratio // self.factor for side in values.shape[2:])
        if pictures.shape[2:] != (height, width):
            pictures = F.interpolate(pictures, (height, width), mode="bilinear", antialias=True)
        return Condition(vector=vector, channels=pictures)


def augmented(pictures: Images, levels: Level, noise: Images) -> LowRes:
    """Values of the conditioner: pictures with noise, and its level as one more channel.

    noisy = sqrt(a) picture + sqrt(1 - a) noise, where a = cos^2((level + s) / (1 + s) pi / 2), scaled
    to 1 at level 0 (Nichol and Dhariwal 2021, Eq. 17).

    Args:
        pictures: `[b, c, h, w]` in [-1, 1].
        levels: 0 (as it is) to 1 (noise alone).
        noise: standard normal, like the pictures.

    Raises:
        ValueError: a level lies outside of 0 to 1.
    """
    if not bool(((levels >= 0.0) & (levels <= 1.0)).all()):
        raise ValueError(f"the noise levels {levels.tolist()} are not all from 0 to 1")
    exact = levels.to("cpu", torch.float64)  # so that level 0 is the picture itself
    alpha_bar = _cosine(exact) / _cosine(torch.zeros_like(exact))
    signal, spread = alpha_bar.sqrt(), (1.0 - alpha_bar).clamp(min=0.0).sqrt()
    noisy = _per_picture(signal, pictures) * pictures + _per_picture(spread, pictures) * noise
    plane = _per_picture(levels, pictures).expand(-1, 1, *pictures.shape[2:])
    return torch.cat([noisy, plane], dim=1)


def parse_lowres(
    raw: Float[Tensor, "_c _h _w"] | UInt8[Tensor, "_c _h _w"],
    channels: int,
    size: tuple[int, int] | None = None,
    level: float = 0.0,
) -> Float[Tensor, "_channels_and_level _height _width"]:
    """One low-resolution picture as a row of the conditioner's values; no noise is added.

    Args:
        raw: `[c, h, w]`, floating point in [-1, 1] or, as latent sets store it, 8-bit pixels.
        channels: that the model takes.
        size: height and width that it must have, pixels; None for any.
        level: of the noise that is already in it, 0 to 1.

    Raises:
        ValueError: it has another number of channels or another size, numbers outside of [-1, 1], or
            the level is none.
    """
    if len(raw) != channels:
        raise ValueError(
            f"the low-resolution picture has {len(raw)} channels and the model takes {channels}"
        )
    if size is not None and tuple(raw.shape[1:]) != tuple(size):
        raise ValueError(
            f"the low-resolution picture has {raw.shape[2]} x {raw.shape[1]} pixels: give one of "
            f"{size[1]} x {size[0]}"
        )
    if not 0.0 <= level <= 1.0:
        raise ValueError(f"the noise level {level} is not from 0 to 1")
    picture = raw / 127.5 - 1.0 if raw.dtype == torch.uint8 else raw.float()
    if not bool(((picture >= -1.0) & (picture <= 1.0)).all()):
        raise ValueError(
            "the low-resolution picture has numbers outside of [-1, 1]: give -1 for black and 1 for "
            "white, and no NaN"
        )
    return torch.cat([picture, torch.full_like(picture[:1], level)])


def _cosine(level: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    return ((level + OFFSET) / (1.0 + OFFSET) * (math.pi / 2)).cos().square()


def _per_picture(numbers: Float[Tensor, " batch"], pictures: Tensor) -> Tensor:
    return numbers.to(pictures).view(-1, 1, 1, 1)


def _settle(options: LowResOptions, latents: LatentSet) -> LowResCondition:
    if "lowres" not in latents.manifest.columns:
        raise DataError(
            f"--condition lowres: {latents.directory} has no low-resolution pictures; encode with "
            "--lowres RATIO"
        )
    recipe = latents.manifest.recipe
    ratio = recipe["lowres"]["ratio"] if isinstance(recipe["lowres"], dict) else recipe["lowres"]
    size = recipe["preprocessing"]["size"]
    return LowResCondition(
        image_channels=latents.rows("lowres", [0]).shape[1],
        ratio=ratio,
        factor=size // latents.manifest.latent_shape[1],
    )


def _build(config: LowResCondition, widths: Widths) -> LowResConditioner:
    return LowResConditioner(config.image_channels, widths.embedding, config.ratio, config.factor)


def pictures_of(latents: LatentSet, indices: np.ndarray) -> Images:
    """The low-resolution pictures of some samples, in [-1, 1]."""
    stored = latents.rows("lowres", indices)
    return stored / 127.5 - 1.0 if stored.dtype == torch.uint8 else stored.float()


def _reader(config: LowResCondition, options: LowResOptions, latents: LatentSet) -> Reader:
    fitting = _settle(options, latents)
    if fitting != config:
        raise DataError(
            f"{latents.directory} has low-resolution pictures {fitting.ratio} times smaller of "
            f"{fitting.image_channels} channels; the model takes {config.ratio} times and {config.image_channels}"
        )

    def read(indices: np.ndarray, generator: torch.Generator) -> LowRes:
        pictures = pictures_of(latents, indices)
        levels = options.noise * torch.rand(len(pictures), generator=generator)
        noise = torch.randn(pictures.shape, generator=generator)
        return augmented(pictures, levels, noise)

    return read


def _sides(config: LowResCondition, latents: Sides) -> Sides:
    return latents[0] * config.factor // config.ratio, latents[1] * config.factor // config.ratio


LOWRES = Kind(
    settle=_settle,
    build=_build,
    reader=_reader,
    row=lambda config, value: parse_lowres(
        read_values(value, config.image_channels), config.image_channels
    ),
    sides=_sides,
)
