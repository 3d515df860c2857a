"""Guidance: `Denoise` functions made of others. No state, no random numbers.

All of it is a combination of estimates of the clean latents whose coefficients sum to 1, so it means
the same for every parameterization. Noise levels are in standard deviations of whitened latents;
papers that set the data's standard deviation to 0.5 (Karras et al. 2022) halve them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ldmkit.diffusion.denoiser import Denoise
from ldmkit.tensors import Latents, Sigmas

Combination = Literal["composed", "nested"]
GrowthName = Literal["constant", "linear", "cosine"]
PROBE = 0.1
"""Standard deviation of the step, in whitened latents, by which a decoder's slope is measured."""
Growth = Callable[[Sigmas], Sigmas]
"""Noise levels to factors on weight - 1."""


class Guidance(NamedTuple):
    """How much, and when.

    With one weight, both combinations are null + weight (conditional - null).
    """

    weights: tuple[float, ...]
    """Of each condition; 1 = as the model was trained, 0 = as the null."""
    combination: Combination = "composed"
    """composed: null + sum_i w_i (c_i - null), each condition alone (Liu et al. 2022); nested: null
    + w_1 (c_1 - null) + w_2 (c_12 - c_1) + ..., each beside those before (Brooks et al. 2023)."""
    interval: tuple[float, float] = (0.0, math.inf)
    """Noise levels, both included, within which guidance acts (Kynkäänniemi et al. 2024)."""
    rescale: float = 0.0
    """Share of the estimate that gets the standard deviation of the unguided one (phi of Lin et al. 2024)."""
    growth: Growth | None = None
    """Change of the weights over the sampling; see `growing`."""


class Branches(NamedTuple):
    """The condition that a guided `Denoise` takes, for b samples."""

    alone: Any
    """Of b rows: all conditions told; used by itself outside the interval."""
    together: Any
    """Of (k + 1) b rows: b for each branch, in the order of `branches`, the last b rows the null,
    or a negative condition in its place."""


class BothConditions(NamedTuple):
    """The condition that an autoguided `Denoise` takes: each model has its own."""

    good: Any
    weak: Any


def branches(count: int, combination: Combination) -> list[tuple[bool, ...]]:
    """Which of `count` conditions each branch is told, the null last."""
    if combination == "nested":
        told = [tuple(place <= last for place in range(count)) for last in range(count)]
    else:
        told = [tuple(place == own for place in range(count)) for own in range(count)]
    return [*told, (False,) * count]


def classifier_free(denoise: Denoise, guidance: Guidance) -> Denoise:
    """Classifier-free guidance (Ho and Salimans 2021), all branches in one call.

    The condition given to the result is a `Branches`. Where no sample lies within the interval, one
    call for `alone` is all. Looking that up waits for the device, so without an interval it is not.
    Where weights of 1 leave nothing of the null, it is never asked.

    Raises:
        ValueError: there is no weight, or the settings make no sense.
    """
    _require_sense(guidance)
    rows = len(guidance.weights) + 1
    if _is_none(guidance):
        return lambda x, sigma, condition: denoise(x, sigma, condition.alone)

    def guided(x: Latents, sigma: Sigmas, condition: Branches) -> Latents:
        inside = _inside(guidance, sigma)
        if inside is not None and not bool(inside.any()):
            return denoise(x, sigma, condition.alone)
        every = denoise(torch.cat([x] * rows), torch.cat([sigma] * rows), condition.together)
        estimate = _combined(guidance, every.chunk(rows), sigma)
        if inside is None or bool(inside.all()):
            return estimate
        return _rows(inside, estimate, denoise(x, sigma, condition.alone))

    return guided


def autoguided(denoise: Denoise, weak: Denoise, guidance: Guidance) -> Denoise:
    """Guidance away from a weaker model: weak + w (good - weak) (Karras et al. 2024, autoguidance).

    The condition given to the result is a `BothConditions`. Both must work in the same whitened
    latents. `denoise` may be guided itself.

    Raises:
        ValueError: there is not exactly one weight, or the settings make no sense.
    """
    _require_sense(guidance)
    if len(guidance.weights) != 1:
        raise ValueError(f"autoguidance takes one weight, not {len(guidance.weights)}")
    if _is_none(guidance):
        return lambda x, sigma, condition: denoise(x, sigma, condition.good)

    def guided(x: Latents, sigma: Sigmas, condition: BothConditions) -> Latents:
        good = denoise(x, sigma, condition.good)
        inside = _inside(guidance, sigma)
        if inside is not None and not bool(inside.any()):
            return good
        estimate = _combined(guidance, (good, weak(x, sigma, condition.weak)), sigma)
        return estimate if inside is None else _rows(inside, estimate, good)

    return guided


def image_guided(
    denoise: Denoise,
    decode: Callable[[Latents], Tensor],
    target: Float[Tensor, "batch ..."],
    downsample: Callable[[Tensor], Tensor],
    scale: float,
    *,
    bounded: bool = False,
) -> Denoise:
    """Guidance by a picture behind the decoder, without training (Rombach et al. 2022, App. C).

    clean + sigma^2 grad_x log p, log p = -scale / 2 |downsample(decode(clean(x))) - target|^2, which
    is the paper's rule in units where noisy = clean + sigma n. The gradient runs through network and
    decoder, so it takes the memory of a training step. Samples must not depend on each other.

    Args:
        denoise: what is guided.
        decode: clean whitened latents to pictures.
        target: what is wanted, as `downsample` gives it; one for each sample.
        downsample: pictures to what is compared: smaller pictures, or features of a perceptual
            distance.
        scale: 1 / variance of the difference that is allowed for each number of `target`; 0 = none.
        bounded: go no further along the gradient than where the difference, taken as linear, is smallest
            (Cauchy's step). Without it a scale that is right at low noise overshoots at high noise, where
            all of a picture moves at once. Costs one decoding more.

    The result raises ValueError in inference mode, and where the target's shape does not fit.
    """

    def guided(x: Latents, sigma: Sigmas, condition: Any) -> Latents:  # noqa: ANN401
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "guidance by a picture needs gradients: sample under torch.no_grad, not inference_mode"
            )
        with torch.enable_grad():
            noisy = x.detach().requires_grad_()
            clean = denoise(noisy, sigma, condition)
            seen = downsample(decode(clean))
            if seen.shape != target.shape:  # else one would be stretched to fit the other
                raise ValueError(
                    f"the target is {list(target.shape)}, the guide {list(seen.shape)}"
                )
            difference = seen - target
            (gradient,) = torch.autograd.grad(-scale / 2.0 * difference.square().sum(), noisy)
        clean, step = clean.detach(), sigma.view(-1, 1, 1, 1) ** 2 * gradient
        if bounded:
            rms = step.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
            probe = (PROBE / rms.clamp(min=torch.finfo(rms.dtype).tiny)).clamp(max=1.0)
            with torch.no_grad():
                moved = (downsample(decode(clean + probe * step)) - seen) / probe
            step = _best_share(difference.detach(), moved) * step
        return clean + step

    return guided


def growing(kind: GrowthName, sigmas: Float[Tensor, " steps_plus_1"]) -> Growth | None:
    """Weights that grow while sampling: weight 1 + (w - 1) factor (Wang et al. 2024).

    linear: factor 2 p; cosine: 1 - cos(pi p); with p = (i + 1/2) / steps at the i-th of `sigmas`, and
    linear in log sigma between. Both have a mean of 1 over the steps, so that w stays comparable.

    Args:
        kind: constant gives None.
        sigmas: the sampler's falling noise levels, the last one 0.
    """
    if kind == "constant":
        return None
    levels = sigmas[:-1].double().cpu()
    table = levels.log().flip(0)
    places = ((torch.arange(len(levels), dtype=torch.float64) + 0.5) / len(levels)).flip(0)

    def factor(sigma: Sigmas) -> Sigmas:
        progress = _interpolated(sigma.log(), table.to(sigma), places.to(sigma))
        return 2.0 * progress if kind == "linear" else 1.0 - torch.cos(math.pi * progress)

    return factor


def _best_share(difference: Tensor, moved: Tensor) -> Tensor:
    """Share of a step, 0 to 1, after which difference + share moved is smallest; `[b, 1, 1, 1]`."""
    moved, difference = moved.flatten(1), difference.flatten(1)
    length = moved.square().sum(1)
    share = -(difference * moved).sum(1) / length.clamp(min=torch.finfo(length.dtype).tiny)
    return share.clamp(0.0, 1.0).view(-1, 1, 1, 1)


def _require_sense(guidance: Guidance) -> None:
    if not guidance.weights or not all(map(math.isfinite, guidance.weights)):
        raise ValueError(f"guidance weights {guidance.weights}: give finite numbers, one or more")
    low, high = guidance.interval
    if not 0.0 <= low < high:
        raise ValueError(f"guidance interval {low:g} to {high:g}: give two rising noise levels")
    if not 0.0 <= guidance.rescale <= 1.0:
        raise ValueError(f"guidance rescale {guidance.rescale:g} is not within 0 and 1")


def _is_none(guidance: Guidance) -> bool:
    """Whether everything but the estimate that is told all cancels out."""
    nested = guidance.combination == "nested" or len(guidance.weights) == 1
    return nested and all(weight == 1.0 for weight in guidance.weights)


def _inside(guidance: Guidance, sigma: Sigmas) -> Tensor | None:
    """Which samples lie within the interval; None where all noise levels do."""
    low, high = guidance.interval
    if low <= 0.0 and high == math.inf:
        return None
    return (sigma >= low) & (sigma <= high)


def _combined(guidance: Guidance, parts: Sequence[Latents], sigma: Sigmas) -> Latents:
    """The guided estimate, from one estimate for each branch and the null's."""
    given = sigma.new_tensor(guidance.weights)
    factor = sigma.new_ones(len(sigma)) if guidance.growth is None else guidance.growth(sigma)
    weights = 1.0 + (given - 1.0) * factor[:, None]
    estimate = _mixed(parts, weights, guidance.combination)
    if guidance.rescale == 0.0:
        return estimate
    unguided = _mixed(parts, torch.ones_like(weights), guidance.combination)
    axes = tuple(range(1, estimate.ndim))
    wanted, is_ = (part.std(dim=axes, keepdim=True) for part in (unguided, estimate))
    ratio = torch.where(is_ > 0.0, wanted / is_, 1.0)
    return estimate * (guidance.rescale * ratio + 1.0 - guidance.rescale)


def _mixed(
    parts: Sequence[Latents], weights: Float[Tensor, "batch k"], combination: Combination
) -> Latents:
    *conditional, null = parts
    estimate = null
    before = null
    for part, weight in zip(conditional, weights.unbind(1), strict=True):
        estimate = estimate + weight.view(-1, 1, 1, 1).to(part.dtype) * (part - before)
        before = part if combination == "nested" else null
    return estimate


def _rows(inside: Tensor, estimate: Latents, other: Latents) -> Latents:
    return torch.where(inside.view(-1, 1, 1, 1), estimate, other)


def _interpolated(at: Tensor, points: Tensor, values: Tensor) -> Tensor:
    """Linear between rising points, constant outside."""
    if len(points) == 1:
        return values.expand(len(at))
    above = torch.searchsorted(points, at.contiguous()).clamp(1, len(points) - 1)
    low, high = points[above - 1], points[above]
    share = ((at - low) / (high - low)).clamp(0.0, 1.0)
    return values[above - 1] + share * (values[above] - values[above - 1])
