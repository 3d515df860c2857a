"""Noise levels chosen for one model: those whose steps lose least of its own trajectories.

A trajectory of the probability-flow ODE is followed on a fine grid once. For any two of its levels it then
says, without another model call, how far one step from the first to the second would miss it; a dynamic
programme takes the levels that miss least in sum (after Watson et al. 2021, who sum terms of the bound on the
likelihood; Sabour et al. 2024 minimise a bound on the error by search).

An error counts as it is at the level where it is made, as if all of it came down to level 0. For Gaussian data a
share 1 / sqrt(1 + sigma^2) would; on trained models levels chosen with that share end farther from the exact
solution (docs/log.md), as what is made early decides what picture it becomes.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ldmkit.diffusion.samplers.dpm_solver import sample_dpmpp_2m
from ldmkit.diffusion.samplers.stepping import DenoiseAt, Levels
from ldmkit.tensors import Latents, Sigmas

Order = Literal[1, 2]
"""Of the sampler: 1 is DDIM and Euler, 2 is DPM-Solver++(2M)."""


class Trajectories(NamedTuple):
    """Solutions of the ODE at falling noise levels, as far as errors of steps depend on them."""

    sigmas: Float[np.ndarray, " m"]
    """Above 0."""
    products: Float[np.ndarray, "2m 2m"]
    """Mean products of values: of the clean latents expected at each level, then of the noise expected."""


def trajectories_of(denoise: DenoiseAt, x: Latents, sigmas: Levels) -> tuple[Trajectories, Latents]:
    """Follow the ODE on a fine grid by DPM-Solver++(2M).

    Args:
        denoise: latents and noise level -> clean latents.
        x: start, noise of level `sigmas[0]`.
        sigmas: falling noise levels, the last one 0.

    Returns:
        What errors are made of, and the clean latents at the end.
    """
    cleans: list[Tensor] = []
    noises: list[Tensor] = []

    def recorded(x: Latents, sigma: Sigmas) -> Latents:
        clean = denoise(x, sigma)
        cleans.append(clean.double().flatten())
        noises.append((x.double() - clean.double()).flatten() / float(sigma[0]))
        return clean

    end = sample_dpmpp_2m(recorded, x, sigmas, noise=torch.zeros_like)
    every = torch.stack([*cleans, *noises])
    return Trajectories(
        sigmas[:-1].double().numpy(), (every @ every.T / every.shape[1]).cpu().numpy()
    ), end


def together(parts: list[Trajectories], counts: list[int]) -> Trajectories:
    """Trajectories of several batches on the same levels, of so many samples each."""
    products = np.average([part.products for part in parts], axis=0, weights=counts)
    return Trajectories(parts[0].sigmas, products)


def tuned_levels(found: Trajectories, steps: int, order: Order) -> Levels:
    """The levels of so many steps that lose least of the trajectories.

    The first is their first. The last but the 0 that ends the grid lies above their last.

    Args:
        found: on many more levels than `steps`.
        steps: of the grid.
        order: of the sampler that the grid is for.

    Raises:
        ValueError: there are fewer levels than steps.
    """
    count = len(found.sigmas)
    if not 1 <= steps < count:
        raise ValueError(f"{steps} steps asked for; {count} levels give 1 to {count - 1}")
    errors = step_errors(found, order)
    chosen = _least_in_sum(errors, steps)
    levels = torch.from_numpy(found.sigmas[chosen].copy())
    return torch.cat([levels, levels.new_zeros(1)])


def step_errors(found: Trajectories, order: Order) -> Float[np.ndarray, "m m m"]:
    """Root mean square error of the step i -> j, h being the level before i; place `[h, i, j]`.

    The last j stands for level 0, and the step there is of order 1, as is that from the first level (for
    which h is the first level too). What is no step is infinite.
    """
    count, level = len(found.sigmas), found.sigmas
    errors = np.full((count, count, count), np.inf)
    for i in range(count - 1):
        ends = np.arange(i + 1, count)
        for h in range(max(i, 1)):
            last = ends == count - 1
            kept = np.where(last, 0.0, level[ends])
            # x_j missed by: c_i + lead (c_i - c_h) - c_j + sigma_j (n_i - n_j)
            lead = np.zeros(len(ends))
            if order == 2 and h < i:
                ratio = np.log(level[i] / level[ends]) / np.log(level[h] / level[i])
                lead = np.where(last, 0.0, (1.0 - kept / level[i]) * ratio / 2.0)
            terms = np.zeros((len(ends), 2 * count))
            rows = np.arange(len(ends))
            terms[:, i] += 1.0 + lead
            terms[:, h] -= lead
            terms[rows, ends] -= 1.0
            terms[:, count + i] += kept
            terms[rows, count + ends] -= kept
            squares = np.einsum("ea,ab,eb->e", terms, found.products, terms, optimize=True)
            errors[h, i, i + 1 :] = np.sqrt(np.maximum(squares, 0.0))
    return errors


def _least_in_sum(errors: Float[np.ndarray, "m m m"], steps: int) -> list[int]:
    """Places of the levels to visit, the last one (0) left out."""
    count = len(errors)
    # best[h, i]: least sum of a way that ends with the step h -> i
    best = np.full((count, count), np.inf)
    best[0] = errors[0, 0]
    if steps == 1:
        return [0]
    before: list[np.ndarray] = []
    for _ in range(steps - 1):
        whole = best[:, :, None] + errors  # h, i, j
        before.append(whole.argmin(axis=0))
        best = whole.min(axis=0)
    i, j = int(best[:, -1].argmin()), count - 1
    way = [i]
    for origin in reversed(before):
        h = int(origin[i, j])
        way.append(h)
        i, j = h, i
    return way[::-1]
