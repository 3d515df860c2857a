"""Pictures as conditions, for variations: a small one to tokens, by a network trained along."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ldmkit.condition_configs import ImageCondition, ImageOptions
from ldmkit.conditioning.condition import Condition
from ldmkit.conditioning.kind import Kind, Reader, Widths
from ldmkit.conditioning.lowres import pictures_of
from ldmkit.conditioning.picture_files import read_values
from ldmkit.data.latent_set import LatentSet
from ldmkit.errors import DataError
from ldmkit.networks.blocks import Norm, ResidualBlock

FACTOR = 8
WIDTHS = (1, 2, 4)
"""Channels of the three levels, in units of the first's."""
CHANNELS_OF_A_GROUP = 8
STD = 0.02
SLACK = 1e-3
"""How far values may leave [-1, 1] by rounding."""

Pictures = Float[Tensor, "batch channels size size"]


class PictureConditioner(nn.Module):
    """A small picture to tokens, by a convolutional encoder trained along.

    Values are pictures `[b, c, s, s]` in [-1, 1]. A row that is all NaN is the empty one: it gets
    learnt tokens. A row with NaN in places is an error of the caller's, and its tokens are NaN.

    Args:
        channels: of the pictures.
        size: their side s, pixels; a multiple of 8.
        width: of the tokens.
        hidden: channels of the first level; the others have twice and four times as many.

    Raises:
        ValueError: the size is not a multiple of 8.
    """

    def __init__(self, channels: int, size: int, width: int, *, hidden: int = 64) -> None:
        super().__init__()
        if size < FACTOR or size % FACTOR:
            raise ValueError(f"pictures of {size} pixels: take a multiple of {FACTOR}")
        widths = [hidden * share for share in WIDTHS]
        norm = Norm(max(1, hidden // CHANNELS_OF_A_GROUP), 1e-5)
        layers: list[nn.Module] = [nn.Conv2d(channels, hidden, 3, padding=1)]
        for before, after in zip([hidden, *widths], widths, strict=False):
            layers.append(ResidualBlock(before, after, norm=norm))
            layers.append(nn.Conv2d(after, after, 3, stride=2, padding=1))
        self.encode = nn.Sequential(*layers)
        self.project = nn.Linear(widths[-1], width)
        count = (size // FACTOR) ** 2 + 1
        self.position = nn.Parameter(STD * torch.randn(count, width))
        self.norm_out = nn.LayerNorm(width)
        self.nothing = nn.Parameter(torch.randn(count, width))

    def empty(self, values: Pictures) -> Pictures:
        """All NaN."""
        return torch.full_like(values, math.nan)

    def forward(self, values: Pictures) -> Condition:
        """Tokens `[b, (s / 8)^2 + 1, width]`: the places, rows first, then their mean."""
        pictures, told = _told(values.to(self.position.device))
        places = rearrange(self.encode(pictures), "b c y x -> b (y x) c")
        places = torch.cat([places, places.mean(dim=1, keepdim=True)], dim=1)
        tokens = self.norm_out(self.project(places) + self.position)
        return Condition(tokens=torch.where(told, tokens, self.nothing))


def picture_row(picture: Tensor, channels: int, size: int) -> Float[Tensor, "channels size size"]:
    """One row of values: a square picture `[c, h, h]` in [-1, 1], made `size` pixels wide.

    Args:
        picture: floating point, without gaps.
        channels: that the model takes.
        size: side that the model takes, pixels.

    Raises:
        ValueError: it is no such picture.
    """
    if picture.ndim != 3 or not picture.is_floating_point():
        raise ValueError(
            f"a picture is floating point [channels, height, width], not {picture.dtype} "
            f"{list(picture.shape)}"
        )
    if picture.shape[0] != channels:
        raise ValueError(f"the picture has {picture.shape[0]} channels; the model takes {channels}")
    if picture.shape[1] != picture.shape[2] or not picture.shape[1]:
        raise ValueError(
            f"the picture has {picture.shape[2]} x {picture.shape[1]} pixels: cut it to a square"
        )
    if not picture.isfinite().all():
        raise ValueError("the picture has pixels without a value: fill its gaps first")
    if float(picture.abs().max()) > 1.0 + SLACK:
        raise ValueError(
            f"the picture has values from {float(picture.min()):g} to {float(picture.max()):g}: "
            "they must lie in [-1, 1]"
        )
    resized = F.interpolate(
        picture[None].float(), (size, size), mode="bicubic", antialias=True, align_corners=False
    )
    return resized[0].clamp(-1.0, 1.0)


def _told(values: Tensor) -> tuple[Tensor, Bool[Tensor, "batch 1 1"]]:
    """Values with zeros in the empty rows, and which rows are not empty."""
    told = ~values.isnan().flatten(1).all(dim=1)
    return torch.where(told.view(-1, *[1] * (values.ndim - 1)), values, 0.0), told[:, None, None]


def _settle(options: ImageOptions, latents: LatentSet) -> ImageCondition:
    if "lowres" not in latents.manifest.columns:
        raise DataError(
            f"--condition image: {latents.directory} has no small pictures; encode with --lowres RATIO"
        )
    _, channels, height, width = latents.rows("lowres", [0]).shape
    if height != width or height % FACTOR:
        raise DataError(
            f"--condition image: the small pictures of {latents.directory} have {width} x {height} pixels; "
            f"it takes squares with a side that is a multiple of {FACTOR}"
        )
    return ImageCondition(hidden=options.hidden, image_channels=channels, size=height)


def _build(config: ImageCondition, widths: Widths) -> PictureConditioner:
    return PictureConditioner(
        config.image_channels, config.size, widths.context, hidden=config.hidden
    )


def _reader(config: ImageCondition, options: ImageOptions, latents: LatentSet) -> Reader:
    if _settle(options, latents).size != config.size:
        raise DataError(f"{latents.directory} has small pictures of another size than the model's")
    return lambda indices, _: pictures_of(latents, indices)


IMAGE = Kind(
    settle=_settle,
    build=_build,
    reader=_reader,
    row=lambda config, value: picture_row(
        read_values(value, config.image_channels), config.image_channels, config.size
    ),
)
