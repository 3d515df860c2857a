"""Which noise levels training sees, and its losses sorted by them.

Every distribution is a function of one uniform number, so that each can be drawn stratified.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ldmkit.diffusion.schedule import Schedule
from ldmkit.diffusion_configs import NoiseDrawConfig
from ldmkit.tensors import Scalar, Sigmas

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


def loss_by_level(sigma: Sigmas, losses: Sigmas, schedule: Schedule) -> dict[str, Scalar]:
    """Mean loss of each tenth of the schedule's own time that occurs, `loss_level_0` the least noisy.

    For a discrete schedule these are the tenths of its T steps, hence of a uniform draw.

    Args:
        sigma: noise level of each sample. On the CPU, asking which levels occur waits for no device.
        losses: of each sample; may lie on another device.
        schedule: of the model.
    """
    edges = schedule.sigma_at(torch.linspace(0.0, 1.0, LEVELS + 1, dtype=torch.float64)[1:-1])
    level = torch.bucketize(sigma, edges.float().to(sigma.device), right=True)
    return {
        f"loss_level_{number}": losses[(level == number).to(losses.device)].mean()
        for number in level.unique().tolist()
    }


DISTRIBUTIONS: dict[str, Callable[[Schedule, NoiseDrawConfig, Uniform], Uniform]] = {
    "uniform": uniform_levels,
    "logit-normal": logit_normal_levels,
    "log-normal": log_normal_levels,
}
"""Keep in step with `diffusion_configs.DistributionName`; a test compares them."""
