"""Likelihood, rate and distortion, uncertainty and anomaly maps: closed forms, and the commands."""

import csv
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import ldmkit
from conftest import SIZE, draw_picture
from ldmkit.diffusion.likelihood import (
    bits_per_dimension,
    gaussian_log_density,
    levels_between,
    log_density,
)
from ldmkit.diffusion.rate_distortion import cumulated_rate, prior_rate
from ldmkit.generation_configs import SampleConfig
from ldmkit.measures_configs import (
    AnomalyConfig,
    LikelihoodConfig,
)
from ldmkit.metrics.curves import Axes, Curve, line_plot, standing_alone
from ldmkit.metrics.spread import RunningSpread

LOW, HIGH = 0.03, 1e4
ROOT = Path(__file__).parent.parent
SMALL = {
    "sample": ("--steps", 1, "--num", 24),
    "spread": ("--every", 4),
    "anomaly": ("--steps", 1, "--draws", 1, "--num", 2),
    "likelihood": ("--steps", 1, "--num", 2, "--holdout", 0.5),
    "rate-distortion": ("--levels", 3, "--num", 2, "--holdout", 0.5),
}
"""So that the commands of the page take a moment."""


def signs(*shape):
    return torch.randint(2, shape, generator=torch.Generator().manual_seed(5)).double() * 2 - 1


def gaussian(mean, std):
    def denoise(x, sigma):
        variance = sigma.view(-1, 1, 1, 1) ** 2
        return (std**2 * x + variance * mean) / (std**2 + variance)

    return denoise


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.4, 0.5), (-0.2, 1.7)])
def test_the_density_of_a_gaussian_is_exact(mean, std, generator):
    x = mean + std * torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64)
    sigmas = levels_between(LOW, HIGH, 80)
    found = log_density(gaussian(mean, std), x, sigmas, signs(1, 3, 2, 4, 4))
    law = torch.distributions.Normal(mean, math.hypot(std, LOW))
    expected = law.log_prob(x).flatten(1).sum(1)
    # of 32 numbers; what is left: N(0, 1 + high^2) for N(mean, std^2 + high^2), and steps
    assert torch.allclose(found, expected, atol=2e-3), found - expected


def test_without_structure_one_step_is_exact(generator):
    x = torch.randn(2, 2, 4, 4, generator=generator, dtype=torch.float64)
    found = log_density(gaussian(0.0, 1.0), x, levels_between(LOW, HIGH, 1), signs(1, 2, 2, 4, 4))
    assert torch.allclose(found, gaussian_log_density(x, LOW), atol=1e-9)


def mixture(x, sigma):
    """E[clean | x] of 0.3 N(-1, 0.3^2) + 0.7 N(0.6, 0.4^2) in every number."""
    variance = torch.tensor([0.09, 0.16], dtype=torch.float64) + sigma.view(-1, 1, 1, 1, 1) ** 2
    log_share, means = _log_shares(x, variance)
    clean = means + (variance - sigma.view(-1, 1, 1, 1, 1) ** 2) / variance * (x[..., None] - means)
    return (log_share.softmax(-1) * clean).sum(-1)


def _log_shares(x, variance):
    means = torch.tensor([-1.0, 0.6], dtype=torch.float64)
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    distance = (x[..., None] - means) ** 2 / variance
    return weights.log() - 0.5 * (distance + (2 * math.pi * variance).log()), means


def mixture_errors(steps):
    x = torch.linspace(-1.6, 1.6, 32, dtype=torch.float64).view(2, 1, 4, 4)
    variance = torch.tensor([0.09, 0.16], dtype=torch.float64) + LOW**2
    expected = _log_shares(x, variance)[0].logsumexp(-1).flatten(1).sum(1)
    found = log_density(mixture, x, levels_between(LOW, HIGH, steps), signs(1, 2, 1, 4, 4))
    return (found - expected).abs().max().item() / 16  # nats for a number


def test_the_density_of_a_mixture_is_exact_in_the_limit():
    coarse, fine = mixture_errors(12), mixture_errors(96)
    assert fine < 2e-4
    assert coarse > 5 * fine


def test_the_trace_is_right_on_average_where_numbers_hang_together(generator):
    factor = torch.randn(8, 8, generator=generator, dtype=torch.float64) * 0.4
    covariance = factor @ factor.T + 0.05 * torch.eye(8, dtype=torch.float64)

    def denoise(x, sigma):
        matrix = covariance @ (covariance + sigma[0] ** 2 * torch.eye(8)).inverse()
        return (x.flatten(1) @ matrix.T).view_as(x)

    x = torch.randn(1, 2, 2, 2, generator=generator, dtype=torch.float64) * 0.5
    many = x.expand(2000, 2, 2, 2)  # with directions of its own each
    law = torch.distributions.MultivariateNormal(
        torch.zeros(8, dtype=torch.float64), covariance + LOW**2 * torch.eye(8)
    )
    expected = law.log_prob(x.flatten(1)).item()
    sigmas = levels_between(LOW, HIGH, 40)
    alone = log_density(denoise, many, sigmas, signs(1, 2000, 2, 2, 2))
    error = alone.std().item() / 2000**0.5
    assert error > 1e-3  # one direction alone is noisy
    assert alone.mean().item() == pytest.approx(expected, abs=4 * error)
    together = log_density(denoise, many[:50], sigmas, signs(16, 50, 2, 2, 2))
    assert together.std().item() < alone.std().item() / 2


def test_a_density_asks_for_levels_that_rise():
    x, probes = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 1, 2, 2)
    for levels in ([0.0, 1.0], [1.0], [2.0, 1.0]):
        with pytest.raises(ValueError, match="rise"):
            log_density(gaussian(0.0, 1.0), x, torch.tensor(levels), probes)


def test_bits_are_code_lengths():
    assert bits_per_dimension(torch.tensor([-8 * math.log(2.0)]), 4).item() == pytest.approx(2.0)


@pytest.mark.parametrize("std", [0.3, 1.0])
def test_the_rate_of_a_gaussian_is_the_integral(std):
    sigmas = levels_between(LOW, HIGH, 200).flip(0)
    values = 24
    errors = values * std**2 * sigmas**2 / (std**2 + sigmas**2)
    found = cumulated_rate(errors[None], sigmas)[0]
    signal = std**2 / sigmas**2
    expected = values / 2 * (torch.log1p(signal) - torch.log1p(signal[0]))
    assert torch.allclose(found, expected, rtol=2e-3)
    assert found[0] == 0
    few = cumulated_rate(errors[None, ::8], sigmas[::8])[0]  # 26 levels
    assert few[-1] == pytest.approx(float(expected[-1]), rel=2e-3)


def test_the_rate_of_the_prior_is_the_divergence(generator):
    latents = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    found = prior_rate(latents, 2.0)
    start = torch.distributions.Normal(0.0, math.sqrt(5.0))
    divergence = torch.distributions.kl_divergence(torch.distributions.Normal(latents, 2.0), start)
    assert torch.allclose(found, divergence.flatten(1).sum(1))


def test_a_rate_asks_for_levels_that_fall():
    for levels in ([1.0, 2.0], [1.0, 0.0], [2.0]):
        with pytest.raises(ValueError, match="fall"):
            cumulated_rate(torch.ones(1, 2), torch.tensor(levels))


def test_running_moments_are_those_of_all(generator):
    images = 1e3 + torch.randn(9, 2, 3, 3, generator=generator)
    running = RunningSpread(images[0])
    assert running.std.isnan().all()
    for image in images[1:]:
        running.add(image)
    assert torch.allclose(running.mean, images.double().mean(0))
    assert torch.allclose(running.std, images.double().std(0))


def test_a_plot_of_its_own_is_a_whole_svg_file():
    plot = line_plot("title", [Curve("", [(0.0, 1.0), (1.0, 2.0)], "marked", "c0")], Axes("x", "y"))
    from xml.etree import ElementTree

    root = ElementTree.fromstring(standing_alone(plot))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "fill: none" in (root[0].text or "")


# the commands


@pytest.fixture(scope="module")
def samples(pipeline, tmp_path_factory):
    """Six samples of two classes that take turns."""
    out = tmp_path_factory.mktemp("samples") / "s.safetensors"
    return ldmkit.sample(SampleConfig(model=pipeline.ldm, out=out, num=6, steps=2))


def test_spread_is_the_mean_and_deviation_of_what_decode_writes(run, pipeline, samples, tmp_path):
    formats = ("--format", "png", "--format", "npy")
    precisely = ("--format", "npy", "--precision", "fp32")  # as spread computes
    done = run("spread", samples, "--ae", pipeline.ae, "-o", tmp_path / "maps", *formats, "--json")
    assert done.returncode == 0, done.stderr.decode()
    report = json.loads(done.stdout)
    assert json.loads((tmp_path / "maps/spread.json").read_text()) == report
    done = run("decode", samples, "--ae", pipeline.ae, "-o", tmp_path / "all", *precisely)
    assert done.returncode == 0, done.stderr.decode()
    assert [group["seeds"] for group in report["groups"]] == [[0, 2, 4], [1, 3, 5]]
    for group in report["groups"]:
        pictures = np.stack(
            [np.load(next((tmp_path / "all").glob(f"{seed:06d}*.npy"))) for seed in group["seeds"]]
        )
        mean, std = (
            np.load(tmp_path / f"maps/{group['name']}.{kind}.npy") for kind in ("mean", "std")
        )
        np.testing.assert_allclose(mean, pictures.mean(0), atol=1e-3)
        np.testing.assert_allclose(std, pictures.std(0, ddof=1), atol=1e-3)
        grey = np.sqrt((std**2).mean(2))
        assert group["mean_std"] == pytest.approx(grey.mean(), rel=1e-4)
        with Image.open(tmp_path / f"maps/{group['name']}.std.png") as image:
            expected = np.clip(grey / report["white"] * 255, 0, 255)
            np.testing.assert_allclose(np.asarray(image), expected, atol=1)


def test_spread_reads_a_pipe_and_does_not_depend_on_the_batch(run, pipeline, tmp_path):
    wish = ("sample", pipeline.ldm, "--label", "circle", "--num", 4, "--steps", 2)
    outputs = []
    for size in (1, 3, 16):
        drawn = run(*wish, "--batch-size", size)
        out = tmp_path / str(size)
        done = run(
            *("spread", "-", "--ae", pipeline.ae, "-o", out, "--batch-size", size),
            *("--every", 2, "--format", "npy"),
            stdin=drawn.stdout,
        )
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.decode() == f"{out}\n"
        outputs.append({file.name: file.read_bytes() for file in out.glob("*.npy")})
    assert len(outputs[0]) == 4
    assert outputs[0] == outputs[1] == outputs[2]


def test_spread_refuses_single_samples_and_odd_groups(run, pipeline, samples, tmp_path):
    common = ("--ae", pipeline.ae, "-o", tmp_path)
    done = run("spread", samples, *common, "--every", 4)
    assert (done.returncode, b"does not divide" in done.stderr) == (3, True)
    one = ldmkit.sample(
        SampleConfig(model=pipeline.ldm, out=tmp_path / "one.safetensors", num=3, steps=1)
    )
    done = run("spread", one, *common)
    assert (done.returncode, b"a single sample" in done.stderr) == (3, True)
    assert run("spread", samples, *common, "--every", 1).returncode == 2


@pytest.fixture(scope="module")
def other(pipeline, tmp_path_factory):
    """An autoencoder, and latents, that have nothing to do with the pipeline's."""
    from conftest import ae_config
    from ldmkit.data_configs import EncodeConfig

    root = tmp_path_factory.mktemp("other")
    ae = ldmkit.train_ae(ae_config(pipeline.data, root / "ae", steps=1, seed=9))
    return ae, ldmkit.encode(EncodeConfig(data=str(pipeline.data), ae=ae, out=root / "latents"))


@pytest.mark.parametrize("command", ["anomaly", "likelihood", "rate-distortion", "spread"])
def test_what_does_not_belong_together_is_refused(
    run, pipeline, samples, other, command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    ae, latents = other
    if command != "spread":
        needs_ae = () if command == "likelihood" else ("--ae", pipeline.ae)
        done = run(command, pipeline.ldm, latents, *needs_ae)
        assert (done.returncode, b"another autoencoder" in done.stderr) == (3, True)
        assert run(command, pipeline.ldm, tmp_path).returncode == 3
        done = run(command, pipeline.ldm, pipeline.latents, *needs_ae, "--holdout", 1e-9)
        assert (done.returncode, b"keeps none" in done.stderr) == (3, True)
    if command != "likelihood":
        given = (samples,) if command == "spread" else (pipeline.ldm, pipeline.latents)
        done = run(command, *given, "--ae", ae)
        assert (done.returncode, b"another autoencoder" in done.stderr) == (3, True)
    assert not list(tmp_path.iterdir())


def test_likelihood_by_batch_and_by_latent(run, pipeline, tmp_path):
    reports = []
    for size in (1, 16):
        config = LikelihoodConfig(
            model=pipeline.ldm, latents=pipeline.latents, num=3, steps=1, batch_size=size
        )
        reports.append(ldmkit.likelihood(config))
    assert reports[0] == reports[1]
    table = tmp_path / "bits.csv"
    done = run(
        *("likelihood", pipeline.ldm, pipeline.latents, "--num", 3, "--steps", 1),
        *("--csv", table, "--json"),
    )
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout) == reports[0]
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) == reports[0]["count"] == 3
    for name in ("whitened", "raw", "gaussian"):
        values = [float(row[name]) for row in rows]
        assert reports[0][name]["mean"] == pytest.approx(np.mean(values))
        assert reports[0][name]["standard_error"] == pytest.approx(np.std(values, ddof=1) / 3**0.5)
    # raw = whitened + log2 of what the whitening divides by
    stds = ldmkit.load_diffusion(pipeline.ldm).latent_std
    gap = reports[0]["raw"]["mean"] - reports[0]["whitened"]["mean"]
    assert gap == pytest.approx(stds.log2().mean().item(), abs=1e-5)
    done = run("likelihood", pipeline.ldm, pipeline.latents, "--num", 2, "--steps", 1)
    assert b"+-" in done.stdout


def test_a_model_told_nothing_finds_other_numbers(pipeline):
    found = [
        ldmkit.likelihood(
            LikelihoodConfig(
                model=pipeline.ldm, latents=pipeline.latents, num=2, steps=1, told=told
            )
        )
        for told in ("set", "nothing")
    ]
    assert found[0]["gaussian"] == found[1]["gaussian"]
    assert found[0]["whitened"] != found[1]["whitened"]


def test_rate_distortion_writes_numbers_and_a_plot(run, pipeline, tmp_path):
    reports = []
    for size in (1, 16):
        out = tmp_path / str(size) / "curve.csv"
        done = run(
            *("rate-distortion", pipeline.ldm, pipeline.latents, "--ae", pipeline.ae, "-o", out),
            *("--num", 3, "--levels", 4, "--batch-size", size, "--json"),
        )
        assert done.returncode == 0, done.stderr.decode()
        assert "<svg" in out.with_suffix(".svg").read_text()
        reports.append((json.loads(done.stdout)["points"], out.read_bytes()))
    assert reports[0] == reports[1]
    points = reports[0][0]
    rates, sigmas = ([point[name] for point in points] for name in ("rate", "sigma"))
    assert rates == sorted(rates)
    assert sigmas == sorted(sigmas, reverse=True)
    assert points[-1]["rmse"] < points[0]["rmse"]
    done = run(
        "rate-distortion", pipeline.ldm, pipeline.latents, "--ae", pipeline.ae, "-o", "x.png"
    )
    assert done.returncode == 2


def test_a_single_picture_has_no_standard_error(run, pipeline, tmp_path):
    done = run(
        *("rate-distortion", pipeline.ldm, pipeline.latents, "--ae", pipeline.ae),
        *("-o", tmp_path / "c.csv", "--num", 1, "--levels", 3, "--json"),
    )
    assert json.loads(done.stdout)["points"][0]["rate_standard_error"] is None


class NormalOnes(nn.Module):
    """A closed-form denoiser in the model's place: the latents of normal pictures are these, alike often."""

    def __init__(self, known):
        super().__init__()
        self.known = known

    def __call__(self, x, sigma, condition):
        distance = (x[:, None] - self.known[None]).square().flatten(2).sum(2)
        weights = (-0.5 * distance / sigma.view(-1, 1) ** 2).softmax(1)
        return (weights @ self.known.flatten(1)).view_as(x)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Normal pictures, and two of them of which one has a patch; the autoencoder is the identity."""
    from ldmkit.assembly import build_autoencoder, save_autoencoder
    from ldmkit.autoencoder_configs import AutoencoderConfig, PreprocessingConfig
    from ldmkit.data_configs import EncodeConfig

    root = tmp_path_factory.mktemp("planted")
    for folder in ("normal", "looked-at"):
        (root / folder).mkdir()
    for number in range(6):
        draw_picture("circle", number).save(root / f"normal/{number}.png")
    draw_picture("circle", 2).save(root / "looked-at/healthy.png")
    sick = draw_picture("circle", 3)
    sick.paste("magenta", (20, 22, 27, 29))
    sick.save(root / "looked-at/sick.png")
    preprocessing = PreprocessingConfig(size=SIZE)
    identity = build_autoencoder(AutoencoderConfig(bottleneck="identity"), preprocessing)
    save_autoencoder(root / "ae.safetensors", identity, preprocessing, {})
    for folder in ("normal", "looked-at"):
        ldmkit.encode(
            EncodeConfig(
                data=str(root / folder), ae=root / "ae.safetensors", out=root / f"{folder}.latents"
            )
        )
    from conftest import diffusion_config

    config = diffusion_config(root / "normal.latents", root / "ldm", steps=1, condition=("none",))
    ldmkit.train_diffusion(config)
    return root


def test_a_planted_patch_is_found(planted, tmp_path, monkeypatch):
    from ldmkit.data.latent_set import LatentSet
    from ldmkit.latent_diffusion import LatentDiffusion

    model = ldmkit.load_diffusion(planted / "ldm/diffusion.safetensors")
    raw = LatentSet(planted / "normal.latents").read(range(6)).mean.float()
    known = NormalOnes(model.whiten(raw))
    monkeypatch.setattr(
        LatentDiffusion, "denoise", lambda self, x, sigma, condition: known(x, sigma, condition)
    )
    reports = []
    for size in (1, 16):
        config = AnomalyConfig(
            model=planted / "ldm/diffusion.safetensors",
            latents=planted / "looked-at.latents",
            ae=planted / "ae.safetensors",
            out=tmp_path / str(size),
            strength=0.4,
            steps=8,
            draws=2,
            format=("npy", "png"),
            batch_size=size,
        )
        reports.append(ldmkit.anomaly(config))
    assert reports[0]["pictures"] == reports[1]["pictures"]
    sick, healthy = reports[0]["pictures"]
    assert (sick["key"], healthy["key"]) == ("sick.png", "healthy.png")
    assert sick["score"] > 10 * healthy["score"] + 1
    map_ = np.load(tmp_path / "1" / sick["files"][0])
    grey = np.sqrt((map_**2).mean(2))
    inside = np.zeros_like(grey, dtype=bool)
    inside[22:29, 20:27] = True
    assert grey[inside].mean() > 20 * grey[~inside].mean()
    rows = list(csv.DictReader((tmp_path / "1/scores.csv").read_text().splitlines()))
    assert [row["key"] for row in rows] == ["sick.png", "healthy.png"]
    assert float(rows[0]["score"]) == sick["score"]
    with Image.open(tmp_path / "1/grid.png") as sheet:
        assert sheet.size == (2 * (SIZE + 2) + 2, 3 * (SIZE + 2) + 2)


def test_anomaly_says_what_does_not_fit(run, pipeline, tmp_path):
    common = (
        "anomaly",
        pipeline.ldm,
        pipeline.latents,
        "--ae",
        pipeline.ae,
        "-o",
        tmp_path / "out",
    )
    done = run(*common, "--strength", 0.005, "--steps", 20)
    assert (done.returncode, b"--strength 0.005" in done.stderr) == (2, True)
    done = run(*common, "--num", 2, "--steps", 2, "--draws", 1)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == f"{tmp_path / 'out'}\n"
    assert len(list((tmp_path / "out").glob("*.map.png"))) == 2


def test_the_commands_of_the_page_run(run, pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {
        "ae.safetensors": pipeline.ae,
        "ldm.safetensors": pipeline.ldm,
        "latents": pipeline.latents,
    }
    for name, file in files.items():
        (tmp_path / name).symlink_to(file)
    page = (ROOT / "docs/measures.md").read_text()
    lines = re.findall(r"^ldmkit .*$", page, re.MULTILINE)
    assert len(lines) == 6
    for line in lines:
        data = b""
        for command in line.split(" | "):
            _, name, *arguments = shlex.split(command)
            done = run(name, *arguments, *SMALL.get(name, ()), stdin=data)
            assert done.returncode == 0, (line, done.stderr.decode())
            data = done.stdout
