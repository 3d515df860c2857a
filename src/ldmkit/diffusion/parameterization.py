"""What the network predicts, as three numbers for each noise level (Karras et al. 2022, Sec. 5).

    clean = c_skip x + c_out F(c_in x, c_noise),    x = clean + sigma n

A parameterization is a function sigma -> (c_skip, c_out, c_in). The fourth number, c_noise, is what
the network is told of the noise level, and comes from the schedule (`Schedule.timestep`): so each
parameterization goes with each schedule, and foreign checkpoints get the t that they know. Weighting
the squared error of the clean latents by 1 / c_out^2 gives the loss of the parameterization's own
paper. Data have variance 1 (latents are whitened), which is Karras et al.'s sigma_data = 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ldmkit.tensors import Sigmas


class Scaling(NamedTuple):
    """The three numbers of each sample."""

    c_skip: Sigmas
    c_out: Sigmas
    c_in: Sigmas


Parameterization = Callable[[Sigmas], Scaling]


def epsilon(sigma: Sigmas) -> Scaling:
    """The network predicts the noise (Ho et al. 2020): clean = x - sigma F(x / sqrt(1 + sigma^2))."""
    return Scaling(torch.ones_like(sigma), -sigma, (1.0 + sigma.square()).rsqrt())


def clean_latents(sigma: Sigmas) -> Scaling:
    """The network predicts the clean latents (Ho et al. 2020, Sec. 3.2; "x0"): clean = F."""
    return Scaling(torch.zeros_like(sigma), torch.ones_like(sigma), (1.0 + sigma.square()).rsqrt())


def velocity(sigma: Sigmas) -> Scaling:
    """The network predicts v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) clean (Salimans and Ho 2022)."""
    square = 1.0 + sigma.square()
    return Scaling(1.0 / square, -sigma * square.rsqrt(), square.rsqrt())


def flow(sigma: Sigmas) -> Scaling:
    """The network predicts n - clean, the velocity of the straight path (Liu et al. 2023; Lipman et al. 2023).

    Time s runs from 0 (data) to 1 (noise), as in Esser et al. 2024: x_s = (1 - s) clean + s n, so
    sigma = s / (1 - s), x_s = x / (1 + sigma) and clean = x_s - s F(x_s).
    """
    level = 1.0 + sigma
    return Scaling(1.0 / level, -sigma / level, 1.0 / level)


def edm(sigma: Sigmas) -> Scaling:
    """The network predicts what Karras et al. 2022, Tab. 1, mix of noise and clean latents.

    c_skip = 1 / (1 + sigma^2), c_out = sigma / sqrt(1 + sigma^2), c_in = 1 / sqrt(1 + sigma^2): for
    sigma_data = 1 that is -v.
    """
    square = 1.0 + sigma.square()
    return Scaling(1.0 / square, sigma * square.rsqrt(), square.rsqrt())


PARAMETERIZATIONS: dict[str, Parameterization] = {
    "epsilon": epsilon,
    "x0": clean_latents,
    "v": velocity,
    "flow": flow,
    "edm": edm,
}
"""Keep in step with `diffusion_configs.ParameterizationName`; a test compares them."""
