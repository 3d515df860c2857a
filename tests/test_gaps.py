import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import ldmkit
from conftest import SIZE
from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.gaps import fill_gaps, with_mask
from ldmkit.data.images import read_images, training_batches
from ldmkit.data.latent_set import LatentSet
from ldmkit.data.latents import items_digest
from ldmkit.data.pictures import decode_picture
from ldmkit.data.preprocessing import preprocess
from ldmkit.data.sources import open_source
from ldmkit.data_configs import EncodeConfig, SourceConfig
from ldmkit.errors import DataError
from test_tars import write_tar


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def half_mask(size=SIZE):
    """Left half does not count."""
    mask = np.full((size, size), 255, np.uint8)
    mask[:, : size // 2] = 0
    return mask


def test_a_number_that_is_not_finite_takes_its_pixel_along():
    array = np.zeros((2, 4, 5), np.float32)
    array[0, 1, 2], array[1, 3, 4] = np.nan, np.inf
    picture = decode_picture(npy(array), "x", PreprocessingConfig(channels=2, range=(0.0, 1.0)))
    where = picture.isnan()
    assert where[:, 1, 2].all()
    assert where[:, 3, 4].all()
    assert where.sum() == 4


@pytest.mark.parametrize("resize", ["bicubic", "bilinear", "area"])
@pytest.mark.parametrize("side", [15, 32, 47])
def test_a_constant_with_a_hole_stays_that_constant(resize, side):
    picture = torch.full((2, 40, 32), 0.3)
    picture[:, 8:20, 5:17] = torch.nan
    config = PreprocessingConfig(size=side, resize=resize)
    result = preprocess(picture, config, None)
    gaps = result.isnan()
    assert torch.equal(gaps[0], gaps[1])
    assert gaps[0].float().mean().item() == pytest.approx(12 * 12 / 32 / 32, abs=0.03)
    assert torch.allclose(result[~gaps], torch.tensor(0.3), atol=1e-5)


def test_values_beside_a_hole_come_from_what_counts_alone():
    picture = torch.rand(1, 16, 16) * 2 - 1
    filled = picture.clone()
    picture[:, :, :7] = torch.nan
    config = PreprocessingConfig(size=8, resize="area")
    result = preprocess(picture, config, None)
    assert result[:, :, :3].isnan().all()
    assert torch.allclose(result[:, :, 4:], F.avg_pool2d(filled, 2)[:, :, 4:], atol=1e-6)
    # of column 3 one half counts, so that it is the mean of that half
    assert torch.allclose(result[0, :, 3], filled[0, :, 7].view(8, 2).mean(1), atol=1e-6)


@pytest.mark.parametrize("resize", ["bicubic", "bilinear"])
def test_without_gaps_nothing_changes(resize):
    picture = torch.rand(3, 37, 41, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = F.interpolate(
        picture[None], (16, 18), mode=resize, antialias=True, align_corners=False
    )[0].clamp(-1, 1)[:, :, 1:17]
    assert torch.equal(
        preprocess(picture, PreprocessingConfig(size=16, resize=resize), None), expected
    )


def test_filling_leaves_numbers_and_says_what_counts():
    images = torch.rand(2, 3, 4, 4)
    same = fill_gaps(images)
    assert same.images is images
    assert same.valid is None
    gappy = images.clone()
    gappy[1, :, 0, 0] = torch.nan
    filled, valid = fill_gaps(gappy)
    assert valid is not None
    assert valid.shape == (2, 1, 4, 4)
    assert (~valid).nonzero().tolist() == [[1, 0, 0, 0]]
    assert torch.equal(filled[1, :, 0, 0], torch.zeros(3))
    assert torch.equal(filled.where(valid, 0), images.where(valid, 0))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_black_in_a_mask_does_not_count(mode):
    picture = torch.zeros(3, SIZE, SIZE)
    buffer = io.BytesIO()
    Image.fromarray(half_mask()).convert("RGB").convert(mode).save(buffer, "PNG")
    result = with_mask(picture, buffer.getvalue(), "m")
    assert result[:, :, : SIZE // 2].isnan().all()
    assert torch.equal(result[:, :, SIZE // 2 :], picture[:, :, SIZE // 2 :])
    assert not picture.isnan().any()


def test_masks_that_do_not_fit_are_named():
    picture = torch.zeros(3, 8, 6)
    with pytest.raises(DataError, match="m has 8 x 8 pixels and its picture 6 x 8"):
        with_mask(picture, png(np.zeros((8, 8), np.uint8)), "m")
    with pytest.raises(DataError, match="m has pixels of mode RGBA"):
        with_mask(picture, png(np.zeros((8, 6, 4), np.uint8)), "m")
    with pytest.raises(DataError, match="m is not a picture"):
        with_mask(picture, b"?", "m")
    with pytest.raises(DataError, match="m is a damaged picture"):
        noise = np.random.default_rng(0).integers(0, 256, (8, 6), dtype=np.uint8)
        with_mask(picture, png(noise)[:-30], "m")


@pytest.fixture
def folder(tmp_path):
    """Two pictures, one with a mask, and a mask without a picture."""
    root = tmp_path / "folder"
    root.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    for name, array in zip("ab", pixels, strict=True):
        (root / f"{name}.png").write_bytes(png(array))
    (root / "b.mask.png").write_bytes(png(half_mask()))
    (root / "c.mask.png").write_bytes(png(half_mask()))
    return root


def test_masks_lie_beside_pictures(folder, tmp_path):
    source = open_source(SourceConfig(data=folder))
    assert [item.key for item in source.items] == ["a.png", "b.png"]
    assert [problem.where for problem in source.problems] == ["c.mask.png"]
    members = [(file.name, file.read_bytes()) for file in sorted(folder.iterdir())]
    write_tar(tmp_path / "0.tar", members)
    in_tar = open_source(SourceConfig(data=tmp_path / "0.tar"))
    assert [item.key for item in in_tar.items] == ["a", "b"]
    config = PreprocessingConfig(size=SIZE)
    for items in (source.items, in_tar.items):
        images = read_images(items, config)
        assert not images[0].isnan().any()
        assert images[1, :, :, : SIZE // 2].isnan().all()
        assert not images[1, :, :, SIZE // 2 :].isnan().any()
        batch = next(training_batches(items, config, batch_size=2, seed=0, start=0, workers=0))
        assert fill_gaps(batch).valid is not None


def test_a_new_mask_makes_another_set(folder):
    before = items_digest(open_source(SourceConfig(data=folder)).items)
    (folder / "a.mask.png").write_bytes(png(half_mask()))
    assert items_digest(open_source(SourceConfig(data=folder)).items) != before


def test_pictures_of_which_nothing_counts_are_named(folder):
    config = PreprocessingConfig(size=SIZE)
    (folder / "b.mask.png").write_bytes(png(np.zeros((SIZE, SIZE), np.uint8)))
    with pytest.raises(DataError, match=r"b.png has no pixel that counts"):
        read_images(open_source(SourceConfig(data=folder)).items, config)
    with pytest.raises(DataError, match=r"b.png has no pixel that counts"):
        next(
            training_batches(
                open_source(SourceConfig(data=folder)).items,
                config,
                batch_size=2,
                seed=0,
                start=0,
                workers=0,
            )
        )
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[0] = 255
    (folder / "b.png").write_bytes(png(np.zeros((3 * SIZE, SIZE), np.uint8)))
    (folder / "b.mask.png").write_bytes(png(np.concatenate([mask, mask * 0, mask * 0])))
    with pytest.raises(DataError, match=r"centre of .*b.png has no pixel that counts"):
        read_images(open_source(SourceConfig(data=folder)).items, config)


def test_latents_of_gappy_pictures_are_finite(folder, pipeline, tmp_path):
    latents = ldmkit.encode(EncodeConfig(data=folder, ae=pipeline.ae, out=tmp_path / "latents"))
    assert latents is not None
    batch = LatentSet(latents).read([0, 1])
    assert batch.mean.isfinite().all()
    images = fill_gaps(
        read_images(open_source(SourceConfig(data=folder)).items, PreprocessingConfig(size=SIZE))
    )
    expected = ldmkit.load_autoencoder(pipeline.ae).encode(images.images).mean
    assert (batch.mean.float() - expected).norm() <= 0.01 * expected.norm()
