"""Samplers against the schedulers of diffusers: the same noise levels, network and noise."""

import pytest
import torch

from ldmkit.diffusion.grids import leading, trailing
from ldmkit.diffusion.samplers import SAMPLERS
from ldmkit.diffusion.schedule import DiscreteSchedule, scaled_linear
from ldmkit.diffusion_configs import ScheduleConfig

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

SCHEDULE = DiscreteSchedule(torch.cumprod(1 - scaled_linear(ScheduleConfig()), dim=0))
BETAS = scaled_linear(ScheduleConfig()).numpy()
STEPS = 10
IN_FLOAT32 = 1e-5  # steps that diffusers computes in float32, whatever it is given


def network(x, sigma):
    """Noise expected in x (of variance 1): that of data of standard deviation 0.5, and something curved."""
    gaussian = x * sigma * (1 + sigma**2).sqrt() / (0.25 + sigma**2)
    return gaussian + 0.1 * torch.sin(2 * x + sigma.log())


def denoise(x, sigma):
    level = sigma.view(-1, 1, 1, 1)
    return x - level * network(x / (1 + level**2).sqrt(), level)


def scheduler_of(diffusers, name, dtype, settings):
    """A scheduler whose tables are ours, in the precision asked for."""
    given = {"num_train_timesteps": 1000, "trained_betas": BETAS, **settings}
    scheduler = getattr(diffusers, name)(**given)
    scheduler.alphas_cumprod = SCHEDULE.alpha_bar.to(dtype)
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = torch.ones((), dtype=dtype)
    scheduler.set_timesteps(STEPS)
    return scheduler


def theirs_of_alpha_bar(scheduler, start, dtype, **given):
    """Of schedulers that keep x of variance 1 and look alpha_bar up by time."""
    x = start.clone()
    for t in scheduler.timesteps:
        sigma = SCHEDULE.sigmas[t].to(dtype)
        x = scheduler.step(network(x, sigma), t, x, **given).prev_sample
    return x


def theirs_of_sigma(scheduler, start, sigmas, scaled, **given):
    """Of schedulers that go by their own list of sigmas; `scaled`: x of variance 1 + sigma^2."""
    twice = len(scheduler.sigmas) > len(sigmas)  # Heun's second calls
    scheduler.sigmas = (
        torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]]) if twice else sigmas
    )
    x = start * (1 + sigmas[0] ** 2).sqrt() if scaled else start.clone()
    scheduler.set_begin_index(0)
    for place, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[place]
        seen = x / (1 + sigma**2).sqrt() if scaled else x
        scheduler.is_scale_input_called = True
        x = scheduler.step(network(seen, sigma), t, x, **given).prev_sample
    return x


def start_of(dtype):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 3, 4, 4, generator=generator).to(dtype)


def ours(name, sigmas, start, dtype, **settings):
    generator = torch.Generator().manual_seed(7)

    def noise(like):
        drawn = torch.float32 if name == "dpmpp-2m-sde" else like.dtype
        return torch.randn(like.shape, generator=generator, dtype=drawn).to(like.dtype)

    x = start * (1 + sigmas[0] ** 2).sqrt()
    return SAMPLERS[name].sample(denoise, x, sigmas, noise=noise, **settings)


def close(found, expected, dtype, bound=None):
    bound = bound or (1e-9 if dtype == torch.float64 else 1e-5)
    assert found.dtype == dtype
    assert expected.isfinite().all()
    assert (found - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "settings", "theirs", "config", "given"),
    [
        ("ddim", {}, "DDIMScheduler", {"clip_sample": False}, {}),
        ("ddim", {"eta": 0.7}, "DDIMScheduler", {"clip_sample": False}, {"eta": 0.7}),
        ("ddpm", {}, "DDPMScheduler", {"clip_sample": False}, {}),
        (
            "ddpm",
            {"variance": 1.0},
            "DDPMScheduler",
            {"clip_sample": False, "variance_type": "fixed_large"},
            {},
        ),
        ("plms", {}, "PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}, {}),
    ],
    ids=["ddim", "ddim-eta", "ddpm", "ddpm-large", "plms"],
)
def test_samplers_of_the_discrete_process(diffusers, name, settings, theirs, config, given, dtype):
    scheduler = scheduler_of(diffusers, theirs, dtype, config)
    start = start_of(dtype)
    if name != "plms":
        given = given | {"generator": torch.Generator().manual_seed(7)}
        expected = theirs_of_alpha_bar(scheduler, start, dtype, **given)
    else:
        expected = theirs_of_alpha_bar(scheduler, start, dtype)
    close(ours(name, leading(SCHEDULE, STEPS), start, dtype, **settings), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "settings", "theirs", "config"),
    [
        ("dpmpp-2m", {}, "DPMSolverMultistepScheduler", {}),
        ("dpmpp-2s", {}, "DPMSolverSinglestepScheduler", {"lower_order_final": True}),
        ("unipc", {"order": 2}, "UniPCMultistepScheduler", {}),
        ("unipc", {"order": 3}, "UniPCMultistepScheduler", {"solver_order": 3}),
        (
            "unipc",
            {"order": 3, "kind": "bh1"},
            "UniPCMultistepScheduler",
            {"solver_order": 3, "solver_type": "bh1"},
        ),
    ],
    ids=["2m", "2s", "unipc-2", "unipc-3", "unipc-3-bh1"],
)
def test_solvers_in_log_sigma(diffusers, name, settings, theirs, config, dtype):
    if "Singlestep" not in theirs:
        config = config | {"timestep_spacing": "trailing"}
    config = config | {"final_sigmas_type": "zero"}
    scheduler = scheduler_of(diffusers, theirs, dtype, config)
    sigmas, start = trailing(SCHEDULE, STEPS), start_of(dtype)
    if "bh1" in settings.values():  # whose last step to 0 is infinity minus infinity in theirs
        sigmas[-1] = 0.5 * SCHEDULE.lowest
    expected = theirs_of_sigma(scheduler, start, sigmas, scaled=False)
    found = ours(name, sigmas, start, dtype, **settings) / (1 + sigmas[-1] ** 2).sqrt()
    close(found, expected, dtype, IN_FLOAT32 if name == "dpmpp-2m" else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_2m_sde_with_the_same_noise(diffusers, dtype):
    config = {"timestep_spacing": "trailing", "algorithm_type": "sde-dpmsolver++"}
    scheduler = scheduler_of(diffusers, "DPMSolverMultistepScheduler", dtype, config)
    sigmas, start = trailing(SCHEDULE, STEPS), start_of(dtype)
    generator = torch.Generator().manual_seed(7)
    given = {"generator": generator}
    expected = theirs_of_sigma(scheduler, start, sigmas, scaled=False, **given)
    close(ours("dpmpp-2m-sde", sigmas, start, dtype), expected, dtype, IN_FLOAT32)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deis_down_to_the_last_level(diffusers, order, dtype):
    """Their last step ends above 0 and, of 15 steps or more, is of full order."""
    config = {"timestep_spacing": "trailing", "solver_order": order}
    scheduler = scheduler_of(diffusers, "DEISMultistepScheduler", dtype, config)
    scheduler.set_timesteps(20)
    sigmas, start = trailing(SCHEDULE, 20), start_of(dtype)
    sigmas[-1] = 0.5 * SCHEDULE.lowest
    expected = theirs_of_sigma(scheduler, start, sigmas, scaled=False)
    found = ours("deis", sigmas, start, dtype, order=order)
    close(found / (1 + sigmas[-1] ** 2).sqrt(), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("euler", "EulerDiscreteScheduler"),
        ("euler-ancestral", "EulerAncestralDiscreteScheduler"),
        ("heun", "HeunDiscreteScheduler"),
        ("lms", "LMSDiscreteScheduler"),
    ],
)
def test_solvers_in_sigma(diffusers, name, theirs, dtype):
    scheduler = scheduler_of(diffusers, theirs, dtype, {"timestep_spacing": "trailing"})
    sigmas, start = trailing(SCHEDULE, STEPS), start_of(dtype)
    given = {"generator": torch.Generator().manual_seed(7)} if name == "euler-ancestral" else {}
    expected = theirs_of_sigma(scheduler, start, sigmas, scaled=True, **given)
    close(
        ours(name, sigmas, start, dtype), expected, dtype, IN_FLOAT32 if "euler" in name else None
    )
