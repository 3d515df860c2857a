"""Noise levels tuned to a model: errors of steps in closed form, the best choice, and the command."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

import ldmkit
from ldmkit.diffusion.grids import GRIDS, of_levels
from ldmkit.diffusion.samplers import SAMPLERS
from ldmkit.diffusion.schedule import build_schedule
from ldmkit.diffusion.step_tuning import (
    Trajectories,
    step_errors,
    together,
    trajectories_of,
    tuned_levels,
)
from ldmkit.diffusion_configs import ScheduleConfig
from ldmkit.modelfile import load

STD = 0.3
EDM = build_schedule(ScheduleConfig(kind="edm"), "edm")


def denoise(x, sigma):
    """E[clean | x] for clean ~ N(0, STD^2)."""
    return x * STD**2 / (STD**2 + sigma.view(-1, 1, 1, 1) ** 2)


def exact(x, sigma, to):
    """The probability-flow ODE of such data keeps x in units of its standard deviation."""
    return x * math.sqrt((STD**2 + to**2) / (STD**2 + sigma**2))


def exact_trajectories(sigmas, start):
    """Products of the exact solution, without a solver."""
    rows = []
    for part in ("clean", "noise"):
        for sigma in sigmas:
            x = exact(start, sigmas[0], sigma)
            clean = x * STD**2 / (STD**2 + sigma**2)
            rows.append((clean if part == "clean" else (x - clean) / sigma).flatten())
    every = torch.stack(rows)
    return Trajectories(np.array(sigmas), (every @ every.T / every.shape[1]).numpy())


LEVELS = [80.0, 30.0, 11.0, 4.0, 1.5, 0.7, 0.3, 0.1, 0.02]
START = torch.linspace(-90.0, 70.0, 12, dtype=torch.float64).view(3, 1, 2, 2)


@pytest.mark.parametrize(("order", "name"), [(1, "ddim"), (2, "dpmpp-2m")])
def test_errors_are_those_of_the_samplers_steps(order, name):
    errors = step_errors(exact_trajectories(LEVELS, START), order)
    for places in itertools.combinations(range(len(LEVELS) - 1), 3):
        levels = [LEVELS[place] for place in places]
        visited = []

        def on_the_way(x, sigma, levels=levels, visited=visited):
            if len(visited) == 1:  # the step begins at the exact solution
                x.copy_(exact(START, LEVELS[0], levels[1]))
            visited.append(x)
            return denoise(x, sigma)

        first = exact(START, LEVELS[0], levels[0])
        grid = torch.tensor([*levels, 0.0], dtype=torch.float64)
        SAMPLERS[name].sample(on_the_way, first, grid, noise=torch.zeros_like)
        missed = visited[2] - exact(START, LEVELS[0], levels[2])
        expected = missed.square().mean().sqrt().item()
        assert errors[places] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_first_and_last_steps_are_of_order_1():
    found = exact_trajectories(LEVELS, START)
    one, two = (step_errors(found, order) for order in (1, 2))
    assert np.array_equal(one[0, 0], two[0, 0])
    for i in range(1, len(LEVELS) - 1):
        assert np.allclose(one[:i, i, -1], two[:i, i, -1])
    at_last = exact(START, LEVELS[0], LEVELS[3])
    clean = denoise(at_last, torch.tensor([LEVELS[3]]).double())
    end = denoise(exact(START, LEVELS[0], LEVELS[-1]), torch.tensor([LEVELS[-1]]).double())
    assert one[2, 3, -1] == pytest.approx((clean - end).square().mean().sqrt().item())


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_no_choice_of_levels_loses_less(order, steps):
    found = exact_trajectories(LEVELS, START)
    errors, last = step_errors(found, order), len(LEVELS) - 1

    def lost(inner):
        way = [0, 0, *inner, last]
        return sum(errors[place] for place in zip(way, way[1:], way[2:], strict=False))

    least = min(lost(inner) for inner in itertools.combinations(range(1, last), steps - 1))
    levels = tuned_levels(found, steps, order)
    assert len(levels) == steps + 1
    assert levels[-1] == 0
    assert levels[0] == LEVELS[0]
    inner = [LEVELS.index(level) for level in levels[1:-1].tolist()]
    assert lost(inner) == pytest.approx(least, rel=1e-12)


def test_the_followed_solution_is_the_exact_one():
    grid = GRIDS["exponential"](EDM, 200)
    start = torch.linspace(-1, 1, 8, dtype=torch.float64).view(8, 1, 1, 1) * float(grid[0])
    found, end = trajectories_of(denoise, start, grid)
    expected = exact_trajectories(grid[:-1].tolist(), start)
    assert np.allclose(found.products, expected.products, rtol=2e-2, atol=1e-6)
    assert np.allclose(end, exact(start, float(grid[0]), 0.0), rtol=5e-3)
    halves = [trajectories_of(denoise, part, grid)[0] for part in start.split([3, 5])]
    assert np.allclose(together(halves, [3, 5]).products, found.products, rtol=1e-9)


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpmpp-2m", 2)])
def test_tuned_levels_end_nearer_to_the_solution(name, order):
    """Than every grid that knows no model, with 10 calls."""
    grid = GRIDS["exponential"](EDM, 120)
    start = torch.linspace(-1, 1, 9, dtype=torch.float64).view(9, 1, 1, 1) * float(grid[0])
    tuned = tuned_levels(trajectories_of(denoise, start, grid)[0], 10, order)

    def error(levels):
        end = SAMPLERS[name].sample(denoise, start, levels, noise=torch.zeros_like)
        return (end - exact(start, float(grid[0]), 0.0)).square().mean().sqrt().item()

    others = [GRIDS[one](EDM, 10) for one in ("trailing", "karras", "exponential")]
    assert error(tuned) < 0.9 * min(map(error, others))


def test_too_many_steps_are_refused():
    with pytest.raises(ValueError, match="9 steps asked for; 9 levels give 1 to 8"):
        tuned_levels(exact_trajectories(LEVELS, START), 9, 1)


def test_given_levels_are_taken_as_they_are():
    grid = of_levels([9.0, 3.0, 1.0, 0.1])
    assert grid(EDM, 3).tolist() == [9.0, 3.0, 1.0, 0.0]
    six = grid(EDM, 6)
    assert six[:5].tolist() == pytest.approx([9.0, 27**0.5, 3.0, 3**0.5, 1.0])
    assert len(six) == 7
    with pytest.raises(ValueError, match="levels that fall"):
        of_levels([1.0, 2.0])


@pytest.fixture(scope="module")
def tuned(pipeline, tmp_path_factory):
    config = ldmkit.TuneStepsConfig(
        model=pipeline.ldm,
        latents=pipeline.latents,
        out=tmp_path_factory.mktemp("tuned") / "steps.json",
        steps=4,
        num=3,
        fine=20,
        batch_size=2,
    )
    return ldmkit.tune_steps(config)


def drawn(ldm, out, **settings):
    config = ldmkit.SampleConfig(model=ldm, out=out, num=2, sampler="dpmpp-2m", **settings)
    path = ldmkit.sample(config)
    assert path is not None
    return load(path, kind="samples")


def test_the_command_writes_levels_that_sample_takes(pipeline, tuned, tmp_path, run):
    page = json.loads(tuned.read_text())
    assert page["format"] == "ldmkit.steps/1"
    assert page["diffusion"] == load(pipeline.ldm, kind="diffusion")[0].facts["fingerprint"]
    assert len(page["levels"]) == 5
    assert set(page["errors"]) == {"tuned", "auto", "karras", "exponential", "align-your-steps"}
    header, found = drawn(pipeline.ldm, tmp_path / "a.safetensors", steps=4, grid=tuned)
    assert header.facts["manner"]["grid"] == str(tuned)
    _, other = drawn(pipeline.ldm, tmp_path / "b.safetensors", steps=4)
    assert not torch.equal(found["latents"], other["latents"])
    done = run("sample", pipeline.ldm, "--grid", tuned, "--steps", 7, "--num", 1)
    assert done.returncode == 0, done.stderr
    again = tmp_path / "again.json"
    done = run(
        *("tune-steps", pipeline.ldm, pipeline.latents, "-o", again, "--steps", 4, "--num", 3),
        *("--fine", 20, "--batch-size", 2),
    )
    assert done.stdout.decode() == f"{again}\n"
    assert again.read_bytes() == tuned.read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"diffusion": "f" * 64}, "was found for another model (ffffffffffff) than this one"),
        ({"format": "ldmkit.steps/2"}, "another version of ldmkit wrote it"),
        ({"levels": [3.0, 3.0]}, "noise levels must fall"),
        ({"levels": [3.0, 0.0]}, "greater than 0"),
        ({"more": 1}, "more"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(pipeline, tuned, tmp_path, run, change, words):
    file = tmp_path / "steps.json"
    file.write_text(json.dumps(json.loads(tuned.read_text()) | change))
    done = run("sample", pipeline.ldm, "--grid", file, "--num", 1)
    assert done.returncode == 3
    assert words in done.stderr.decode()


def test_what_is_no_file_of_levels_is_refused(pipeline, tmp_path, run):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for grid, code, words in (
        (broken, 3, "is not what tune-steps writes"),
        (tmp_path / "none.json", 3, "cannot read"),
        ("karas", 2, "give a file of tune-steps (*.json), or auto, or trailing"),
    ):
        done = run("sample", pipeline.ldm, "--grid", grid, "--num", 1)
        assert (done.returncode, words in done.stderr.decode()) == (code, True), done.stderr
    for options, words in (
        (("-o", "x.txt"), "name a *.json file"),
        (("--fine", 20, "--steps", 20), "choose from more levels than --steps 20"),
    ):
        done = run("tune-steps", pipeline.ldm, pipeline.latents, *options)
        assert (done.returncode, words in done.stderr.decode()) == (2, True), done.stderr
