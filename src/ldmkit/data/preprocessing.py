"""Resize, crop and mirror, as the stored preprocessing config says."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.gaps import has_gaps
from ldmkit.data.pictures import Picture
from ldmkit.data.placement import Placement, place

AnySize = Float[Tensor, "batch channels _height _width"]


def preprocess(
    picture: Picture,
    config: PreprocessingConfig,
    draw: torch.Generator | None,
    name: str = "the picture",
) -> Picture:
    """Bring a picture to `[c, size, size]`: shorter side to the size, cut the longer one.

    Args:
        picture: `[c, h, w]` in [-1, 1], or beyond where a range is declared: it is clipped, before
            values that lie outside can spread. NaN marks pixels that do not count and stays NaN.
        config: size, filter, crop, flip.
        draw: decides random crops and flips; None for the centre and no flip (encoding, evaluation).
        name: how to call the picture in errors.

    Raises:
        DataError: the config allows no resizing or no cutting, and the picture would need it.
    """
    return lay(picture, place(picture.shape[1:], config, draw, name=name), config)


def lay(picture: Picture, placement: Placement, config: PreprocessingConfig) -> Picture:
    """Resize, cut and mirror a picture as a placement says; values are clipped to a declared range."""
    if config.range is not None:
        picture = picture.clamp(-1.0, 1.0)
    if picture.shape[1:] != placement.resized:
        picture = resize(picture[None].contiguous(), placement.resized, config.resize)[0]
    return _window(picture, placement).contiguous()


def lay_classes(labelmap: Tensor, placement: Placement) -> Tensor:
    """The same for `[h, w]` class indices, by the nearest pixel: classes have no middle."""
    resized = F.interpolate(labelmap[None, None].float(), placement.resized, mode="nearest-exact")
    return _window(resized[0], placement)[0].to(labelmap.dtype)


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


def _window(picture: Tensor, placement: Placement) -> Tensor:
    top, left, (height, width) = placement.top, placement.left, placement.size
    window = picture[:, top : top + height, left : left + width]
    return window.flip(2) if placement.mirror else window


def _interpolated(images: Tensor, size: tuple[int, int], filter_name: str) -> Tensor:
    if filter_name == "area":
        return F.interpolate(images, size, mode="area")
    return F.interpolate(images, size, mode=filter_name, antialias=True, align_corners=False)
