"""Pictures that a user names as conditions, read from their files."""

from pathlib import Path

from jaxtyping import Float, UInt8
from torch import Tensor

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.items import Span
from ldmkit.data.labelmaps import read_labelmap
from ldmkit.data.pictures import decode_picture


def read_values(path: object, channels: int) -> Float[Tensor, "channels _height _width"]:
    """The picture in a file, its range to [-1, 1].

    Raises:
        DataError: it cannot be read, or has other channels.
    """
    span = _span(path)
    return decode_picture(span.read(), span.file, PreprocessingConfig(channels=channels))


def read_classes(path: object) -> UInt8[Tensor, "height width"]:
    """The label map in a file: a class for each pixel.

    Raises:
        DataError: it cannot be read, or holds no classes.
    """
    return read_labelmap(_span(path), None)


def _span(path: object) -> Span:
    """The whole file.

    Raises:
        ValueError: it is not there.
    """
    file = Path(str(path))
    if not file.is_file():
        raise ValueError(f"{file} is not there: name a picture file")
    return Span(str(file), 0, file.stat().st_size)
