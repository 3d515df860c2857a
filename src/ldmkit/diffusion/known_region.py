"""Inpainting with any model: what is known is put in the place of what the model expects there.

A wrapper of `denoise`, so that every sampler, grid and guidance works with it. Outside of the hole the
estimate is the known latents at each call; a sampler then moves x there on the straight line
known + sigma n, which is what noisy known latents are, so that the model always sees the hole with its
true surroundings at the right noise level. Samplers that add noise add it there too, at the levels they
mean to: no renoising of our own is needed, unlike where x itself is replaced between the steps (Lugmayr
et al. 2022, RePaint). Their resampling, which harmonises hole and surroundings, is what the sampler
`restart` does.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from ldmkit.diffusion.samplers import DenoiseAt
from ldmkit.tensors import Latents, Sigmas


class KnownRegion(NamedTuple):
    """Latents that are known but for a hole."""

    latents: Latents
    """What they are in the hole does not matter."""
    hole: Bool[Tensor, "batch 1 y x"]
    """True in the hole."""


def keeping(denoise: DenoiseAt, known: KnownRegion) -> DenoiseAt:
    """A `denoise` whose estimate outside of the hole is the known latents.

    Args:
        denoise: latents and noise level -> clean latents.
        known: of the samples, in their order.
    """

    def kept(x: Latents, sigma: Sigmas) -> Latents:
        return torch.where(known.hole, denoise(x, sigma), known.latents)

    return kept


def surrounded(start: Latents, known: KnownRegion, noise: Latents, sigma: float) -> Latents:
    """Where sampling starts: `start` in the hole, noisy known latents around it.

    Args:
        start: noise of level sigma.
        known: of the samples, in their order.
        noise: unit noise.
        sigma: the first noise level.
    """
    return torch.where(known.hole, start, known.latents + sigma * noise)


def touched(
    hole: Bool[Tensor, "batch height width"], y: int, x: int
) -> Bool[Tensor, "batch 1 {y} {x}"]:
    """Holes at the latents' size: every latent of whose pixels one lies in the hole.

    Args:
        hole: of pictures.
        y: height of the latents.
        x: width of the latents.
    """
    return F.adaptive_max_pool2d(hole[:, None].float(), (y, x)) > 0.0
