import urllib.error
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from ldmkit.autoencoder.perceptual import box_distance, build_perceptual
from ldmkit.autoencoder_configs import AutoencoderLossConfig, PreprocessingConfig
from ldmkit.data.images import read_images
from ldmkit.data.sources import open_source
from ldmkit.data_configs import SourceConfig
from ldmkit.errors import DataError
from ldmkit.networks.efficientnet import EfficientNetLite0
from ldmkit.torchvision_import import import_torchvision

EXAMPLES = Path(__file__).parent.parent / "examples/data/emoji-64-00000.tar"


@pytest.fixture(scope="module")
def box():
    return box_distance()


def blurred(images, sigma):
    radius = int(3 * sigma)
    x = torch.arange(-radius, radius + 1.0)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    images = F.conv2d(images, kernel[:, :, None], padding=(0, radius), groups=3)
    return F.conv2d(images, kernel[..., None], padding=(radius, 0), groups=3)


@pytest.fixture(scope="module")
def photos():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1
    return F.interpolate(coarse, 32, mode="nearest")  # edges, so that blur has something to destroy


def test_the_box_grows_with_blur_and_is_zero_for_equals(box, photos):
    distances = [
        box(photos, blurred(photos, sigma)).mean().item() for sigma in (0.5, 1.0, 2.0, 4.0)
    ]
    assert box(photos, photos).abs().max() == 0
    assert 0 < distances[0] < distances[1] < distances[2] < distances[3]


def test_the_box_computes_its_formula(box, photos):
    """By hand: unit-length features, squared differences, layer weights, mean over pixels."""
    other = blurred(photos, 1.0)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = torch.zeros(2)
    maps = [((picture + 1) / 2 - mean) / std for picture in (photos, other)]
    for index, layer in enumerate(box.features.layers):
        maps = [layer(map_) for map_ in maps]
        weight = {3: 0.1082, 8: 0.0692, 15: 0.0684}.get(index)
        if weight is not None:
            unit = [F.normalize(map_, dim=1) for map_ in maps]
            expected += weight * (unit[0] - unit[1]).square().sum(1).mean((1, 2))
    # LPIPS rounds ImageNet's statistics to three digits, hence the tolerance
    assert torch.allclose(box(photos, other), expected, rtol=0.02)


def test_gradients_reach_the_second_picture_only(box, photos):
    reference, images = photos.clone().requires_grad_(), blurred(photos, 1.0).requires_grad_()
    box(reference, images).sum().backward()
    assert reference.grad is None
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in box.parameters())


def test_flat_pictures_give_finite_gradients(box):
    images = torch.full((1, 3, 16, 16), -1.0, requires_grad=True)
    box(torch.ones(1, 3, 16, 16), images).sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()


def test_grey_is_shown_as_rgb(box, photos):
    grey, other = photos[:, :1], blurred(photos, 1.0)[:, :1]
    same = box(grey.expand(-1, 3, -1, -1), other.expand(-1, 3, -1, -1))
    assert torch.allclose(box(grey, other), same)


@pytest.mark.parametrize(
    ("channels", "triplets"),
    [
        (2, [(0, 1, 0)]),
        (4, [(0, 1, 2), (3, 0, 1)]),
        (6, [(0, 1, 2), (3, 4, 5)]),
        (7, [(0, 1, 2), (3, 4, 5), (6, 0, 1)]),
    ],
)
def test_n_channels_are_the_mean_over_triplets(box, channels, triplets):
    generator = torch.Generator().manual_seed(1)
    reference, images = torch.rand(2, 2, channels, 16, 16, generator=generator) * 2 - 1
    images.requires_grad_()
    found = box(reference, images)
    parts = [box(reference[:, list(part)], images[:, list(part)]) for part in triplets]
    assert found.shape == (2,)
    assert torch.allclose(found, torch.stack(parts).mean(0), rtol=1e-4)
    found.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum((0, 2, 3)).min() > 0


@pytest.mark.parametrize(
    ("name", "net"), [("alex", "alexnet"), ("squeeze", "squeezenet1_1"), ("vgg", "vgg16")]
)
def test_lpips_equals_the_package_on_the_same_weights(name, net, tmp_path):
    import_torchvision()
    import lpips
    import torchvision

    torch.manual_seed(0)
    with torch.device("meta"):  # the classifier's hundred million weights are never asked for
        whole = torchvision.models.get_model(net, weights=None)
    backbone = whole.get_submodule("features").to_empty(device="cpu")
    for layer in backbone.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.reset_parameters()
    state = {f"features.{key}": value for key, value in backbone.state_dict().items()}
    file = tmp_path / "backbone.safetensors"
    safetensors.torch.save_file(state, file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = lpips.LPIPS(net=name, pnet_rand=True, verbose=False)
    reference.net.load_state_dict(
        {key: state["features." + key.split(".", 1)[1]] for key in reference.net.state_dict()}
    )
    config = AutoencoderLossConfig.model_validate(
        {"perceptual": f"lpips-{name}", "perceptual_weights": file}
    )
    ours = build_perceptual(config)
    assert ours is not None
    images = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    expected = reference(images[0], images[1]).flatten()
    assert expected.min() > 1e-4
    assert torch.allclose(ours(images[0], images[1]), expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_changes_the_boxs_distance_by_less_than_one_percent(box):
    items = open_source(SourceConfig(data=str(EXAMPLES))).items[::64]
    pictures = read_images(items, PreprocessingConfig(size=64))
    made = blurred(pictures, 0.7)
    exact = box(pictures, made)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = box(pictures, made)
    assert not torch.equal(rounded, exact)  # it was computed that way
    assert ((rounded - exact).abs() / exact).max() < 0.01


def test_efficientnet_is_computed_in_float32_and_trains_the_second_picture_only(photos, tmp_path):
    """In bfloat16 its distances are off by a tenth."""
    torch.manual_seed(0)
    file = tmp_path / "lite0.safetensors"
    safetensors.torch.save_file(EfficientNetLite0().network.state_dict(), file)
    config = AutoencoderLossConfig(perceptual="efficientnet-lite0", perceptual_weights=file)
    distance = build_perceptual(config)
    assert distance is not None
    images = blurred(photos, 1.0).requires_grad_()
    exact = distance(photos, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(distance(photos, images), exact)
    exact.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert exact.min() > 0
    assert distance(photos, photos).abs().max() == 0
    with pytest.raises(DataError, match="efficientnet-lite0 needs"):
        build_perceptual(AutoencoderLossConfig(perceptual="efficientnet-lite0"))


def test_missing_weights_name_both_ways_out(monkeypatch):
    import_torchvision()
    import torchvision

    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.models.AlexNet_Weights, "get_state_dict", offline)
    with pytest.raises(
        DataError, match=r"alexnet-owt-.*\.pth there, or .*--loss.perceptual-weights"
    ):
        build_perceptual(AutoencoderLossConfig(perceptual="lpips-alex"))


def test_wrong_weights_are_refused(tmp_path):
    safetensors.torch.save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    for file, words in (
        (tmp_path / "x.safetensors", "lacks features"),
        (tmp_path / "y", "cannot be read"),
    ):
        config = AutoencoderLossConfig(perceptual="lpips-vgg", perceptual_weights=file)
        with pytest.raises(DataError, match=words):
            build_perceptual(config)
    with pytest.raises(DataError, match="goes with lpips"):
        build_perceptual(AutoencoderLossConfig(perceptual="vgg16", perceptual_weights=tmp_path))
    assert build_perceptual(AutoencoderLossConfig(perceptual="none")) is None
