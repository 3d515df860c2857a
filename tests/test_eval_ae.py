"""The command `eval-ae`, and that its metrics rank what is better above what is worse."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import ldmkit
from conftest import save_pickled
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder.perceptual import PerceptualDistance, box_distance
from ldmkit.autoencoder_configs import AutoencoderConfig, CodebookConfig, PreprocessingConfig
from ldmkit.configs import EvalAEConfig
from ldmkit.data.images import read_images
from ldmkit.data.sources import open_source
from ldmkit.data_configs import SourceConfig
from ldmkit.errors import DataError, QualityError
from ldmkit.metrics.comparison import Comparison
from ldmkit.metrics.sheets import error_map_sheet, pairs_sheet, prior_sheet
from ldmkit.metrics.st_lpips import alex_network, load_st_lpips
from ldmkit.networks.efficientnet import EfficientNetLite0, load_efficientnet_lite0
from ldmkit.recipes import eval_ae as recipe
from ldmkit.torchvision_import import import_torchvision

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples/data/emoji-64-00002.tar"
PICTURES = 64
HIGHER_IS_BETTER = frozenset(("psnr", "ssim"))
ST_ALEX_WIDTHS = (64, 192, 384, 256, 256)


@pytest.fixture(scope="module")
def emoji():
    """Real pictures of 64 pixels, spread over one file of the data in the box."""
    items = open_source(SourceConfig(data=str(EXAMPLES))).items
    return read_images(items[:: len(items) // PICTURES][:PICTURES], PreprocessingConfig(size=64))


def truncated(images):
    """A good reconstruction: without the faster half of a cosine transform's waves on each axis.

    It loses what an autoencoder of factor 2 with a linear decoder would lose.
    """
    size = images.shape[-1]
    n = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(torch.pi * (n[None] + 0.5) * n[:, None] / size) * (2 / size) ** 0.5
    basis[0] /= 2**0.5
    keep = basis[: size // 2].float()
    coefficients = keep @ images @ keep.T
    return keep.T @ coefficients @ keep


def blurred(images, sigma):
    radius = int(4 * sigma)
    x = torch.arange(-radius, radius + 1.0)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    padded = F.pad(images, (radius,) * 4, "replicate")
    return F.conv2d(F.conv2d(padded, kernel[:, :, None], groups=3), kernel[..., None], groups=3)


def noised(images, sigma):
    generator = torch.Generator().manual_seed(0)
    return images + sigma * torch.randn(images.shape, generator=generator)


def ladder(images):
    """From perfect to bad. Blur: sigma 1.5 pixels; noise: sigma 0.5 of [-1, 1].

    Weaker noise (0.2) has the better PSNR than this blur, and rightly so; strengths are chosen so that
    noise is worse by any standard.
    """
    return {
        "itself": images,
        "good": truncated(images),
        "blurred": blurred(images, 1.5),
        "noised": noised(images, 0.5),
    }


def measured(images, distances, features):
    """Metric -> its values along the ladder, by the code of the command."""
    found: dict[str, list[float]] = {}
    for others in ladder(images).values():
        comparison = Comparison(distances, features)
        for batch, rest in zip(images.split(16), others.split(16), strict=True):
            comparison.add(batch, rest)
        for name in comparison.distances:
            found.setdefault(name, []).append(comparison.spread(name).mean)
        for name, result in comparison.frechet_distances().items():
            found.setdefault(name, []).append(result.distance)
    return found


def assert_ranked(found):
    for name, values in found.items():
        best_first = [-value for value in values] if name in HIGHER_IS_BETTER else values
        assert best_first == sorted(best_first), (name, values)
        assert len(set(values)) == len(values), (name, values)


def test_every_metric_ranks_itself_good_blurred_noised(emoji):
    found = measured(emoji[::4], {"vgg16": box_distance()}, {})
    assert set(found) == {"psnr", "ssim", "vgg16"}
    assert_ranked(found)
    assert found["psnr"][0] == 100
    assert found["ssim"][0] == pytest.approx(1)
    assert found["vgg16"][0] == 0


def test_frechet_distances_rank_by_any_network(emoji):
    """Even the features of a random network know a picture from its blurred and noised versions."""

    class Edges(nn.Module):
        def forward(self, images):
            grey = images.mean(1, keepdim=True)
            across = (grey[..., 1:] - grey[..., :-1]).abs()
            return F.adaptive_avg_pool2d(across, 4).flatten(1)

    found = measured(emoji, {}, {"edges": Edges()})
    edges = found["edges"]
    assert edges[0] == pytest.approx(0, abs=1e-9)
    assert 0 < edges[1] < edges[2]
    assert edges[0] < edges[1] < edges[3]


@pytest.mark.weights
def test_every_metric_with_published_weights_ranks(emoji, published_weights, capsys):
    networks = ("alex", "vgg")
    parts = [load_st_lpips(published_weights(f"{name}_shift_tolerant.pth")[0]) for name in networks]
    distances = {part.name: PerceptualDistance(*part) for part in parts}
    effnet = load_efficientnet_lite0(published_weights("efficientnet-lite0-*.pth")[0])
    found = measured(emoji, distances, {"rfd_effnet": effnet.pooled})
    with capsys.disabled():
        for name, values in found.items():
            print(name, [round(value, 4) for value in values])
    assert_ranked(found)


def test_bias_and_error_map_of_a_known_shift():
    images = torch.zeros(6, 3, 16, 16)
    others = images.clone()
    others[:, 1] += 0.2
    others[:, 2, 0, 0] -= 0.6
    comparison = Comparison({}, {})
    for batch, rest in zip(images.split(4), others.split(4), strict=True):
        comparison.add(batch, rest)
    assert comparison.colour_bias().tolist() == pytest.approx([0, 0.2, -0.6 / 256])
    errors = comparison.error_map()
    assert errors[3, 3].item() == pytest.approx(0.2 / 3)
    assert errors[0, 0].item() == pytest.approx(0.8 / 3)
    sheet = error_map_sheet(errors)
    assert sheet.shape == (1, 256, 256)
    assert sheet[0, 0, 0] == 255
    assert sheet[0, 99, 99] == round(255 / 4)


def test_what_comes_out_does_not_depend_on_the_batches(emoji):
    results = []
    for size in (5, 64):
        comparison = Comparison({}, {"f": lambda images: images.mean(dim=(2, 3))})
        for batch, rest in zip(emoji.split(size), blurred(emoji, 1.0).split(size), strict=True):
            comparison.add(batch, rest)
        results.append(comparison)
    a, b = results
    assert torch.allclose(a.per_picture("ssim"), b.per_picture("ssim"))
    assert torch.allclose(a.error_map(), b.error_map())
    left, right = (result.frechet_distances()["f"] for result in results)
    assert left.distance == pytest.approx(right.distance)
    assert left.floor == pytest.approx(right.floor)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_sheets_show_any_number_of_channels(channels):
    images = torch.zeros(4, channels, 16, 16)
    sheet = pairs_sheet(images, images + 0.5)
    assert sheet.shape[0] == (3 if channels >= 3 else 1)
    assert sheet[0, 2 + 2 * 18, 2] == 128  # twice an error of 0.5, of a range of 2


def evaluate(pipeline, out, **changes):
    return ldmkit.eval_ae(EvalAEConfig(data=pipeline.data, ae=pipeline.ae, out=out, **changes))


def report_of(out):
    return json.loads((out / "report.json").read_text())


def test_the_report_holds_numbers_pictures_and_plots(pipeline, tmp_path):
    out = evaluate(pipeline, tmp_path / "out", batch_size=5)
    report = report_of(out)
    assert report["schema_version"] == 1
    assert report["pictures"] == 12
    assert report["picture_shape"] == [3, 32, 32]
    assert set(report["reconstruction"]) == {"psnr_db", "ssim", "vgg16"}
    assert report["autoencoder"]["fingerprint"]
    latents = report["latents"]
    assert len(latents["std"]) == len(latents["kl_nats_per_value"]) == 4
    assert latents["values_per_channel"] == 12 * 8 * 8
    assert latents["codebook"] is None
    assert report["findings"]
    assert len(report["worst"]) == 8
    assert set(report["worst"][4:]) == set(report["best"][4:])  # the middle four of twelve
    for name in report["files"]:
        with Image.open(out / name) as picture:
            picture.verify()
    assert {"worst.png", "error-map.png", "prior.png", "plot-spectrum.png"} <= set(report["files"])


def test_the_numbers_are_those_of_training(pipeline, tmp_path):
    """The same pictures through the same autoencoder, whatever the batch size and the order."""
    reports = [
        report_of(evaluate(pipeline, tmp_path / str(seed), batch_size=size, seed=seed))
        for size, seed in ((4, 0), (12, 7))
    ]
    for name in ("psnr_db", "ssim", "vgg16"):
        means = [report["reconstruction"][name]["mean"] for report in reports]
        assert means[0] == pytest.approx(means[1], rel=1e-5)
    assert reports[0]["latents"]["std"] == pytest.approx(reports[1]["latents"]["std"], rel=1e-5)


def test_the_same_call_writes_the_same_report(pipeline, tmp_path):
    first = (evaluate(pipeline, tmp_path / "out", num=6) / "report.json").read_bytes()
    sheet = (tmp_path / "out/prior.png").read_bytes()
    assert (evaluate(pipeline, tmp_path / "out", num=6) / "report.json").read_bytes() == first
    assert (tmp_path / "out/prior.png").read_bytes() == sheet
    assert json.loads(first)["pictures"] == 6


def test_one_picture_is_enough(pipeline, tmp_path):
    report = report_of(evaluate(pipeline, tmp_path, num=1, perceptual="none"))
    assert report["pictures"] == 1
    assert set(report["reconstruction"]) == {"psnr_db", "ssim"}


def test_holdout_looks_at_the_pictures_that_training_left_out(pipeline, tmp_path):
    from ldmkit.data.images import split

    held_back = split(open_source(SourceConfig(data=pipeline.data)).items, 0.5).held_back
    report = report_of(evaluate(pipeline, tmp_path, holdout=0.5))
    assert report["pictures"] == len(held_back)
    assert {*report["worst"], *report["best"]} <= {item.key for item in held_back}
    with pytest.raises(DataError, match="keeps none of the 12 pictures out"):
        evaluate(pipeline, tmp_path, holdout=1e-9)


def test_a_training_with_holdout_is_mentioned(pipeline, tmp_path):
    from ldmkit.assembly import autoencoder_facts

    facts = autoencoder_facts(pipeline.ae)
    facts = facts.model_copy(update={"trained": {"holdout": 0.05}})
    config = EvalAEConfig(data=tmp_path, ae=pipeline.ae)
    assert "trained with --holdout 0.05" in recipe.holdout_findings(config, facts)[0]
    same = config.model_copy(update={"holdout": 0.05})
    assert recipe.holdout_findings(same, facts) == []


@pytest.fixture(scope="module")
def effnet_file(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "effnet.pth"
    save_pickled(file, EfficientNetLite0().network.state_dict())
    return file


def test_thresholds_end_with_3_after_the_report(pipeline, run, tmp_path, effnet_file):
    """The first is met, the rest are missed; a random network gives the distance a number."""
    done = run(
        *("eval-ae", pipeline.data, "--ae", pipeline.ae, "--out", tmp_path / "out"),
        *("--effnet", effnet_file, "--max-dead-channels", 4),
        *("--min-psnr", 90, "--min-ssim", 0.999, "--max-perceptual", 0, "--max-rfd", 0),
    )
    assert done.returncode == 3
    assert done.stdout == b""
    text = done.stderr.decode()
    assert "which misses --min-psnr 90" in text
    assert "dB" in text
    for option in ("--min-ssim 0.999", "--max-perceptual 0", "--max-rfd 0"):
        assert f"misses {option}" in text
    assert "--max-dead-channels" not in text.split("error: ")[1]
    report = report_of(tmp_path / "out")
    assert [check["met"] for check in report["thresholds"]] == [*[False] * 4, True]
    found = report["reconstruction"]["rfd_effnet"]
    assert found["pictures"] == 12
    assert found["floor"] > 0


def test_stdout_is_the_path_or_the_document(pipeline, run, tmp_path):
    arguments = ("eval-ae", pipeline.data, "--ae", pipeline.ae, "-o", tmp_path, "--num", 2)
    plain = run(*arguments, "--quiet")
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.decode() == f"{tmp_path}\n"
    assert plain.stderr == b""
    document = run(*arguments, "--json", "--min-psnr", 1)
    report = json.loads(document.stdout)
    assert report == report_of(tmp_path)
    assert report["thresholds"][0]["met"]
    assert b"psnr_db: " in document.stderr
    assert b"stage 2 whitens them" in document.stderr or b"unit Gaussian" in document.stderr


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--max-rfd", 3], 2, "--max-rfd needs --effnet FILE"),
        (["--max-rfid", 3], 2, "--max-rfid needs --rfid"),
        (["--inception", "x"], 2, "--inception needs --rfid"),
        (["--perceptual", "none", "--max-perceptual", 1], 2, "needs a --perceptual"),
        (["--size", 30], 3, "--size 30 is not a multiple"),
        (["--size", 8], 3, "needs pictures of 16 pixels or more, these have 8"),
        (["--effnet", "absent.pth"], 3, "there is no file absent.pth"),
        (["--st-lpips", "absent.safetensors"], 3, "absent.safetensors cannot be read"),
        (["--perceptual-weights", "x"], 3, "--perceptual-weights goes with lpips-vgg"),
        (["--ae", "absent"], 3, "absent"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(pipeline, run, tmp_path, options, code, words):
    done = run("eval-ae", pipeline.data, "--ae", pipeline.ae, "-o", tmp_path, *options)
    assert done.returncode == code
    text = done.stderr.decode()
    assert words in " ".join(text.split()), text
    assert "Traceback" not in text
    assert "--loss." not in text


def test_without_matplotlib_the_rest_is_written(pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "can_plot", lambda: False)
    from ldmkit import terminal

    terminal.be_quiet(False)
    report = report_of(evaluate(pipeline, tmp_path, num=2))
    assert not [name for name in report["files"] if name.startswith("plot")]
    assert "pip install 'ldmkit[eval]'" in capsys.readouterr().err


def quantised():
    """An autoencoder with four codes, of which one is nearest to nothing."""
    config = AutoencoderConfig(
        bottleneck="vq",
        channels=8,
        multipliers=(1, 2),
        residual_blocks=1,
        norm_groups=2,
        latent_channels=3,
        codebook=CodebookConfig(size=4),
    )
    torch.manual_seed(0)
    model = Autoencoder(config, 3).eval()
    assert model.codebook is not None
    with torch.no_grad():
        model.get_parameter("to_moments.weight").mul_(5.0)
        model.codebook.codes.copy_(torch.tensor([[-1.0] * 3, [1.0] * 3, [0.0] * 3, [99.0] * 3]))
    return model


def test_a_codebook_without_noise_is_reported(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "load_autoencoder", lambda *_: quantised())
    report = report_of(evaluate(pipeline, tmp_path))
    assert report["latents"]["kl_nats_per_value"] is None
    book = report["latents"]["codebook"]
    assert book["size"] == 4
    assert 0 < book["share_used"] <= 0.75
    assert 1 <= book["perplexity"] < 3
    said = " ".join(report["findings"])
    assert "% of the 4 codes are used" in said
    assert "adds no noise" in said


def test_reconstructions_that_are_not_finite_are_refused(pipeline, tmp_path, monkeypatch):
    model = quantised()
    monkeypatch.setattr(model, "decode", lambda _: torch.full((12, 3, 32, 32), torch.nan))
    monkeypatch.setattr(recipe, "load_autoencoder", lambda *_: model)
    with pytest.raises(DataError, match="no finite numbers"):
        evaluate(pipeline, tmp_path)


def test_lpips_and_st_lpips_come_beside_the_box(pipeline, run, tmp_path):
    import_torchvision()
    import torchvision

    torch.manual_seed(0)
    backbone = torchvision.models.alexnet(weights=None).features.state_dict()
    files = tmp_path / "alex.safetensors", tmp_path / "st.pth"
    save_file({f"features.{name}": tensor for name, tensor in backbone.items()}, files[0])
    network = {f"net.{name}": t for name, t in alex_network().state_dict().items()}
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(ST_ALEX_WIDTHS)}
    save_pickled(files[1], network | heads)
    done = run(
        *("eval-ae", pipeline.data, "--ae", pipeline.ae, "-o", tmp_path, "--num", 4),
        *("--perceptual", "lpips-alex", "--perceptual-weights", files[0], "--st-lpips", files[1]),
        *("--max-perceptual", 1000),
    )
    assert done.returncode == 0, done.stderr
    report = report_of(tmp_path)
    expected = {"psnr_db", "ssim", "vgg16", "lpips_alex", "st_lpips_alex"}
    assert set(report["reconstruction"]) == expected
    assert report["thresholds"][0]["metric"] == "lpips_alex"
    images = torch.zeros(1, 3, 24, 24)
    with pytest.raises(DataError, match="lpips-alex needs pictures of 31 pixels or more"):
        recipe.require_size(images, dict.fromkeys(("vgg16", "lpips-alex"), box_distance()))


def test_the_commands_of_the_page_run(pipeline, run, tmp_path):
    """As printed in docs/evaluation.md, but for the paths; whether thresholds are met is left open."""
    page = (ROOT / "docs/evaluation.md").read_text()
    commands = re.findall(r"^ldmkit (eval-ae [^\n&|]*)", page, re.MULTILINE)
    assert commands
    for command in commands:
        words = command.replace("photos/", str(pipeline.data)).replace('"$ae"', str(pipeline.ae))
        done = run(*words.split(), "--out", tmp_path)
        assert done.returncode in (0, 3), done.stderr
        assert (tmp_path / "report.json").is_file(), done.stderr
        (tmp_path / "report.json").unlink()


def test_a_missed_threshold_raises_in_python(pipeline, tmp_path):
    shutil.rmtree(tmp_path)
    with pytest.raises(QualityError, match=r"psnr_db is [\d.]+ dB, which misses --min-psnr 99"):
        evaluate(pipeline, tmp_path, min_psnr=99)
    assert (tmp_path / "report.json").is_file()


def test_the_prior_sheet_has_both_rows(generator):
    from ldmkit.metrics.latents import LatentStatistics
    from ldmkit.training.runtime import noise_from

    statistics = LatentStatistics()
    statistics.add(torch.randn(8, 3, 4, 4) * 0.01 + 0.5, torch.full((8, 3, 4, 4), 0.01))
    sheet = prior_sheet(
        lambda latents: latents, statistics.health(), torch.zeros(1, 3, 4, 4), noise_from(generator)
    )
    assert sheet.shape == (3, 14, 50)
    upper, lower = sheet[:, 2:6, 2:6].float(), sheet[:, 8:12, 2:6].float()
    assert upper.std() > 50
    assert (lower - 191).abs().max() < 10  # 0.5 of [-1, 1], hardly varied
