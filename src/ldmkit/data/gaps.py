"""Pixels that do not count: NaN in the picture, or zero in the mask beside it.

From the file to the batch such a pixel is NaN in every channel, so that no step can take it for a
value. Networks and losses need numbers: `fill_gaps` gives them, with what counts beside.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from PIL import ImageOps
from torch import Tensor

from ldmkit.data.opening import open_picture
from ldmkit.data.pictures import Picture
from ldmkit.errors import DataError
from ldmkit.tensors import Images

FILL = 0.0
"""What networks see in a gap: the middle of the range."""
MASK_MODES = ("1", "L", "P", "RGB", "I;16")


class Filled(NamedTuple):
    """Images without NaN, and which of their pixels count."""

    images: Images
    valid: Bool[Tensor, "batch 1 height width"] | None
    """None where all do."""


def fill_gaps(images: Images) -> Filled:
    """Replace NaN by the middle of the range, 0; images without gaps are returned as they are.

    Call it before images go to a device: asking whether there are gaps waits for the answer.

    Args:
        images: `[b, c, h, w]` in [-1, 1], NaN in all channels of a pixel that does not count.
    """
    if not has_gaps(images):
        return Filled(images, None)
    valid = ~images.isnan().any(dim=1, keepdim=True)
    return Filled(images.where(valid, FILL), valid)


def has_gaps(images: Images | Picture) -> bool:
    """Whether any value is NaN; a sum answers ten times as fast as a look at each value."""
    return bool(images.sum().isnan())


def with_mask(picture: Picture, mask: bytes, name: str) -> Picture:
    """The picture with NaN where its mask is zero (black).

    Args:
        picture: `[c, h, w]`.
        mask: an encoded picture of the same size, grey or RGB.
        name: how to call the mask in errors.

    Raises:
        DataError: the mask cannot be read, has alpha, or is of another size.
    """
    with open_picture(mask, name) as image:
        if image.mode not in MASK_MODES:
            raise DataError(f"{name} has pixels of mode {image.mode}; a mask is grey or RGB")
        image = ImageOps.exif_transpose(image)
        array = np.asarray(image.convert("RGB") if image.mode == "P" else image)
    counts = torch.from_numpy(np.atleast_3d(array).any(axis=2))
    if counts.shape != picture.shape[1:]:
        sides = [f"{shape[1]} x {shape[0]}" for shape in (counts.shape, picture.shape[1:])]
        raise DataError(f"{name} has {sides[0]} pixels and its picture {sides[1]}")
    return picture.where(counts, torch.nan)


def require_some(picture: Picture, name: str) -> Picture:
    """The picture itself.

    Raises:
        DataError: not one of its pixels counts.
    """
    if has_gaps(picture) and bool(picture[0].isnan().all()):
        raise DataError(f"{name} has no pixel that counts: all are NaN or masked")
    return picture
