"""What the network predicts, as three numbers for each noise level (Karras et al. 2022, Sec. 5).

    clean = c_skip x + c_out F(c_in x, t)

A parameterization is a function sigma -> (c_skip, c_out, c_in). Weighting the squared error of the
clean latents by 1 / c_out^2 gives the loss of the parameterization's own paper.
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


def velocity(sigma: Sigmas) -> Scaling:
    """The network predicts v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) clean (Salimans and Ho 2022)."""
    square = 1.0 + sigma.square()
    return Scaling(1.0 / square, -sigma * square.rsqrt(), square.rsqrt())


PARAMETERIZATIONS: dict[str, Parameterization] = {"epsilon": epsilon, "v": velocity}
"""Keep in step with `configs.ParameterizationName`; a test compares them."""
