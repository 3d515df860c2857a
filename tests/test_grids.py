"""Grids of noise levels: exact counts on every schedule, and the papers' formulas."""

import numpy as np
import pytest
import scipy.stats
import torch

from ldmkit.diffusion.grids import (
    AMPLE_NOISE,
    GRIDS,
    STABLE_DIFFUSION_ANCHORS,
    anchored,
    beta,
    exponential,
    karras,
    ldm,
    leading,
    linspace,
    trailing,
)
from ldmkit.diffusion.schedule import PURE_NOISE, build_schedule
from ldmkit.diffusion_configs import ScheduleConfig

SCHEDULES = {
    "scaled-linear": build_schedule(ScheduleConfig(), "epsilon"),
    "zero-snr": build_schedule(ScheduleConfig(zero_terminal_snr=True), "v"),
    "cosine": build_schedule(ScheduleConfig(kind="cosine"), "epsilon"),
    "flow": build_schedule(ScheduleConfig(kind="flow", shift=3.0), "flow"),
    "edm": build_schedule(ScheduleConfig(kind="edm"), "edm"),
}
LDM = SCHEDULES["scaled-linear"]
FITTING = [
    (grid, kind)
    for grid in GRIDS
    for kind in SCHEDULES
    if grid != "ldm" or kind not in ("flow", "edm")
]


@pytest.mark.parametrize(("grid", "kind"), FITTING)
def test_every_number_of_steps_is_exact_and_falls_to_0(grid, kind):
    schedule = SCHEDULES[kind]
    for steps in (*range(1, 41), *range(41, 1000, 37), 999, 1000):
        sigmas = GRIDS[grid](schedule, steps)
        assert sigmas.dtype == torch.float64
        assert len(sigmas) == steps + 1
        assert sigmas[-1] == 0
        assert (sigmas.float().diff() < 0).all(), steps
        assert sigmas[0] <= schedule.highest * (1 + 1e-9)
        assert sigmas[-2] >= schedule.lowest * (1 - 1e-9)
        if grid not in ("leading", "ldm", "align-your-steps"):
            assert sigmas[0].item() == pytest.approx(schedule.highest)


@pytest.mark.parametrize("grid", GRIDS)
def test_numbers_of_steps_that_cannot_be(grid):
    with pytest.raises(ValueError, match="at least 1"):
        GRIDS[grid](LDM, 0)
    if grid in ("trailing", "linspace", "leading", "ldm"):
        with pytest.raises(ValueError, match="1 to 1000"):
            GRIDS[grid](LDM, 1001)
    else:
        assert len(GRIDS[grid](LDM, 1001)) == 1002
    if grid == "ldm":
        with pytest.raises(ValueError, match="discrete"):
            GRIDS[grid](SCHEDULES["flow"], 10)
    else:
        assert len(GRIDS[grid](SCHEDULES["flow"], 1500)) == 1501


def times_of(sigmas):
    return LDM.timestep(sigmas[:-1].float()).tolist()


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 50, 100, 200, 250, 500])
def test_ldm_is_the_original_grid(steps):
    original = np.asarray(list(range(0, 1000, 1000 // steps))) + 1
    assert times_of(ldm(LDM, steps)) == original[::-1].tolist()
    assert times_of(leading(LDM, steps)) == (original - 1)[::-1].tolist()


@pytest.mark.parametrize("kind", SCHEDULES)
def test_trailing_is_what_models_are_sampled_with(kind):
    schedule = SCHEDULES[kind]
    grid = linspace if kind == "edm" else trailing
    for steps in (1, 7, 50, 1000):
        assert torch.equal(grid(schedule, steps).float(), schedule.steps(steps))


def test_linspace_meets_both_ends():
    assert times_of(linspace(LDM, 10)) == np.linspace(0, 999, 10).round()[::-1].tolist()


def test_karras_and_exponential_are_their_formulas():
    edm = SCHEDULES["edm"]
    i = np.arange(18) / 17
    low, high = edm.lowest, edm.highest
    expected = (high ** (1 / 7) + i * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    assert karras(edm, 18)[:-1].numpy() == pytest.approx(expected, rel=1e-12)
    snr = -2 * exponential(edm, 18)[:-1].log()
    assert snr.diff().numpy() == pytest.approx(float(snr.diff()[0]), rel=1e-9)


def test_beta_is_at_its_quantiles():
    times = LDM.timestep(beta(LDM, 30)[:-1].float())
    expected = 999 * scipy.stats.beta.ppf(np.linspace(1, 0, 30), 0.6, 0.6)
    assert times.numpy() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("grid", [karras, exponential])
@pytest.mark.parametrize("kind", ["flow", "zero-snr"])
def test_pure_noise_is_one_level_not_many(grid, kind):
    sigmas = grid(SCHEDULES[kind], 20)
    assert sigmas[0] == PURE_NOISE
    assert sigmas[1].item() == pytest.approx(AMPLE_NOISE)


def test_anchors():
    edm = SCHEDULES["edm"]
    ten = GRIDS["align-your-steps"](edm, 10)
    assert ten.tolist() == pytest.approx([*STABLE_DIFFUSION_ANCHORS[:-1], 0.0])
    twenty = GRIDS["align-your-steps"](edm, 20)
    assert torch.allclose(twenty[:-1:2], ten[:-1])
    assert torch.allclose(twenty[1:-2:2] ** 2, ten[:-2] * ten[1:-1])
    assert anchored([50.0, 1.0, 0.1])(edm, 2).tolist() == pytest.approx([50.0, 1.0, 0.0])
    for bad in ([1.0], [1.0, 2.0], [1.0, 0.0], [1.0, 1.0]):
        with pytest.raises(ValueError, match="anchors"):
            anchored(bad)
