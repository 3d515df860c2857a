"""Pictures that a user names as conditions, read from their files."""

from pathlib import Path

from jaxtyping import Float, UInt8
from torch import Tensor

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.items import Span
from ldmkit.data.labelmaps import ColourMap, read_labelmap
from ldmkit.data.pictures import decode_picture
from ldmkit.label_names import ClassColour


def read_values(path: object, channels: int) -> Float[Tensor, "channels _height _width"]:
    """The picture in a file, its range to [-1, 1].

    Raises:
        DataError: it cannot be read, or has other channels.
    """
    span = _span(path)
    return decode_picture(span.read(), span.file, PreprocessingConfig(channels=channels))


def read_classes(
    path: object, colours: tuple[ClassColour, ...] = ()
) -> UInt8[Tensor, "height width"]:
    """The label map in a file: a class for each pixel.

    Args:
        path: of the file.
        colours: what they mean, where it is an RGB picture.

    Raises:
        DataError: it cannot be read, or holds no classes.
    """
    span = _span(path)
    return read_labelmap(ColourMap(span, colours) if colours else span, None)


def _span(path: object) -> Span:
    """The whole file.

    Raises:
        ValueError: it is not there.
    """
    file = Path(str(path))
    if not file.is_file():
        raise ValueError(f"{file} is not there: name a picture file")
    return Span(str(file), 0, file.stat().st_size)
