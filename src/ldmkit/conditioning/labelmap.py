"""Label maps: the class of each pixel, brought to the latents' size and concatenated.

The paper's semantic synthesis (Rombach et al. 2022, Sec. 4.3.2): one channel for each class, bilinear
halvings, then a learnt 1x1 convolution to a few channels. A bilinear halving is the mean of two by two
pixels, so n of them give the share of each class in a square of 2^n pixels. Counting gives those
shares exactly, without a channel for each class at the pictures' size.
"""

from collections.abc import Collection, Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ldmkit.condition_configs import LabelMapCondition, LabelMapOptions
from ldmkit.conditioning.condition import Condition
from ldmkit.conditioning.kind import Kind, Reader, Sides, Widths
from ldmkit.conditioning.picture_files import read_classes
from ldmkit.data.labelmaps import ids_of_colours
from ldmkit.data.latent_set import LatentSet
from ldmkit.errors import DataError
from ldmkit.label_names import UNLABELLED, Colour, class_names_of

Maps = Int[Tensor, "batch height width"]
AT_ONCE = 64
"""Maps that are looked at together."""


class LabelMapConditioner(nn.Module):
    """Class shares around each latent, as a few learnt channels.

    Args:
        classes: number of classes; the further id `classes` is "unknown", which has no channel.
        channels: learnt channels that are concatenated.
        stages: halvings between the map and the latents, log2 of the autoencoder's factor.
    """

    def __init__(self, classes: int, channels: int, stages: int) -> None:
        super().__init__()
        self.classes, self.channels, self.stages = classes, channels, stages
        self.mapper = nn.Conv2d(classes, channels, 1, bias=False)

    def empty(self, values: Maps) -> Maps:
        """Maps in which every pixel is unknown."""
        return torch.full_like(values, self.classes)

    def forward(self, values: Maps) -> Condition:
        """Channels `[batch, channels, h, w]`.

        Args:
            values: `[batch, H, W]` class ids at the pictures' size, `classes` = unknown; H and W
                multiples of 2^stages.
        """
        shares = class_shares(values.to(self.mapper.weight.device), self.classes, self.stages)
        return Condition(channels=self.mapper(shares))


def class_shares(
    values: Maps, classes: int, stages: int
) -> Float[Tensor, "batch classes height_of_latents width_of_latents"]:
    """The share of each class in each square of 2^stages x 2^stages pixels; unknown counts for none.

    Raises:
        ValueError: the sides are no multiples of 2^stages.
    """
    square = 2**stages
    count, height, width = values.shape
    if height % square or width % square:
        raise ValueError(
            f"label maps of {width} x {height} pixels cannot be halved {stages} times: give sides that "
            f"are multiples of {square}"
        )
    shape = (count, classes + 1, height // square * (width // square))
    squares = values.long().view(count, height // square, square, width // square, square)
    rows = squares.permute(0, 2, 4, 1, 3).reshape(count, square * square, -1)
    # classes x places; each of a square's pixels adds one to the count of its class
    counts = torch.zeros(shape, device=values.device)
    counts.scatter_add_(1, rows, torch.ones((), device=values.device).expand(rows.shape))
    shares = counts[:, :classes] / (square * square)
    return shares.view(count, classes, height // square, width // square)


def parse_labelmap(
    raw: np.ndarray,
    classes: int,
    size: tuple[int, int],
    *,
    colours: Mapping[Colour, int] | None = None,
    ignore: Collection[int] = (UNLABELLED,),
) -> Int[Tensor, "height width"]:
    """One label map as a row of the conditioner's values.

    Args:
        raw: `[h, w]` class ids, or `[h, w, 3]` 8-bit colours where there is a table of them.
        classes: number of classes.
        size: height and width of its picture, pixels.
        colours: class id of each colour (red, green, blue); None for a map of ids.
        ignore: ids that mean "unknown".

    Raises:
        ValueError: it has another size, is no map of ids (of colours, with a table), or has an id or
            a colour that there is no class for, or the table is empty.
    """
    if colours is None and (raw.ndim != 2 or raw.dtype.kind not in "iu"):
        raise ValueError(
            f"a label map holds whole numbers [h, w], and this one {raw.dtype} {list(raw.shape)}: give "
            "class ids, or a table of colours"
        )
    if colours is not None and (raw.ndim != 3 or raw.shape[2] != 3 or raw.dtype != np.uint8):
        raise ValueError(
            f"a table of colours is for 8-bit RGB label maps [h, w, 3], and this one has {raw.dtype} "
            f"{list(raw.shape)}: give such a map, or no table"
        )
    if colours is not None and not colours:
        raise ValueError("the table of colours is empty: give the class of each colour")
    if raw.shape[:2] != tuple(size):
        raise ValueError(
            f"the label map has {raw.shape[1]} x {raw.shape[0]} pixels and its picture "
            f"{size[1]} x {size[0]}: give one of the same size"
        )
    ids = raw.astype(np.int64) if colours is None else ids_of_colours(raw, colours)
    unknown = np.isin(ids, list(ignore))
    wrong = ((ids < 0) | (ids >= classes)) & ~unknown
    if wrong.any():
        y, x = np.argwhere(wrong)[0]
        also = "".join(f", {number} = unknown" for number in sorted(ignore))
        raise ValueError(
            f"the label map has the class {ids[y, x]} at x = {x}, y = {y}: classes are 0 to "
            f"{classes - 1}{also}"
        )
    return torch.from_numpy(np.where(unknown, classes, ids))


def _settle(options: LabelMapOptions, latents: LatentSet) -> LabelMapCondition:
    if "labelmap" not in latents.manifest.columns:
        raise DataError(f"--condition labelmap: {latents.directory} has no label maps")
    colours = latents.manifest.labelmap_colours
    classes = options.classes or len(class_names_of(colours)) or _count_classes(latents)
    maps = latents.rows("labelmap", [0])
    stages = (maps.shape[1] // latents.read([0]).mean.shape[2]).bit_length() - 1
    return LabelMapCondition(mapped=options.mapped, classes=classes, stages=stages, colours=colours)


def _count_classes(latents: LatentSet) -> int:
    """The largest id in the set and one."""
    largest = -1
    for indices in latents.shapes.values():
        for first in range(0, len(indices), AT_ONCE):
            ids = latents.rows("labelmap", indices[first : first + AT_ONCE])
            known = ids[ids != UNLABELLED]
            largest = max(largest, int(known.max())) if len(known) else largest
    if largest < 0:
        raise DataError(f"{latents.directory} has label maps of unknown pixels alone")
    return largest + 1


def _build(config: LabelMapCondition, widths: Widths) -> LabelMapConditioner:
    del widths
    return LabelMapConditioner(config.classes, config.mapped, config.stages)


def _reader(config: LabelMapCondition, options: LabelMapOptions, latents: LatentSet) -> Reader:
    if "labelmap" not in latents.manifest.columns:
        raise DataError(f"{latents.directory} has no label maps")

    def read(indices: np.ndarray, generator: torch.Generator) -> Tensor:
        del generator
        maps = latents.rows("labelmap", indices).long()
        unknown = (maps >= config.classes) & (maps != UNLABELLED)
        if unknown.any():
            raise DataError(
                f"a label map of {latents.directory} has id {int(maps[unknown][0])}, and the model knows "
                f"{config.classes} classes (from 0): give --labelmap.classes"
            )
        return torch.where(maps == UNLABELLED, config.classes, maps)

    return read


def _row(config: LabelMapCondition, value: object) -> Tensor:
    classes = read_classes(value, config.colours).numpy()
    return parse_labelmap(classes, config.classes, classes.shape)


def _sides(config: LabelMapCondition, latents: Sides) -> Sides:
    return latents[0] << config.stages, latents[1] << config.stages


LABELMAP = Kind(settle=_settle, build=_build, reader=_reader, row=_row, sides=_sides)
