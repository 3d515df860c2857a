"""Self-conditioning: the network sees its own earlier estimate of the clean latents (Chen et al. 2023)."""

from collections.abc import Callable

import torch

from ldmkit.conditioning.condition import Condition
from ldmkit.tensors import Latents, Mask, Sigmas

DenoiseUnder = Callable[[Latents, Sigmas, Condition], Latents]
"""Noisy latents, their noise level, a condition -> the clean latents expected."""

SHARE = 0.5
"""Of the samples of a training step that see an estimate (Chen et al. 2023, Sec. 3.2)."""


def estimating_first(denoise: DenoiseUnder, chosen: Mask, *, always: bool = False) -> DenoiseUnder:
    """For training: samples where `chosen` is true see what the network says without an estimate.

    No gradient flows through the estimate; only the chosen samples go through the network twice
    (Chen et al. 2023, Alg. 1).

    Args:
        denoise: the network.
        chosen: of the samples of a batch.
        always: call the network first even where no sample is chosen, since in other processes some may
            be, and its weights are put together in each call; nothing comes of it.
    """

    def denoise_twice(x: Latents, sigma: Sigmas, condition: Condition) -> Latents:
        previous = torch.zeros_like(x)
        rows = chosen.to(x.device).nonzero()[:, 0]
        if len(rows):
            told = Condition(*(way if way is None else way[rows] for way in condition))
            with torch.no_grad():
                previous[rows] = denoise(x[rows], sigma[rows], told)
        elif always:
            one = Condition(*(way if way is None else way[:1] for way in condition))
            devices = [x.device] if x.device.type == "cuda" else []
            with torch.no_grad(), torch.random.fork_rng(devices):  # dropout goes on as without
                denoise(x[:1], sigma[:1], one)
        return denoise(x, sigma, condition._replace(previous=previous))

    return denoise_twice


def remembering(denoise: DenoiseUnder) -> DenoiseUnder:
    """For one run of a sampler: each call sees the result of the call before (Chen et al. 2023, Alg. 2)."""
    previous: Latents | None = None

    def denoise_on(x: Latents, sigma: Sigmas, condition: Condition) -> Latents:
        nonlocal previous
        found = denoise(x, sigma, condition._replace(previous=previous))
        previous = found.detach()  # a gradient through this call must not hold those before
        return found

    return denoise_on
