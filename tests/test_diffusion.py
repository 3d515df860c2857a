"""The mathematics against closed forms and the papers' own formulas."""

import pytest
import torch

from ldmkit.diffusion.samplers import sample_ddim
from ldmkit.diffusion.schedule import DiscreteSchedule, scaled_linear
from ldmkit.diffusion_configs import ScheduleConfig

SCHEDULE = DiscreteSchedule(torch.cumprod(1 - scaled_linear(ScheduleConfig()), dim=0))


def gaussian_denoise(mean, std):
    """E[clean | x] for clean ~ N(mean, std^2): the ideal denoiser, in closed form."""

    def denoise(x, sigma):
        variance = sigma.view(-1, 1, 1, 1) ** 2
        return (std**2 * x + variance * mean) / (std**2 + variance)

    return denoise


def test_the_schedule_is_the_papers():
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.ones((), dtype=torch.float64)
    for t in (0, 1, 500, 999):
        alpha_bar = torch.prod(1 - betas[: t + 1])
        assert SCHEDULE.alpha_bar[t] == pytest.approx(alpha_bar.item(), rel=1e-12)
        assert SCHEDULE.sigmas[t] == pytest.approx(((1 - alpha_bar) / alpha_bar).sqrt().item())


def test_every_number_of_steps_is_exact():
    for count in range(1, 1001):
        sigmas = SCHEDULE.steps(count)
        assert len(sigmas) == count + 1
        assert sigmas[0] == SCHEDULE.sigmas[-1].float()
        assert sigmas[-1] == 0
        assert (sigmas.diff() < 0).all()
    for count in (0, -1, 1001):
        with pytest.raises(ValueError, match="1 to 1000"):
            SCHEDULE.steps(count)


def test_sigma_and_t_are_inverse():
    times = SCHEDULE.timestep(SCHEDULE.sigmas.float())
    assert torch.equal(times, torch.arange(1000.0))
    between = (SCHEDULE.sigmas[10] * SCHEDULE.sigmas[11]).sqrt().float()[None]
    assert SCHEDULE.timestep(between).item() == pytest.approx(10.5, abs=1e-2)


def test_drawn_levels_are_uniform_in_t(generator):
    times = SCHEDULE.timestep(SCHEDULE.draw(20_000, generator))
    assert times.min() >= 0
    assert times.max() <= 999
    assert times.mean().item() == pytest.approx(499.5, abs=8)
    assert times.std().item() == pytest.approx(288.7, abs=6)


def textbook_ddim(predict, x, times, eta, noises):
    """Song et al. 2021, Eq. 12 and 16, in the paper's own variables, float64."""
    for step, (t, following) in enumerate(zip(times, [*times[1:], None], strict=True)):
        a = SCHEDULE.alpha_bar[t]
        a_next = SCHEDULE.alpha_bar[following] if following is not None else torch.tensor(1.0)
        predicted = predict(x, t)
        clean = (x - (1 - a).sqrt() * predicted) / a.sqrt()
        s = eta * ((1 - a_next) / (1 - a)).sqrt() * (1 - a / a_next).sqrt()
        x = a_next.sqrt() * clean + (1 - a_next - s**2).sqrt() * predicted + s * noises[step]
    return x


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("count", [1, 7, 50])
def test_ddim_equals_the_textbook(eta, count, generator):
    noises = torch.randn(count + 1, 2, 1, 3, 3, generator=generator, dtype=torch.float64)

    def predict(x, t):
        return torch.sin(3 * x + 0.01 * t)

    def network(x, t, condition):
        return predict(x, t.view(-1, 1, 1, 1))

    def denoise(x, sigma):
        return x - sigma.view(-1, 1, 1, 1) * network(
            x / (1 + sigma.double() ** 2).sqrt().view(-1, 1, 1, 1),
            SCHEDULE.timestep(sigma).double(),
            None,
        )

    sigmas = SCHEDULE.steps(count)
    times = SCHEDULE.timestep(sigmas[:-1]).long().tolist()
    start = SCHEDULE.initial(noises[-1], float(sigmas[0]))
    queue = iter(noises)
    found = sample_ddim(denoise, start, sigmas, noise=lambda like: next(queue), eta=eta)
    expected = textbook_ddim(predict, noises[-1], times, eta, noises)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_gaussian_data_come_out_with_their_mean_and_variance(eta, generator):
    mean, std = 0.3, 0.5

    def noise(like):
        return torch.randn(like.shape, generator=generator)

    sigmas = SCHEDULE.steps(1000)
    start = SCHEDULE.initial(torch.randn(20_000, 1, 1, 1, generator=generator), float(sigmas[0]))
    found = sample_ddim(gaussian_denoise(mean, std), start, sigmas, noise=noise, eta=eta)
    assert found.mean().item() == pytest.approx(mean, abs=0.01)
    assert found.std().item() == pytest.approx(std, rel=0.02)


def test_ddim_calls_the_model_once_a_step_and_noise_only_when_asked(generator):
    calls = []

    def denoise(x, sigma):
        calls.append(sigma[0].item())
        return x * 0

    def no_noise(like):
        raise AssertionError("eta 0 draws no noise")

    steps = []
    x = torch.randn(2, 1, 2, 2, generator=generator)
    sample_ddim(
        denoise,
        x,
        SCHEDULE.steps(13),
        noise=no_noise,
        on_step=lambda step, clean: steps.append(step),
    )
    assert calls == SCHEDULE.steps(13)[:-1].tolist()
    assert steps == list(range(13))


def test_ddim_converges_with_order_one(generator):
    """The error against the exact solution of the probability-flow ODE halves with the step."""
    std = 0.5
    start = torch.randn(64, 1, 1, 1, generator=generator, dtype=torch.float64) * 10.0
    exact = start * std / (std**2 + 100.0) ** 0.5
    errors = []
    for count in (40, 80, 160):
        sigmas = torch.cat([torch.logspace(1, -3, count, dtype=torch.float64), torch.zeros(1)])
        found = sample_ddim(gaussian_denoise(0.0, std), start, sigmas, noise=torch.zeros_like)
        errors.append((found - exact).abs().mean().item())
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2.0, rel=0.15)
