"""Samplers: pure functions from noise to latents. No state, no hidden random numbers."""

import itertools
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from ldmkit.tensors import Latents, Noise, Sigmas

DenoiseAt = Callable[[Latents, Sigmas], Latents]
"""A `Denoise` whose condition is settled."""


def sample_ddim(
    denoise: DenoiseAt,
    x: Latents,
    sigmas: Float[Tensor, " steps_plus_1"],
    *,
    noise: Noise,
    eta: float = 0.0,
    on_step: Callable[[int, Latents], None] | None = None,
) -> Latents:
    """DDIM (Song et al. 2021, Eq. 12 and 16), exactly one model call a step.

    In units where noisy = clean + sigma n the step is: keep the direction of the noise at
    sqrt(s'^2 - up^2), add fresh noise of up = eta (s' / s) sqrt(s^2 - s'^2). eta 1 is DDPM's
    ancestral sampling.

    Args:
        denoise: latents and noise level -> clean latents.
        x: start, noise of level `sigmas[0]`.
        sigmas: falling noise levels, the last one 0.
        noise: source of unit noise; not called for eta 0.
        eta: share of the noise that is drawn anew, 0 to 1.
        on_step: called after each step with its number and the clean latents expected.
    """
    levels = sigmas.tolist()
    for step, (level, following) in enumerate(itertools.pairwise(levels)):
        clean = denoise(x, x.new_full((len(x),), level))
        up = eta * following / level * (level**2 - following**2) ** 0.5
        kept = (following**2 - up**2) ** 0.5
        x = clean + kept / level * (x - clean)
        if up > 0:
            x = x + up * noise(x)
        if on_step is not None:
            on_step(step, clean)
    return x
