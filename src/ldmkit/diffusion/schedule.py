"""Noise schedules, and the only place where a schedule's own time and sigma meet.

Everything outside speaks of sigma, the noise in units of whitened latents: noisy = x + sigma n. A
discrete process (Ho et al. 2020) scales that by sqrt(alpha_bar): x_t = sqrt(alpha_bar_t) (x + sigma_t n),
sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t). Rectified flow scales it by 1 - s: x_s = (1 - s) x + s n.

Where a process ends at pure noise, sigma would be infinite there; it is `PURE_NOISE` instead. What the
network sees then differs from noise by a millionth of the latents, below the resolution of float32.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ldmkit.diffusion_configs import (
    DistributionName,
    ParameterizationName,
    ScheduleConfig,
    schedule_name,
)
from ldmkit.tensors import Sigmas

SNAP = 1e-3
"""A sigma this close to a step's (in steps) is that step's: it came from the table in float32."""
PURE_NOISE = 1e6
LEAST_FLOW_TIME = 1e-4
"""Below, the velocity is lost in the rounding of float32: it is read off a difference of size s."""
FLOW_STEPS = 1000.0
"""A flow's network is told 1000 s, the range that time embeddings are made for (Esser et al. 2024)."""
MAX_BETA = 0.999
COSINE_OFFSET = 0.008
SIGMOID_START, SIGMOID_END, SIGMOID_TAU = -3.0, 3.0, 1.0

Table = Float[Tensor, " T"]


class Schedule(ABC):
    """Noise levels from 0 to the noisiest, as a function of the schedule's own time.

    Attributes:
        usual_draw: distribution of the levels in training where none is asked for.
        lowest, highest: least and most noise that the network is trained on.
    """

    usual_draw: ClassVar[DistributionName] = "uniform"
    lowest: float
    highest: float

    @abstractmethod
    def sigma_at(self, place: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Noise levels at places along the schedule, from 0 (least noise) to 1 (most); float64."""

    @abstractmethod
    def timestep(self, sigma: Sigmas) -> Float[Tensor, " batch"]:
        """What the network is told of noise levels (c_noise of Karras et al. 2022)."""

    @abstractmethod
    def steps(self, count: int) -> Float[Tensor, " count_plus_1"]:
        """Falling noise levels for exactly `count` model calls, then 0.

        Raises:
            ValueError: the schedule has not so many; the message says how many.
        """

    def draw(self, count: int, generator: torch.Generator) -> Sigmas:
        """Noise levels whose places are uniform along the schedule; see `noise_draw` for others."""
        place = torch.rand(count, generator=generator, dtype=torch.float64)
        return self.sigma_at(place).float()

    def initial(
        self, noise: Float[Tensor, "batch *rest"], sigma: float
    ) -> Float[Tensor, "batch *rest"]:
        """Where sampling starts: noise with the variance of noisy latents, 1 + sigma^2."""
        return noise * (1.0 + sigma**2) ** 0.5


class DiscreteSchedule(Schedule):
    """T noise levels; the network is told t = 0 .. T - 1.

    Args:
        alpha_bar: share of the signal in the variance at each t, falling, perhaps to 0; float64.
    """

    def __init__(self, alpha_bar: Table) -> None:
        self.alpha_bar = alpha_bar
        levels = ((1.0 - self.alpha_bar) / self.alpha_bar).sqrt()
        self.sigmas: Table = levels.clamp(max=PURE_NOISE)
        self.timesteps = len(alpha_bar)
        self.lowest, self.highest = float(self.sigmas[0]), float(self.sigmas[-1])

    def sigma_at(self, place: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The level of t = floor(T place)."""
        return self.sigmas[(place * self.timesteps).long().clamp(0, self.timesteps - 1)]

    def draw(self, count: int, generator: torch.Generator) -> Sigmas:
        """Noise levels for training: t uniform over the T steps."""
        return self.sigmas[torch.randint(self.timesteps, (count,), generator=generator)].float()

    def steps(self, count: int) -> Float[Tensor, " count_plus_1"]:
        """Falling noise levels for exactly `count` model calls, evenly spaced in t, then 0.

        Starts at t = T - 1, so that the first level is the one pure noise stands for ("trailing"
        spacing, Lin et al. 2024).

        Raises:
            ValueError: `count` is not within 1 .. T.
        """
        if not 1 <= count <= self.timesteps:
            raise ValueError(
                f"{count} sampling steps asked for; this model takes 1 to {self.timesteps}"
            )
        back = torch.arange(count, dtype=torch.float64) * (self.timesteps / count)
        chosen = (self.timesteps - back).round().long() - 1
        return _then_0(self.sigmas[chosen])

    def timestep(self, sigma: Sigmas) -> Float[Tensor, " batch"]:
        """The time t of a noise level: whole at the table's levels, linear in log sigma between."""
        table = self.sigmas.log().float().to(sigma.device)
        level = sigma.float().log().clamp(table[0], table[-1])
        above = torch.searchsorted(table, level).clamp(1, self.timesteps - 1)
        low, high = table[above - 1], table[above]
        time = (above - 1) + (level - low) / (high - low)
        whole = time.round()
        return torch.where((time - whole).abs() < SNAP, whole, time)


class FlowSchedule(Schedule):
    """Rectified flow: time s from 0 (data) to 1 (noise), sigma = s / (1 - s); the network is told 1000 s.

    The resolution shift (Esser et al. 2024, Sec. 5.3.2) moves training and sampling alike to more noise:
    at place p, s = a p / (1 + (a - 1) p).

    Args:
        config: its `shift` is a.
    """

    usual_draw = "logit-normal"

    def __init__(self, config: ScheduleConfig) -> None:
        self.shift = config.shift
        self.lowest, self.highest = LEAST_FLOW_TIME / (1.0 - LEAST_FLOW_TIME), PURE_NOISE

    def sigma_at(self, place: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The level of the shifted place."""
        place = place.double()
        # s / (1 - s) of s = a p / (1 + (a - 1) p), whose 1 - s is (1 - p) / (1 + (a - 1) p)
        return (self.shift * place / (1.0 - place)).clamp(self.lowest, self.highest)

    def timestep(self, sigma: Sigmas) -> Float[Tensor, " batch"]:
        """1000 s."""
        return FLOW_STEPS * sigma / (1.0 + sigma)

    def steps(self, count: int) -> Float[Tensor, " count_plus_1"]:
        """Levels at even places from 1 down (Esser et al. 2024), then 0.

        Raises:
            ValueError: `count` is below 1.
        """
        _require_steps(count)
        return _then_0(self.sigma_at(torch.linspace(1.0, 0.0, count + 1, dtype=torch.float64)[:-1]))


class EDMSchedule(Schedule):
    """Noise levels of Karras et al. 2022; the network is told ln(sigma) / 4.

    At place p, sigma = (min^(1/rho) + p (max^(1/rho) - min^(1/rho)))^rho (their Eq. 5).

    Args:
        config: its `sigma_min`, `sigma_max` and `rho`. The paper's 0.002 and 80 are in units of data of
            standard deviation 0.5; ours have 1, hence twice as much.
    """

    usual_draw = "log-normal"

    def __init__(self, config: ScheduleConfig) -> None:
        self.lowest, self.highest, self.rho = config.sigma_min, config.sigma_max, config.rho

    def sigma_at(self, place: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Even in sigma^(1/rho)."""
        low, high = self.lowest ** (1.0 / self.rho), self.highest ** (1.0 / self.rho)
        return (low + place.double() * (high - low)).pow(self.rho)

    def timestep(self, sigma: Sigmas) -> Float[Tensor, " batch"]:
        """ln(sigma) / 4."""
        return sigma.log() / 4.0

    def steps(self, count: int) -> Float[Tensor, " count_plus_1"]:
        """`sigma_max` to `sigma_min`, even in sigma^(1/rho), then 0.

        Raises:
            ValueError: `count` is below 1.
        """
        _require_steps(count)
        return _then_0(self.sigma_at(torch.linspace(1.0, 0.0, count, dtype=torch.float64)))


def scaled_linear(config: ScheduleConfig) -> Table:
    """Betas linear in their square root: Rombach et al. 2022 ("linear" in their code)."""
    start, end = config.beta_start**0.5, config.beta_end**0.5
    return torch.linspace(start, end, config.timesteps, dtype=torch.float64).square()


def linear(config: ScheduleConfig) -> Table:
    """Betas linear in t: Ho et al. 2020 ("sqrt_linear" in the LDM code)."""
    return torch.linspace(config.beta_start, config.beta_end, config.timesteps, dtype=torch.float64)


def cosine(config: ScheduleConfig) -> Table:
    """Betas of alpha_bar = cos^2((t / T + 0.008) / 1.008 pi / 2): Nichol and Dhariwal 2021, Eq. 17."""
    time = torch.linspace(0.0, 1.0, config.timesteps + 1, dtype=torch.float64)
    angle = (time + COSINE_OFFSET) / (1.0 + COSINE_OFFSET) * (math.pi / 2.0)
    return _betas_of(angle.cos().square())


def sigmoid(config: ScheduleConfig) -> Table:
    """Betas of alpha_bar that falls as a sigmoid from -3 to 3: Jabri et al. 2022, tau = 1."""
    time = torch.linspace(0.0, 1.0, config.timesteps + 1, dtype=torch.float64)
    width = SIGMOID_END - SIGMOID_START
    curve = ((time * width + SIGMOID_START) / SIGMOID_TAU).sigmoid()
    return _betas_of((curve[-1] - curve) / (curve[-1] - curve[0]))


def sigmoid_beta(config: ScheduleConfig) -> Table:
    """Betas that rise as a sigmoid from -6 to 6: Xu et al. 2022 (GeoDiff); "sigmoid" in diffusers."""
    curve = torch.linspace(-6.0, 6.0, config.timesteps, dtype=torch.float64).sigmoid()
    return curve * (config.beta_end - config.beta_start) + config.beta_start


def with_zero_terminal_snr(alpha_bar: Table) -> Table:
    """Stretch sqrt(alpha_bar) to end at 0, its start kept: Lin et al. 2024, Alg. 1."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()


def build_schedule(config: ScheduleConfig, parameterization: ParameterizationName) -> Schedule:
    """The schedule of a config; `auto` depends on the parameterization."""
    name = schedule_name(config, parameterization)
    if name in CONTINUOUS_SCHEDULES:
        return CONTINUOUS_SCHEDULES[name](config)
    alpha_bar = torch.cumprod(1.0 - BETAS[name](config), dim=0)
    return DiscreteSchedule(
        with_zero_terminal_snr(alpha_bar) if config.zero_terminal_snr else alpha_bar
    )


def _betas_of(alpha_bar: Float[Tensor, " T_plus_1"]) -> Table:
    return (1.0 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=MAX_BETA)


def _then_0(sigmas: Float[Tensor, " n"]) -> Float[Tensor, " n_plus_1"]:
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)]).float()


def _require_steps(count: int) -> None:
    if count < 1:
        raise ValueError(f"{count} sampling steps asked for; at least 1 is needed")


BETAS: dict[str, Callable[[ScheduleConfig], Table]] = {
    "scaled-linear": scaled_linear,
    "linear": linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "sigmoid-beta": sigmoid_beta,
}
CONTINUOUS_SCHEDULES: dict[str, Callable[[ScheduleConfig], Schedule]] = {
    "flow": FlowSchedule,
    "edm": EDMSchedule,
}
"""Both together: keep in step with `diffusion_configs.ScheduleName`; a test compares them."""
