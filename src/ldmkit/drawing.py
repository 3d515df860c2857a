"""From seeds and what they are told to latents: a model, guidance, a grid and a sampler put together."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ldmkit.condition_configs import ConditionConfig
from ldmkit.conditioning.condition import Condition, mixed, stacked
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
from ldmkit.diffusion.known_region import KnownRegion, keeping, surrounded
from ldmkit.diffusion.samplers import SAMPLERS, DenoiseAt, Levels, run_sampler
from ldmkit.diffusion.schedule import Schedule
from ldmkit.diffusion.tiles import Tiling, Window, tiled
from ldmkit.generation_configs import GridName, SamplerName
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.tensors import Latents, Noise

Settled = Condition | Branches | BothConditions
"""The condition of all samples, of one model or as guidance takes it."""
Steer = Callable[[DenoiseAt], DenoiseAt]
"""What leads the samples of one call, told or not; see `guiding`."""


Encode = Callable[[LatentDiffusion, Values], Condition]
"""A model and what its samples are told, received -> their condition."""


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
    share: float = 1.0
    """Of the noise levels that is walked, the less noisy ones; 0 < share <= 1."""
    tiling: Tiling | None = None
    """Windows to denoise in; None: all at once."""


class Destination(NamedTuple):
    """What samples are told in part."""

    values: Values
    share: Float[Tensor, " batch"]
    """How far each lies from its own values towards these, 0 to 1."""


class Origin(NamedTuple):
    """What samples begin with and lie between, beside their seeds; None: nothing of the kind."""

    noise: Latents | None = None
    """Unit noise instead of the seeds' first."""
    latents: Latents | None = None
    """Raw; noised to the first level instead of beginning with noise alone."""
    known: KnownRegion | None = None
    """Raw; stays as it is outside of its hole."""
    towards: Destination | None = None
    steer: Steer | None = None
    """What leads the samples besides what they are told."""


@torch.no_grad()
def draw_latents(
    model: LatentDiffusion,
    values: Values,
    shape: Sequence[int],
    noise: Noise,
    manner: Manner,
    origin: Origin = Origin(),  # noqa: B008 - an immutable tuple
    encode: Encode = LatentDiffusion.condition,
    on_estimate: Callable[[int, Latents], None] | None = None,
) -> Latents:
    """Raw latents `[n, z, h, w]` on the model's device.

    Args:
        model: in evaluation mode.
        values: what the samples are told, as `conditioning.kinds` reads them.
        shape: n, z, h, w.
        noise: source of unit noise, of which the start is drawn first.
        manner: sampler, grid and guidance.
        origin: what the samples begin with beside noise.
        encode: what makes conditions, such as one that remembers those it made.
        on_estimate: called after each model call, with its number from 0 and the clean raw latents that
            it expected.

    Raises:
        ValueError: the schedule has no such grid, or the sampler no such settings.
    """
    sigmas = levels_of(model.schedule, manner)
    denoise = denoise_at(model, values, manner.guide, sigmas, origin.towards, encode, manner.tiling)
    if origin.steer is not None:
        denoise = origin.steer(denoise)
    unit = noise(torch.empty(*shape, device=model.latent_mean.device))
    denoise, start = _begun(model, origin, denoise, unit, float(sigmas[0]))
    if on_estimate is not None:
        denoise = _watched(denoise, lambda call, clean: on_estimate(call, model.unwhiten(clean)))
    clean = run_sampler(
        manner.sampler,
        denoise,
        start,
        sigmas,
        calls=manner.steps,
        noise=noise,
        settings=manner.settings,
    )
    return model.unwhiten(clean)


def levels_of(schedule: Schedule, manner: Manner) -> Levels:
    """The noise levels that the sampler visits.

    Where only a share is walked, they are the last ones of a grid that has as many more steps as the
    whole is larger (SDEdit, Meng et al. 2022; `strength` in diffusers), so that the calls stay as asked.

    Raises:
        ValueError: the schedule has not so many, or no such grid.
    """
    steps = SAMPLERS[manner.sampler].grid_steps(manner.steps)
    whole = round(steps / manner.share)
    if manner.levels:
        found = of_levels(manner.levels)(schedule, whole)
    elif manner.grid == "auto":
        found = schedule.steps(whole)
    else:
        found = GRIDS[manner.grid](schedule, whole)
    return found[whole - steps :]


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
    model: LatentDiffusion,
    values: Values,
    guide: Guide | None,
    sigmas: Levels,
    towards: Destination | None = None,
    encode: Encode = LatentDiffusion.condition,
    tiling: Tiling | None = None,
) -> DenoiseAt:
    """The model with everything settled but latents and noise level.

    Args:
        model: in evaluation mode.
        values: what the samples are told.
        guide: what guides it.
        sigmas: the sampler's noise levels, over which weights may grow.
        towards: what else they are told, in part.
        encode: what makes conditions.
        tiling: windows to denoise in, guidance included; None for all at once.
    """
    denoise, condition = _settled(model, values, guide, sigmas, encode)
    if towards is not None:
        _, other = _settled(model, towards.values, guide, sigmas, encode)
        condition = _between(condition, other, towards.share)
    if tiling is not None:
        denoise = tiled(denoise, tiling, _within)
    if not any(one.config.unet.self_conditioning for one in models_of(model, guide)):
        return lambda x, sigma: denoise(x, sigma, condition)

    def denoise_seeing(x: Latents, sigma: Tensor, seen: Condition) -> Latents:
        return denoise(x, sigma, _with_previous(condition, seen.previous))

    remembered = remembering(denoise_seeing)
    return lambda x, sigma: remembered(x, sigma, Condition())


def _watched(denoise: DenoiseAt, watch: Callable[[int, Latents], None]) -> DenoiseAt:
    """The same, and what it gives is shown."""
    calls = itertools.count()

    def watched(x: Latents, sigma: Tensor) -> Latents:
        clean = denoise(x, sigma)
        watch(next(calls), clean)
        return clean

    return watched


def models_of(model: LatentDiffusion, guide: Guide | None) -> tuple[LatentDiffusion, ...]:
    """All models that samples are drawn from."""
    return (model, *((guide.weaker,) if guide and guide.weaker else ()))


def seeded_noise(seeds: Sequence[int]) -> Noise:
    """Noise whose row i comes from a generator of seed i alone."""
    generators = [generator_for(seed) for seed in seeds]

    def noise(like: torch.Tensor) -> torch.Tensor:
        rows = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
        return torch.stack(rows).to(like.device)

    return noise


def _begun(
    model: LatentDiffusion, origin: Origin, denoise: DenoiseAt, unit: Latents, sigma: float
) -> tuple[DenoiseAt, Latents]:
    """What to denoise with, and where sampling starts."""
    unit = unit if origin.noise is None else origin.noise.to(unit)
    start = model.schedule.initial(unit, sigma)
    if origin.latents is not None:
        start = model.whiten(origin.latents.to(unit)) + sigma * unit
    if origin.known is None:
        return denoise, start
    latents, hole = origin.known
    known = KnownRegion(model.whiten(latents.to(unit)), hole.to(unit.device))
    return keeping(denoise, known), surrounded(start, known, unit, sigma)


def _settled(
    model: LatentDiffusion, values: Values, guide: Guide | None, sigmas: Levels, encode: Encode
) -> tuple[Denoise, Settled]:
    """A `Denoise`, and the condition to give to it."""
    told = model.received(values)
    if guide is not None:
        return _guided(model, told, guide, sigmas, encode)
    return _seeing(model), encode(model, told)


def _between(first: Settled, last: Settled, share: Tensor) -> Settled:
    """Conditions, or both of a pair, some way from the first to the last."""
    if isinstance(first, Branches) and isinstance(last, Branches):
        alone = mixed(first.alone, last.alone, share)
        return Branches(alone, mixed(first.together, last.together, share))
    if isinstance(first, BothConditions) and isinstance(last, BothConditions):
        good = mixed(first.good, last.good, share)
        return BothConditions(good, mixed(first.weak, last.weak, share))
    return mixed(cast("Condition", first), cast("Condition", last), share)


def _guided(
    model: LatentDiffusion, told: Values, guide: Guide, sigmas: Levels, encode: Encode
) -> tuple[Denoise, Branches | BothConditions]:
    """A guided `Denoise`, and the condition to give to it."""
    guidance = guide.guidance._replace(growth=growing(guide.growth, sigmas))
    whole = encode(model, told)
    if guide.weaker is not None:
        both = BothConditions(whole, encode(guide.weaker, told))
        return autoguided(_seeing(model), _seeing(guide.weaker), guidance), both
    empty = model.empty(told)
    if guide.negative is not None:
        empty["text"] = guide.negative.to(empty["text"]).expand_as(empty["text"])
    parts = [
        encode(model, _told_in(branch, guide.groups, told, empty))
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


def _within(condition: Settled, window: Window) -> Settled:
    """A condition, or both of a pair, of a window: maps are cut, what has no place stays."""
    if not isinstance(condition, Condition):
        return type(condition)(*(_within(part, window) for part in condition))
    maps = (condition.channels, condition.previous)
    channels, previous = (None if x is None else window.of(x) for x in maps)
    return condition._replace(channels=channels, previous=previous)


def _with_previous(condition: Settled, previous: Latents | None) -> Settled:
    """A condition, or both of a pair, with the estimate of the call before."""
    if isinstance(condition, Condition):
        return condition._replace(previous=previous)
    return type(condition)(*(part._replace(previous=previous) for part in condition))
