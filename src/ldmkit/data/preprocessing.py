"""Resize, crop and mirror, as the stored preprocessing config says."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.gaps import has_gaps
from ldmkit.data.pictures import Picture

AnySize = Float[Tensor, "batch channels _height _width"]


def preprocess(
    picture: Picture, config: PreprocessingConfig, draw: torch.Generator | None
) -> Picture:
    """Bring a picture to `[c, size, size]`: shorter side to the size, cut the longer one.

    Args:
        picture: `[c, h, w]` in [-1, 1], or beyond where a range is declared: it is clipped, before
            values that lie outside can spread. NaN marks pixels that do not count and stays NaN.
        config: size, filter, crop, flip.
        draw: decides random crops and flips; None for the centre and no flip (encoding, evaluation).
    """
    size = config.size
    if config.range is not None:
        picture = picture.clamp(-1.0, 1.0)
    if min(picture.shape[1:]) != size:
        picture = _resize_shorter_side(picture, size, config.resize)
    spare_y, spare_x = picture.shape[1] - size, picture.shape[2] - size
    top, left = spare_y // 2, spare_x // 2
    if draw is not None:
        share_y, share_x, mirror = torch.rand(3, generator=draw).tolist()
        if config.crop == "random":
            top, left = int(share_y * (spare_y + 1)), int(share_x * (spare_x + 1))
        if config.flip and mirror < 0.5:
            picture = picture.flip(2)
    return picture[:, top : top + size, left : left + size].contiguous()


def resize(images: AnySize, size: tuple[int, int], filter_name: str) -> AnySize:
    """Images at another height and width, in [-1, 1].

    Args:
        images: `[b, c, h, w]`, NaN in pixels that do not count.
        size: height, width.
        filter_name: bicubic or bilinear (both anti-aliased), or area.
    """
    if images.shape[2:] == size:
        return images
    if not has_gaps(images):
        resized = _interpolated(images, size, filter_name)
    else:  # an average over what counts; a pixel of the result counts if half of its area does
        valid = ~images.isnan().any(dim=1, keepdim=True)
        values = _interpolated(images.where(valid, 0.0), size, filter_name)
        weight = _interpolated(valid.to(images.dtype), size, filter_name)
        resized = (values / weight).where(weight >= 0.5, torch.nan)
    return resized.clamp(-1.0, 1.0)  # bicubic overshoots at edges


def _resize_shorter_side(picture: Picture, size: int, filter_name: str) -> Picture:
    height, width = picture.shape[1:]
    scale = size / min(height, width)
    target = (max(size, round(height * scale)), max(size, round(width * scale)))
    return resize(picture[None].contiguous(), target, filter_name)[0]


def _interpolated(images: Tensor, size: tuple[int, int], filter_name: str) -> Tensor:
    if filter_name == "area":
        return F.interpolate(images, size, mode="area")
    return F.interpolate(images, size, mode=filter_name, antialias=True, align_corners=False)
