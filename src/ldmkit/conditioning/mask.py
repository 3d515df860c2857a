"""Inpainting: the latents of the picture with its hole filled, and the mask, concatenated.

Two conventions, of models that others have trained:

    ldm   channels = latents, mask as -1 (known) and 1 (hole); the hole is black, -1
          (Rombach et al. 2022, Sec. 4.5; `scripts/inpaint.py` of its code)
    sd    channels = mask as 0 and 1, latents; the hole is mid-grey, 0
          (Stable Diffusion inpainting; diffusers' `StableDiffusionInpaintPipeline`)

Both bring the mask to the latents' size by the nearest pixel. True or 1 is a hole, everywhere.
"""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ldmkit.condition_configs import MaskCondition, MaskOptions
from ldmkit.conditioning.condition import Condition
from ldmkit.conditioning.kind import Kind, Reader, Widths
from ldmkit.data.latent_set import LatentSet
from ldmkit.errors import DataError
from ldmkit.tensors import Images, Latents

Convention = Literal["ldm", "sd"]
MaskedLatents = Float[Tensor, "batch z_and_mask y x"]
Holes = Bool[Tensor, "batch _height _width"]

HOLE_FILL: dict[Convention, float] = {"ldm": -1.0, "sd": 0.0}
"""What stands in the hole of a picture in [-1, 1] that is encoded."""


class MaskConditioner(nn.Module):
    """Masked latents and mask as channels, in one of two orders; nothing is learnt.

    Args:
        latent_channels: of the autoencoder.
        convention: order of the channels and range of the mask.
    """

    def __init__(self, latent_channels: int, convention: Convention) -> None:
        super().__init__()
        self.convention: Convention = convention
        self.channels = latent_channels + 1

    def empty(self, values: MaskedLatents) -> MaskedLatents:
        """Everything is a hole; the latents behind it are 0, the mean of the whitened ones."""
        nothing = torch.zeros_like(values)
        nothing[:, -1] = 1.0
        return nothing

    def forward(self, values: MaskedLatents) -> Condition:
        """Channels `[batch, z + 1, y, x]` in the order of the convention.

        Args:
            values: `[batch, z + 1, y, x]`: whitened latents of the picture with its hole filled and,
                last, the mask at their size, 1 = hole.
        """
        latents, mask = values[:, :-1], values[:, -1:]
        if self.convention == "sd":
            return Condition(channels=torch.cat([mask, latents], dim=1))
        return Condition(channels=torch.cat([latents, mask * 2.0 - 1.0], dim=1))


def mask_values(latents: Latents, mask: Holes) -> MaskedLatents:
    """Values of the conditioner.

    Args:
        latents: whitened latents of `fill_hole(image, mask, convention)`.
        mask: at the pictures' size or at that of the latents.
    """
    small = to_latent_size(mask, latents.shape[2], latents.shape[3])
    return torch.cat([latents, small[:, None].to(latents)], dim=1)


def fill_hole(image: Images, mask: Holes, convention: Convention) -> Images:
    """Pictures in [-1, 1] with the colour of the convention in their holes, ready to be encoded.

    Raises:
        ValueError: picture and mask differ in size.
    """
    _require_same_size(image, mask)
    return image.masked_fill(mask[:, None], HOLE_FILL[convention])


def to_latent_size(
    mask: Holes, height: int, width: int
) -> Bool[Tensor, "batch height_of_latents width_of_latents"]:
    """Masks at the latents' size: of each square of pixels the upper left one, as in both sources."""
    return F.interpolate(mask[:, None].float(), (height, width), mode="nearest")[:, 0] > 0.5


def blended(picture: Images, generated: Images, mask: Holes, feather: int = 0) -> Images:
    """The generated picture in the hole, the given one outside of it.

    Both show the same around the hole, so that is where they are mixed: pixels that lie further than
    `feather` from it stay exactly as they were, and nothing of what was in the hole shines through.

    Args:
        picture: `[b, c, h, w]`.
        generated: decoded, of the same shape.
        mask: `[b, h, w]`, True in the hole.
        feather: width of the mixed rim outside of the hole, pixels (along rows, columns and
            diagonals alike).

    Raises:
        ValueError: sizes differ, or the rim has a negative width.
    """
    _require_same_size(picture, mask)
    _require_same_size(generated, mask)
    if feather < 0:
        raise ValueError(f"a rim of {feather} pixels cannot be: give 0 or more")
    reached = mask[:, None].to(picture)
    weight = reached.clone()
    for _ in range(feather):
        reached = F.max_pool2d(reached, 3, stride=1, padding=1)
        weight += reached
    share = weight / (feather + 1)
    mixed = picture + share * (generated - picture)
    return torch.where(share == 1.0, generated, torch.where(share == 0.0, picture, mixed))


def _require_same_size(image: Images, mask: Holes) -> None:
    if image.shape[2:] != mask.shape[1:]:
        raise ValueError(
            f"the mask has {mask.shape[2]} x {mask.shape[1]} pixels and its picture "
            f"{image.shape[3]} x {image.shape[2]}: give one of the same size"
        )


def _settle(options: MaskOptions, latents: LatentSet) -> MaskCondition:
    del options
    if "hole" not in latents.manifest.columns:
        raise DataError(
            f"--condition mask: {latents.directory} has no holes; encode with --holes mixed"
        )
    fill = latents.manifest.recipe["holes"]["fill"]
    return MaskCondition(
        latent_channels=latents.manifest.latent_shape[0],
        convention="ldm" if fill == "black" else "sd",
    )


def _build(config: MaskCondition, widths: Widths) -> MaskConditioner:
    del widths
    return MaskConditioner(config.latent_channels, config.convention)


def _reader(config: MaskCondition, options: MaskOptions, latents: LatentSet) -> Reader:
    if _settle(options, latents) != config:
        raise DataError(f"{latents.directory} has holes of another convention than the model")

    def read(indices: np.ndarray, generator: torch.Generator) -> MaskedLatents:
        del generator
        masked = latents.rows("masked", indices).float()
        return mask_values(masked, latents.rows("hole", indices).bool())

    return read


def _row(config: MaskCondition, value: object) -> MaskedLatents:
    raise ValueError("holes come from a latent set: encode with --holes given, then --like SET")


MASK = Kind(settle=_settle, build=_build, reader=_reader, row=_row)
