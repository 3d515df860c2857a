"""Small, worse pictures: what bicubic and the light BSR degradation keep, and what they draw."""

import ast
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import ValidationError

import ldmkit
from conftest import SIZE, draw_picture
from ldmkit.data import degradation
from ldmkit.data.degradation import channel_mixing, degraded, gaussian
from ldmkit.data.preprocessing import resize
from ldmkit.data_configs import EncodeConfig
from ldmkit.errors import DataError
from ldmkit.manifest import read_manifest
from ldmkit.modelfile import load
from ldmkit.pixels import to_pixels


def picture(channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth colours with an edge and a little texture."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, channels, 4, 5, generator=draw) * 1.2 - 0.6
    smooth = F.interpolate(coarse, (height, width), mode="bicubic")[0]
    smooth[:, height // 3 :, width // 2 :] += 0.2
    return (smooth + 0.05 * torch.randn(smooth.shape, generator=draw)).clamp(-1, 1)


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("ratio", [2, 4, 8])
@pytest.mark.parametrize(
    ("channels", "depth"), [(1, "uint8"), (3, "uint8"), (3, "uint16"), (5, "float32")]
)
@pytest.mark.parametrize("name", ["bicubic", "bsr"])
def test_size_range_and_brightness_are_kept(ratio, channels, depth, name):
    for seed in range(8):
        whole = picture(channels, 96, 128, seed)
        small = degraded(whole, ratio, name, rng(seed), depth=depth)
        assert small.shape == (channels, 96 // ratio, 128 // ratio)
        assert small.dtype == torch.float32
        assert float(small.abs().max()) <= 1.0
        # every kernel sums to 1; aliasing, noise and JPEG move the mean by a grey level or two
        assert float((small.mean() - whole.mean()).abs()) < 0.02
        # and it is still the same picture
        plain = degraded(whole, ratio, "bicubic", rng(0))
        assert float((small - plain).square().mean().sqrt()) < 0.035 * ratio


def test_the_draw_decides_and_nothing_else():
    whole = picture(3, 32, 32)
    kept = whole.clone()
    results = [degraded(whole, 4, "bsr", rng(seed)) for seed in range(8)]
    assert torch.equal(whole, kept)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again = [degraded(whole, 4, "bsr", rng(seed)) for seed in range(8)]
    finally:
        torch.set_num_threads(threads)
    for number, result in enumerate(results):
        assert torch.equal(result, again[number])
        assert not any(torch.equal(result, other) for other in results[:number])
    bicubic = [degraded(whole, 4, "bicubic", rng(seed)) for seed in range(2)]
    assert torch.equal(*bicubic)


def test_bicubic_is_that_of_pillow():
    whole = picture(1, 64, 48)
    image = Image.fromarray(whole[0].numpy()).resize((12, 16), Image.Resampling.BICUBIC)
    small = degraded(whole, 4, "bicubic", rng(0))
    assert torch.allclose(small[0], torch.from_numpy(np.array(image)).clamp(-1, 1), atol=1e-5)


@pytest.mark.parametrize("height", [30, 33])
def test_a_ratio_must_divide_the_sides(height):
    with pytest.raises(ValueError, match=rf"32 x {height} pixels cannot become 4 times smaller"):
        degraded(torch.zeros(3, height, 32), 4, "bsr", rng(0))


def test_no_line_is_dead():
    """Every line of the degradations runs within a few draws."""
    file = degradation.__file__
    functions = [
        node for node in ast.parse(Path(file).read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    lines = {
        node.lineno
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Assign | ast.AugAssign | ast.Return)
    }
    seen = set()

    def local(frame, event, argument):
        seen.add(frame.f_lineno)
        return local

    def trace(frame, event, argument):
        return local if frame.f_code.co_filename == file else None

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        for seed in range(40):
            degraded(picture(3, 16, 16), 4, "bsr", rng(seed))
        degraded(picture(3, 16, 16), 4, "bicubic", rng(0))
        degraded(picture(4, 16, 16), 4, "bsr", rng(0))
    finally:
        sys.settrace(former)
    assert lines <= seen, sorted(lines - seen)


def test_orders_put_the_final_size_after_the_random_one():
    orders = [degradation._order(rng(seed)) for seed in range(300)]
    assert all(order.index("shrink") < order.index("fit") for order in orders)
    assert {order[0] for order in orders} == {"blur", "shrink", "noise", "jpeg"}
    assert len({tuple(order) for order in orders}) == 60  # half of all 120


def test_kernels_have_the_moments_asked_for():
    kernel = gaussian(41, (9.0, 1.0), angle=0.5, centre=1.5)
    assert kernel.sum() == pytest.approx(1.0)
    at = np.arange(41) - 20.0
    mean = (kernel.sum(0) @ at, kernel.sum(1) @ at)
    assert mean == pytest.approx((1.5, 1.5), abs=1e-6)
    x, y = at - mean[0], at - mean[1]
    covariance = np.array(
        [
            [kernel.sum(0) @ x**2, y @ kernel @ x],
            [y @ kernel @ x, kernel.sum(1) @ y**2],
        ]
    )
    assert np.linalg.eigvalsh(covariance) == pytest.approx([1.0, 9.0], rel=1e-3)
    turned = np.array([np.cos(0.5), np.sin(0.5)])
    assert turned @ covariance @ turned == pytest.approx(9.0, rel=1e-3)
    assert gaussian(5, (0.0, 0.0))[2, 2] == 1.0


def test_keeping_every_nth_pixel_does_not_move_the_picture():
    """The kernel is centred in the pixels that one stands for: a ramp stays a ramp of their means."""
    ramp = np.broadcast_to(np.linspace(0.2, 0.8, 64, dtype=np.float32), (1, 64, 64))
    small = degradation._filtered(ramp, gaussian(25, (1.0, 1.0), centre=1.5), every=4)
    assert small.shape == (1, 16, 16)
    assert np.allclose(small[0, 8, 3:13], ramp[0, 0].reshape(16, 4).mean(1)[3:13], atol=1e-5)


def test_noise_between_channels_has_the_covariance_of_the_published_code():
    mixing = channel_mixing(3, rng(3))
    draw = rng(3)
    variances = np.diag(draw.random(3))
    basis = np.linalg.svd(draw.random((3, 3)))[0]
    assert np.allclose(mixing @ mixing.T, np.abs(basis.T @ variances @ basis), atol=1e-12)
    noise = np.concatenate(
        [
            (degradation._noised(np.full((3, 48, 48), 0.5, np.float32), rng(seed)) - 0.5)
            .reshape(3, -1)
            .std(1)
            for seed in range(20)
        ]
    )
    assert 0.0 < noise.max() < 2.5 / 255


@pytest.mark.parametrize(
    ("channels", "depth", "touched"),
    [(3, "uint8", True), (1, "uint8", True), (3, "uint16", False), (2, "uint8", False)],
)
def test_jpeg_is_for_8_bit_grey_and_rgb_only(channels, depth, touched):
    image = np.random.default_rng(0).random((channels, 16, 16), dtype=np.float32)
    after = degradation._through_jpeg(image, rng(0), depth)
    assert after.shape == image.shape
    assert np.array_equal(after, image) != touched
    assert np.abs(after - image).mean() < 0.2


@pytest.fixture
def config(pipeline, tmp_path):
    return EncodeConfig(
        data=pipeline.data, ae=pipeline.ae, out=tmp_path / "latents", shard_size=5, batch_size=4
    )


def encoded(config, **changes):
    out = ldmkit.encode(EncodeConfig.model_validate(config.model_dump() | changes))
    assert out is not None
    return out, torch.cat(
        [load(file, kind="latents")[1]["lowres"] for file in sorted(out.glob("*.safetensors"))]
    )


@pytest.mark.filterwarnings("ignore:This DataLoader")
def test_encode_stores_degraded_pictures_that_no_worker_changes(config, tmp_path):
    asked = {"lowres": 4, "lowres_degradation": "bsr", "views": 2}
    out, stored = encoded(config, **asked)
    assert stored.shape == (24, 3, SIZE // 4, SIZE // 4)
    assert stored.dtype == torch.uint8
    recipe = read_manifest(out).recipe
    assert recipe["lowres"] == {"ratio": 4, "degradation": "bsr", "seed": 0}
    whole = {file.name: file.read_bytes() for file in out.iterdir()}
    other = {"out": tmp_path / "other", "batch_size": 7, "workers": 2}
    again, _ = encoded(config, **asked, **other)
    assert {file.name: file.read_bytes() for file in again.iterdir()} == whole
    _, elsewhere = encoded(config, **asked, seed=1, out=tmp_path / "seed")
    assert not torch.equal(elsewhere[::2], stored[::2])  # of the plain views too
    with pytest.raises(DataError, match="another lowres"):
        encoded(config, lowres=4, views=2)
    # views of one picture that look alike are still degraded each in its own way
    plain = encoded(
        config, lowres=4, lowres_degradation="bsr", views=2, view_zoom=1.0, out=tmp_path / "alike"
    )[1]
    assert not torch.equal(plain[0], plain[1])


def test_bicubic_is_stored_as_ever(config, tmp_path):
    out, stored = encoded(config, lowres=4)
    assert read_manifest(out).recipe["lowres"] == 4
    pixels = [
        np.asarray(draw_picture(kind, number))
        for kind in ("circle", "square")
        for number in range(6)
    ]
    images = torch.from_numpy(np.stack(pixels)).movedim(3, 1).float() / 127.5 - 1.0
    assert torch.equal(stored, to_pixels(resize(images, (SIZE // 4, SIZE // 4), "bicubic")))
    with pytest.raises(ValidationError, match="give their factor, such as --lowres 4"):
        encoded(config, lowres_degradation="bsr")
