"""Guidance against closed forms: linear in its weights, exact for Gaussians, and counted calls."""

import math

import pytest
import torch
import torch.nn.functional as F

from ldmkit.diffusion.guidance import (
    BothConditions,
    Branches,
    Guidance,
    autoguided,
    branches,
    classifier_free,
    growing,
    image_guided,
)
from ldmkit.diffusion.samplers import sample_ddim

SIGMAS = torch.tensor([10.0, 3.0, 1.0, 0.3, 0.1, 0.0])


class Counted:
    """Adds the condition, one number a row, to a share of `x`; remembers the rows of each call."""

    def __init__(self):
        self.calls: list[int] = []

    def __call__(self, x, sigma, condition):
        assert len(x) == len(sigma) == len(condition)
        self.calls.append(len(x))
        return x / (1 + sigma.view(-1, 1, 1, 1)) + condition.view(-1, 1, 1, 1)


def at(x, sigma, shift):
    """What `Counted` gives for one shift, or one for each row."""
    shift = torch.as_tensor(shift, dtype=x.dtype).view(-1, 1, 1, 1)
    return x / (1 + sigma.view(-1, 1, 1, 1)) + shift


def both(alone, *parts):
    """Conditions of two rows each."""
    return Branches(torch.tensor(alone), torch.cat([torch.tensor(part) for part in parts]))


@pytest.fixture
def x(generator):
    return torch.randn(2, 1, 3, 3, generator=generator)


@pytest.fixture
def sigma():
    return torch.tensor([0.5, 2.0])


@pytest.mark.parametrize("weight", [-1.0, 0.0, 1.0, 1.5, 7.0])
def test_one_weight_moves_from_null_to_conditional(x, sigma, weight):
    denoise = Counted()
    condition = both([1.0, 2.0], [1.0, 2.0], [0.25, 0.5])
    found = classifier_free(denoise, Guidance((weight,)))(x, sigma, condition)
    shift = torch.tensor([0.25 + weight * 0.75, 0.5 + weight * 1.5])
    assert torch.allclose(found, at(x, sigma, shift), atol=1e-5)
    assert denoise.calls == [2 if weight == 1.0 else 4]  # nothing is left of the null then
    conditional, null = denoise(
        torch.cat([x, x]), torch.cat([sigma, sigma]), condition.together
    ).chunk(2)
    assert torch.equal(found, null + weight * (conditional - null))


def test_a_negative_condition_takes_the_place_of_the_null(x, sigma):
    condition = both([1.0, 1.0], [1.0, 1.0], [-3.0, -3.0])
    found = classifier_free(Counted(), Guidance((2.0,)))(x, sigma, condition)
    assert torch.allclose(found, at(x, sigma, [-3.0 + 2.0 * 4.0]), atol=1e-5)


def test_composed_conditions_add_up(x, sigma):
    denoise = Counted()
    condition = both([9.0, 9.0], [1.0, 1.0], [10.0, 10.0], [0.5, 0.5])
    found = classifier_free(denoise, Guidance((2.0, 3.0)))(x, sigma, condition)
    assert torch.allclose(found, at(x, sigma, [0.5 + 2 * 0.5 + 3 * 9.5]), atol=1e-5)
    assert denoise.calls == [6]


def test_nested_conditions_come_one_on_top_of_the_other(x, sigma):
    condition = both([10.0, 10.0], [1.0, 1.0], [10.0, 10.0], [0.5, 0.5])

    def run(*weights):
        settings = Guidance(weights, combination="nested")
        return classifier_free(Counted(), settings)(x, sigma, condition)

    assert torch.allclose(run(2.0, 3.0), at(x, sigma, [0.5 + 2 * 0.5 + 3 * 9.0]), atol=1e-5)
    assert torch.allclose(run(1.0, 1.0), at(x, sigma, [10.0]), atol=1e-5)  # all conditions told
    assert torch.allclose(run(1.0, 0.0), at(x, sigma, [1.0]), atol=1e-5)
    assert torch.allclose(run(0.0, 0.0), at(x, sigma, [0.5]), atol=1e-5)


def test_branches_say_what_each_is_told():
    assert branches(1, "composed") == branches(1, "nested") == [(True,), (False,)]
    assert branches(2, "composed") == [(True, False), (False, True), (False, False)]
    assert branches(2, "nested") == [(True, False), (True, True), (False, False)]


def test_outside_the_interval_the_conditional_is_called_alone(x):
    denoise = Counted()
    settings = Guidance((3.0,), interval=(0.3, 3.0))
    condition = both([1.0, 1.0], [1.0, 1.0], [0.0, 0.0])
    guide = classifier_free(denoise, settings)
    shifts = []
    for level in SIGMAS[:-1].tolist():
        sigma = torch.full((2,), level)
        shifts.append(float((guide(x, sigma, condition) - at(x, sigma, [0.0])).mean()))
    assert denoise.calls == [2, 4, 4, 4, 2]
    assert shifts == pytest.approx([1, 3, 3, 3, 1], abs=1e-4)


def test_rows_on_both_sides_of_the_interval_each_get_their_own(x, sigma):
    settings = Guidance((3.0,), interval=(1.0, math.inf))
    condition = both([1.0, 1.0], [1.0, 1.0], [0.0, 0.0])
    found = classifier_free(Counted(), settings)(x, sigma, condition)
    assert torch.allclose(found, at(x, sigma, [1.0, 3.0]), atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_rescaling_brings_the_spread_back(share, generator):
    conditional, null = torch.randn(2, 2, 4, 8, 8, generator=generator, dtype=torch.float64)

    def denoise(x, sigma, condition):
        return torch.cat([conditional, null])

    settings = Guidance((4.0,), rescale=share)
    condition = both([0.0, 0.0], [0.0, 0.0], [0.0, 0.0])
    sigma = torch.ones(2, dtype=torch.float64)
    found = classifier_free(denoise, settings)(conditional, sigma, condition)
    plain = null + 4.0 * (conditional - null)
    spreads = [part.flatten(1).std(dim=1) for part in (found, plain, conditional)]
    assert torch.allclose(spreads[0], share * spreads[2] + (1 - share) * spreads[1])
    one, other = (part / part.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for part in (found, plain))
    assert torch.allclose(one, other)


def test_rescaling_equals_diffusers(diffusers, generator):
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    conditional, null = torch.randn(2, 2, 4, 8, 8, generator=generator)
    settings = Guidance((4.0,), rescale=0.7)
    condition = both([0.0, 0.0], [0.0, 0.0], [0.0, 0.0])
    found = classifier_free(lambda *_: torch.cat([conditional, null]), settings)(
        conditional, torch.ones(2), condition
    )
    expected = rescale_noise_cfg(null + 4.0 * (conditional - null), conditional, 0.7)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_flat_estimate_is_rescaled_to_itself(sigma):
    flat = torch.ones(2, 1, 3, 3)
    settings = Guidance((2.0,), rescale=1.0)
    found = classifier_free(lambda x, *_: torch.ones_like(x), settings)(
        flat, sigma, both([0.0, 0.0], [0.0, 0.0], [0.0, 0.0])
    )
    assert torch.equal(found, flat)


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_growing_weights_keep_their_mean(steps):
    sigmas = torch.cat([torch.logspace(2, -2, steps), torch.zeros(1)])
    assert growing("constant", sigmas) is None
    for kind in ("linear", "cosine"):
        factor = growing(kind, sigmas)
        assert factor is not None
        factors = factor(sigmas[:-1])
        assert factors.mean().item() == pytest.approx(1.0, abs=1e-5)
        assert (factors.diff() > 0).all()
    linear = growing("linear", sigmas)
    assert linear is not None
    expected = 2 * (torch.arange(steps) + 0.5) / steps
    assert torch.allclose(linear(sigmas[:-1]), expected, atol=1e-5)


def test_growing_is_continuous_between_steps_and_flat_beyond():
    linear = growing("linear", SIGMAS)
    assert linear is not None
    between = torch.tensor([30.0, 10.0, 30.0**0.5, 3.0, 0.1, 0.001])
    assert linear(between).tolist() == pytest.approx([0.2, 0.2, 0.4, 0.6, 1.8, 1.8], abs=1e-5)


def test_weights_grow_while_sampling(x):
    settings = Guidance((3.0,), growth=growing("linear", SIGMAS))
    condition = both([1.0, 1.0], [1.0, 1.0], [0.0, 0.0])
    found = [
        float((classifier_free(Counted(), settings)(x, s, condition) - at(x, s, [0.0])).mean())
        for s in (torch.full((2,), level) for level in SIGMAS[:-1].tolist())
    ]
    assert found == pytest.approx(
        [1 + 2 * factor for factor in (0.2, 0.6, 1.0, 1.4, 1.8)], abs=1e-4
    )


def test_autoguidance_moves_away_from_the_weak_model(x, sigma):
    good, weak = Counted(), Counted()
    condition = BothConditions(torch.ones(2), torch.full((2,), -1.0))
    for weight in (0.0, 1.0, 2.5):
        found = autoguided(good, weak, Guidance((weight,)))(x, sigma, condition)
        assert torch.allclose(found, at(x, sigma, [-1 + weight * 2]), atol=1e-5)
    assert (good.calls, weak.calls) == (
        [2, 2, 2],
        [2, 2],
    )  # at weight 1 nothing is left of the weak one
    within = autoguided(good, weak, Guidance((3.0,), interval=(1.0, 4.0)))
    assert torch.allclose(within(x, sigma, condition), at(x, sigma, [1.0, 5.0]), atol=1e-5)
    within(x, sigma / 10, condition)
    assert (len(good.calls), len(weak.calls)) == (5, 3)


def gaussian(mean, std):
    """The ideal denoiser for clean ~ N(mean, std^2), independent numbers."""

    def denoise(x, sigma, condition):
        variance = sigma.view(-1, 1, 1, 1) ** 2
        return (std**2 * x + variance * mean) / (std**2 + variance)

    return denoise


def test_a_picture_guides_a_gaussian_to_its_posterior(generator):
    """For y = A clean + n, the guided estimate is E[clean | x, y] where `scale` is 1 / Var(y | x)."""
    mean, std, spread, level = 0.5, 0.8, 0.3, 0.6
    x, y = torch.randn(2, 3, 1, 4, 4, generator=generator, dtype=torch.float64)
    sigma = torch.full((3,), level, dtype=torch.float64)
    left = std**2 * level**2 / (std**2 + level**2)  # Var(clean | x)
    gain = 2.0  # what decoding multiplies by
    scale = 1 / (gain**2 * left + spread**2)
    guide = image_guided(gaussian(mean, std), lambda z: gain * z, y, lambda p: p, scale)
    precision = 1 / std**2 + 1 / level**2 + gain**2 / spread**2
    posterior = (mean / std**2 + x / level**2 + gain * y / spread**2) / precision
    assert torch.allclose(guide(x, sigma, None), posterior)


def test_means_of_blocks_guide_too(generator):
    """T = mean of 2 x 2: its 4 pixels share the evidence, the rest of the picture stays."""
    std, spread, level = 1.0, 0.2, 0.5
    x = torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64)
    sigma = torch.full((2,), level, dtype=torch.float64)
    left = std**2 * level**2 / (std**2 + level**2)
    plain = gaussian(0.0, std)(x, sigma, None)
    target = F.avg_pool2d(plain, 2)
    target[1, 0, 1, 1] += 1.0
    scale = 1 / (left / 4 + spread**2)
    guide = image_guided(
        gaussian(0.0, std), lambda z: z, target, lambda p: F.avg_pool2d(p, 2), scale
    )
    expected = plain.clone()
    expected[1, 0, 2:, 2:] += left / 4 * scale  # Kalman: cov(clean, y) / var(y) * surprise
    assert torch.allclose(guide(x, sigma, None), expected)


def test_a_guided_sampler_reaches_what_is_asked_for(generator):
    sigmas = torch.cat([torch.logspace(1.5, -2, 60, dtype=torch.float64), torch.zeros(1)])
    target = torch.tensor([2.0, -1.0], dtype=torch.float64).view(2, 1, 1, 1)
    start = sigmas[0] * torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64)

    def shrink(pictures):
        return pictures.mean(dim=(2, 3), keepdim=True)

    def run(scale):
        guide = image_guided(gaussian(0.0, 1.0), lambda z: z, target, shrink, scale)
        with torch.no_grad():
            return sample_ddim(
                lambda x, sigma: guide(x, sigma, None), start, sigmas, noise=torch.randn_like
            )

    plain, reached = run(0.0), run(500.0)
    assert (shrink(plain) - target).abs().max() > 0.5
    assert (shrink(reached) - target).abs().max() < 0.1
    assert torch.allclose(reached - shrink(reached), plain - shrink(plain))  # all else stays
    assert torch.equal(
        plain,
        sample_ddim(
            lambda x, sigma: gaussian(0.0, 1.0)(x, sigma, None),
            start,
            sigmas,
            noise=torch.randn_like,
        ),
    )


def test_a_bounded_step_is_the_whole_one_or_ends_where_the_target_is_met(generator):
    """Where the paper's step overshoots, the bound stops at the best point along it; else it is the same."""
    x, y = torch.randn(2, 2, 1, 4, 4, generator=generator, dtype=torch.float64)
    sigma = torch.full((2,), 3.0, dtype=torch.float64)
    plain = gaussian(0.0, 1.0)(x, sigma, None)

    def guide(scale, bounded):
        return image_guided(
            gaussian(0.0, 1.0), lambda z: 2.0 * z, y, lambda p: p, scale, bounded=bounded
        )(x, sigma, None)

    assert torch.allclose(guide(0.1, True), guide(0.1, False))
    assert torch.equal(guide(0.0, True), plain)
    assert torch.allclose(guide(1e3, True), y / 2.0)  # all directions have one slope: it is met
    assert (guide(1e3, False) - y / 2.0).abs().max() > 100.0


def test_what_cannot_be_done_is_said(x, sigma):
    for settings, message in (
        (Guidance(()), "one or more"),
        (Guidance((math.nan,)), "finite"),
        (Guidance((2.0,), interval=(2.0, 1.0)), "rising"),
        (Guidance((2.0,), interval=(-1.0, 1.0)), "rising"),
        (Guidance((2.0,), rescale=1.5), "not within 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            classifier_free(Counted(), settings)
    with pytest.raises(ValueError, match="one weight, not 2"):
        autoguided(Counted(), Counted(), Guidance((1.0, 2.0)))
    guide = image_guided(gaussian(0.0, 1.0), lambda z: z, x[:1], lambda p: p, 1.0)
    with pytest.raises(ValueError, match=r"target is \[1, 1, 3, 3\], the guide \[2, 1, 3, 3\]"):
        guide(x, sigma, None)
    with torch.inference_mode(), pytest.raises(ValueError, match="not inference_mode"):
        guide(x, sigma, None)
