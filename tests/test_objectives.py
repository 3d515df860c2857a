"""Every objective against its own paper's formulas, closed forms and another implementation."""

import json
import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats

import ldmkit
from conftest import diffusion_config
from ldmkit.configs import TrainDiffusionConfig
from ldmkit.container import read_header
from ldmkit.diffusion.denoiser import denoiser
from ldmkit.diffusion.noise_draw import DISTRIBUTIONS, LEVELS, draw_sigmas, even_sigmas, level_of
from ldmkit.diffusion.objective import LOSSES, denoising_loss
from ldmkit.diffusion.parameterization import PARAMETERIZATIONS
from ldmkit.diffusion.samplers import sample_ddim
from ldmkit.diffusion.schedule import (
    BETAS,
    CONTINUOUS_SCHEDULES,
    PURE_NOISE,
    DiscreteSchedule,
    build_schedule,
)
from ldmkit.diffusion.validation import linear_denoise
from ldmkit.diffusion.weighting import WEIGHTINGS, Uncertainty, weight
from ldmkit.diffusion_configs import (
    CONTINUOUS,
    DiffusionConfig,
    DistributionName,
    LossKind,
    NoiseDrawConfig,
    ObjectiveConfig,
    ParameterizationName,
    ScheduleConfig,
    ScheduleName,
    UNetConfig,
    WeightingName,
)
from ldmkit.generation_configs import SampleConfig
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.modelfile import load

SIMPLE = ObjectiveConfig()
NO_NOISE = torch.zeros_like


def schedule(kind: Any, parameterization: Any = "v", **settings: Any):
    return build_schedule(ScheduleConfig(kind=kind, **settings), parameterization)


def discrete(kind: Any, **settings: Any):
    found = schedule(kind, **settings)
    assert isinstance(found, DiscreteSchedule)
    return found


def column(numbers):
    return numbers.view(-1, 1, 1, 1)


def paper(name, clean, noise, sigma):
    """What the parameterization's own paper feeds the network, and its target, in its own variables."""
    s = column(sigma).double()
    clean, noise = clean.double(), noise.double()
    alpha = (1 + s**2) ** -0.5  # sqrt(alpha_bar)
    beta = s * alpha  # sqrt(1 - alpha_bar)
    x_t = alpha * clean + beta * noise
    time = s / (1 + s)
    noisy = clean + s * noise
    skip, out = 1 / (s**2 + 1), s / (s**2 + 1).sqrt()  # Karras et al. 2022, Tab. 1, sigma_data 1
    return {
        "epsilon": (x_t, noise),
        "x0": (x_t, clean),
        "v": (x_t, alpha * noise - beta * clean),
        "flow": ((1 - time) * clean + time * noise, noise - clean),
        "edm": (noisy / (s**2 + 1).sqrt(), (clean - skip * noisy) / out),
    }[name]


def test_choices_and_registries_agree():
    assert tuple(PARAMETERIZATIONS) == get_args(ParameterizationName)
    assert (*BETAS, *CONTINUOUS_SCHEDULES) == get_args(ScheduleName)
    assert tuple(CONTINUOUS_SCHEDULES) == CONTINUOUS
    assert tuple(WEIGHTINGS) == get_args(WeightingName)
    assert tuple(LOSSES) == get_args(LossKind)
    assert tuple(DISTRIBUTIONS) == get_args(DistributionName)


# Parameterizations


@pytest.mark.parametrize("kind", ["scaled-linear", "flow", "edm"])
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_a_parameterization_recovers_clean_latents_from_its_own_target(name, kind, generator):
    levels = schedule(kind)
    sigma = levels.sigma_at(torch.linspace(0, 0.999, 1000, dtype=torch.float64)).float()
    clean = torch.randn(1000, 1, 1, 1, generator=generator)
    noise = torch.randn(1000, 1, 1, 1, generator=generator)
    expected, target = paper(name, clean, noise, sigma)
    seen = {}

    def network(x, t, condition):
        seen["x"], seen["t"] = x, t
        return target

    noisy = clean + column(sigma) * noise
    found = denoiser(network, levels, PARAMETERIZATIONS[name])(noisy, sigma, None)
    # the difference of two numbers of size sigma, in float32
    assert ((found - clean).flatten().abs() <= 1e-6 * (1 + 4 * sigma)).all()
    # what the network sees is the paper's, of variance at most 1 for data of variance 1
    assert torch.allclose(seen["x"].double(), expected, atol=1e-5)
    assert torch.equal(seen["t"], levels.timestep(sigma))


def test_the_network_is_told_what_its_paper_tells_it():
    table = discrete("scaled-linear")
    assert torch.equal(table.timestep(table.sigmas.float()), torch.arange(1000.0))
    sigma = torch.tensor([0.01, 1.0, 3.0])
    assert torch.allclose(schedule("edm").timestep(sigma), sigma.log() / 4)
    s = sigma / (1 + sigma)
    assert torch.allclose(schedule("flow").timestep(sigma), 1000 * s)
    assert schedule("flow", shift=3.0).timestep(sigma)[1] == 500  # told of sigma, not of the place
    for kind in CONTINUOUS:
        assert torch.equal(schedule("auto", kind).timestep(sigma), schedule(kind).timestep(sigma))
    assert torch.equal(
        schedule("auto", "x0").timestep(sigma), schedule("scaled-linear").timestep(sigma)
    )


def test_edm_is_v_with_the_other_sign():
    sigma = torch.logspace(-3, 3, 50)
    v, edm = PARAMETERIZATIONS["v"](sigma), PARAMETERIZATIONS["edm"](sigma)
    assert torch.equal(v.c_skip, edm.c_skip)
    assert torch.equal(v.c_out, -edm.c_out)


# Losses


def fixed(generator, kind="scaled-linear", count=64):
    clean, noise, prediction = torch.randn(3, count, 2, 3, 3, generator=generator)
    place = torch.rand(count, generator=generator, dtype=torch.float64) * 0.9 + 0.02
    return clean, noise, prediction, schedule(kind).sigma_at(place).float()


def our_loss(name, tensors, config, kind="scaled-linear"):
    clean, noise, prediction, sigma = tensors
    parameterization = PARAMETERIZATIONS[name]
    denoise = denoiser(lambda x, t, c: prediction, schedule(kind), parameterization)
    return denoising_loss(denoise, parameterization, clean, sigma, lambda like: noise, None, config)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_each_papers_loss_is_ours(name, loss, generator):
    tensors = fixed(generator, "edm" if name == "edm" else "scaled-linear")
    clean, noise, prediction, sigma = tensors
    error = prediction.double() - paper(name, clean, noise, sigma)[1]
    expected = {
        "l2": error.square(),
        "l1": error.abs(),
        "huber": 2 * 0.3 * ((error.square() + 0.3**2).sqrt() - 0.3),
    }[loss].mean((1, 2, 3))
    found = our_loss(name, tensors, ObjectiveConfig(loss=loss, huber_c=0.3))
    # epsilon at sigma 0.05 is read off differences of size sigma, in float32
    assert torch.allclose(found.double(), expected, rtol=1e-4)


GAMMA, K = 5.0, 1.3
PAPERS_OF_EPSILON = {  # factors on the squared error of epsilon and of v, from SNR, as published
    "min-snr": (
        lambda snr: torch.clamp(snr, max=GAMMA) / snr,
        lambda snr: torch.clamp(snr, max=GAMMA) / (snr + 1),
    ),
    "soft-min-snr": (  # harmonic in place of min: snr gamma / (snr + gamma) on the clean latents
        lambda snr: GAMMA / (snr + GAMMA),
        lambda snr: GAMMA * snr / (snr + GAMMA) / (snr + 1),
    ),
    "p2": (lambda snr: (K + snr) ** -0.7, lambda snr: snr / (snr + 1) * (K + snr) ** -0.7),
    "debiased": (lambda snr: snr**-0.5, lambda snr: snr**0.5 / (snr + 1)),
    "simple": (torch.ones_like, torch.ones_like),
}


@pytest.mark.parametrize("weighting", PAPERS_OF_EPSILON)
def test_each_weighting_is_its_papers(weighting, generator):
    config = ObjectiveConfig(weighting=weighting, p2_k=K, p2_gamma=0.7, min_snr_gamma=GAMMA)
    tensors = fixed(generator)
    snr = tensors[-1].double() ** -2
    for name, factor in zip(("epsilon", "v"), PAPERS_OF_EPSILON[weighting], strict=True):
        target = paper(name, *tensors[:2], tensors[-1])[1]
        plain = (tensors[2].double() - target).square().mean((1, 2, 3))
        found = our_loss(name, tensors, config)
        assert torch.allclose(found.double(), factor(snr) * plain, rtol=1e-4), name


def test_a_weighting_means_the_same_under_every_parameterization():
    sigma = torch.logspace(-2, 2, 30, dtype=torch.float64)
    for weighting in get_args(WeightingName):
        config = ObjectiveConfig(weighting=weighting)
        found = torch.stack([weight(sigma, p, config) for p in PARAMETERIZATIONS.values()])
        same = torch.allclose(found, found[:1].expand_as(found), rtol=1e-9)
        assert same == (weighting not in ("simple", "uncertainty")), weighting
    assert torch.allclose(weight(sigma, PARAMETERIZATIONS["edm"], SIMPLE), 1 + sigma**-2)
    assert torch.allclose(weight(sigma, PARAMETERIZATIONS["flow"], SIMPLE), (1 + 1 / sigma) ** 2)


def test_learned_uncertainty_finds_the_loss_of_each_level(generator):
    uncertainty = Uncertainty(generator)
    sigma = torch.logspace(-2, 2, 64)
    losses = 0.05 + sigma.square() / (1 + sigma.square())
    assert torch.equal(uncertainty.balanced(sigma, losses), losses)  # u starts at 0
    optimizer = torch.optim.Adam(uncertainty.parameters(), 2e-2)
    for _ in range(250):
        optimizer.zero_grad()
        uncertainty.balanced(sigma, losses).mean().backward()
        optimizer.step()
    assert torch.allclose(uncertainty(sigma).exp(), losses, rtol=0.1)
    best = (1 + losses.log()).mean()  # L / exp(u) + u is least at exp(u) = L
    assert uncertainty.balanced(sigma, losses).mean().item() == pytest.approx(best.item(), abs=1e-3)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_offset_noise_is_one_number_a_channel_and_part_of_the_target(name, generator):
    clean, noise, prediction, sigma = fixed(generator)
    offset = torch.randn(64, 2, 1, 1, generator=generator)
    queue = iter([noise, offset])
    shapes = []

    def draw(like):
        shapes.append(like.shape)
        return next(queue)

    parameterization = PARAMETERIZATIONS[name]
    denoise = denoiser(lambda x, t, c: prediction, schedule("scaled-linear"), parameterization)
    config = ObjectiveConfig(offset_noise=0.1)
    found = denoising_loss(denoise, parameterization, clean, sigma, draw, None, config)
    whole = noise + 0.1 * offset
    assert torch.allclose(
        found, our_loss(name, (clean, whole, prediction, sigma), SIMPLE), rtol=1e-4
    )
    assert shapes == [(64, 2, 3, 3), (64, 2, 1, 1)]


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_input_perturbation_changes_the_input_and_not_the_target(name, generator):
    """Ning et al. 2023: the network sees noise n + 0.1 n', its target knows of n alone."""
    clean, noise, prediction, sigma = fixed(generator)
    extra = torch.randn(clean.shape, generator=generator)
    queue, seen = iter([noise, extra]), []

    def network(x, t, condition):
        seen.append(x)
        return prediction

    parameterization = PARAMETERIZATIONS[name]
    found = denoising_loss(
        denoiser(network, schedule("scaled-linear"), parameterization),
        *(parameterization, clean, sigma, lambda like: next(queue), None),
        ObjectiveConfig(input_perturbation=0.1),
    )
    assert torch.allclose(
        found, our_loss(name, (clean, noise, prediction, sigma), SIMPLE), rtol=1e-4
    )
    expected = paper(name, clean, noise + 0.1 * extra, sigma)[0]
    assert torch.allclose(seen[0].double(), expected, atol=1e-5)


def test_without_options_only_the_noise_is_drawn(generator):
    calls = []

    def draw(like):
        calls.append(like.shape)
        return torch.zeros_like(like)

    clean, _, _, sigma = fixed(generator)
    denoising_loss(
        lambda x, s, c: x, PARAMETERIZATIONS["v"], clean, sigma, draw, None, ObjectiveConfig()
    )
    assert calls == [clean.shape]


# The best denoiser in closed form


class Mixture:
    """Scalars from a mixture of Gaussians: quadrature over data and noise, and E[clean | noisy]."""

    def __init__(self, weights, means, stds):
        self.weights, self.means, self.stds = (
            torch.tensor(numbers, dtype=torch.float64) for numbers in (weights, means, stds)
        )

    def best(self, x, sigma):
        variance = self.stds**2 + column(sigma) ** 2  # of each component's noisy values
        x = x[..., None]
        variance = variance[..., None, :] if variance.ndim == 4 else variance
        log = self.weights.log() - variance.log() / 2 - (x - self.means) ** 2 / (2 * variance)
        inside = (self.stds**2 * x + (variance - self.stds**2) * self.means) / variance
        return (log.softmax(-1) * inside).sum(-1)

    def grid(self):
        """Clean values, noises and their probabilities: the trapezoidal rule, exponentially exact here."""
        nodes = torch.linspace(-7, 7, 71, dtype=torch.float64)
        noises = torch.linspace(-7, 7, 111, dtype=torch.float64)
        masses, noise_masses = (
            (-points.square() / 2).exp() / (-points.square() / 2).exp().sum()
            for points in (nodes, noises)
        )
        clean = (self.means[:, None] + self.stds[:, None] * nodes).flatten()
        mass = (self.weights[:, None] * masses).flatten()
        shape = (len(clean), len(noises))
        return (
            clean[:, None].expand(shape).reshape(-1, 1, 1, 1),
            noises[None].expand(shape).reshape(-1, 1, 1, 1),
            (mass[:, None] * noise_masses).flatten(),
        )


GAUSSIAN = Mixture([1.0], [0.0], [1.0])
TWO_HUMPS = Mixture([0.3, 0.7], [-1.4, 0.6], [0.5, 0.4])  # mean 0, variance 1.04


def expected_loss(mixture, denoise, level, name, config):
    """The mean of `denoising_loss` over data and noise, without Monte Carlo."""
    clean, noise, mass = mixture.grid()
    sigma = torch.full((len(clean),), level, dtype=torch.float64)
    losses = denoising_loss(
        denoise, PARAMETERIZATIONS[name], clean, sigma, lambda like: noise, None, config
    )
    return (losses * mass).sum()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
@pytest.mark.parametrize("mixture", [GAUSSIAN, TWO_HUMPS], ids=["gaussian", "mixture"])
def test_the_best_denoiser_has_no_excess_loss(mixture, name, weighting):
    """No direction of change lowers its loss, and any change raises it by just its weighted square."""
    config = ObjectiveConfig(weighting=weighting)
    for level in (0.4, 1.0, 4.0):
        sigma = torch.tensor([level], dtype=torch.float64)
        factor = weight(sigma, PARAMETERIZATIONS[name], config).item()
        least = expected_loss(
            mixture, lambda x, s, c: mixture.best(x, s), level, name, config
        ).item()
        for change in (torch.ones_like, lambda x: x / 3, torch.tanh):
            amount = torch.zeros((), dtype=torch.float64, requires_grad=True)

            def changed(x, s, c, change=change, amount=amount):
                return mixture.best(x, s) + amount * change(x)

            loss = expected_loss(mixture, changed, level, name, config)
            (slope,) = torch.autograd.grad(loss, amount)
            assert abs(slope.item()) < 1e-6 * factor
            clean, noise, mass = mixture.grid()
            square = (change(clean + level * noise).square().flatten() * mass).sum().item()
            with torch.no_grad():
                amount.fill_(0.5)
                excess = expected_loss(mixture, changed, level, name, config).item() - least
            assert excess == pytest.approx(factor * 0.25 * square, rel=1e-5)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_the_best_network_is_the_best_denoiser(name):
    """Through (c_skip, c_out, c_in) and back, in float32, for data with structure."""
    parameterization = PARAMETERIZATIONS[name]
    kind = "edm" if name == "edm" else "scaled-linear"
    x = torch.linspace(-3, 3, 41, dtype=torch.float64).view(-1, 1, 1, 1)
    for level in (0.4, 1.0, 7.0):
        sigma = torch.full((41,), level)
        scaling = [column(number.double()) for number in parameterization(sigma)]

        def network(seen, t, condition, scaling=scaling, sigma=sigma):
            c_skip, c_out, c_in = scaling
            noisy = seen / c_in
            return (TWO_HUMPS.best(noisy, sigma.double()) - c_skip * noisy) / c_out

        denoise = denoiser(network, schedule(kind), parameterization)
        assert torch.allclose(denoise(x, sigma, None), TWO_HUMPS.best(x, sigma.double()), atol=1e-5)


def test_the_linear_denoiser_is_the_best_for_gaussian_data():
    x = torch.linspace(-3, 3, 7, dtype=torch.float64).view(-1, 1, 1, 1)
    for level in (0.1, 2.0):
        sigma = torch.full((7,), level, dtype=torch.float64)
        assert torch.allclose(linear_denoise(x, sigma, None), GAUSSIAN.best(x, sigma))
        # for v its loss is 1 at every level: that of a network whose output is 0
        assert expected_loss(GAUSSIAN, linear_denoise, level, "v", SIMPLE).item() == pytest.approx(
            1
        )


# Schedules


DIFFUSERS = {
    "scaled-linear": "scaled_linear",
    "linear": "linear",
    "cosine": "squaredcos_cap_v2",
    "sigmoid-beta": "sigmoid",
}


def betas(alpha_bar):
    return 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("kind", DIFFUSERS)
@pytest.mark.parametrize("timesteps", [1000, 200])
def test_schedules_equal_those_of_diffusers(kind, zero_snr, timesteps, diffusers):
    ours = discrete(kind, zero_terminal_snr=zero_snr, timesteps=timesteps)
    theirs = diffusers.DDPMScheduler(
        num_train_timesteps=timesteps,
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule=DIFFUSERS[kind],
        rescale_betas_zero_snr=zero_snr,
    )
    assert (ours.alpha_bar - theirs.alphas_cumprod).abs().max() < 1e-6
    if not zero_snr:
        assert (betas(ours.alpha_bar) - theirs.betas).abs().max() < 1e-6
        return
    # In the float32 of their class stretched betas are off by up to 3e-6; their function in float64
    # says what is meant.
    plain = betas(discrete(kind, timesteps=timesteps).alpha_bar)
    stretched = diffusers.schedulers.scheduling_ddpm.rescale_zero_terminal_snr(plain)
    assert stretched[-1] == 1
    assert (betas(ours.alpha_bar) - stretched).abs().max() < 1e-6


def test_sigmoid_is_the_one_of_jabri_et_al():
    ours = discrete("sigmoid").alpha_bar
    time = np.arange(1, 1000) / 1000
    curve, start, end = stats.logistic.cdf(6 * time - 3), *stats.logistic.cdf([-3, 3])
    expected = (end - curve) / (end - start)
    assert np.abs(ours[:-1].numpy() - expected).max() < 1e-12
    assert betas(ours)[-1].item() == pytest.approx(0.999)  # the last one, capped


@pytest.mark.parametrize("kind", BETAS)
def test_discrete_schedules_rise_and_stay_finite(kind):
    for zero_snr in (False, True):
        levels = discrete(kind, zero_terminal_snr=zero_snr)
        assert levels.sigmas.isfinite().all()
        assert (levels.sigmas.diff() > 0).all()
        assert torch.equal(levels.timestep(levels.sigmas.float()), torch.arange(1000.0))
    plain = discrete(kind)
    assert levels.highest == pytest.approx(PURE_NOISE)
    assert levels.lowest == pytest.approx(plain.lowest, rel=1e-9)  # the start is kept


def test_zero_terminal_snr_is_lins_algorithm():
    root = discrete("scaled-linear").alpha_bar.sqrt()
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    found = discrete("scaled-linear", zero_terminal_snr=True).alpha_bar.sqrt()
    assert (found - expected).abs().max() < 1e-12
    assert found[-1] == 0


@pytest.mark.parametrize("name", ["v", "x0", "flow", "edm"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("scaled-linear", {"zero_terminal_snr": True}), ("flow", {}), ("flow", {"shift": 3.0})],
)
def test_sampling_from_pure_noise_gives_the_mean_of_the_data(name, kind, settings, generator):
    """The point of ending at pure noise: data of a mean far from 0, which any signal left would tell."""
    mean, std = 3.0, 0.5
    levels, parameterization = schedule(kind, **settings), PARAMETERIZATIONS[name]

    def network(seen, t, condition):
        sigma = level["now"]
        c_skip, c_out, c_in = (float(c) for c in parameterization(torch.tensor([sigma]).double()))
        noisy = seen.double() / c_in
        best = (std**2 * noisy + sigma**2 * mean) / (std**2 + sigma**2)
        return ((best - c_skip * noisy) / c_out).float()

    level = {}
    denoise = denoiser(network, levels, parameterization)

    def denoise_at(x, sigma):
        level["now"] = float(sigma[0])
        return denoise(x, sigma, None)

    sigmas = levels.steps(100)
    assert sigmas[0] == PURE_NOISE
    start = torch.randn(20_000, 1, 1, 1, generator=generator)
    found = sample_ddim(denoise_at, levels.initial(start, float(sigmas[0])), sigmas, noise=NO_NOISE)
    assert found.isfinite().all()
    assert found.mean().item() == pytest.approx(mean, abs=0.02)
    assert found.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("kind", [*BETAS, *CONTINUOUS_SCHEDULES])
def test_sampling_grids_fall_to_0(kind):
    levels = schedule(kind, shift=2.0)
    for count in (1, 2, 7, 50, 1000):
        sigmas = levels.steps(count)
        assert len(sigmas) == count + 1
        assert (sigmas.diff() < 0).all()
        assert sigmas[0].item() == pytest.approx(levels.highest)
        assert sigmas[-1] == 0
    with pytest.raises(ValueError, match="sampling steps asked for"):
        levels.steps(0)


def test_sampling_grids_are_their_papers():
    flow = schedule("flow", shift=3.0).steps(10)
    s = np.linspace(1, 0, 11)
    assert (flow / (1 + flow)).numpy() == pytest.approx(3 * s / (1 + 2 * s), abs=1e-5)
    edm = schedule("edm", sigma_min=0.002, sigma_max=80.0).steps(18)
    i = np.arange(18) / 17  # Karras et al. 2022, Eq. 5
    expected = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert edm[:-1].numpy() == pytest.approx(expected, rel=1e-4)


# Draws


def drawn(levels, count=20_000, **settings):
    generator = torch.Generator().manual_seed(0)
    return draw_sigmas(levels, NoiseDrawConfig(**settings), count, generator)


def fits(values, distribution):
    return stats.kstest(values.double().numpy(), distribution).pvalue > 0.01


@pytest.mark.parametrize("stratified", [False, True])
def test_draws_follow_their_distributions(stratified):
    flow, shifted, edm = schedule("flow"), schedule("flow", shift=3.0), schedule("edm")

    def time(sigma):
        return sigma / (1 + sigma)

    options = {"stratified": stratified}
    uniform = drawn(flow, distribution="uniform", **options)
    assert fits(time(uniform), stats.uniform.cdf)
    logit = {"logit_mean": 0.4, "logit_std": 0.8}
    # sigma = s / (1 - s), hence logit(s) = ln(sigma); the shift adds ln(a)
    assert fits(drawn(flow, **logit, **options).log(), stats.norm(0.4, 0.8).cdf)
    assert fits(drawn(shifted, **logit, **options).log(), stats.norm(0.4 + math.log(3), 0.8).cdf)
    for levels in (edm, flow):
        log = drawn(levels, distribution="log-normal", log_mean=0.3, log_std=0.9, **options).log()
        assert fits(log, stats.norm(0.3, 0.9).cdf)
    assert not fits(drawn(flow, **options).log(), stats.norm(0.1, 1.0).cdf)  # the test can fail


@pytest.mark.parametrize("kind", get_args(ScheduleName))
def test_each_kind_of_schedule_takes_each_draw(kind):
    levels = schedule(kind)
    for name in get_args(DistributionName):
        sigma = drawn(levels, 2000, distribution=name)
        assert sigma.min().item() >= levels.lowest * (1 - 1e-6)
        assert sigma.max().item() <= levels.highest * (1 + 1e-6)
        assert sigma.unique().numel() > 500
    assert torch.equal(drawn(levels), drawn(levels, distribution=levels.usual_draw))
    assert not torch.equal(drawn(levels), drawn(levels, stratified=True))


def test_the_default_draw_is_the_one_of_former_versions():
    levels = discrete("scaled-linear")
    times = torch.randint(1000, (64,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn(levels, 64), levels.sigmas[times].float())


def test_a_stratified_draw_has_one_level_in_each_part():
    levels = discrete("scaled-linear")
    times = levels.timestep(drawn(levels, 100, stratified=True))
    assert (times // 10).tolist() == list(range(100))
    edm = drawn(schedule("edm"), 50, stratified=True).log().double()
    parts = stats.norm(-0.507, 1.2).cdf(edm.numpy()) * 50
    assert np.floor(parts).tolist() == list(range(50))


def test_levels_are_tenths_of_the_schedule():
    levels = discrete("scaled-linear")
    times = torch.tensor([0, 99, 100, 550, 599, 999])
    assert level_of(levels, levels.sigmas[times].float()).tolist() == [0, 0, 1, 5, 5, 9]
    for kind in CONTINUOUS_SCHEDULES:
        found = level_of(schedule(kind), drawn(schedule(kind), distribution="uniform"))
        assert set(found.tolist()) == set(range(LEVELS))


@pytest.mark.parametrize("kind", ["scaled-linear", *CONTINUOUS_SCHEDULES])
def test_even_levels_are_a_draw_without_its_chance(kind):
    generator = torch.Generator().manual_seed(0)
    even = even_sigmas(schedule(kind), NoiseDrawConfig(), 1000, generator).sort().values
    chance = drawn(schedule(kind), 1000, stratified=True).sort().values
    within = slice(50, 950)  # the tails of a draw are chance
    assert torch.allclose(even[within].log(), chance[within].log(), atol=0.05)
    assert len(even.unique()) == 1000


# Configs and the model


def model_config(**changes):
    settings = {
        "unet": UNetConfig(
            channels=8, multipliers=(1,), residual_blocks=1, attention_factors=(), norm_groups=2
        ),
        "schedule": ScheduleConfig(),
        "parameterization": "v",
        "latent_channels": 2,
        "conditions": (),
    }
    return DiffusionConfig.model_validate(settings | changes)


def test_epsilon_is_refused_where_there_is_no_signal():
    for settings in ({"zero_terminal_snr": True}, {"kind": "flow"}):
        with pytest.raises(ValidationError, match="epsilon says nothing"):
            model_config(schedule=settings, parameterization="epsilon")
        with pytest.raises(ValidationError, match="epsilon says nothing"):
            TrainDiffusionConfig.model_validate(
                {"latents": "x", "schedule": settings, "parameterization": "epsilon"}
            )
        model_config(schedule=settings, parameterization="v")
    for name in CONTINUOUS:
        with pytest.raises(ValidationError, match="for discrete schedules"):
            model_config(schedule={"zero_terminal_snr": True}, parameterization=name)
    with pytest.raises(ValidationError, match="sigma-min must lie below"):
        ScheduleConfig(sigma_min=2.0, sigma_max=1.0)


def test_files_say_of_a_schedule_what_they_always_said_unless_there_is_more():
    first = {"timesteps": 1000, "beta_start": 0.0015, "beta_end": 0.0195}
    assert model_config().model_dump(mode="json")["schedule"] == first
    more = ScheduleConfig(kind="edm", sigma_max=40.0)
    assert more.model_dump(mode="json") == first | {"kind": "edm", "sigma_max": 40.0}
    assert ScheduleConfig.model_validate(more.model_dump(mode="json")) == more


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_a_model_learns_under_every_objective(name, generator):
    """Ten steps on one batch, with everything that the config decides."""
    torch.manual_seed(0)
    model = LatentDiffusion(model_config(parameterization=name))
    config = ObjectiveConfig(draw=NoiseDrawConfig(stratified=True))
    clean = torch.randn(8, 2, 4, 4, generator=generator)
    noise = torch.randn(8, 2, 4, 4, generator=generator)
    sigma = draw_sigmas(model.schedule, config.draw, 8, generator)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(10):
        loss = denoising_loss(
            *(model.denoise, model.parameterization, clean, sigma, lambda like: noise),
            *(model.condition({"class": torch.zeros(8, 1, dtype=torch.long)}), config),
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"parameterization": "flow", "schedule": {"shift": 3.0}},
        {"parameterization": "edm", "objective": {"weighting": "min-snr", "loss": "huber"}},
        {"parameterization": "v", "schedule": {"kind": "cosine", "zero_terminal_snr": True}},
        {"parameterization": "x0", "objective": {"offset_noise": 0.1, "input_perturbation": 0.1}},
    ],
    ids=["flow", "edm", "v", "x0"],
)
def test_the_commands_train_and_sample_it(changes, pipeline, tmp_path):
    config = diffusion_config(pipeline.latents, tmp_path / "ldm", steps=2, **changes)
    model = ldmkit.train_diffusion(config)
    stored = read_header(model).config
    assert stored["parameterization"] == changes["parameterization"]
    assert stored["schedule"] == config.schedule.model_dump(mode="json")
    out = tmp_path / "s.safetensors"
    drawn = ldmkit.sample(SampleConfig(model=model, out=out, num=2, steps=3, sampler="ddim"))
    assert drawn is not None
    _, tensors = load(drawn, kind="samples")
    assert tensors["latents"].isfinite().all()
    assert tensors["latents"].abs().max() < 100


def test_the_objective_reaches_training(pipeline, tmp_path):
    """A network that starts silent has the loss of a prediction of 0: the mean |noise| for l1."""
    settings = {"objective": {"loss": "l1", "draw": {"stratified": True}}, "steps": 1, "lr": 1e-9}
    config = diffusion_config(pipeline.latents, tmp_path / "l1", batch_size=64, **settings)
    ldmkit.train_diffusion(config)
    lines = (tmp_path / "l1/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["loss"] == pytest.approx((2 / math.pi) ** 0.5, rel=0.02)
