"""Averaged weights: closed forms, any width from two, and files that say what is wrong with them."""

import copy
import json
import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

import ldmkit
from conftest import diffusion_config
from ldmkit import diffusion_step, terminal
from ldmkit.assembly import diffusion_facts
from ldmkit.configs import EMAConfig, InspectConfig
from ldmkit.container import read_header
from ldmkit.diffusion_configs import AverageConfig, DiffusionConfig, ScheduleConfig, UNetConfig
from ldmkit.errors import DataError, InterruptedRun, NonFiniteError, UsageError
from ldmkit.facts import DiffusionFacts, Whitening
from ldmkit.modelfile import load
from ldmkit.training.averages import (
    ROUNDING,
    Profile,
    averaged_copy,
    decay_at,
    exponent,
    power_decay,
    profile_products,
    reconstruction,
    update_average,
)
from ldmkit.training.checkpoint import TrainingState
from ldmkit.training.snapshots import (
    MAX_ERROR,
    WIDTHS,
    combined,
    drop_snapshots_after,
    find_snapshots,
    fits,
    save_snapshot,
    snapshot_path,
    snapshot_steps,
    tracked_averages,
    update_tracked,
)

TOY_STEPS, EVERY = 400, 20
DIRECT = (0.035, 0.05, 0.07, 0.15, 0.2)
CONFIG = DiffusionConfig(
    unet=UNetConfig(),
    schedule=ScheduleConfig(),
    parameterization="v",
    latent_channels=1,
    conditions=(),
)
FACTS = DiffusionFacts(
    fingerprint="",
    autoencoder="a",
    latent_shape=(1, 2, 2),
    whitening=Whitening(mean=(0.0,), std=(1.0,)),
    trained={"steps": 1},
    versions={},
)


class Scalar(nn.Module):
    """One number in float64, and a buffer that counts."""

    count: torch.Tensor

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(100.0, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))


@pytest.mark.parametrize("width", [0.002, 0.01, 0.05, 0.1, 0.2, 0.288])
def test_the_exponent_of_a_width_has_that_width(width):
    gamma = exponent(width)
    assert gamma > 0
    times = (np.arange(2_000_000) + 0.5) / 2_000_000
    profile = (gamma + 1) * times**gamma
    mean = (profile * times).mean()
    assert profile.mean() == pytest.approx(1.0, rel=1e-6)
    assert np.sqrt((profile * (times - mean) ** 2).mean()) == pytest.approx(width, rel=1e-6)


def test_the_exponents_of_the_tracked_widths_are_the_papers():
    assert [round(exponent(width), 2) for width in WIDTHS] == [16.97, 6.94]


@pytest.mark.parametrize("width", [0.01, 0.05, 0.2])
def test_a_power_average_is_the_sum_over_steps_with_the_weights_of_the_formula(width):
    steps = 60
    values = np.random.default_rng(0).normal(size=steps)
    module = Scalar()
    average = averaged_copy(module)
    config = AverageConfig(kind="power", width=width)
    for step, value in enumerate(values):
        with torch.no_grad():
            module.value.fill_(value)
            module.count.add_(1)
        update_average(average, module, decay_at(step, config))
    edges = (np.arange(steps + 1) / steps) ** (exponent(width) + 1)
    assert average.value.item() == pytest.approx((np.diff(edges) * values).sum(), rel=1e-9)
    assert average.count.item() == steps


def test_the_exponential_average_keeps_its_warm_up():
    config = AverageConfig(decay=0.99)
    assert [decay_at(step, config) for step in (0, 8, 10_000)] == [0.1, 0.5, 0.99]
    assert decay_at(8, AverageConfig(kind="power", width=0.1)) == power_decay(8, 0.1)


def test_inner_products_are_the_integrals():
    first = [Profile(40, 0.05), Profile(100, 0.2), Profile(70, 0.1)]
    second = [Profile(70, 0.1), Profile(55, 0.25)]
    times = (np.arange(400_000) + 0.5) / 4_000

    def values(profile):
        gamma = exponent(profile.width)
        inside = times <= profile.step
        return (gamma + 1) * times**gamma / float(profile.step) ** (gamma + 1) * inside

    found = profile_products(first, second)
    for row, one in enumerate(first):
        for column, other in enumerate(second):
            expected = (values(one) * values(other)).mean() * 100
            assert found[row, column] == pytest.approx(expected, rel=1e-3)


def test_a_kept_profile_is_its_own_reconstruction():
    kept = [Profile(step, width) for step in (100, 200, 300) for width in WIDTHS]
    (found,) = reconstruction(kept, [kept[3]], "float32")
    assert np.abs(found.coefficients - np.eye(6)[3]).max() < 1e-6
    assert found.error < 1e-6


@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_coefficients_add_up_to_one_however_close_the_snapshots_are(stored):
    steps = [*range(1_000, 200_001, 1_000), 200_001]  # the last two nearly are one
    kept = [Profile(step, width) for step in steps for width in WIDTHS]
    wanted = [Profile(200_001, width) for width in (0.02, 0.07, 0.25)]
    for found in reconstruction(kept, wanted, stored):
        assert found.coefficients.sum() == pytest.approx(1.0, abs=1e-9)
        assert found.error < MAX_ERROR
        expected = ROUNDING[stored] * np.linalg.norm(found.coefficients)
        assert found.rounding == pytest.approx(expected)
        assert found.rounding < 2**-8


def test_what_is_left_is_the_distance_of_the_profiles():
    kept = [Profile(step, width) for step in (500, 1000) for width in WIDTHS]
    (found,) = reconstruction(kept, [Profile(1000, 0.15)], "float32")
    times = (np.arange(1_000_000) + 0.5) / 1_000

    def values(profile):
        gamma = exponent(profile.width)
        return (gamma + 1) / profile.step * (times / profile.step) ** gamma * (times < profile.step)

    wanted = values(Profile(1000, 0.15))
    made = sum(c * values(one) for c, one in zip(found.coefficients, kept, strict=True))
    expected = np.linalg.norm(wanted - made) / np.linalg.norm(wanted)
    assert found.error == pytest.approx(expected, rel=1e-3)


@pytest.fixture(scope="module", params=["float32", "float16"])
def toy(request, tmp_path_factory):
    """A network trained for a few hundred steps; averages tracked directly, and snapshots."""
    run = tmp_path_factory.mktemp("toy")
    average = AverageConfig(snapshots=EVERY, snapshot_format=request.param)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 2))
    teacher = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    tracked = tracked_averages(model, average)
    direct = {width: averaged_copy(model) for width in DIRECT}
    kept = {}
    for step in range(TOY_STEPS):
        x = torch.randn(16, 4)
        loss = (model(x) - teacher(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_tracked(tracked, model, step)
        for width, module in direct.items():
            update_average(module, model, power_decay(step, width))
        done = step + 1
        if done % EVERY == 0:
            save_snapshot(run, done, tracked, CONFIG, FACTS, average)
        if done in (200, TOY_STEPS):
            kept[done] = {w: copy.deepcopy(m.state_dict()) for w, m in direct.items()}
    return run, kept, {name for name, _ in model.named_parameters()}


def apart(found, expected, names):
    """Relative distance over all these tensors together."""
    squares = sum((found[n].double() - expected[n].double()).square().sum() for n in names)
    norm = sum(expected[n].double().square().sum() for n in names)
    return float(squares / norm) ** 0.5


@pytest.mark.parametrize("step", [200, TOY_STEPS])
def test_any_width_comes_out_as_if_it_had_been_tracked(toy, step):
    run, kept, names = toy
    snapshots = find_snapshots(run, step)
    widths = [w for w in DIRECT if step == TOY_STEPS or 0.05 <= w <= 0.15]
    for width, fit in zip(widths, fits(snapshots, widths), strict=True):
        found, expected = combined(snapshots, fit), kept[step][width]
        assert apart(found, expected, names) < 1e-3, width
        assert found.keys() == expected.keys()
        for name in expected.keys() - names:
            assert torch.equal(found[name], expected[name]), name
    # the bound means something: the averages differ from one another by more
    assert apart(kept[step][0.05], kept[step][0.15], names) > 5e-3


def test_a_width_out_of_reach_is_refused_with_those_in_reach(toy):
    run, _, _ = toy
    snapshots = find_snapshots(run, None)
    with pytest.raises(
        UsageError, match=r"a width of 0.005 cannot be made of the 20 snapshots"
    ) as e:
        fits(snapshots, [0.1, 0.005])
    low, high = str(e.value).rsplit("take ", 1)[1].split(" to ")
    fits(snapshots, [float(low), float(high)])
    for outside in (float(low) - 0.001, float(high) + 0.001):
        with pytest.raises(UsageError, match="cannot be made"):
            fits(snapshots, [outside])
    with pytest.raises(UsageError, match=r"take 0\.0\d\d to 0\.0\d\d or 0\.0\d\d to 0\.1\d\d"):
        fits(snapshots[:1], [0.2])


def test_steps_between_snapshots_are_refused_with_the_nearest(toy):
    run, _, _ = toy
    with pytest.raises(UsageError, match=r"no snapshot of that step; the nearest are 200 and 220"):
        find_snapshots(run, 210)
    with pytest.raises(UsageError, match=r"the nearest are 400$"):
        find_snapshots(run, 401)
    with pytest.raises(DataError, match="has no snapshots: train it with"):
        find_snapshots(run / "averages", None)


@pytest.fixture
def small(tmp_path):
    """Three snapshots of a tiny module."""
    average = AverageConfig(snapshots=10)
    model = nn.Linear(2, 1)
    tracked = tracked_averages(model, average)
    for step in range(30):
        update_tracked(tracked, model, step)
        if (step + 1) % 10 == 0:
            save_snapshot(tmp_path, step + 1, tracked, CONFIG, FACTS, average)
    return tmp_path


def test_a_missing_snapshot_is_named(small, capsys):
    snapshot_path(small, 10).unlink()
    terminal.be_quiet(False)
    found = find_snapshots(small, None)
    assert [one.facts.step for one in found] == [20, 30]
    assert "lacks step-000000010.safetensors" in capsys.readouterr().err


def test_a_damaged_snapshot_is_named(small):
    path = snapshot_path(small, 20)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    snapshots = find_snapshots(small, None)
    with pytest.raises(DataError, match=r"step-000000020.safetensors is damaged"):
        combined(snapshots, fits(snapshots, [0.07])[0])
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"step-000000020.safetensors is cut off"):
        find_snapshots(small, None)
    snapshot_path(small, 10).replace(path)
    with pytest.raises(DataError, match=r"step-000000020.safetensors is of step 10"):
        find_snapshots(small, None)


def test_snapshots_of_another_model_or_with_other_tensors_are_named(small):
    other = CONFIG.model_copy(update={"latent_channels": 2})
    tracked = tracked_averages(nn.Linear(2, 1), AverageConfig(snapshots=10))
    save_snapshot(small, 20, tracked, other, FACTS, AverageConfig(snapshots=10))
    with pytest.raises(DataError, match=r"000020.safetensors is of another run than .*000030"):
        find_snapshots(small, None)
    tracked = tracked_averages(nn.Linear(2, 1, bias=False), AverageConfig(snapshots=10))
    save_snapshot(small, 20, tracked, CONFIG, FACTS, AverageConfig(snapshots=10))
    snapshots = find_snapshots(small, None)
    with pytest.raises(DataError, match=r"000020.safetensors: the averages differ in tensor bias"):
        combined(snapshots, fits(snapshots, [0.07])[0])


def test_snapshots_of_steps_to_come_are_dropped(small):
    leftover = small / "averages" / "step-000000040.safetensors.tmp-12345678"
    leftover.mkdir()
    drop_snapshots_after(small, 20)
    assert snapshot_steps(small) == [10, 20]
    assert not leftover.exists()


@pytest.mark.parametrize(("stored", "value"), [("float16", 1e5), ("float32", float("nan"))])
def test_weights_that_a_snapshot_cannot_hold_are_refused(stored, value, tmp_path):
    average = AverageConfig(snapshots=10, snapshot_format=stored)
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight[0, 0] = value
    tracked = tracked_averages(model, average)
    with pytest.raises(NonFiniteError, match=f"average 0.weight is not finite in {stored}"):
        save_snapshot(tmp_path, 10, tracked, CONFIG, FACTS, average)
    assert snapshot_steps(tmp_path) == []


AVERAGE = AverageConfig(kind="power", width=0.15, snapshots=2)


@pytest.fixture(scope="module")
def trained(pipeline, tmp_path_factory):
    """An uninterrupted run with snapshots after 2, 4, 6 and 7 steps."""
    out = tmp_path_factory.mktemp("trained") / "run"
    config = diffusion_config(
        pipeline.latents,
        out,
        steps=7,
        average=AVERAGE,
        unet=UNetConfig(
            channels=8,
            multipliers=(1, 2),
            head_channels=8,
            context_channels=8,
            residual_blocks=1,
            attention_factors=(2,),
            norm_groups=4,
        ),
    )
    return config, ldmkit.train_diffusion(config)


@pytest.mark.parametrize("step", [4, 5])
def test_interrupted_equals_uninterrupted_snapshots_included(trained, step, tmp_path, monkeypatch):
    whole, model = trained
    config = whole.model_copy(update={"out": tmp_path / "run"})
    calls = [0]
    original = diffusion_step.update_tracked

    def update_and_stop(*arguments):
        original(*arguments)
        calls[0] += 1
        if calls[0] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(diffusion_step, "update_tracked", update_and_stop)
        with pytest.raises(InterruptedRun, match=f"saved before step {step}"):
            ldmkit.train_diffusion(config)
    assert max(snapshot_steps(config.out), default=0) <= step
    assert ldmkit.train_diffusion(config).read_bytes() == model.read_bytes()
    assert snapshot_steps(config.out) == snapshot_steps(whole.out) == [2, 4, 6, 7]
    for one in (2, 4, 6, 7):
        expected = snapshot_path(whole.out, one).read_bytes()
        assert snapshot_path(config.out, one).read_bytes() == expected


def test_the_tracked_averages_change_nothing_of_the_run(trained, pipeline, tmp_path):
    config, model = trained
    without = config.model_copy(
        update={"out": tmp_path / "run", "average": AVERAGE.model_copy(update={"snapshots": 0})}
    )
    assert ldmkit.train_diffusion(without).read_bytes() == model.read_bytes()
    assert not (tmp_path / "run/averages").exists()
    with pytest.raises(UsageError, match=r"average.snapshots = 0, not 2"):
        ldmkit.train_diffusion(without.model_copy(update={"average": AVERAGE, "steps": 8}))


def test_snapshots_cover_the_conditioner_and_say_what_they_are(trained):
    config, _ = trained
    header, tensors = load(snapshot_path(config.out, 6), kind="averages")
    assert {
        "0.conditioners.class.embedding.weight",
        "1.conditioners.class.embedding.weight",
    } <= tensors.keys()
    assert {"buffer.latent_mean", "buffer.latent_std"} <= tensors.keys()
    assert (header.facts["step"], header.facts["widths"]) == (6, list(WIDTHS))
    assert header.facts["model"]["trained"]["steps"] == 6
    report = ldmkit.inspect(InspectConfig(path=config.out))
    assert report["averages"] == [f"step-{step:09d}" for step in (2, 4, 6, 7)]


def test_the_command_writes_a_model_file_like_that_of_training(trained, tmp_path, run):
    config, model = trained
    out = tmp_path / "narrow.safetensors"
    done = run("ema", config.out, "--width", 0.05, "--step", 6, "--out", out)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == f"{out}\n"
    _, tensors = load(snapshot_path(config.out, 6), kind="averages")
    for name, value in ldmkit.load_diffusion(out).state_dict().items():
        expected = tensors.get(f"0.{name}", tensors.get(f"buffer.{name}"))
        assert expected is not None
        assert torch.allclose(value, expected, rtol=1e-4, atol=1e-6), name
    facts, ours = diffusion_facts(model), diffusion_facts(out)
    assert read_header(out).config == read_header(model).config
    assert ours.trained["average"]["snapshots"] == [2, 4, 6]
    assert ours.trained["average"]["width"] == 0.05
    assert facts.trained["average"] == {"kind": "power", "width": 0.15}
    assert len({ours.fingerprint, facts.fingerprint}) == 2
    skipped = {"trained", "fingerprint"}
    assert ours.model_dump(exclude=skipped) == facts.model_dump(exclude=skipped)
    drawn = run("sample", out, "--num", 1, "--steps", 1, "--out", tmp_path / "samples.safetensors")
    assert drawn.returncode == 0, drawn.stderr.decode()


def test_the_trained_average_comes_back_from_snapshots(trained):
    """The model of the run is an average of width 0.15, tracked in training."""
    config, model = trained
    snapshots = find_snapshots(config.out, None)
    found = combined(snapshots, reconstruction_of(snapshots, 0.15))
    expected = ldmkit.load_diffusion(model).state_dict()
    assert apart(found, expected, expected.keys()) < 1e-3


def reconstruction_of(snapshots, width):
    kept = [Profile(one.facts.step, w) for one in snapshots for w in WIDTHS]
    return reconstruction(kept, [Profile(snapshots[-1].facts.step, width)], "float32")[0]


def test_a_sweep_scores_every_width(trained, tmp_path, run, capfdbinary):
    config, _ = trained
    widths = (0.05, 0.06, 0.1)
    seen = []

    def score(model):
        seen.append(model)
        return float(len(seen))

    terminal.be_quiet(False)
    report = ldmkit.ema(EMAConfig(run=config.out, sweep=widths, out=tmp_path / "sweep"), score)
    assert [model["score"] for model in report["models"]] == [1.0, 2.0, 3.0]
    assert b"width   missed   score" in capfdbinary.readouterr().err
    for model, width, scored in zip(report["models"], widths, seen, strict=True):
        assert model["width"] == width
        loaded = ldmkit.load_diffusion(model["path"]).state_dict()
        assert all(torch.equal(x, scored.state_dict()[name]) for name, x in loaded.items())
    done = run("ema", config.out, "--sweep", "0.05,0.1", "--json")
    paths = [model["path"] for model in json.loads(done.stdout)["models"]]
    expected = [config.out / f"ema-{w}-step-000000007.safetensors" for w in ("0.05", "0.1")]
    assert paths == [str(path) for path in expected]
    assert all(path.exists() for path in expected)


def test_a_sweep_is_scored_by_the_validation_loss_of_the_run(pipeline, tmp_path):
    config = diffusion_config(
        pipeline.latents, tmp_path / "run", average={"snapshots": 1}, holdout=0.3, validate_every=4
    )
    model = ldmkit.train_diffusion(config)
    report = ldmkit.ema(EMAConfig(run=config.out, sweep=(0.05, 0.1)))
    scores = [one["score"] for one in report["models"]]
    assert scores[0] != scores[1]
    measured = read_header(model).facts["trained"]["validation_loss"]
    assert scores == pytest.approx([measured] * 2, rel=0.2)  # of other averages of the same run


def test_what_cannot_be_made_is_refused_before_anything_is_written(trained, tmp_path, run):
    config, model = trained
    for arguments, code, sentence in (
        (("--step", 5), 2, "the nearest are 4 and 6"),
        (("--sweep", "0.05,0.28"), 2, "a width of 0.28 cannot be made of the 4 snapshots"),
        (("--width", 0.4), 2, "0.288"),
        (("--out", tmp_path), 2, "is a directory: name the model file"),
        (("--sweep", "0.05", "--out", model), 2, "is a file: with --sweep it names a directory"),
    ):
        done = run("ema", config.out, *arguments)
        assert done.returncode == code, done.stderr.decode()
        assert sentence in done.stderr.decode()
    assert run("ema", tmp_path).returncode == 3
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_counts_averages_and_snapshots(trained, run):
    config, _ = trained

    def told(snapshots):
        done = run(
            "train-diffusion",
            "--config",
            config.out / "config.toml",
            "--dry-run",
            "--average.snapshots",
            snapshots,
            "--steps",
            100,
        )
        lines = done.stderr.decode().splitlines()
        number = next(line for line in lines if line.startswith("disk")).split()[2]
        return float(number)

    few = told(50)
    assert few > 1.4 * told(0)
    assert told(1) > 5 * few


def test_averages_for_snapshots_are_part_of_the_state(tmp_path):
    model = nn.Linear(2, 1)
    tracked = tracked_averages(model, AverageConfig(snapshots=1))
    assert list(tracked) == ["average0", "average1"]
    state = TrainingState(tmp_path, {"model": model, **tracked}, {})
    state.save(1)
    fresh = tracked_averages(nn.Linear(2, 1), AverageConfig(snapshots=1))
    TrainingState(tmp_path, {"model": nn.Linear(2, 1), **fresh}, {}).load_latest(
        torch.device("cpu")
    )
    for name, module in fresh.items():
        assert torch.equal(module.weight, tracked[name].weight)
    assert tracked_averages(model, AverageConfig()) == {}
