"""The tables of a diffusion process in checkpoints of the original code, in and out."""

import math
from collections.abc import Iterator

import torch

from ldmkit.diffusion.schedule import BETAS, DiscreteSchedule
from ldmkit.diffusion_configs import ScheduleConfig
from ldmkit.errors import DataError
from ldmkit.interop.layout import Tensors

TOLERANCE = 1e-6
TABLES = ("betas", "alphas_cumprod")
DIGITS = range(2, 8)
SIGMOID_FOOT = 1.0 / (1.0 + math.exp(6.0))
"""Where the curve of sigmoid-beta begins, as a share of its height; it ends as far below the top."""
LEAST_VARIANCE = 1e-20


def schedule_of(tensors: Tensors, source: str) -> ScheduleConfig:
    """The schedule whose tables a checkpoint holds.

    Its ends are the shortest decimal numbers that give the stored ones, so that 0.0015 is 0.0015
    again and not its float32. Whatever tables are there must then agree with it at every t within
    1e-6, or within the resolution of the number format that they are stored in.

    Args:
        tensors: of the whole checkpoint, without prefix.
        source: how to name it in errors.

    Raises:
        DataError: there is no table, or it is none of ours; it is named.
    """
    stored = {name: tensors[name] for name in TABLES if name in tensors}
    if not stored:
        raise DataError(
            f"{source} holds neither betas nor alphas_cumprod, so its noise levels are unknown: take "
            "a copy of the checkpoint that was not stripped of them"
        )
    for name, table in stored.items():
        if table.ndim != 1 or len(table) < 2 or not table.is_floating_point():
            raise DataError(f"{source}: tensor {name} of shape {list(table.shape)} is no table")
    fitting = [config for config in _candidates(stored) if _differ(config, stored) is not None]
    if fitting:
        return min(fitting, key=lambda config: _differ(config, stored) or 0.0)
    name, table = next(iter(stored.items()))
    raise DataError(
        f"{source}: its table {name} ({len(table)} steps, from {table[0].item():.6g} to "
        f"{table[-1].item():.6g}) is none of {', '.join(BETAS)}"
    )


def schedule_buffers(schedule: DiscreteSchedule) -> Tensors:
    """Every table that the original code registers, float32 (Ho et al. 2020, Eq. 7; v_posterior 0)."""
    after = schedule.alpha_bar
    before = torch.cat([after.new_ones(1), after[:-1]])
    betas = 1.0 - after / before
    variance = betas * (1.0 - before) / (1.0 - after)
    tables = {
        "betas": betas,
        "alphas_cumprod": after,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": after.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1.0 - after).sqrt(),
        "log_one_minus_alphas_cumprod": (1.0 - after).log(),
        "sqrt_recip_alphas_cumprod": after.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1.0 / after - 1.0).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=LEAST_VARIANCE).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1.0 - after),
        "posterior_mean_coef2": (1.0 - before) * (1.0 - betas).sqrt() / (1.0 - after),
    }
    return {name: table.float() for name, table in tables.items()}


def _candidates(stored: Tensors) -> Iterator[ScheduleConfig]:
    """Ours with as many steps; of the numbers that one may have been typed as, the shortest first."""
    steps = len(next(iter(stored.values())))
    for digits in DIGITS:
        for kind, ends in _ends(stored).items():
            start, end = (float(f"{value:.{digits - 1}e}") for value in ends)
            if 0.0 < start < 1.0 and 0.0 < end < 1.0:
                yield ScheduleConfig.model_validate(
                    {"kind": kind, "timesteps": steps, "beta_start": start, "beta_end": end}
                )
    for kind in BETAS:
        if kind not in _ends(stored):  # it has no ends to choose
            yield ScheduleConfig.model_validate({"kind": kind, "timesteps": steps})


def _ends(stored: Tensors) -> dict[str, tuple[float, float]]:
    """What `beta_start` and `beta_end` of each kind that has them must be, up to rounding."""
    if "betas" in stored:
        first, last = stored["betas"][0].item(), stored["betas"][-1].item()
    else:
        after = stored["alphas_cumprod"].double()
        first, last = 1.0 - after[0].item(), 1.0 - (after[-1] / after[-2]).item()
    height = (last - first) / (1.0 - 2.0 * SIGMOID_FOOT)
    start = first - SIGMOID_FOOT * height
    return {
        "scaled-linear": (first, last),
        "linear": (first, last),
        "sigmoid-beta": (start, start + height),
    }


def _differ(config: ScheduleConfig, stored: Tensors) -> float | None:
    """The largest difference once both are in the stored number format; None if it is too large."""
    betas = BETAS[config.kind](config)
    mine: Tensors = dict(zip(TABLES, (betas, torch.cumprod(1.0 - betas, dim=0)), strict=True))
    worst = 0.0
    for name, table in stored.items():
        near = mine[name].to(table.dtype).double()
        resolution = torch.finfo(table.dtype).eps
        if not torch.allclose(table.double(), near, rtol=resolution, atol=TOLERANCE):
            return None
        worst = max(worst, (table.double() - near).abs().max().item())
    return worst
