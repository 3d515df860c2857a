"""Label maps: pictures whose values are the classes of the pixels."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from ldmkit.data.arrays import NPY_MAGIC, decode_npy
from ldmkit.data.items import Blob
from ldmkit.data.opening import open_picture
from ldmkit.errors import DataError

LARGEST_CLASS = 255
INDEX_MODES = ("1", "L", "P", "I;16", "I;16B", "I")


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
                    "whose values are classes"
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
