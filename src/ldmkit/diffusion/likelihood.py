"""The density that a denoiser gives to latents, by the probability-flow ODE (Song et al. 2021, App. D.2).

With s the noise level, dx / d ln s = x - D(x; s) moves latents from the least level to the noisiest, where
their density is a Gaussian's (Karras et al. 2022, Eq. 1, with sigma(t) = t). On the way the log-density
changes by the divergence, d - tr dD/dx, whose trace is estimated by v . (dD/dx)^T v with random signs v
(Skilling 1989, Hutchinson 1990): without bias, and without any error where dD/dx is diagonal.

It is z = x / sqrt(1 + s^2) that is moved, by dz / d ln s = (z / r - D(r z; s)) / r, r = sqrt(1 + s^2): for
latents of variance 1 without any structure nothing moves at all, so steps are spent on structure.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ldmkit.diffusion.samplers import DenoiseAt, Levels
from ldmkit.tensors import Latents, Sigmas

Probes = Float[Tensor, "probes batch z y x"]


class _Slope(NamedTuple):
    """How latents, and what is added to their log-density, change with ln sigma."""

    latents: Latents
    density: Float[Tensor, " batch"]


def log_density(
    denoise: DenoiseAt, x: Latents, sigmas: Levels, probes: Probes
) -> Float[Tensor, " batch"]:
    """Log-density of noisy latents at the least of some noise levels, nats, in float64.

    It is that of the latents as they are at level `sigmas[0]`: give latents with noise of that level. A
    level that is small beside all structure makes it that of the latents themselves.

    Args:
        denoise: latents and their noise level -> clean latents; no sample may depend on another, and
            autograd must reach through it.
        x: whitened latents with noise of level `sigmas[0]`.
        sigmas: rising noise levels, two or more, the first above 0; between neighbours goes one step of
            the classical Runge-Kutta method, four calls and four gradients for each probe. At the last
            one x is taken to be N(0, 1 + sigma^2), as samplers start.
        probes: random signs, -1 and 1, of mean 0 and independent of each other; the same ones on the whole
            way, so that the trace is smooth in sigma.

    Raises:
        ValueError: the levels do not rise from above 0.
    """
    if len(sigmas) < 2 or float(sigmas[0]) <= 0.0 or bool((sigmas.diff() <= 0).any()):
        raise ValueError("noise levels of a density must be two or more that rise from above 0")
    times = sigmas.double().log().tolist()

    def slope(z: Latents, time: float) -> _Slope:
        return _slope(denoise, z, math.exp(time), probes)

    z = x / (1.0 + float(sigmas[0]) ** 2) ** 0.5
    added = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for start, stop in itertools.pairwise(times):
        z, more = _runge_kutta(slope, z, start, stop)
        added = added + more
    values = x[0].numel()
    prior = -0.5 * (_sums(z.double().square()) + values * math.log(2.0 * math.pi))
    return prior + added - 0.5 * values * math.log1p(float(sigmas[0]) ** 2)


def gaussian_log_density(x: Latents, sigma: float) -> Float[Tensor, " batch"]:
    """Log-density under N(0, 1 + sigma^2), nats: of a model that knows whitening and nothing else."""
    variance = 1.0 + sigma**2
    values = x[0].numel()
    return -0.5 * (
        _sums(x.double().square()) / variance + values * math.log(2.0 * math.pi * variance)
    )


def bits_per_dimension(density: Float[Tensor, " batch"], values: int) -> Float[Tensor, " batch"]:
    """Log-densities in nats as code lengths: -log2 p for each of `values` numbers of a sample.

    Of a density, so below 0 where it is concentrated; only differences have a meaning of their own.
    """
    return -density / (values * math.log(2.0))


def levels_between(low: float, high: float, steps: int) -> Levels:
    """`steps` + 1 rising levels, even in log sigma, float64."""
    return torch.logspace(math.log10(low), math.log10(high), steps + 1, dtype=torch.float64)


def _slope(denoise: DenoiseAt, z: Latents, sigma: float, probes: Probes) -> _Slope:
    root = (1.0 + sigma**2) ** 0.5
    levels: Sigmas = torch.full((len(z),), sigma, dtype=z.dtype, device=z.device)
    with torch.enable_grad():
        x = (z * root).detach().requires_grad_()
        clean = denoise(x, levels)
        traces = [
            _sums(probe * torch.autograd.grad(clean, x, probe, retain_graph=number + 1 < len(probes))[0])
            for number, probe in enumerate(probes)
        ]  # fmt: skip
    trace = torch.stack(traces).mean(0)
    return _Slope((z / root - clean.detach()) / root, z[0].numel() / root**2 - trace)


def _runge_kutta(
    slope: Callable[[Latents, float], _Slope], z: Latents, start: float, stop: float
) -> tuple[Latents, Float[Tensor, " batch"]]:
    """One step of order four: the latents moved, and what it adds to the log-density."""
    step, middle = stop - start, (start + stop) / 2.0
    first = slope(z, start)
    second = slope(z + step / 2.0 * first.latents, middle)
    third = slope(z + step / 2.0 * second.latents, middle)
    fourth = slope(z + step * third.latents, stop)
    moved, added = (
        step / 6.0 * (a + 2.0 * b + 2.0 * c + d)
        for a, b, c, d in zip(first, second, third, fourth, strict=True)
    )
    return z + moved, added


def _sums(values: Tensor) -> Float[Tensor, " batch"]:
    """Over all of a sample, in float64."""
    return values.flatten(1).double().sum(1)
