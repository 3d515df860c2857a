"""`ldmkit tune-steps`: which noise levels are the best for few model calls of this model?"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ldmkit.assembly import diffusion_facts, load_diffusion
from ldmkit.diffusion.grids import GRIDS
from ldmkit.diffusion.samplers import SAMPLERS, DenoiseAt, Levels
from ldmkit.diffusion.step_tuning import (
    Order,
    Trajectories,
    together,
    trajectories_of,
    tuned_levels,
)
from ldmkit.drawing import Guide, denoise_at, levels_of, seeded_noise
from ldmkit.errors import UsageError
from ldmkit.generation_configs import GRID_SUFFIX, SampleConfig
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.manner import manner_of
from ldmkit.modelfile import versions
from ldmkit.requests import Asked, asked_of
from ldmkit.tensors import Latents
from ldmkit.terminal import say, track
from ldmkit.training.runtime import pick_device
from ldmkit.tuned_steps import TunedSteps, write_tuned
from ldmkit.tuning_configs import TuneStepsConfig

ORDERS: dict[str, Order] = {"ddim": 1, "dpmpp-2m": 2}
COMPARED = ("karras", "exponential", "align-your-steps")
"""Grids beside the schedule's own that the levels are measured against."""


class Sampling(NamedTuple):
    """What all samples share."""

    model: LatentDiffusion
    asked: Asked
    guide: Guide | None
    shape: tuple[int, int, int]
    seed: int


class Exact(NamedTuple):
    """Some samples, and where the ODE leads them."""

    numbers: list[int]
    end: Latents
    """Clean whitened latents."""


@torch.no_grad()
def tune_steps(config: TuneStepsConfig) -> Path:
    """Follow exact solutions, choose levels by half of them, and measure them on the other half.

    Returns:
        The file of the levels.

    Raises:
        UsageError: OUT is no *.json, or there are not more levels to choose from than steps.
        DataError: the model or the latents cannot be used.
    """
    if config.out.suffix != GRID_SUFFIX:
        raise UsageError(f"--out {config.out}: the levels are JSON, so name a *{GRID_SUFFIX} file")
    if config.fine <= config.steps:
        raise UsageError(
            f"--fine {config.fine}: choose from more levels than --steps {config.steps}"
        )
    facts = diffusion_facts(config.model)
    model = load_diffusion(config.model, pick_device(config.device))
    wish = _as_sampled(config)
    manner = manner_of(wish, model)
    asked = asked_of(wish, model.config, facts.latent_shape, None)
    sampling = Sampling(model, asked, manner.guide, facts.latent_shape, config.seed)

    fine = GRIDS["exponential"](model.schedule, config.fine)
    groups = [
        list(range(first, min(first + config.batch_size, end)))
        for start, end in ((0, config.num), (config.num, 2 * config.num))
        for first in range(start, end, config.batch_size)
    ]
    found: list[Trajectories] = []
    others: list[Exact] = []
    with track("exact solutions", 2 * config.num, unit="sample") as progress:
        for numbers in groups:
            trajectories, end = trajectories_of(*_start(sampling, numbers, fine), fine)
            if numbers[0] < config.num:
                found.append(trajectories)
            else:
                others.append(Exact(numbers, end))
            progress.advance(len(numbers))

    sizes = [len(numbers) for numbers in groups[: len(found)]]
    levels = tuned_levels(together(found, sizes), config.steps, ORDERS[config.sampler])
    grids = {"tuned": levels, "auto": levels_of(model.schedule, manner)}
    grids |= {name: GRIDS[name](model.schedule, config.steps) for name in COMPARED}
    errors: dict[str, float] = {}
    with track("comparison", len(grids), unit="grid") as progress:
        for name, grid in grids.items():
            errors[name] = _error(sampling, others, grid, config.sampler)
            progress.advance(1)
    write_tuned(
        config.out,
        _described(
            config, wish, facts.fingerprint, [*levels[:-1].tolist(), fine[-2].item()], errors
        ),
    )
    for name, error in sorted(errors.items(), key=lambda pair: pair[1]):
        say(f"{name}: {error:.4f} standard deviations from the exact solution, on other samples")
    if errors["tuned"] > min(errors.values()):
        say(
            f"warning: the grid {min(errors, key=lambda name: errors[name])} comes nearer than the levels found: "
            "take it, or raise --num"
        )
    return config.out


def _as_sampled(config: TuneStepsConfig) -> SampleConfig:
    """The samples as `sample` would draw them."""
    return SampleConfig(
        model=config.model,
        like=config.latents,
        holdout=config.holdout,
        num=2 * config.num,
        steps=config.steps,
        sampler=config.sampler,
        guidance=config.guidance,
        seed=config.seed,
    )


def _start(sampling: Sampling, numbers: Sequence[int], grid: Levels) -> tuple[DenoiseAt, Latents]:
    """The settled model and the noise of some samples."""
    model = sampling.model
    like = torch.empty(len(numbers), *sampling.shape, device=model.latent_mean.device)
    noise = seeded_noise([sampling.seed + number for number in numbers])(like)
    denoise = denoise_at(model, sampling.asked.values(list(numbers)), sampling.guide, grid)
    return denoise, model.schedule.initial(noise, float(grid[0]))


def _error(sampling: Sampling, exact: Sequence[Exact], grid: Levels, sampler: str) -> float:
    """Root mean square difference of latents drawn on a grid to the exact solution."""
    squares, values = 0.0, 0
    for one in exact:
        denoise, x = _start(sampling, one.numbers, grid)
        found = SAMPLERS[sampler].sample(denoise, x, grid, noise=torch.zeros_like)
        squares += (found - one.end).double().square().sum().item()
        values += found.numel()
    return math.sqrt(squares / values)


def _described(
    config: TuneStepsConfig,
    wish: SampleConfig,
    fingerprint: str,
    levels: list[float],
    errors: dict[str, float],
) -> TunedSteps:
    return TunedSteps(
        diffusion=fingerprint,
        steps=config.steps,
        levels=tuple(levels),
        manner={
            "sampler": config.sampler,
            "guidance": wish.weight,
            "samples": config.num,
            "fine": config.fine,
            "holdout": config.holdout,
            "seed": config.seed,
        },
        errors=errors,
        versions=versions(),
    )
