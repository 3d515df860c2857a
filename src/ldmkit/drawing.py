"""From seeds and what they are told to latents: a model, guidance and a sampler put together."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ldmkit.conditioning.condition import stacked
from ldmkit.conditioning.kind import Values
from ldmkit.conditioning.self_conditioning import remembering
from ldmkit.data.order import generator_for
from ldmkit.diffusion.denoiser import guided
from ldmkit.diffusion.samplers import sample_ddim
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.tensors import Latents, Noise


class Manner(NamedTuple):
    """How samples are drawn."""

    steps: int
    """Model calls for each sample."""
    guidance: float = 1.0
    """Weight of classifier-free guidance; 1 = off."""
    eta: float = 0.0
    """Share of the noise that DDIM draws anew."""


@torch.no_grad()
def draw_latents(
    model: LatentDiffusion,
    values: Values,
    shape: Sequence[int],
    noise: Noise,
    manner: Manner,
) -> Latents:
    """Raw latents `[n, z, h, w]` on the model's device.

    Args:
        model: in evaluation mode.
        values: what the samples are told, as `conditioning.kinds` reads them.
        shape: n, z, h, w.
        noise: source of unit noise, of which the start is drawn first.
        manner: steps and guidance.
    """
    told = model.received(values)
    condition, denoise = model.condition(told), model.denoise
    if manner.guidance != 1.0 and told:
        condition = stacked(condition, model.condition(model.empty(told)))
        denoise = guided(denoise, manner.guidance)
    if model.config.unet.self_conditioning:
        denoise = remembering(denoise)
    sigmas = model.schedule.steps(manner.steps)
    start = noise(torch.empty(*shape, device=model.latent_mean.device))
    clean = sample_ddim(
        lambda x, sigma: denoise(x, sigma, condition),
        model.schedule.initial(start, float(sigmas[0])),
        sigmas,
        noise=noise,
        eta=manner.eta,
    )
    return model.unwhiten(clean)


def seeded_noise(seeds: Sequence[int]) -> Noise:
    """Noise whose row i comes from a generator of seed i alone."""
    generators = [generator_for(seed) for seed in seeds]

    def noise(like: torch.Tensor) -> torch.Tensor:
        rows = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
        return torch.stack(rows).to(like.device)

    return noise
