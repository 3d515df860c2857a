"""Label maps: pictures whose values are the classes of the pixels."""

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from ldmkit.data.arrays import NPY_MAGIC, decode_npy
from ldmkit.data.items import Blob
from ldmkit.data.opening import open_picture
from ldmkit.errors import DataError
from ldmkit.label_names import ClassColour, Colour

LARGEST_CLASS = 255
INDEX_MODES = ("1", "L", "P", "I;16", "I;16B", "I")
OPAQUE = 255


class ColourMap(NamedTuple):
    """A label map that is an RGB picture, or may be: it reads as class ids.

    What holds ids itself, a grey or palette picture or an array, stays as it is.
    """

    picture: Blob
    colours: tuple[ClassColour, ...]

    @property
    def name(self) -> str:
        """That of the picture."""
        return self.picture.name

    @property
    def size(self) -> int:
        """That of the picture."""
        return self.picture.size

    def read(self) -> bytes:
        """A picture of class ids, or an `.npy` of them.

        Raises:
            DataError: it cannot be read, or has a colour that is not in the table.
        """
        data = self.picture.read()
        if data.startswith(NPY_MAGIC):
            return data
        with open_picture(data, f"the label map {self.name}") as image:
            if image.mode not in ("RGB", "RGBA"):
                return data
            raw = np.asarray(image)
        if raw.shape[2] == 4 and (raw[..., 3] != OPAQUE).any():
            raise DataError(f"the label map {self.name} is transparent in places: save it as RGB")
        try:
            ids = ids_of_colours(raw[..., :3], {one.colour: one.id for one in self.colours})
        except ValueError as error:
            raise DataError(f"{self.name}: {error}") from error
        stream = io.BytesIO()
        np.save(stream, ids.astype(np.uint8))
        return stream.getvalue()


def ids_of_colours(
    raw: UInt8[np.ndarray, "height width 3"], colours: Mapping[Colour, int]
) -> Int[np.ndarray, "height width"]:
    """Class ids of the pixels of a label map by their colours.

    Raises:
        ValueError: a colour is not in the table; the message names it and its first pixel.
    """
    codes = raw.astype(np.int64) @ np.array([65536, 256, 1])
    known = np.array([(red << 16) + (green << 8) + blue for red, green, blue in colours])
    order = np.argsort(known)
    places = np.searchsorted(known[order], codes).clip(max=len(known) - 1)
    missing = known[order][places] != codes
    if missing.any():
        y, x = np.argwhere(missing)[0]
        raise ValueError(
            f"the label map has the colour {tuple(raw[y, x].tolist())} at x = {x}, y = {y}, which is "
            "not in the table: add it with its class"
        )
    return np.array(list(colours.values()), dtype=np.int64)[order][places]


def read_labelmap(blob: Blob, shape: Sequence[int] | None) -> UInt8[Tensor, "height width"]:
    """Class indices of the pixels: of a palette picture its indices, of others their values.

    Args:
        blob: a grey or palette picture, or a `.npy` of whole numbers.
        shape: height and width of the picture it belongs to; None for any.

    Raises:
        DataError: it holds no indices from 0 to 255, or has another size than its picture.
    """
    name = f"the label map {blob.name}"
    data = blob.read()
    if data.startswith(NPY_MAGIC):
        values = decode_npy(data, name, 1)
    else:
        with open_picture(data, name) as image:
            if image.mode not in INDEX_MODES:
                raise DataError(
                    f"{name} has pixels of mode {image.mode}; a label map is a grey or palette picture "
                    "whose values are classes, or an RGB picture with a table of colours "
                    "(--labelmap-colours)"
                )
            values = np.asarray(image).astype(np.int64)
    if values.dtype.kind not in "iu" or values.ndim != 2:
        raise DataError(
            f"{name} holds {values.dtype} {list(values.shape)}; whole numbers [h, w] are needed"
        )
    if shape is not None and values.shape != tuple(shape):
        raise DataError(
            f"{name} has {values.shape[1]} x {values.shape[0]} pixels and its picture "
            f"{shape[1]} x {shape[0]}"
        )
    if values.min(initial=0) < 0 or values.max(initial=0) > LARGEST_CLASS:
        raise DataError(
            f"{name} has classes from {values.min()} to {values.max()}; 0 to {LARGEST_CLASS} are read"
        )
    return torch.from_numpy(values.astype(np.uint8))
