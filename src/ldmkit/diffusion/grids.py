"""Grids: which noise levels a sampler visits. Pure functions of (schedule, steps).

Each gives steps + 1 levels, strictly falling, the last one 0, in float64. Grids of times ask a discrete
schedule for its own levels, of which there are T; grids of sigma lie between them too. Where a
schedule ends at pure noise, the first level is that, and a grid of sigma has its others below
`AMPLE_NOISE`: evenly spaced up to a million nearly all would lie where nothing of the picture is left.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ldmkit.diffusion.schedule import PURE_NOISE, DiscreteSchedule, Schedule

AMPLE_NOISE = 100.0
"""What is left of the signal is a ten thousandth of the variance."""
KARRAS_RHO = 7.0
BETA_SHAPE = 0.6
BETA_POINTS = 20_001
STABLE_DIFFUSION_ANCHORS = (
    14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029,
)  # fmt: skip
"""Optimised for Stable Diffusion 1.5 (Sabour et al. 2024, published with their quick guide)."""

Grid = Callable[[Schedule, int], Float[Tensor, " steps_plus_1"]]


def trailing(schedule: Schedule, steps: int) -> Float[Tensor, " steps_plus_1"]:
    """Even in time from the noisiest level down, whose last step is as long as the others (Lin et al. 2024).

    Raises:
        ValueError: steps below 1, or above T of a discrete schedule; so do all grids of times.
    """
    _require_steps(schedule, steps)
    if isinstance(schedule, DiscreteSchedule):
        back = torch.arange(steps, dtype=torch.float64) * (schedule.timesteps / steps)
        return _then_0(schedule.sigmas[(schedule.timesteps - back).round().long() - 1])
    return _then_0(schedule.sigma_at(_even(steps + 1)[:-1]))


def linspace(schedule: Schedule, steps: int) -> Float[Tensor, " steps_plus_1"]:
    """Even in time from the noisiest level to the least noisy, then 0 (Nichol and Dhariwal 2021)."""
    _require_steps(schedule, steps)
    if isinstance(schedule, DiscreteSchedule):
        return _then_0(schedule.sigmas[((schedule.timesteps - 1) * _even(steps)).round().long()])
    return _then_0(schedule.sigma_at(_even(steps)))


def leading(schedule: Schedule, steps: int) -> Float[Tensor, " steps_plus_1"]:
    """Times k T / steps from k = steps - 1 to 0: starts below the noisiest level (Song et al. 2021)."""
    _require_steps(schedule, steps)
    if isinstance(schedule, DiscreteSchedule):
        return _then_0(schedule.sigmas[_leading_times(schedule, steps)])
    return _then_0(schedule.sigma_at(_even(steps + 1)[1:]))


def ldm(schedule: Schedule, steps: int) -> Float[Tensor, " steps_plus_1"]:
    """The grid of Rombach et al. 2022: `leading`, and one time more noisy, as their code has it.

    Where steps divides T, and is less, times are theirs (`range(0, T, T // steps)` + 1; other numbers of
    steps give theirs a grid of another length, and T one that fails). Theirs ends at the level of t = 0,
    ours at 0.

    Raises:
        ValueError: the schedule is not discrete, or has fewer times than `steps`.
    """
    _require_steps(schedule, steps)
    if not isinstance(schedule, DiscreteSchedule):
        raise ValueError(
            "the ldm grid is one of a discrete schedule's times: take trailing or karras"
        )
    more = int(steps < schedule.timesteps)
    return _then_0(schedule.sigmas[_leading_times(schedule, steps) + more])


def karras(schedule: Schedule, steps: int) -> Float[Tensor, " steps_plus_1"]:
    """Even in sigma^(1/7) (Karras et al. 2022, Eq. 5)."""
    return _of_sigma(
        schedule,
        steps,
        lambda low, high, place: (
            low ** (1 / KARRAS_RHO) + place * (high ** (1 / KARRAS_RHO) - low ** (1 / KARRAS_RHO))
        ).pow(KARRAS_RHO),
    )


def exponential(schedule: Schedule, steps: int) -> Float[Tensor, " steps_plus_1"]:
    """Even in log sigma, which is even in log-SNR (Lu et al. 2022)."""
    return _of_sigma(schedule, steps, lambda low, high, place: low * (high / low) ** place)


def beta(schedule: Schedule, steps: int) -> Float[Tensor, " steps_plus_1"]:
    """Times at even quantiles of Beta(0.6, 0.6), denser at both ends (Lee et al. 2024)."""
    _require_positive(steps)
    # p = sin^2(angle) takes the infinite ends out of the density
    angle = torch.linspace(0.0, math.pi / 2, BETA_POINTS, dtype=torch.float64)
    density = (angle.sin() * angle.cos()).pow(2 * BETA_SHAPE - 1)
    share = torch.cumulative_trapezoid(density, angle)
    share = torch.cat([share.new_zeros(1), share / share[-1]])
    return _then_0(_between(schedule, _interpolated(_even(steps), share, angle).sin().square()))


def anchored(anchors: Sequence[float]) -> Grid:
    """A grid through given levels: log-linear between them, by place (Sabour et al. 2024).

    Of steps + 1 levels spaced evenly along the anchors the last is replaced by 0. Anchors that reach
    beyond a schedule's levels are drawn together, in log sigma, to fit.

    Args:
        anchors: falling noise levels, at least two, the last above 0.

    Raises:
        ValueError: they are not that.
    """
    given = torch.tensor(anchors, dtype=torch.float64)
    if len(given) < 2 or given.min() <= 0 or (given.diff() >= 0).any():
        raise ValueError(
            "anchors of a grid must be two or more noise levels that fall, all above 0"
        )

    def grid(schedule: Schedule, steps: int) -> Float[Tensor, " steps_plus_1"]:
        _require_positive(steps)
        ends = given.clamp(schedule.lowest, schedule.highest).log()
        logs = given.log()
        share = (logs - logs[-1]) / (logs[0] - logs[-1])
        fitted = ends[-1] + share * (ends[0] - ends[-1])
        places = torch.linspace(0.0, len(given) - 1.0, steps + 1, dtype=torch.float64)[:-1]
        at = torch.arange(len(given), dtype=torch.float64)
        levels = _interpolated(places, at, fitted).exp()
        if schedule.highest >= PURE_NOISE:
            levels[0] = schedule.highest
        return _then_0(levels)

    return grid


def of_levels(levels: Sequence[float]) -> Grid:
    """A grid of given levels, the last of them where the step to 0 begins.

    For as many steps as there are levels but one, it is the levels, with the last replaced by 0; for other
    numbers of steps they are anchors. The levels are those of one model: nothing is fitted to a schedule.

    Args:
        levels: falling noise levels, at least two, the last above 0.

    Raises:
        ValueError: they are not that.
    """
    through = anchored(levels)

    def grid(schedule: Schedule, steps: int) -> Float[Tensor, " steps_plus_1"]:
        if steps == len(levels) - 1:
            return _then_0(torch.tensor(levels[:-1], dtype=torch.float64))
        return through(schedule, steps)

    return grid


def _of_sigma(
    schedule: Schedule,
    steps: int,
    level: Callable[[float, float, Float[Tensor, " n"]], Float[Tensor, " n"]],
) -> Float[Tensor, " steps_plus_1"]:
    _require_positive(steps)
    low, high = schedule.lowest, schedule.highest
    if high < PURE_NOISE:
        return _then_0(level(low, high, _even(steps)))
    below = level(low, AMPLE_NOISE, _even(steps - 1))
    return _then_0(torch.cat([below.new_full((1,), high), below]))


def _between(schedule: Schedule, place: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Noise levels at places along a schedule; a discrete one's are joined in log sigma."""
    if not isinstance(schedule, DiscreteSchedule):
        # a flow's lowest level is that of several places, and levels of a grid must differ
        probe = torch.logspace(-8.0, 0.0, 2001, dtype=torch.float64)
        least = probe[schedule.sigma_at(probe) > schedule.lowest][0]
        return schedule.sigma_at(least + (1.0 - least) * place)
    times = torch.arange(schedule.timesteps, dtype=torch.float64)
    return _interpolated(place * times[-1], times, schedule.sigmas.log()).exp()


def _leading_times(schedule: DiscreteSchedule, steps: int) -> Tensor:
    return torch.arange(steps).flip(0) * schedule.timesteps // steps


def _even(count: int) -> Float[Tensor, " count"]:
    """From 1 to 0; of one, 1."""
    return torch.linspace(1.0, 0.0, count, dtype=torch.float64)


def _interpolated(
    at: Float[Tensor, " n"], xs: Float[Tensor, " m"], ys: Float[Tensor, " m"]
) -> Float[Tensor, " n"]:
    above = torch.searchsorted(xs, at).clamp(1, len(xs) - 1)
    share = (at - xs[above - 1]) / (xs[above] - xs[above - 1])
    return ys[above - 1] + share * (ys[above] - ys[above - 1])


def _then_0(sigmas: Float[Tensor, " n"]) -> Float[Tensor, " n_plus_1"]:
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _require_positive(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"{steps} sampling steps asked for; at least 1 is needed")


def _require_steps(schedule: Schedule, steps: int) -> None:
    _require_positive(steps)
    if isinstance(schedule, DiscreteSchedule) and steps > schedule.timesteps:
        raise ValueError(
            f"{steps} sampling steps asked for; this model takes 1 to {schedule.timesteps}"
        )


GRIDS: dict[str, Grid] = {
    "trailing": trailing,
    "linspace": linspace,
    "leading": leading,
    "ldm": ldm,
    "karras": karras,
    "exponential": exponential,
    "beta": beta,
    "align-your-steps": anchored(STABLE_DIFFUSION_ANCHORS),
}
