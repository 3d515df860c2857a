"""From seeds and what they are told to latents: a model, guidance, a grid and a sampler put together."""

from collections.abc import Mapping, Sequence
from functools import reduce
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from ldmkit.condition_configs import ConditionConfig
from ldmkit.conditioning.condition import Condition, stacked
from ldmkit.conditioning.kind import Values
from ldmkit.conditioning.self_conditioning import DenoiseUnder, remembering
from ldmkit.data.order import generator_for
from ldmkit.diffusion.denoiser import Denoise
from ldmkit.diffusion.grids import GRIDS, of_levels
from ldmkit.diffusion.guidance import (
    BothConditions,
    Branches,
    GrowthName,
    Guidance,
    autoguided,
    branches,
    classifier_free,
    growing,
)
from ldmkit.diffusion.samplers import SAMPLERS, DenoiseAt, Levels, run_sampler
from ldmkit.diffusion.schedule import Schedule
from ldmkit.generation_configs import GridName, SamplerName
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.tensors import Latents, Noise

Settled = Condition | Branches | BothConditions
"""The condition of all samples, of one model or as guidance takes it."""


class Guide(NamedTuple):
    """What leads the samples, and away from what."""

    guidance: Guidance
    """Weights, one for each of `groups`, or the weaker model's; its `growth` is set while sampling."""
    groups: tuple[tuple[str, ...], ...] = ()
    """Kinds of condition that are told or not told together; kinds in none of them are always told."""
    growth: GrowthName = "constant"
    """Change of the weights over the sampling."""
    negative: Shaped[Tensor, " _values"] | None = None
    """Values of a text for branches that are not told theirs, instead of the empty ones."""
    weaker: LatentDiffusion | None = None
    """Model of the same latents and conditions to lead away from, instead of the null."""


class Manner(NamedTuple):
    """How samples are drawn."""

    steps: int
    """Model calls for each sample (a guided one counts as one)."""
    guide: Guide | None = None
    """None: the model as it is."""
    sampler: SamplerName = "ddim"
    grid: GridName = "auto"
    """auto: the schedule's own."""
    settings: Mapping[str, Any] = MappingProxyType({})
    """Parameters of the sampler that differ from their defaults."""
    levels: tuple[float, ...] = ()
    """Noise levels that a file gives in the grid's place, as `diffusion.grids.of_levels` takes them."""


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
        manner: sampler, grid and guidance.

    Raises:
        ValueError: the schedule has no such grid, or the sampler no such settings.
    """
    sigmas = levels_of(model.schedule, manner)
    denoise = denoise_at(model, values, manner.guide, sigmas)
    start = noise(torch.empty(*shape, device=model.latent_mean.device))
    clean = run_sampler(
        manner.sampler,
        denoise,
        model.schedule.initial(start, float(sigmas[0])),
        sigmas,
        calls=manner.steps,
        noise=noise,
        settings=manner.settings,
    )
    return model.unwhiten(clean)


def levels_of(schedule: Schedule, manner: Manner) -> Levels:
    """The noise levels that the sampler visits.

    Raises:
        ValueError: the schedule has not so many, or no such grid.
    """
    steps = SAMPLERS[manner.sampler].grid_steps(manner.steps)
    if manner.levels:
        return of_levels(manner.levels)(schedule, steps)
    if manner.grid == "auto":
        return schedule.steps(steps)
    return GRIDS[manner.grid](schedule, steps)


def guide_together(conditions: Sequence[ConditionConfig], weight: float) -> Guide | None:
    """Guidance by one weight: the model told everything against the model told nothing.

    Concatenated conditions are told in both, as in the paper and Stable Diffusion inpainting: without the
    picture around a hole the null would be another task's, not the same one's with less to go by.

    Returns:
        None where there is nothing to guide, or the weight is 1.
    """
    kinds = tuple(condition.kind for condition in conditions if not condition.channels)
    return Guide(Guidance((weight,)), (kinds,)) if kinds and weight != 1.0 else None


def denoise_at(
    model: LatentDiffusion, values: Values, guide: Guide | None, sigmas: Levels
) -> DenoiseAt:
    """The model with everything settled but latents and noise level.

    Args:
        model: in evaluation mode.
        values: what the samples are told.
        guide: what guides it.
        sigmas: the sampler's noise levels, over which weights may grow.
    """
    told = model.received(values)
    denoise: Denoise = _seeing(model)
    condition: Settled = model.condition(told)
    if guide is not None:
        denoise, condition = _guided(model, told, guide, sigmas)
    models = (model, *((guide.weaker,) if guide and guide.weaker else ()))
    if not any(one.config.unet.self_conditioning for one in models):
        return lambda x, sigma: denoise(x, sigma, condition)

    def denoise_seeing(x: Latents, sigma: Tensor, seen: Condition) -> Latents:
        return denoise(x, sigma, _with_previous(condition, seen.previous))

    remembered = remembering(denoise_seeing)
    return lambda x, sigma: remembered(x, sigma, Condition())


def seeded_noise(seeds: Sequence[int]) -> Noise:
    """Noise whose row i comes from a generator of seed i alone."""
    generators = [generator_for(seed) for seed in seeds]

    def noise(like: torch.Tensor) -> torch.Tensor:
        rows = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
        return torch.stack(rows).to(like.device)

    return noise


def _guided(
    model: LatentDiffusion, told: Values, guide: Guide, sigmas: Levels
) -> tuple[Denoise, Branches | BothConditions]:
    """A guided `Denoise`, and the condition to give to it."""
    guidance = guide.guidance._replace(growth=growing(guide.growth, sigmas))
    whole = model.condition(told)
    if guide.weaker is not None:
        both = BothConditions(whole, guide.weaker.condition(told))
        return autoguided(_seeing(model), _seeing(guide.weaker), guidance), both
    empty = model.empty(told)
    if guide.negative is not None:
        empty["text"] = guide.negative.to(empty["text"]).expand_as(empty["text"])
    parts = [
        model.condition(_told_in(branch, guide.groups, told, empty))
        for branch in branches(len(guide.groups), guidance.combination)
    ]
    return classifier_free(_seeing(model), guidance), Branches(whole, reduce(stacked, parts))


def _told_in(
    branch: Sequence[bool], groups: Sequence[Sequence[str]], told: Values, empty: Values
) -> dict[str, Tensor]:
    """The values of a branch that is told some of the groups."""
    silent = {
        kind for group, is_told in zip(groups, branch, strict=True) for kind in group if not is_told
    }
    return {kind: empty[kind] if kind in silent else value for kind, value in told.items()}


def _seeing(model: LatentDiffusion) -> DenoiseUnder:
    """The model's `denoise`, given its earlier estimate only if it was trained to see one."""
    if model.config.unet.self_conditioning:
        return model.denoise
    return lambda x, sigma, condition: model.denoise(x, sigma, condition._replace(previous=None))


def _with_previous(condition: Settled, previous: Latents | None) -> Settled:
    """A condition, or both of a pair, with the estimate of the call before."""
    if isinstance(condition, Condition):
        return condition._replace(previous=previous)
    return type(condition)(*(part._replace(previous=previous) for part in condition))
