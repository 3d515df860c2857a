import io
import sys

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data import arrays
from ldmkit.data.images import depth_of, say_what_is_clipped
from ldmkit.data.pictures import decode_picture
from ldmkit.data.preprocessing import preprocess
from ldmkit.data.sources import open_source
from ldmkit.data_configs import SourceConfig
from ldmkit.errors import DataError
from test_pictures import of
from test_tars import write_tar


def npy(array, **settings):
    buffer = io.BytesIO()
    np.save(buffer, array, **settings)
    return buffer.getvalue()


def tiff(array, **settings):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **settings)
    return buffer.getvalue()


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def integers(*shape, dtype="uint16"):
    limits = np.iinfo(dtype)
    return np.random.default_rng(0).integers(
        limits.min, limits.max, shape, dtype=dtype, endpoint=True
    )


EVERY_UINT16 = np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize("write", [npy, tiff, png])
@pytest.mark.parametrize("value_range", [None, (0.0, 65535.0), (-1000.5, 70000.0)])
def test_every_16_bit_number_survives(write, value_range):
    picture = decode_picture(write(EVERY_UINT16), "x", of(1, value_range))
    low, high = value_range or (0, 65535)
    back = (picture[0].double() + 1) / 2 * (high - low) + low
    assert picture.dtype == torch.float32
    assert np.array_equal(back.round().numpy(), EVERY_UINT16)
    assert (back - back.round()).abs().max() < 0.01


def test_16_bit_pgm_is_exact():
    data = b"P5 256 256 65535\n" + EVERY_UINT16.astype(">u2").tobytes()
    picture = decode_picture(data, "x", of(1))
    assert np.array_equal(((picture[0].double() + 1) * 32767.5).round().numpy(), EVERY_UINT16)


def test_a_symmetric_range_keeps_floats_bit_for_bit():
    values = np.random.default_rng(0).normal(size=(8, 9)).astype(np.float32) * 1e-12
    assert np.array_equal(decode_picture(npy(values), "x", of(1, (-1.0, 1.0)))[0].numpy(), values)


def test_the_range_gives_minus_one_and_one():
    hounsfield = np.array([[-1000, -160], [40, 240]], dtype=np.int16)
    expected = torch.tensor([[-5.2, -1.0], [0.0, 1.0]])
    for data in (npy(hounsfield), tiff(hounsfield), npy(hounsfield.astype(">f8"))):
        picture = decode_picture(data, "x", of(1, (-160.0, 240.0)))
        assert torch.allclose(picture[0], expected)
    config = PreprocessingConfig(size=2, channels=1, range=(-160, 240))
    assert torch.allclose(preprocess(picture, config, None)[0], expected.clamp(-1, 1))


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint32", "float16", "float32"])
@pytest.mark.parametrize("write", [npy, tiff])
def test_other_numbers_need_a_range(dtype, write):
    data = write(np.full((4, 5), 7, dtype=dtype))
    with pytest.raises(DataError, match=r"x.num has \w+ values.*--preprocessing.range LO,HI"):
        decode_picture(data, "x.num", of(1))
    assert torch.equal(decode_picture(data, "x", of(1, (3.0, 11.0))), torch.zeros(1, 4, 5))


def test_a_large_uint32_does_not_turn_negative():
    values = np.array([[0, 2**32 - 1]], dtype=np.uint32)
    for write in (npy, tiff):
        picture = decode_picture(write(values), "x", of(1, (0.0, 2.0**32 - 1)))
        assert picture.flatten().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("channels", [2, 4, 5])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_channels_first_last_planes_and_pages_are_the_same_picture(channels, dtype):
    array = integers(6, 7, channels, dtype=dtype)
    first = np.moveaxis(array, 2, 0)
    grey = {"photometric": "minisblack"}
    files = [
        npy(array),
        npy(first),
        npy(np.asfortranarray(first)),
        tiff(array, planarconfig="contig", **grey),
        tiff(first, planarconfig="separate", **grey),
        tiff(first, **grey),
        tiff(array, planarconfig="contig", compression="zlib", **grey),
    ]
    half = np.iinfo(dtype).max / 2
    expected = torch.from_numpy(first.astype(np.float32)) / half - 1
    for data in files:
        assert torch.equal(decode_picture(data, "x", of(channels)), expected)


def test_16_bit_rgb_tiff_keeps_its_bits():
    array = integers(6, 7, 3)
    picture = decode_picture(tiff(array, photometric="rgb"), "x", of(3))
    assert np.array_equal(((picture.movedim(0, 2).double() + 1) * 32767.5).round(), array)


@pytest.mark.parametrize(("mode", "channels"), [("LA", 2), ("RGBA", 4), ("CMYK", 4)])
def test_channels_are_as_the_file_has_them(mode, channels):
    pixels = integers(5, 6, channels, dtype="uint8")
    buffer = io.BytesIO()
    Image.frombuffer(mode, (6, 5), pixels.tobytes()).save(buffer, "TIFF")
    picture = decode_picture(buffer.getvalue(), "x", of(channels))
    assert np.array_equal(((picture.movedim(0, 2) + 1) * 127.5).round().numpy(), pixels)


@pytest.mark.parametrize(
    ("array", "channels", "words"),
    [
        (np.zeros((4, 5, 4), np.uint8), 4, "both outer axes"),
        (np.zeros((5, 6, 2), np.uint8), 4, r"none of \[h, w\]"),
        (np.zeros((1, 2, 3, 4), np.uint8), 4, r"shape \[1, 2, 3, 4\]"),
        (np.zeros(4, np.uint8), 1, "none of"),
        (np.zeros((5, 6), np.float32), 3, "of 1 channel.*--preprocessing.channels 1"),
        (np.zeros((5, 6), np.uint8), 2, "of 1 channel"),
        (np.zeros((0, 6), np.uint8), 1, "no pixels"),
        (np.zeros((5, 6), np.complex64), 1, "complex64"),
        (np.zeros((5, 6), bool), 1, "bool"),
    ],
)
def test_shapes_and_types_that_do_not_fit_are_sentences(array, channels, words):
    with pytest.raises(DataError, match=f"x.npy.*{words}"):
        decode_picture(npy(array), "x.npy", of(channels))


def test_a_picture_of_other_channels_is_refused():
    rgb = png(integers(5, 6, 3, dtype="uint8"))
    with pytest.raises(DataError, match=r"of 3 channel\(s\) and the model takes 4"):
        decode_picture(rgb, "x.png", of(4))
    with pytest.raises(DataError, match="the model takes 1"):  # colour of 16 bits has no luma here
        decode_picture(tiff(integers(5, 6, 3), photometric="rgb"), "x.tif", of(1))


def test_nothing_is_unpickled_and_no_header_is_believed(monkeypatch):
    with pytest.raises(DataError, match="Python objects"):
        decode_picture(npy(np.array([[{}]]), allow_pickle=True), "x.npy", of(1))
    whole = npy(np.zeros((8, 9), np.uint16))
    for length in (3, 8, 40, len(whole) - 1):
        with pytest.raises(DataError, match=r"x.npy is (a damaged NumPy file|not a picture)"):
            decode_picture(whole[:length], "x.npy", of(1))
    bomb = whole.replace(b"(8, 9)", b"(9999999, 99999)"[:16]).replace(b" " * 10, b"", 1)
    with pytest.raises(DataError, match="9999999 x 99999 pixels"):
        decode_picture(bomb, "x.npy", of(1))
    monkeypatch.setattr(arrays, "MAX_PIXELS", 71)
    for data in (whole, tiff(np.zeros((8, 9), np.float64)), tiff(np.zeros((8, 9), np.float32))):
        with pytest.raises(DataError, match=r"(8 x 9|9 x 8) pixels; at most 71"):
            decode_picture(data, "x", of(1, (0.0, 1.0)))


def test_damaged_tiffs_are_sentences():
    for settings in ({"photometric": "rgb"}, {"photometric": "rgb", "compression": "zlib"}):
        whole = tiff(integers(16, 16, 3), **settings)
        for length in range(9, len(whole), 61):
            with pytest.raises(DataError, match=r"x\.tif.*(damaged|TIFF)"):
                decode_picture(whole[:length], "x.tif", of(3))


def test_without_tifffile_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    assert decode_picture(tiff(EVERY_UINT16), "x", of(1)).shape == (1, 256, 256)  # Pillow is enough
    with pytest.raises(DataError, match=r"x.tif .*pip install 'ldmkit\[scientific\]'"):
        decode_picture(tiff(integers(4, 4, 3), photometric="rgb"), "x.tif", of(3))


def test_an_array_beside_a_picture_is_not_one(tmp_path):
    (tmp_path / "a.png").write_bytes(png(integers(4, 4, dtype="uint8")))
    np.save(tmp_path / "a.npy", np.zeros(512))  # its features
    np.save(tmp_path / "b.npy", np.zeros((4, 4)))
    assert [item.key for item in open_source(SourceConfig(data=tmp_path)).items] == [
        "a.png",
        "b.npy",
    ]
    members = [(name, (tmp_path / name).read_bytes()) for name in ("a.npy", "a.png", "b.npy")]
    write_tar(tmp_path / "0.tar", members)
    items = open_source(SourceConfig(data=tmp_path / "0.tar")).items
    assert [item.picture.read()[1:4] for item in items] == [b"PNG", b"NUM"]


def test_what_a_range_clips_is_counted(tmp_path, monkeypatch):
    for number in range(2):
        np.save(tmp_path / f"{number}.npy", np.array([[0.0, 1.0], [np.nan, 5.0]]))
    (tmp_path / "2.npy").write_bytes(b"damaged")
    said = []
    monkeypatch.setattr("ldmkit.data.images.say", said.append)
    items = open_source(SourceConfig(data=tmp_path)).items
    say_what_is_clipped(items, PreprocessingConfig(channels=1, range=(0, 1)))
    assert said == [
        "33.33% of the values in the first 3 pictures lie outside --preprocessing.range 0,1 "
        "and are clipped to it"
    ]
    say_what_is_clipped(items, PreprocessingConfig(channels=1, range=(0, 5)))
    assert len(said) == 1


@pytest.mark.parametrize(
    ("dtypes", "depth"),
    [
        (("uint8", "uint8"), "uint8"),
        (("uint8", "uint16"), "uint16"),
        (("uint16", "float64"), "float32"),
        (("int16", "int16"), "float32"),
    ],
)
def test_the_depth_is_that_of_the_widest(tmp_path, dtypes, depth):
    for number, dtype in enumerate(dtypes):
        np.save(tmp_path / f"{number}.npy", np.zeros((4, 5), dtype))
    assert (
        depth_of(open_source(SourceConfig(data=tmp_path)).items, PreprocessingConfig(channels=1))
        == depth
    )
