import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.pictures import decode_picture
from ldmkit.data.preprocessing import preprocess
from ldmkit.errors import DataError
from ldmkit.pixels import grid, save_png, to_pixels


def encoded(image, kind="PNG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def noise(*shape, dtype: type[np.unsignedinteger] = np.uint8):
    high = np.iinfo(dtype).max + 1
    return np.random.default_rng(0).integers(0, high, shape, dtype=dtype)


def test_rgb_round_trip_is_exact(tmp_path):
    pixels = noise(9, 7, 3)
    picture = decode_picture(encoded(Image.fromarray(pixels)), "x", 3)
    assert picture.shape == (3, 9, 7)
    assert picture.min() >= -1
    assert picture.max() <= 1
    save_png(tmp_path / "x.png", to_pixels(picture[None])[0])
    with Image.open(tmp_path / "x.png") as image:
        assert np.array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_exact(kind):
    pixels = noise(8, 8, dtype=np.uint16)
    picture = decode_picture(encoded(Image.fromarray(pixels), kind), "x", 1)
    assert np.array_equal(((picture[0].double() + 1) * 32767.5).round().numpy(), pixels)
    with pytest.raises(DataError, match="16-bit grey"):
        decode_picture(encoded(Image.fromarray(pixels), kind), "x", 3)


def test_sixteen_bit_rgb_is_refused_not_cut():
    rows = b"".join(b"\0" + bytes(range(12)) for _ in range(2))  # 2 x 2 pixels of 3 x 16 bits

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(DataError, match="16 bits for each colour channel"):
        decode_picture(png, "deep.png", 3)


def test_alpha_is_laid_over_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert torch.equal(decode_picture(encoded(image), "x", 3), torch.ones(3, 4, 4))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 255] + [0, 0, 0] * 255)
    transparent = decode_picture(encoded(palette, transparency=0), "x", 3)
    assert torch.equal(transparent, torch.ones(3, 4, 4))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_white_is_white_in_every_mode(mode):
    image = Image.new("RGB", (4, 4), "white").convert(mode)
    for channels in (1, 3):
        assert torch.allclose(decode_picture(encoded(image), "x", channels), torch.ones(1))


def test_cmyk_and_exif_orientation():
    assert decode_picture(encoded(Image.new("CMYK", (4, 4)), "JPEG"), "x", 3).min() > 0.99
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    rotated = encoded(Image.new("RGB", (6, 4)), "JPEG", exif=exif)
    assert decode_picture(rotated, "x", 3).shape == (3, 6, 4)


def test_bad_files_are_named():
    whole = encoded(Image.fromarray(noise(32, 32, 3)))
    for data, words in (
        (b"text", "not a picture"),
        (b"", "not a picture"),
        (whole[:-100], "damaged"),
    ):
        with pytest.raises(DataError, match=f"bad.png.*{words}"):
            decode_picture(data, "bad.png", 3)
    with pytest.raises(DataError, match=r"--preprocessing.range LO,HI"):
        decode_picture(encoded(Image.new("F", (4, 4)), "TIFF"), "x.tif", 1)


def test_a_bomb_is_refused_from_its_header():
    whole = bytearray(encoded(Image.new("L", (8, 8))))
    whole[16:24] = struct.pack(">II", 50_000, 50_000)
    whole[29:33] = struct.pack(">I", zlib.crc32(bytes(whole[12:29])))
    with pytest.raises(DataError, match=r"50000 x 50000 pixels|damaged"):
        decode_picture(bytes(whole), "bomb.png", 1)


def test_resize_keeps_a_picture_of_the_right_size_untouched():
    picture = decode_picture(encoded(Image.fromarray(noise(8, 8, 3))), "x", 3)
    assert torch.equal(preprocess(picture, PreprocessingConfig(size=8), None), picture)


@pytest.mark.parametrize("resize", ["bicubic", "bilinear", "area"])
@pytest.mark.parametrize("shape", [(40, 20), (20, 40), (7, 5), (64, 64)])
def test_any_shape_becomes_the_square(resize, shape):
    picture = torch.rand(3, *shape) * 2 - 1
    result = preprocess(picture, PreprocessingConfig(size=16, resize=resize), None)
    assert result.shape == (3, 16, 16)
    assert result.abs().max() <= 1
    constant = preprocess(
        torch.full((1, *shape), 0.25), PreprocessingConfig(size=16, resize=resize), None
    )
    assert torch.allclose(constant, torch.full((1, 16, 16), 0.25), atol=1e-6)


def test_random_crops_and_flips_are_functions_of_the_generator():
    picture = torch.rand(1, 16, 48)
    config = PreprocessingConfig(size=16, crop="random", flip=True)

    def crop(seed):
        return preprocess(picture, config, torch.Generator().manual_seed(seed))

    assert torch.equal(crop(3), crop(3))
    assert len({crop(seed).sum().item() for seed in range(20)}) > 10
    windows = [picture[:, :, left : left + 16] for left in range(33)]
    both = windows + [window.flip(2) for window in windows]
    assert all(any(torch.equal(crop(seed), window) for window in both) for seed in range(20))


def test_to_pixels_rounds_and_clips():
    values = torch.tensor([-2.0, -1.0, -0.9961, 0.0, 1.0, 3.0]).view(1, 1, 1, 6)
    assert to_pixels(values).flatten().tolist() == [0, 0, 0, 128, 255, 255]


def test_grid_places_pictures_in_rows():
    pictures = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    sheet = grid(pictures, 2, gap=1)
    assert sheet.shape == (1, 7, 7)
    assert sheet[0, 1, 1] == 0
    assert sheet[0, 1, 4] == 1
    assert sheet[0, 4, 1] == 2
    assert sheet[0, 4, 4] == 255
