"""What headers say, and that it is what decoding does."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from ldmkit.data.look import conversions, look_at
from ldmkit.data.pictures import decode_picture
from ldmkit.errors import DataError
from test_pictures import chunk, deep_png, encoded, noise, of

GREY, RGB, RGBA, LA = (
    Image.fromarray(noise(*shape)) for shape in ((5, 6), (5, 6, 3), (5, 6, 4), (5, 6, 2))
)
CMYK = Image.fromarray(noise(5, 6, 4), "CMYK")
PALETTE = RGB.quantize(16)
DEEP = noise(5, 6, dtype=np.uint16)
LAB = Image.merge("LAB", [Image.fromarray(noise(5, 6)) for _ in range(3)])
OVER, AS_RGB, AS_GREY = (
    "transparency laid over white",
    "grey shown as RGB",
    "colour turned into grey (BT.601 luma)",
)
FIRST, UPRIGHT = "first of several frames taken", "turned upright by EXIF"
FROM_PALETTE = "palette turned into RGB"


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def tiff(array, **settings):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **settings)
    return buffer.getvalue()


def turned(image, kind="JPEG", orientation=6):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif)


def with_late_exif(orientation):
    """A PNG whose EXIF block follows its pixels."""
    whole = encoded(RGB)
    exif = b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0)
    return whole[:-12] + chunk(b"eXIf", exif) + whole[-12:]


def stored(image):
    return np.asarray(image)


KINDS = [
    # name, file, numbers as stored (None = not known), channels -> what decoding changes
    ("grey.png", encoded(GREY), stored(GREY), {1: (), 3: (AS_RGB,)}),
    ("rgb.png", encoded(RGB), stored(RGB), {1: (AS_GREY,), 3: ()}),
    ("rgb.bmp", encoded(RGB, "BMP"), stored(RGB), {1: (AS_GREY,), 3: ()}),
    ("rgb.ppm", encoded(RGB, "PPM"), stored(RGB), {1: (AS_GREY,), 3: ()}),
    ("rgb.webp", encoded(RGB, "WEBP", lossless=True), stored(RGB), {1: (AS_GREY,), 3: ()}),
    ("rgb.tif", encoded(RGB, "TIFF"), stored(RGB), {1: (AS_GREY,), 3: ()}),
    ("la.png", encoded(LA), stored(LA), {1: (OVER,), 2: (), 3: (OVER, AS_RGB)}),
    ("rgba.png", encoded(RGBA), stored(RGBA), {1: (OVER, AS_GREY), 3: (OVER,), 4: ()}),
    ("rgba.tif", encoded(RGBA, "TIFF"), stored(RGBA), {1: (OVER, AS_GREY), 3: (OVER,), 4: ()}),
    (
        "cmyk.tif",
        encoded(CMYK, "TIFF"),
        stored(CMYK),
        {1: ("CMYK turned into RGB", AS_GREY), 3: ("CMYK turned into RGB",), 4: ()},
    ),
    ("cmyk.jpg", encoded(CMYK, "JPEG"), None, {3: ("CMYK turned into RGB",), 4: ()}),
    ("lab.tif", encoded(LAB, "TIFF"), stored(LAB), {3: ("LAB turned into RGB",)}),
    (
        "palette.png",
        encoded(PALETTE),
        stored(PALETTE),
        {1: (FROM_PALETTE, AS_GREY), 3: (FROM_PALETTE,)},
    ),
    (
        "transparent.png",
        encoded(PALETTE, transparency=3),
        stored(PALETTE),
        {3: (FROM_PALETTE, OVER), 4: (FROM_PALETTE,)},
    ),
    ("colour-key.png", encoded(RGB, transparency=RGB.getpixel((1, 2))), stored(RGB), {3: (OVER,)}),
    (
        "bits.png",
        encoded(GREY.convert("1")),
        stored(GREY.convert("1")),
        {1: ("1 bit widened to 8",), 3: ("1 bit widened to 8", AS_RGB)},
    ),
    ("deep.png", encoded(Image.fromarray(DEEP)), DEEP, {1: ()}),
    ("deep.pgm", encoded(Image.fromarray(DEEP), "PPM"), DEEP, {1: ()}),
    ("deep.tif", tiff(DEEP), DEEP, {1: ()}),
    ("deep-rgb.png", deep_png(noise(5, 6, 3, dtype=np.uint16)), None, {3: ()}),
    ("deep-la.png", deep_png(noise(5, 6, 2, dtype=np.uint16)), None, {1: (OVER,), 2: ()}),
    ("deep-rgba.png", deep_png(noise(5, 6, 4, dtype=np.uint16)), None, {3: (OVER,), 4: ()}),
    (
        "inverted.tif",
        tiff(stored(GREY), photometric="miniswhite"),
        stored(GREY),
        {1: ("inverted, since white is stored as zero",)},
    ),
    (
        "few.pgm",
        b"P5 2 1 100\n\x32\x64",
        np.array([[50, 100]], np.uint8),
        {1: ("values stretched to the whole range",)},
    ),
    ("pages.tif", tiff(noise(4, 5, 6), photometric="minisblack"), None, {4: ()}),
    (
        "pages.tif",
        tiff(noise(2, 5, 6), photometric="minisblack"),
        noise(2, 5, 6)[0],
        {1: (FIRST,), 3: (FIRST, AS_RGB)},
    ),
    ("turned.jpg", turned(RGB), None, {3: (UPRIGHT,), 1: (UPRIGHT, AS_GREY)}),
    ("turned.png", turned(RGB, "PNG"), stored(RGB), {3: (UPRIGHT,)}),
    ("late.png", with_late_exif(6), stored(RGB), {3: (UPRIGHT,)}),
    ("upright.png", with_late_exif(1), stored(RGB), {3: ()}),
    ("turned.tif", turned(RGB, "TIFF"), stored(RGB), {3: (UPRIGHT,)}),
    (
        "turned-deep.tif",
        tiff(noise(5, 6, 3, dtype=np.uint16), photometric="rgb", extratags=[(274, 3, 1, 6, True)]),
        None,
        {3: (UPRIGHT,)},
    ),
    (
        "animated.gif",
        encoded(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(180)]),
        None,
        {3: (FIRST, FROM_PALETTE)},
    ),
    (
        "animated.webp",
        encoded(RGB, "WEBP", save_all=True, append_images=[RGB.rotate(180)], lossless=True),
        stored(RGB),
        {3: (FIRST,)},
    ),
    (
        "animated.png",
        encoded(RGB, save_all=True, append_images=[RGB.rotate(180)]),
        stored(RGB),
        {3: (FIRST,)},
    ),
    (
        "two.jpg",
        encoded(RGB, "MPO", save_all=True, append_images=[RGB.rotate(180)]),
        None,
        {3: (FIRST,)},
    ),
    (
        "really-a-jpeg.png",
        encoded(RGB, "JPEG"),
        None,
        {3: ("extension does not fit the content",)},
    ),
    ("a.tar/000001", encoded(GREY), stored(GREY), {1: ()}),
    ("grey.npy", npy(stored(GREY)), stored(GREY), {1: (), 3: (AS_RGB,)}),
    ("first.npy", npy(np.moveaxis(stored(RGB), 2, 0)), stored(RGB), {3: ()}),
    ("last.npy", npy(stored(RGB)), stored(RGB), {3: ()}),
    ("planes.tif", tiff(noise(5, 9, 7, dtype=np.uint16), photometric="minisblack"), None, {5: ()}),
]
CASES = [
    pytest.param(name, data, numbers, channels, changes, id=f"{name}-{channels}")
    for name, data, numbers, by_channels in KINDS
    for channels, changes in by_channels.items()
]


@pytest.mark.parametrize(("name", "data", "numbers", "channels", "changes"), CASES)
def test_what_is_said_is_what_happens(name, data, numbers, channels, changes):
    config = of(channels, size=1)
    look = look_at(data, name)
    assert conversions(look, name, config) == changes
    picture = decode_picture(data, name, config)
    assert picture.shape == (channels, *look.shape)
    harmless = {FIRST, "extension does not fit the content"}
    if numbers is not None:
        most = 65535 if numbers.dtype == np.uint16 else 255
        as_stored = np.moveaxis(np.atleast_3d(numbers), 2, 0) / most * 2 - 1
        same = picture.shape == as_stored.shape and np.allclose(picture, as_stored, atol=1e-6)
        assert same == (set(changes) <= harmless)


def test_a_look_tells_bits_channels_and_kinds():
    def seen(data, *names):
        look = look_at(data, "x")
        return tuple(getattr(look, name) for name in names)

    assert seen(encoded(RGB, "JPEG"), "format", "mode", "bits", "channels") == (
        "JPEG",
        "RGB",
        8,
        3,
    )
    assert seen(encoded(PALETTE, transparency=1), "channels", "alpha", "palette") == (4, True, True)
    assert seen(encoded(GREY.convert("1")), "bits", "channels", "grey") == (1, 1, True)
    assert seen(deep_png(noise(3, 4, 4, dtype=np.uint16)), "bits", "channels") == (16, 4)
    assert seen(deep_png(noise(3, 4, 2, dtype=np.uint16)), "channels", "alpha") == (2, True)
    floats = tiff(np.zeros((3, 4, 5), np.float64), planarconfig="contig", photometric="minisblack")
    assert seen(floats, "bits", "channels", "numbers", "mode") == (64, 5, "float", "")
    assert seen(npy(np.zeros((4, 9, 9), np.int16)), "bits", "channels", "numbers", "mode") == (
        16,
        4,
        "int",
        "chw",
    )
    assert seen(turned(RGB, orientation=3), "turned", "shape", "width") == (True, (5, 6), 6)
    assert seen(turned(RGB, orientation=8), "turned", "shape", "width") == (True, (6, 5), 6)
    three = [GREY.rotate(90 * turn) for turn in range(3)]
    assert seen(encoded(three[0], "GIF", save_all=True, append_images=three[1:]), "frames") == (3,)


def test_small_pictures_and_dct_scaling_are_named():
    look = look_at(encoded(RGB.resize((64, 48)), "JPEG"), "x.jpg")
    assert conversions(look, "x.jpg", of(3, size=49)) == ("smaller than the target size, enlarged",)
    assert conversions(look, "x.jpg", of(3, size=48)) == ()
    scaled = conversions(look, "x.jpg", of(3, size=24, dct_scaling=True))
    assert scaled == ("decoded at a fraction of its size (DCT scaling)",)
    assert conversions(look, "x.jpg", of(3, size=25, dct_scaling=True)) == ()


def test_a_damaged_exif_block_counts_as_none():
    whole = turned(RGB)
    place = whole.index(b"Exif\0\0")
    for damage in (b"\xff" * 8, b"MM\0*\xff\xff\xff\xff", b""):
        broken = whole[: place + 6] + damage + whole[place + 6 + len(damage) :]
        for cut in (broken, broken.replace(b"\x01\x12\0\x03", b"\x01\x12\0\x07")):
            look = look_at(cut, "x.jpg")
            assert decode_picture(cut, "x.jpg", of(3)).shape[1:] == look.shape


def bomb():
    """40 kB that declare 50,000 x 50,000 pixels."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(40_000), 0))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a picture"),
        (b"text in a file", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),  # would be run
        (encoded(RGB)[:20], "not a picture|damaged"),
        (bomb(), "2,500,000,000 pixels; at most 100,000,000 are read"),
        (npy(np.zeros((0, 5))), "no pixels"),
        (npy(np.zeros((2, 2, 2, 2))), "none of"),
        (npy(np.zeros((20, 20)))[:-9], "damaged NumPy file"),
        (npy(np.array([[{}]])), "Python objects"),
        (
            tiff(np.zeros((3, 4, 5, 6), np.float64), photometric="minisblack", volumetric=True),
            "axes",
        ),
    ],
)
def test_looking_and_decoding_refuse_with_the_same_sentence(data, words):
    start = time.perf_counter()
    with pytest.raises(DataError, match=f"x.png .*({words})") as looked:
        look_at(data, "x.png")
    assert time.perf_counter() - start < 0.5  # 50 ms where nothing else runs
    with pytest.raises(DataError) as decoded:
        decode_picture(data, "x.png", of(3, (0.0, 1.0)))
    assert str(decoded.value) == str(looked.value)


def test_looking_reads_no_pixels():
    whole = encoded(Image.fromarray(noise(1000, 1000, 3)))
    quick = min(_seconds(lambda: look_at(whole, "x.png")) for _ in range(20))
    slow = min(_seconds(lambda: decode_picture(whole, "x.png", of(3))) for _ in range(2))
    assert quick < slow / 20
    assert look_at(whole[: len(whole) // 2], "x.png").shape == (1000, 1000)


def _seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
