"""Samplers against closed forms: order of convergence, moments, calls, all schedules and precisions."""

import itertools
import math

import pytest
import torch

from ldmkit.diffusion.grids import GRIDS
from ldmkit.diffusion.samplers import SAMPLERS, run_sampler
from ldmkit.diffusion.samplers.euler import Churn
from ldmkit.diffusion.samplers.restart import sample_restart
from ldmkit.diffusion.schedule import build_schedule
from ldmkit.diffusion_configs import ScheduleConfig

SCHEDULES = {
    "scaled-linear": build_schedule(ScheduleConfig(), "epsilon"),
    "zero-snr": build_schedule(ScheduleConfig(zero_terminal_snr=True), "v"),
    "flow": build_schedule(ScheduleConfig(kind="flow"), "flow"),
    "edm": build_schedule(ScheduleConfig(kind="edm"), "edm"),
}
STOCHASTIC = [name for name in SAMPLERS if SAMPLERS[name].stochastic]


def gaussian_denoise(mean, std):
    """E[clean | x] for clean ~ N(mean, std^2)."""

    def denoise(x, sigma):
        variance = sigma.view(-1, 1, 1, 1) ** 2
        return (std**2 * x + variance * mean) / (std**2 + variance)

    return denoise


class Mixture:
    """Two Gaussians: the exact denoiser, and the exact solution of the probability-flow ODE.

    In one dimension the ODE keeps the share of the probability below x (its quantile).
    """

    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    means = torch.tensor([-1.0, 0.6], dtype=torch.float64)
    variances = torch.tensor([0.35, 0.5], dtype=torch.float64) ** 2

    def denoise(self, x, sigma):
        level, x = sigma.view(-1, 1, 1, 1, 1) ** 2, x[..., None]
        variance = self.variances + level
        log_share = self.weights.log() - 0.5 * ((x - self.means) ** 2 / variance + variance.log())
        clean = (self.variances * x + level * self.means) / variance
        return (log_share.softmax(-1) * clean).sum(-1)

    def share_below(self, x, sigma):
        normal = (x[..., None] - self.means) / (self.variances + sigma**2).sqrt()
        return (self.weights * torch.special.ndtr(normal)).sum(-1)

    def moved(self, x, sigma, to):
        share = self.share_below(x, sigma)
        low, high = torch.full_like(x, -20.0), torch.full_like(x, 20.0)
        for _ in range(48):
            middle = (low + high) / 2
            below = self.share_below(middle, to) < share
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


TOP, LOW = 200.0, 0.02


def log_grid(steps, top=TOP, low=LOW):
    levels = torch.logspace(math.log10(top), math.log10(low), steps, dtype=torch.float64)
    return torch.cat([levels, levels.new_zeros(1)])


def ode_error(name, steps, settings):
    """Mean error of the clean latents expected at the last level, before whatever step leads to 0."""
    mixture = Mixture()
    start = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64).view(-1, 1, 1, 1) * TOP
    level = torch.full((7,), LOW, dtype=torch.float64)
    expected = mixture.denoise(mixture.moved(start, TOP, LOW), level)
    cleans = []
    SAMPLERS[name].sample(
        mixture.denoise,
        start,
        log_grid(steps),
        noise=torch.zeros_like,
        on_step=lambda step, clean: cleans.append(clean),
        **settings,
    )
    return (cleans[-1] - expected).abs().mean().item()


ODE_ORDERS = [
    ("ddim", {}, 1),
    ("euler", {}, 1),
    ("euler-ancestral", {"eta": 0.0}, 1),
    ("plms", {}, 2),
    ("heun", {}, 2),
    ("lms", {"order": 2}, 2),
    ("lms", {"order": 3}, 3),
    ("lms", {}, 4),
    ("dpmpp-2s", {}, 2),
    ("dpmpp-2m", {}, 2),
    ("dpmpp-2m-sde", {"eta": 0.0}, 2),
    ("dpmpp-3m-sde", {"eta": 0.0}, 3),
    ("unipc", {"order": 1}, 2),
    ("unipc", {"order": 2}, 3),
    ("unipc", {"order": 2, "kind": "bh1"}, 3),
    ("unipc", {"order": 3}, 4),
    ("unipc", {"order": 3, "kind": "bh1"}, 4),
    ("deis", {"order": 2}, 2),
    ("deis", {"order": 3}, 3),
]


@pytest.mark.parametrize(("name", "settings", "order"), ODE_ORDERS)
def test_order_of_convergence_on_the_ode(name, settings, order):
    errors = [ode_error(name, steps, settings) for steps in (80, 160)]
    slope = math.log2(errors[0] / errors[1])
    assert slope == pytest.approx(order, abs=0.6), errors


def variance_error(name, steps, settings, std=0.5, top=50.0, low=0.01):
    """Exact error of the variance of samples, for a Gaussian: no chance is left in it.

    All is linear, so each draw of noise gets a row in which it alone is 1; the variance is the sum of
    squares over rows.
    """
    x = torch.zeros(steps + 1, 1, 1, 1, dtype=torch.float64)
    x[0] = (top**2 + std**2) ** 0.5
    drawn = []

    def noise(like):
        drawn.append(like)
        unit = torch.zeros_like(like)
        unit[len(drawn)] = 1.0
        return unit

    found = SAMPLERS[name].sample(
        gaussian_denoise(0.0, std), x, log_grid(steps, top, low), noise=noise, **settings
    )
    return abs((found**2).sum().item() - std**4 / (std**2 + low**2))


SDE_ORDERS = [
    ("ddpm", {}, 1),
    ("ddpm", {"variance": 1.0}, 1),
    ("ddim", {"eta": 0.5}, 1),
    ("euler-ancestral", {}, 1),
    ("dpmpp-2m-sde", {}, 2),
    ("dpmpp-2m-sde", {"eta": 0.5}, 2),
    ("dpmpp-3m-sde", {}, 2),
    ("er-sde", {"order": 1}, 1),
    ("er-sde", {"order": 2}, 2),
    ("er-sde", {"order": 3}, 3),
    ("restart", {}, 2),
    ("restart", {"repeats": 1}, 2),
]


@pytest.mark.parametrize(("name", "settings", "order"), SDE_ORDERS)
def test_order_of_convergence_of_the_variance_with_noise(name, settings, order):
    errors = [variance_error(name, steps, settings) for steps in (80, 160)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.4), errors


@pytest.mark.parametrize("name", [*SAMPLERS, "heun-churn", "euler-churn"])
def test_gaussian_data_come_out_with_their_mean_and_variance(name, generator):
    """Within 4 standard errors of 8,000 samples, and what the steps themselves cost."""
    mean, std, count = 0.3, 0.6, 8_000
    name, settings = (
        name.split("-churn")[0],
        {"churn": Churn(s_churn=20.0)} if "churn" in name else {},
    )
    schedule = SCHEDULES["edm"]
    calls = 300 if SAMPLERS[name].grid_steps(300) == 300 else 60
    sigmas = GRIDS["exponential"](schedule, SAMPLERS[name].grid_steps(calls))

    def noise(like):
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    start = noise(torch.empty(count, 1, 1, 1)) * (sigmas[0] ** 2 + std**2).sqrt().float() + mean
    found = run_sampler(
        name,
        gaussian_denoise(mean, std),
        start,
        sigmas,
        calls=calls,
        noise=noise,
        settings=settings,
    )
    assert found.mean().item() == pytest.approx(mean, abs=4 * std / count**0.5)
    assert found.std().item() == pytest.approx(std, rel=4 / (2 * count) ** 0.5 + 0.012)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_calls_are_exact_and_levels_falling_on_every_schedule(name, kind):
    schedule = SCHEDULES[kind]
    counts = range(1, 26) if kind == "scaled-linear" else (1, 2, 3, 11, 12, 13, 50)
    for calls in counts:
        seen = []

        def denoise(x, sigma, seen=seen):
            assert sigma.shape == (len(x),)
            seen.append(sigma[0].item())
            return 0.5 * torch.tanh(x / (1 + sigma.view(-1, 1, 1, 1)))

        sigmas = GRIDS["trailing"](schedule, SAMPLERS[name].grid_steps(calls))
        x = schedule.initial(torch.ones(1, 1, 1, 1), float(sigmas[0]))
        found = run_sampler(
            name, denoise, x, sigmas, calls=calls, noise=torch.ones_like, settings={}
        )
        assert len(seen) == calls
        assert min(seen) > 0
        assert seen[0] == sigmas[0].float()
        assert found.isfinite().all()
        assert found.abs().max() < 3


@pytest.mark.parametrize("name", SAMPLERS)
def test_any_number_of_calls_from_1_to_1000_fits_a_grid(name):
    sampler = SAMPLERS[name]
    steps = [sampler.grid_steps(calls) for calls in range(1, 1001)]
    assert all(1 <= found <= calls for calls, found in enumerate(steps, start=1))


def calls_made(name, calls):
    seen = itertools.count()

    def denoise(x, sigma):
        next(seen)
        return x

    steps = SAMPLERS[name].grid_steps(calls)
    x = torch.ones(1, 1, 1, 1)
    run_sampler(name, denoise, x, log_grid(steps), calls=calls, noise=torch.zeros_like, settings={})
    return next(seen)


@pytest.mark.parametrize("name", SAMPLERS)
def test_calls_are_exact_throughout_the_range(name):
    counts = [26, 27, 64, 99, 100, 333, 1000]
    assert [calls_made(name, calls) for calls in counts] == counts


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_number_of_calls_from_1_to_1000_is_exact(name):
    counts = list(range(1, 1001))
    assert [calls_made(name, calls) for calls in counts] == counts


@pytest.mark.parametrize("kind", ["zero-snr", "flow"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_from_pure_noise_the_mean_comes_out(name, kind, generator):
    """A sampler that is linear in sigma would carry the first step's error times a million."""
    schedule, mean, std = SCHEDULES[kind], 3.0, 0.5
    steps = SAMPLERS[name].grid_steps(60)
    sigmas = GRIDS["trailing"](schedule, steps)
    for dtype in (torch.float32, torch.float64):

        def noise(like, dtype=dtype):
            return torch.randn(like.shape, generator=generator, dtype=dtype)

        start = noise(torch.empty(4000, 1, 1, 1))
        found = run_sampler(
            name,
            gaussian_denoise(mean, std),
            schedule.initial(start, float(sigmas[0])),
            sigmas,
            calls=60,
            noise=noise,
            settings={},
        )
        assert found.dtype == dtype
        assert found.mean().item() == pytest.approx(mean, abs=0.05)
        assert found.std().item() == pytest.approx(std, rel=0.12)  # of order 1: 0.447


@pytest.mark.parametrize("name", SAMPLERS)
def test_float32_differs_from_float64_by_rounding(name, generator):
    start = torch.randn(16, 1, 2, 2, generator=generator, dtype=torch.float64)
    for schedule in SCHEDULES.values():
        sigmas = GRIDS["trailing"](schedule, SAMPLERS[name].grid_steps(20))
        found = [
            run_sampler(
                name,
                gaussian_denoise(0.3, 0.5),
                schedule.initial(start, float(sigmas[0])).to(dtype),
                sigmas,
                calls=20,
                noise=lambda like: start.to(like.dtype),
                settings={},
            ).double()
            for dtype in (torch.float32, torch.float64)
        ]
        assert (found[0] - found[1]).abs().max() < 2e-4


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(name):
    sampler, settings = SAMPLERS[name], {}
    sigmas = GRIDS["trailing"](SCHEDULES["scaled-linear"], sampler.grid_steps(16))
    start = torch.linspace(-20, 20, 6).view(6, 1, 1, 1)

    def draw(rows):
        step = iter(range(100))

        def noise(like):
            return torch.sin(start[rows] * 7 + next(step))

        return run_sampler(
            name,
            gaussian_denoise(0.1, 0.7),
            start[rows],
            sigmas,
            calls=16,
            noise=noise,
            settings=settings,
        )

    together = draw(slice(0, 6))
    assert torch.equal(together, torch.cat([draw(slice(row, row + 1)) for row in range(6)]))


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_is_drawn_by_the_stochastic_only(name):
    drawn, reported = [], []
    sampler = SAMPLERS[name]

    def noise(like):
        drawn.append(1)
        return torch.zeros_like(like)

    sigmas = GRIDS["trailing"](SCHEDULES["scaled-linear"], sampler.grid_steps(20))
    run_sampler(
        name,
        gaussian_denoise(0.0, 0.5),
        torch.ones(2, 1, 1, 1),
        sigmas,
        calls=20,
        noise=noise,
        settings={},
        on_step=lambda step, clean: reported.append((step, clean.shape)),
    )
    assert bool(drawn) == sampler.stochastic
    assert [step for step, _ in reported] == list(range(len(reported)))
    assert len(reported) >= sampler.grid_steps(20)
    assert {shape for _, shape in reported} == {(2, 1, 1, 1)}


def test_euler_ancestral_and_ddpm_are_ddim_with_eta_1():
    sigmas = log_grid(20, 14.0)
    noise = torch.ones_like
    x = torch.linspace(-3, 3, 5).view(5, 1, 1, 1)
    denoise = gaussian_denoise(0.2, 0.5)
    expected = SAMPLERS["ddim"].sample(denoise, x, sigmas, eta=1.0, noise=noise)
    for name in ("euler-ancestral", "ddpm"):
        assert torch.allclose(
            SAMPLERS[name].sample(denoise, x, sigmas, noise=noise), expected, atol=1e-6
        )


def test_churn_adds_noise_within_its_interval_only():
    seen = []

    def denoise(x, sigma):
        seen.append(sigma[0].item())
        return x * 0

    sigmas = torch.tensor([10.0, 5.0, 1.0, 0.0])
    churn = Churn(s_churn=0.3, s_tmin=4.0, s_tmax=6.0)
    x = torch.ones(1, 1, 1, 1)
    SAMPLERS["euler"].sample(denoise, x, sigmas, noise=torch.ones_like, churn=churn)
    assert seen == pytest.approx([10.0, 5.5, 1.0])
    seen.clear()
    SAMPLERS["heun"].sample(denoise, x, sigmas, noise=torch.ones_like, churn=churn)
    assert seen == pytest.approx([10.0, 5.0, 5.5, 1.0, 1.0])


def test_what_does_not_go_together_is_refused():
    x, noise = torch.ones(1, 1, 1, 1), torch.zeros_like
    denoise = gaussian_denoise(0.0, 1.0)
    with pytest.raises(ValueError, match="3 to 5"):
        SAMPLERS["heun"].sample(denoise, x, log_grid(3), calls=6, noise=noise)
    with pytest.raises(ValueError, match="3 or 4"):
        SAMPLERS["plms"].sample(denoise, x, log_grid(3), calls=5, noise=noise)
    with pytest.raises(ValueError, match="interval"):
        sample_restart(denoise, x, log_grid(3, 1.0), calls=20, noise=noise)
    with pytest.raises(ValueError, match="has no eta"):
        run_sampler("deis", denoise, x, log_grid(3), calls=3, settings={"eta": 1.0}, noise=noise)
    with pytest.raises(ValueError, match="take 2 steps"):
        run_sampler("heun", denoise, x, log_grid(3), calls=3, settings={}, noise=noise)
    assert SAMPLERS["unipc"].parameters == {"order": 3, "kind": "bh2"}
