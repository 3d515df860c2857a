import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageCms, ImageOps

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.images import read_picture
from ldmkit.data.pictures import decode_picture
from ldmkit.data.preprocessing import preprocess
from ldmkit.data.sources import open_source
from ldmkit.data_configs import SourceConfig
from ldmkit.errors import DataError
from ldmkit.output.formats import Note, encode_picture
from ldmkit.pixels import grid, save_png, to_pixels


def encoded(image, kind="PNG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def of(channels, value_range=None, **settings):
    """What a model of that many channels does to pictures."""
    return PreprocessingConfig(channels=channels, range=value_range, **settings)


def noise(*shape, dtype: type[np.unsignedinteger] = np.uint8):
    high = np.iinfo(dtype).max + 1
    return np.random.default_rng(0).integers(0, high, shape, dtype=dtype)


def chunk(name, data):
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def filtered(lines, step):
    """Lines of bytes as PNG stores them, with all five filters in turn (PNG 3, 9.2)."""
    before, stored = [0] * len(lines[0]), b""
    for number, line in enumerate(lines):
        kind = number % 5
        stored += bytes([kind])
        for place, value in enumerate(line):
            left = line[place - step] if place >= step else 0
            up, corner = before[place], before[place - step] if place >= step else 0
            guess = left + up - corner
            paeth = min((left, up, corner), key=lambda value, guess=guess: abs(guess - value))
            expected = (0, left, up, (left + up) // 2, paeth)[kind]
            stored += bytes([(value - expected) % 256])
        before = line
    return stored


def deep_png(array, transparent=b"", *, interlaced=False):
    """A 16-bit PNG of 1 to 4 channels, by the specification alone."""
    array = np.atleast_3d(array).astype(">u2")
    height, width, channels = array.shape
    passes = [array]
    if interlaced:  # PNG 3, 8.1
        starts = [(0, 0), (0, 4), (4, 0), (0, 2), (2, 0), (0, 1), (1, 0)]
        steps = [(8, 8), (8, 8), (8, 4), (4, 4), (4, 2), (2, 2), (2, 1)]
        passes = [array[y::dy, x::dx] for (y, x), (dy, dx) in zip(starts, steps, strict=True)]
    lines = b""
    for part in passes:
        if part.size:
            lines += filtered([list(row.tobytes()) for row in part], 2 * channels)
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, interlaced)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"tRNS", transparent) if transparent else b"")
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


def as_uint16(picture):
    """The 16-bit numbers of a picture, channels last."""
    return ((picture.movedim(0, 2).double() + 1) * 32767.5).round().numpy().astype(np.uint16)


def test_rgb_round_trip_is_exact(tmp_path):
    pixels = noise(9, 7, 3)
    picture = decode_picture(encoded(Image.fromarray(pixels)), "x", of(3))
    assert picture.shape == (3, 9, 7)
    assert picture.min() >= -1
    assert picture.max() <= 1
    save_png(tmp_path / "x.png", to_pixels(picture[None])[0])
    with Image.open(tmp_path / "x.png") as image:
        assert np.array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_exact(kind):
    pixels = noise(8, 8, dtype=np.uint16)
    picture = decode_picture(encoded(Image.fromarray(pixels), kind), "x", of(1))
    assert np.array_equal(((picture[0].double() + 1) * 32767.5).round().numpy(), pixels)
    with pytest.raises(DataError, match="16-bit grey"):
        decode_picture(encoded(Image.fromarray(pixels), kind), "x", of(3))


WORDS = arrays(
    np.uint16, st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3, 4]))
)


@given(WORDS, st.booleans())
def test_sixteen_bit_png_is_exact_with_every_filter(array, interlaced):
    picture = decode_picture(deep_png(array, interlaced=interlaced), "x", of(array.shape[2]))
    assert np.array_equal(as_uint16(picture), array)


@given(WORDS)
def test_sixteen_bit_tiff_is_exact(array):
    buffer = io.BytesIO()
    stored = array if array.shape[2] > 1 else array[:, :, 0]
    tifffile.imwrite(buffer, stored, photometric="minisblack", planarconfig="contig")
    picture = decode_picture(buffer.getvalue(), "x", of(array.shape[2]))
    assert np.array_equal(as_uint16(picture), array)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_written_as_they_were_read(tmp_path, channels):
    array = noise(7, 9, channels, dtype=np.uint16)
    image = decode_picture(deep_png(array), "x", of(channels))
    data = encode_picture(image, "png16", (0.0, 1.0), Note("", 95, "x"))
    (tmp_path / "x.png").write_bytes(data)
    again = decode_picture((tmp_path / "x.png").read_bytes(), "x", of(channels))
    assert torch.equal(again, image)
    assert np.array_equal(as_uint16(again), array)


@pytest.mark.parametrize("limit", [65535, 1000])
def test_sixteen_bit_ppm_is_exact(limit):
    array = noise(5, 6, 3, dtype=np.uint16).astype(np.uint32) % (limit + 1)
    data = b"P6 6 5 %d\n" % limit + array.astype(">u2").tobytes()
    expected = (array.astype(np.float64) * 65535 / limit).round()
    assert np.array_equal(as_uint16(decode_picture(data, "x", of(3))), expected)
    with pytest.raises(DataError, match="damaged"):
        decode_picture(data[:-1], "x", of(3))


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("colour", ["white", "black", "10,20,200"])
def test_sixteen_bit_transparency_is_exact(channels, colour):
    array = noise(6, 7, channels, dtype=np.uint16)
    array[0, 0, -1], array[0, 1, -1] = 0, 65535
    model = of({2: 1, 4: 3}[channels], background=colour)
    below = np.array(model.background_rgb) * 257.0
    if channels == 2:
        below = np.array([(below * (0.299, 0.587, 0.114)).sum()])
    share = array[:, :, -1:] / 65535
    expected = (array[:, :, :-1] * share + below.round() * (1 - share)).round()
    found = as_uint16(decode_picture(deep_png(array), "x", model))
    assert np.array_equal(found, expected)
    assert np.array_equal(as_uint16(decode_picture(deep_png(array), "x", of(channels))), array)


def test_a_transparent_colour_of_sixteen_bits_is_laid_over_too():
    array = noise(4, 5, 3, dtype=np.uint16)
    data = deep_png(array, array[1, 2].astype(">u2").tobytes())
    found = as_uint16(decode_picture(data, "x", of(3)))
    assert found[1, 2].tolist() == [65535] * 3
    array[1, 2] = 65535
    assert np.array_equal(found, array)
    grey = noise(4, 5, dtype=np.uint16)
    found = decode_picture(
        deep_png(grey, b"\0\0" + grey[2:3, 1].astype(">u2").tobytes()), "x", of(1)
    )
    assert found[0, 2, 1] != 1.0  # the colour key is the first two bytes, which no pixel has
    found = decode_picture(deep_png(grey, grey[2:3, 1].astype(">u2").tobytes()), "x", of(1))
    assert found[0, 2, 1] == 1.0


def test_transparency_is_laid_over_the_background():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert torch.equal(decode_picture(encoded(image), "x", of(3)), torch.ones(3, 4, 4))
    for colour, numbers in (("black", (0, 0, 0)), ("grey", (128,) * 3), ("1,20,255", (1, 20, 255))):
        picture = decode_picture(encoded(image), "x", of(3, background=colour))
        assert tuple(to_pixels(picture[None])[0, :, 0, 0].tolist()) == numbers
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 255] + [0, 0, 0] * 255)
    transparent = decode_picture(encoded(palette, transparency=0), "x", of(3))
    assert torch.equal(transparent, torch.ones(3, 4, 4))
    grey = encoded(Image.new("LA", (4, 4), (7, 0)))
    assert to_pixels(decode_picture(grey, "x", of(3, background="9,0,0"))[None])[
        0, :, 0, 0
    ].tolist() == [9, 0, 0]
    pixels = noise(6, 7, 4)
    share = pixels[:, :, 3:] / 255
    expected = (pixels[:, :, :3] * share + np.array([10, 20, 200]) * (1 - share)).round()
    found = decode_picture(encoded(Image.fromarray(pixels)), "x", of(3, background="10,20,200"))
    assert np.array_equal(to_pixels(found[None])[0].movedim(0, 2), expected)


@pytest.mark.parametrize("colour", ["", "red", "1,2", "1,2,256", "-1,2,3", "1,2,3,4", "1, 2,x"])
def test_what_is_no_colour_is_refused(colour):
    with pytest.raises(ValueError, match="is no colour"):
        of(3, background=colour)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_white_is_white_in_every_mode(mode):
    image = Image.new("RGB", (4, 4), "white").convert(mode)
    for channels in (1, 3):
        assert torch.allclose(decode_picture(encoded(image), "x", of(channels)), torch.ones(1))


def test_cmyk_and_exif_orientation():
    assert decode_picture(encoded(Image.new("CMYK", (4, 4)), "JPEG"), "x", of(3)).min() > 0.99
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    rotated = encoded(Image.new("RGB", (6, 4)), "JPEG", exif=exif)
    assert decode_picture(rotated, "x", of(3)).shape == (3, 6, 4)


@pytest.mark.parametrize("kind", ["CMYK", "YCCK"])
def test_adobe_inks_are_not_inverted(kind):
    image = Image.new("CMYK", (16, 16), (0, 200, 0, 0))
    data = encoded(image, "JPEG", quality=100)  # by Pillow inverted, with Adobe's mark
    marker = data.index(b"Adobe")
    if kind == "YCCK":  # the same numbers as luma and chroma
        data = data[: marker + 11] + b"\2" + data[marker + 12 :]
    colour = to_pixels(decode_picture(data, "x", of(3))[None])[0, :, 8, 8].tolist()
    expected = [255, 55, 255]
    if kind == "YCCK":
        with Image.open(io.BytesIO(data)) as image:
            expected = image.convert("RGB").getpixel((8, 8))
        assert isinstance(expected, tuple)
        assert list(expected) != [255, 55, 255]
    assert np.abs(np.array(colour) - expected).max() <= 3


def test_profiles_and_gamma_change_no_number():
    pixels = Image.fromarray(noise(5, 6, 3))
    plain = encoded(pixels)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    gamma = plain[:33] + chunk(b"gAMA", struct.pack(">I", 100000)) + plain[33:]
    expected = decode_picture(plain, "x", of(3))
    for data in (encoded(pixels, icc_profile=profile), gamma):
        assert len(data) > len(plain)
        assert torch.equal(decode_picture(data, "x", of(3)), expected)


def test_the_first_frame_is_taken():
    for kind in ("GIF", "WEBP", "PNG", "MPO", "TIFF"):
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert decode_picture(data, "x", of(3))[2].max() < -0.9, kind


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "deep TIFF", "deep PNG"])
def test_every_orientation_is_shown_upright(orientation, kind):
    array = np.kron(np.array([[0, 90], [160, 255], [30, 200]]), np.ones((8, 8))).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain = Image.fromarray(array).convert("RGB")
    if kind == "deep TIFF":
        buffer, tag = io.BytesIO(), (0x0112, 3, 1, orientation, True)
        deep = np.asarray(plain).astype(np.uint16) * 257
        tifffile.imwrite(buffer, deep, photometric="rgb", extratags=[tag])
        data = buffer.getvalue()
    elif kind == "deep PNG":
        data = deep_png(np.asarray(plain).astype(np.uint16) * 257)
        data = data[:33] + chunk(b"eXIf", exif.tobytes()[6:]) + data[33:]
    else:
        data = encoded(plain, kind, exif=exif)
    reference = encoded(plain, "PNG", exif=exif)
    with Image.open(io.BytesIO(reference)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    found = to_pixels(decode_picture(data, "x", of(3))[None])[0].movedim(0, 2).numpy()
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= (6 if kind == "JPEG" else 0)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(("size", "scale"), [(20, 8), (32, 4), (33, 4), (64, 2), (65, 2), (128, 1)])
def test_dct_scaling_is_nearly_decoding_and_resizing(mode, orientation, size, scale):
    coarse = Image.fromarray(noise(3, 4, 3)).resize((240, 161), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(coarse.convert(mode), "JPEG", quality=95, exif=exif)
    model = of(1 if mode == "L" else 3, size=size, dct_scaling=True)
    scaled = decode_picture(data, "x", model)
    sides = (161 // scale, 240 // scale)  # the last line is less than half one
    assert scaled.shape[1:] == (sides if orientation == 1 else sides[::-1])
    assert min(scaled.shape[1:]) >= size
    whole = decode_picture(data, "x", of(model.channels, size=size))
    error = (preprocess(scaled, model, None) - preprocess(whole, model, None)).square().mean()
    assert error <= 4 / 10**3.2  # PSNR of 32 dB; photographs reach more


def test_dct_scaling_is_not_for_pictures_that_are_not_resized():
    data = encoded(Image.fromarray(noise(64, 64, 3)), "JPEG")
    assert decode_picture(data, "x", of(3, size=8, dct_scaling=True)).shape == (3, 8, 8)
    png = encoded(Image.fromarray(noise(64, 64, 3)))
    assert decode_picture(png, "x", of(3, size=8, dct_scaling=True)).shape == (3, 64, 64)


def test_a_masked_picture_keeps_its_size(tmp_path):
    Image.fromarray(noise(64, 64, 3)).save(tmp_path / "a.jpg")
    Image.new("L", (64, 64), 255).save(tmp_path / "a.mask.png")
    item = open_source(SourceConfig(data=str(tmp_path))).items[0]
    assert read_picture(item, of(3, size=8, dct_scaling=True)).shape == (3, 64, 64)


def test_bad_files_are_named():
    whole = encoded(Image.fromarray(noise(32, 32, 3)))
    for data, words in (
        (b"text", "not a picture"),
        (b"", "not a picture"),
        (whole[:-100], "damaged"),
    ):
        with pytest.raises(DataError, match=f"bad.png.*{words}"):
            decode_picture(data, "bad.png", of(3))
    with pytest.raises(DataError, match=r"--preprocessing.range LO,HI"):
        decode_picture(encoded(Image.new("F", (4, 4)), "TIFF"), "x.tif", of(1))


def test_a_bomb_is_refused_from_its_header():
    whole = bytearray(encoded(Image.new("L", (8, 8))))
    whole[16:24] = struct.pack(">II", 50_000, 50_000)
    whole[29:33] = struct.pack(">I", zlib.crc32(bytes(whole[12:29])))
    with pytest.raises(
        DataError, match=r"bomb.png has 2,500,000,000 pixels; at most 100,000,000 are read"
    ):
        decode_picture(bytes(whole), "bomb.png", of(1))


def test_resize_keeps_a_picture_of_the_right_size_untouched():
    picture = decode_picture(encoded(Image.fromarray(noise(8, 8, 3))), "x", of(3))
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
