"""Resize, crop and mirror, as the stored preprocessing config says."""

import torch
import torch.nn.functional as F

from ldmkit.configs import PreprocessingConfig
from ldmkit.data.pictures import Picture


def preprocess(
    picture: Picture, config: PreprocessingConfig, draw: torch.Generator | None
) -> Picture:
    """Bring a picture to `[c, size, size]`: shorter side to the size, cut the longer one.

    Args:
        picture: `[c, h, w]` in [-1, 1].
        config: size, filter, crop, flip.
        draw: decides random crops and flips; None for the centre and no flip (encoding, evaluation).
    """
    size = config.size
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


def _resize_shorter_side(picture: Picture, size: int, filter_name: str) -> Picture:
    height, width = picture.shape[1:]
    scale = size / min(height, width)
    target = (max(size, round(height * scale)), max(size, round(width * scale)))
    batch = picture[None].contiguous()
    if filter_name == "area":
        resized = F.interpolate(batch, target, mode="area")
    else:
        resized = F.interpolate(
            batch, target, mode=filter_name, antialias=True, align_corners=False
        )
    return resized[0].clamp(-1.0, 1.0)  # bicubic overshoots at edges
