"""Cut and damaged picture files: refused with a sentence, never a crash and never half a picture."""

import io
import random
import warnings

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from ldmkit.data.look import look_at
from ldmkit.data.pictures import decode_picture
from ldmkit.errors import DataError
from test_pictures import deep_png, encoded, noise, of

SMALL = Image.fromarray(noise(24, 24, 3)).resize((40, 32), Image.Resampling.BICUBIC)
FILES = {
    "png": encoded(SMALL),
    "palette": encoded(SMALL.quantize(16), transparency=1),
    "deep": deep_png(noise(5, 6, 3, dtype=np.uint16)),
    "jpeg": encoded(SMALL, "JPEG"),
    "progressive": encoded(SMALL, "JPEG", progressive=True),
    "tiff": encoded(SMALL, "TIFF", compression="tiff_deflate"),
    "raw tiff": encoded(SMALL, "TIFF"),
    "gif": encoded(SMALL, "GIF"),
    "webp": encoded(SMALL, "WEBP"),
    "apng": encoded(SMALL, "PNG", save_all=True, append_images=[SMALL.rotate(180)]),
    "bmp": encoded(SMALL, "BMP"),
    "ppm": encoded(SMALL, "PPM"),
}


@pytest.mark.parametrize("kind", ["png", "jpeg", "progressive", "deep", "tiff", "raw tiff", "webp"])
def test_a_cut_file_is_refused_wherever_it_is_cut(kind):
    whole = FILES[kind]
    expected = decode_picture(whole, "x", of(3))
    lost = 0
    for length in {*range(0, len(whole), 7), *range(len(whole) - 40, len(whole))}:
        try:
            picture = decode_picture(whole[:length], "x", of(3))
        except DataError:
            lost += 1
        else:  # what is gone held no pixels
            assert torch.equal(picture, expected), length
            assert length > len(whole) * 0.9
    assert lost > len(whole) / 8


def _npy():
    buffer = io.BytesIO()
    np.save(buffer, noise(8, 9, 3))
    return buffer.getvalue()


def test_damage_of_any_kind_is_a_data_error_and_looking_agrees():
    draw = random.Random(0)
    files = [*FILES.values(), _npy(), _deep_tiff()]
    refused = 0
    for number in range(2000):
        data = bytearray(files[number % len(files)])
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(min(len(data), draw.choice((64, 400, 10**6))))] = draw.randrange(
                256
            )
        if draw.random() < 0.3:
            del data[draw.randrange(len(data)) :]
        whole = bytes(data)
        model = of(draw.choice((1, 3, 4)), (0.0, 255.0), dct_scaling=True, size=8)
        looked = sentence_of(lambda whole=whole: look_at(whole, "x"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            decoded = sentence_of(
                lambda whole=whole, model=model: decode_picture(whole, "x", model)
            )
        refused += decoded is not None
        assert looked is None or decoded is not None, looked
    assert 500 < refused < 2000


def sentence_of(call):
    """What a call is refused with."""
    try:
        call()
    except DataError as error:
        return str(error)
    return None


def _deep_tiff():
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, noise(8, 9, 3, dtype=np.uint16), photometric="rgb", compression="zlib")
    return buffer.getvalue()
