"""Closed forms and parity of the metrics; the networks with random weights."""

import math
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch

from conftest import save_pickled
from ldmkit.autoencoder.perceptual import PerceptualDistance
from ldmkit.errors import DataError, UsageError
from ldmkit.metrics import frechet
from ldmkit.metrics.findings import bias_findings, codebook_findings, latent_findings
from ldmkit.metrics.frechet import FeatureStatistics, FrechetComparison, frechet_distance
from ldmkit.metrics.latents import CodebookUsage, LatentStatistics
from ldmkit.metrics.reconstruction import psnr, ssim
from ldmkit.metrics.st_lpips import MIN_SIZE, alex_network, load_st_lpips, vgg_network
from ldmkit.networks.efficientnet import (
    BLOCK_LAYERS,
    FIRST_BLOCK_LAYERS,
    OUTER_LAYERS,
    EfficientNetLite0,
    load_efficientnet_lite0,
)
from ldmkit.torchvision_import import import_torchvision


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(2, 3, 40, 32), (2, 1, 11, 17)])
def test_ssim_equals_scikit_image(shape):
    from skimage.metrics import structural_similarity

    images = noise(*shape).clamp(-1, 1)
    others = (images + 0.3 * noise(*shape, seed=1)).clamp(-1, 1)
    expected = [
        structural_similarity(
            image.double().numpy(),
            other.double().numpy(),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=2,
            channel_axis=0,
        )
        for image, other in zip(images, others, strict=True)
    ]
    assert torch.allclose(ssim(images, others), torch.tensor(expected).float(), atol=1e-5, rtol=0)


def test_ssim_of_equals_is_one_and_small_pictures_are_refused():
    images = noise(2, 3, 16, 16).clamp(-1, 1)
    assert torch.allclose(ssim(images, images), torch.ones(2))
    flat = torch.ones(1, 3, 16, 16)
    assert ssim(flat, flat).item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(images[..., :10], images[..., :10])


def test_psnr_of_a_known_error():
    images = torch.zeros(1, 3, 8, 8)
    assert psnr(images, images + 0.2).item() == pytest.approx(20.0)  # 10 log10(4 / 0.04)
    assert psnr(images, images).item() == pytest.approx(100.0)


def test_frechet_distance_of_two_gaussians():
    """Commuting covariances: |m|^2 + sum((s_a - s_b)^2)."""
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    a = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    b = torch.tensor([4.0, 4.0, 1.0], dtype=torch.float64)
    rotation = torch.linalg.qr(noise(3, 3).double()).Q
    covariances = [rotation @ torch.diag(values) @ rotation.T for values in (a, b)]
    found = frechet_distance((torch.zeros(3).double(), covariances[0]), (mean, covariances[1]))
    assert found == pytest.approx(5.25 + 1.0 + 4.0)
    assert frechet_distance((mean, covariances[0]), (mean, covariances[0])) == pytest.approx(
        0, abs=1e-9
    )


@pytest.mark.parametrize("count", [200, 12])  # more and fewer samples than features
def test_frechet_distance_equals_torch_fidelity(count):
    import_torchvision()
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    sets = [noise(count, 24).double(), noise(count, 24, seed=1).double() * 1.3 + 0.2]
    ours = []
    for features in sets:
        statistics = FeatureStatistics()
        for batch in features.split(7):
            statistics.add(batch)
        ours.append(statistics.moments())
    first, second = (fid_features_to_statistics(features) for features in sets)
    reference = fid_statistics_to_metric(first, second, False)
    expected = reference["frechet_inception_distance"]
    assert frechet_distance(*ours) == pytest.approx(expected, rel=1e-6)


def test_the_floor_is_the_distance_of_two_random_halves():
    def means(images):
        return images.mean(dim=(2, 3))

    comparison = FrechetComparison(means)
    images = noise(30, 3, 4, 4).clamp(-1, 1)
    for batch in images.split(7):
        comparison.add(batch, batch)
    found = comparison.result()
    assert found is not None
    assert found.pictures == 30
    assert found.distance == pytest.approx(0, abs=1e-9)
    rounded = ((images + 1) * 127.5).round() / 127.5 - 1
    halves = [FeatureStatistics(), FeatureStatistics()]
    for half, features in zip(halves, (rounded[::2], rounded[1::2]), strict=True):
        half.add(means(features))
    expected = frechet_distance(*[half.moments() for half in halves])
    assert found.floor == pytest.approx(expected)
    assert expected > 0


def test_frechet_needs_two_pictures_and_rgb():
    comparison = FrechetComparison(lambda images: images.mean(dim=(2, 3)))
    assert comparison.result() is None
    comparison.add(noise(3, 3, 4, 4), noise(3, 3, 4, 4))
    found = comparison.result()
    assert found is not None
    assert found.floor is None
    with pytest.raises(DataError, match="have 5 channels"):
        comparison.add(noise(1, 5, 4, 4), noise(1, 5, 4, 4))


def health_of(mean, std=None, batch=8):
    statistics = LatentStatistics()
    for first in range(0, len(mean), batch):
        part = slice(first, first + batch)
        statistics.add(mean[part], None if std is None else std[part])
    return statistics.health()


def test_latent_statistics_equal_those_of_the_whole_set():
    mean = noise(50, 3, 4, 6) * torch.tensor([1.0, 5.0, 0.1]).view(1, 3, 1, 1) + 7.0
    std = torch.rand(50, 3, 4, 6, generator=torch.Generator().manual_seed(0)) + 0.1
    health = health_of(mean, std)
    flat = mean.double().movedim(1, 0).flatten(1)
    assert torch.allclose(health.mean, flat.mean(1))
    assert torch.allclose(health.std, flat.std(1, correction=0))
    assert torch.allclose(health.correlation, torch.corrcoef(flat))
    centred = flat - flat.mean(1, keepdim=True)
    kurtosis = centred.pow(4).mean(1) / centred.square().mean(1).square() - 3
    assert torch.allclose(health.excess_kurtosis, kurtosis)
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(normal(mean, std), normal(0.0, 1.0))
    assert health.kl is not None
    assert torch.allclose(health.kl.float(), divergence.mean(dim=(0, 2, 3)), rtol=1e-5)


def test_kl_agrees_with_the_penalty_of_training():
    from ldmkit.autoencoder.posterior import GaussianPosterior

    posterior = GaussianPosterior(noise(4, 6, 5, 5))
    health = health_of(posterior.mean, posterior.std)
    assert health.kl is not None
    assert health.kl.sum().item() * 25 == pytest.approx(posterior.penalty().item(), rel=1e-5)


def test_kurtosis_of_known_distributions():
    uniform = torch.rand(64, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    health = health_of(torch.cat([uniform, noise(64, 1, 32, 32), torch.ones(64, 1, 32, 32)], dim=1))
    assert health.excess_kurtosis.tolist() == pytest.approx([-1.2, 0.0, 0.0], abs=0.05)


def test_spectrum_of_white_noise_is_flat_and_of_a_wave_is_one_line():
    health = health_of(noise(256, 2, 16, 16))
    assert health.frequency.tolist() == pytest.approx([k / 16 for k in range(1, 9)])
    assert (health.spectrum - 1.0).abs().max() < 0.05
    wave = torch.sin(2 * math.pi * 3 * torch.arange(16.0) / 16).expand(4, 1, 16, 16)
    spectrum = health_of(wave).spectrum[0]
    assert spectrum.argmax() == 2
    assert spectrum[2] > 10
    assert spectrum.sum() == pytest.approx(spectrum[2].item())


@pytest.mark.parametrize("side", [1, 2, 3])
def test_tiny_latents_have_a_short_spectrum(side):
    health = health_of(noise(8, 2, side, side), torch.ones(8, 2, side, side))
    assert health.spectrum.shape == (2, side // 2)
    assert health.spectrum.isfinite().all()
    assert latent_findings(health)


def test_dead_channels_by_noise_and_by_spread():
    mean = noise(32, 3, 4, 4) * torch.tensor([1.0, 0.05, 0.0]).view(1, 3, 1, 1) + 2.0
    noisy = health_of(mean, torch.ones(32, 3, 4, 4))
    assert noisy.dead == (1, 2)  # 0.05^2 is 0.25 % of the noise's variance
    assert noisy.information is not None
    assert noisy.information[0].item() == pytest.approx(0.5 * math.log(2), rel=0.1)
    plain = health_of(mean)
    assert plain.dead == (2,)
    assert plain.kl is None
    assert plain.noise_std is None


def test_perplexity_and_usage_of_a_codebook():
    uniform = CodebookUsage(16)
    for batch in torch.arange(64).remainder(16).view(4, 4, 4).split(1):
        uniform.add(batch)
    assert uniform.perplexity() == pytest.approx(16.0)
    assert uniform.share_used() == 1.0
    single = CodebookUsage(16)
    single.add(torch.full((2, 4, 4), 3))
    assert single.perplexity() == pytest.approx(1.0)
    assert single.share_used() == 1 / 16
    assert "6 % of the 16 codes" in codebook_findings(single)[0]
    assert "idle" in codebook_findings(single)[0]
    assert "idle" not in codebook_findings(uniform)[0]


def test_findings_say_what_stands_out():
    small = health_of(1e-2 * noise(32, 2, 8, 8), torch.full((32, 2, 8, 8), 1e-6))
    said = " ".join(latent_findings(small))
    assert "far from the unit Gaussian's 1" in said
    assert "stage 2 whitens them" in said
    assert "nearly a plain autoencoder" in said
    assert "rough" in said  # white noise
    smooth = torch.nn.functional.interpolate(noise(32, 1, 2, 2), 16, mode="bicubic")
    twice = health_of(torch.cat([smooth, 0.01 * smooth], dim=1))
    said = " ".join(latent_findings(twice))
    assert "correlated by +1.00" in said
    assert "smooth like pictures" in said
    assert "100 times as much" in said
    assert "adds no noise" in said
    heavy = health_of(noise(32, 1, 8, 8).pow(5), torch.ones(32, 1, 8, 8))
    assert "rare extreme values" in " ".join(latent_findings(heavy))
    collapsed = health_of(torch.zeros(4, 2, 8, 8), torch.ones(4, 2, 8, 8))
    assert "no latent channel carries anything" in latent_findings(collapsed)[0]
    half = health_of(
        noise(8, 2, 8, 8) * torch.tensor([1.0, 0]).view(1, 2, 1, 1), torch.ones(8, 2, 8, 8)
    )
    said = " ".join(latent_findings(half))
    assert "channel 1 without content" in said
    assert "noise is up to" in said
    assert bias_findings([0.1, -0.5]) == []
    assert "-3.0 %" in bias_findings([0.1, -3.0])[0]


def st_lpips_tensors(network, widths):
    torch.manual_seed(0)
    tensors = {f"net.{name}": torch.rand_like(t) * 0.1 for name, t in network.state_dict().items()}
    return tensors | {
        f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(widths)
    }


@pytest.mark.parametrize(
    ("network", "widths", "name"),
    [
        (alex_network, (64, 192, 384, 256, 256), "st-lpips-alex"),
        (vgg_network, (64, 128, 256, 512, 512), "st-lpips-vgg"),
    ],
)
def test_st_lpips_reads_its_published_names(network, widths, name, tmp_path):
    tensors = st_lpips_tensors(network(), widths)
    numbers = {"alex": "0 1 4 5 8 9 11 13", "vgg": "0 2 5 6 8 11 12 14 16 19 20 22 24 27 28 30 32"}
    indices = [key.split(".")[2] for key in tensors if key.startswith("net.")]
    assert list(dict.fromkeys(indices)) == numbers[name[9:]].split()  # those of the published file
    safetensors.torch.save_file(tensors, tmp_path / "st.safetensors")
    save_pickled(tmp_path / "st.pth", tensors)
    images = noise(2, 3, MIN_SIZE, MIN_SIZE).clamp(-1, 1)
    found = []
    for file in ("st.safetensors", "st.pth"):
        parts = load_st_lpips(tmp_path / file)
        assert parts.name == name
        found.append(PerceptualDistance(*parts)(images, -images))
    assert found[0].shape == (2,)
    assert torch.equal(*found)
    del tensors["lin4.model.1.weight"]
    safetensors.torch.save_file(tensors, tmp_path / "st.safetensors")
    with pytest.raises(DataError, match=r"no ST-LPIPS network: it lacks lin4\.model\.1\.weight"):
        load_st_lpips(tmp_path / "st.safetensors")


@pytest.fixture(scope="module")
def effnet_tensors():
    torch.manual_seed(0)
    state = EfficientNetLite0().network.state_dict()
    return {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}


def package_names(tensors):
    """The names that the package's checkpoint has, by the reverse of the loader's tables."""
    blocks = list(dict.fromkeys(name.rsplit(".", 2)[0] for name in tensors if "blocks" in name))
    renamed = {}
    for name, tensor in tensors.items():
        module, kind = name.rsplit(".", 1)
        if module.startswith("blocks"):
            block, layer = module.rsplit(".", 1)
            number = blocks.index(block)
            table = FIRST_BLOCK_LAYERS if number == 0 else BLOCK_LAYERS
            module = f"_blocks.{number}.{next(k for k, v in table.items() if v == layer)}"
        else:
            module = next(k for k, v in OUTER_LAYERS.items() if v == module)
        renamed[f"{module}.{kind}"] = tensor
    return renamed


def test_efficientnet_reads_both_names_and_gives_maps_and_features(effnet_tensors, tmp_path):
    safetensors.torch.save_file(effnet_tensors, tmp_path / "timm.safetensors")
    renamed = package_names(effnet_tensors)
    assert len(renamed) == 247
    assert "_blocks.15._project_conv.weight" in renamed
    save_pickled(tmp_path / "package.pth", renamed)
    images = noise(2, 3, 64, 64).clamp(-1, 1)
    models = [
        load_efficientnet_lite0(tmp_path / name) for name in ("timm.safetensors", "package.pth")
    ]
    assert torch.equal(*[model.pooled(images) for model in models])
    model = models[0]
    assert model.pooled(images).shape == (2, 1280)
    shapes = [tuple(map_.shape[1:]) for map_ in model.features(images)]
    assert shapes == [
        (16, 32, 32),
        (24, 16, 16),
        (40, 8, 8),
        (80, 4, 4),
        (112, 4, 4),
        (192, 2, 2),
        (320, 2, 2),
    ]
    grey = images[:, :1]
    assert torch.equal(model.pooled(grey), model.pooled(grey.expand(-1, 3, -1, -1)))
    images.requires_grad_()
    model.features(images)[-1].sum().backward()
    assert images.grad is not None
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_another_network_is_no_efficientnet(effnet_tensors, tmp_path):
    file = tmp_path / "x.safetensors"
    wrong = effnet_tensors | {"conv_stem.weight": torch.zeros(8, 3, 3, 3)}
    safetensors.torch.save_file(wrong, file)
    with pytest.raises(DataError, match=r"conv_stem\.weight has shape \[8, 3, 3, 3\]"):
        load_efficientnet_lite0(file)
    safetensors.torch.save_file({"a.weight": torch.zeros(1)}, file)
    with pytest.raises(DataError, match="read as EfficientNet-Lite0, has the unknown tensor a"):
        load_efficientnet_lite0(file)
    with pytest.raises(DataError, match="there is no file"):
        load_efficientnet_lite0(tmp_path / "absent.pth")


def test_rfid_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(DataError, match=r"weights-inception-2015.*--inception FILE"):
        frechet.inception(None)
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(DataError, match="does not hold torch-fidelity's Inception"):
        frechet.inception(file)
    monkeypatch.setattr(frechet, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'ldmkit\[eval\]'"):
        frechet.inception(None)


def test_inception_takes_weights_from_a_file(tmp_path, monkeypatch):
    """Random weights in the published network: those of the file arrive, by path and by cache."""
    import_torchvision()
    from torch_fidelity import feature_extractor_inceptionv3 as module

    torch.manual_seed(0)
    monkeypatch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_, **__: None)
    network = module.FeatureExtractorInceptionV3("x", ["2048"])
    monkeypatch.undo()
    file = tmp_path / "checkpoints" / module.URL_INCEPTION_V3.rsplit("/", 1)[1]
    file.parent.mkdir()
    save_pickled(file, network.state_dict())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    loaded = frechet.inception(None)
    images = noise(2, 3, 32, 32).clamp(-1, 1)
    features = frechet.inception_features(loaded)
    expected = network(((images + 1) * 127.5).round().to(torch.uint8))[0]
    assert torch.equal(features(images), expected)
    assert features(images[:, :1]).shape == (2, 2048)


@pytest.mark.weights
def test_efficientnet_knows_a_cat(published_weights):
    """The published network and its input convention: the cat of scikit-image is a tabby or Egyptian."""
    from skimage import data

    model = load_efficientnet_lite0(published_weights("efficientnet-lite0-*.pth")[0])
    cat = torch.from_numpy(np.array(data.chelsea()))[:, 75:375].permute(2, 0, 1)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = model.network.classifier(model.pooled(cat / 127.5 - 1.0))
    assert logits.argmax().item() in (281, 282, 285)
