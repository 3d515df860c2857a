"""Which noise levels training sees, and its losses sorted by them.

Every distribution is a function of one uniform number, so that each can be drawn stratified.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ldmkit.diffusion.schedule import Schedule
from ldmkit.diffusion_configs import NoiseDrawConfig
from ldmkit.tensors import Sigmas

LEVELS = 10
MARGIN = 1e-9
"""Keeps uniform numbers off 0 and 1, where a normal distribution has its infinite quantiles."""

Uniform = Float[Tensor, " n"]


def draw_sigmas(
    schedule: Schedule, config: NoiseDrawConfig, count: int, generator: torch.Generator
) -> Sigmas:
    """Noise levels for a batch, on the CPU.

    Stratified, sample i gets its level from the i-th of `count` equal parts of the distribution, which
    takes most of the draw's share out of the loss's noise. Give the size of the global batch, and each
    process its rows; samples come in random order, so none is bound to a level.

    Args:
        schedule: of the model.
        config: distribution; `auto` is the schedule's usual one.
        count: samples.
        generator: the only source of randomness.
    """
    name = schedule.usual_draw if config.distribution == "auto" else config.distribution
    if name == "uniform" and not config.stratified:
        return schedule.draw(count, generator)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    if config.stratified:
        uniform = (torch.arange(count, dtype=torch.float64) + uniform) / count
    return DISTRIBUTIONS[name](schedule, config, uniform.clamp(MARGIN, 1.0 - MARGIN)).float()


def uniform_levels(schedule: Schedule, config: NoiseDrawConfig, uniform: Uniform) -> Uniform:
    """Uniform in the schedule's own time: t, the flow's s before its shift, or sigma^(1/rho)."""
    return schedule.sigma_at(uniform)


def logit_normal_levels(schedule: Schedule, config: NoiseDrawConfig, uniform: Uniform) -> Uniform:
    """logit(time) normal (Esser et al. 2024, Sec. 3.1); a flow's shift comes after it."""
    normal = torch.special.ndtri(uniform)
    return schedule.sigma_at((config.logit_mean + config.logit_std * normal).sigmoid())


def log_normal_levels(schedule: Schedule, config: NoiseDrawConfig, uniform: Uniform) -> Uniform:
    """ln(sigma) normal (Karras et al. 2022, Tab. 1: P_mean, P_std), within the schedule's range."""
    normal = torch.special.ndtri(uniform)
    sigma = (config.log_mean + config.log_std * normal).exp()
    return sigma.clamp(schedule.lowest, schedule.highest)


def even_sigmas(
    schedule: Schedule, config: NoiseDrawConfig, count: int, generator: torch.Generator
) -> Sigmas:
    """`count` levels evenly spaced in the distribution, in random order: a draw without its chance."""
    name = schedule.usual_draw if config.distribution == "auto" else config.distribution
    middle = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    levels = DISTRIBUTIONS[name](schedule, config, middle).float()
    return levels[torch.randperm(count, generator=generator)]


def level_of(schedule: Schedule, sigma: Sigmas) -> Int[Tensor, " batch"]:
    """The tenth of the schedule's own time that each noise level lies in, 0 the least noisy.

    For a discrete schedule these are the tenths of its T steps, hence of a uniform draw.
    """
    edges = schedule.sigma_at(torch.linspace(0.0, 1.0, LEVELS + 1, dtype=torch.float64)[1:-1])
    return torch.bucketize(sigma, edges.float().to(sigma.device), right=True)


DISTRIBUTIONS: dict[str, Callable[[Schedule, NoiseDrawConfig, Uniform], Uniform]] = {
    "uniform": uniform_levels,
    "logit-normal": logit_normal_levels,
    "log-normal": log_normal_levels,
}
"""Keep in step with `diffusion_configs.DistributionName`; a test compares them."""
