"""Boxes with classes as token ids, and a transformer over them (Rombach et al. 2022, Sec. 4.3.1).

An object is three ids: its class, its top-left and its bottom-right corner (Jahn et al. 2021). A corner
is one id, its cell in a grid of floor(sqrt(vocabulary)) x floor(sqrt(vocabulary)) points, rows first.
Two more ids say which part of the full picture is seen, and an object that is not there is three
times the last id. With 30 objects that makes 92 ids.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ldmkit.condition_configs import LayoutCondition, LayoutOptions
from ldmkit.conditioning.box_lists import boxes_of_json
from ldmkit.conditioning.condition import Condition
from ldmkit.conditioning.kind import Kind, Reader, Widths
from ldmkit.conditioning.token_transformer import TokenTransformer
from ldmkit.data.items import Box
from ldmkit.data.latent_set import LatentSet
from ldmkit.errors import DataError
from ldmkit.terminal import say

IDS_OF_AN_OBJECT = 3
IDS_OF_THE_CROP = 2

Ids = Int[Tensor, " count"]
BatchIds = Int[Tensor, "batch count"]
Corners = tuple[float, float, float, float]
WHOLE: Corners = (0.0, 0.0, 1.0, 1.0)


class LayoutFormat(NamedTuple):
    """How boxes are written as ids."""

    objects: int = 30
    """How many a row has room for."""
    vocabulary: int = 8192
    """Ids that there are; the last one means none."""

    @property
    def none(self) -> int:
        """The id of what is not there."""
        return self.vocabulary - 1

    @property
    def sections(self) -> int:
        """Points of the grid along a side of the picture."""
        return math.isqrt(self.vocabulary)

    @property
    def length(self) -> int:
        """Ids in a row."""
        return self.objects * IDS_OF_AN_OBJECT + IDS_OF_THE_CROP


PAPER = LayoutFormat()


class Layout(NamedTuple):
    """Boxes as one row of ids."""

    ids: Ids
    """int64; as many as the format's `length`."""
    dropped: int
    """Boxes that there was no room for: the smallest ones."""


def corner_id(x: float, y: float, sections: int) -> int:
    """The id of a point, x and y in shares of the picture's sides (Jahn et al. 2021)."""
    return round(y * (sections - 1)) * sections + round(x * (sections - 1))


def corner_of(token: int, sections: int) -> tuple[float, float]:
    """Where a corner's id lies, x and y in shares of the picture's sides."""
    row, column = divmod(token, sections)
    return column / (sections - 1), row / (sections - 1)


def corner_waves(sections: int, width: int) -> Float[Tensor, "corners width"]:
    """Sinusoids of where the corners lie, to begin their embeddings with: near corners are alike.

    Of x in the first half of the numbers, of y in the second; from half a period across the picture to
    one that a cell takes half of. Mean square 1; zeros where the width is no multiple of 4.
    """
    place = torch.arange(sections) / (sections - 1)
    octaves = torch.linspace(0.0, math.log2(sections - 1), width // 4)
    angles = math.pi * place[:, None] * 2.0**octaves
    waves = math.sqrt(2.0) * torch.cat([angles.cos(), angles.sin()], dim=1)
    y, x = (part.flatten() for part in torch.meshgrid(*[torch.arange(sections)] * 2, indexing="ij"))
    both = torch.cat([waves[x], waves[y]], dim=1)
    return F.pad(both, (0, width - both.shape[1]))


def layout_of_boxes(
    boxes: Sequence[Box], layout: LayoutFormat = PAPER, *, crop: Corners = WHOLE
) -> Layout:
    """Boxes as ids, in their order; where there are too many, the largest stay.

    No box at all is a layout too: of an empty picture. What says nothing is `empty`.

    Args:
        boxes: in shares of the picture's sides.
        layout: the format.
        crop: x0, y0, x1, y1 of the part that is seen, in shares of the picture that the boxes are
            shares of. Those of latent sets are shares of what is seen already: the whole.

    Raises:
        ValueError: a class has no id.
    """
    for box in boxes:
        if not 0 <= box.category < layout.none:
            raise ValueError(
                f"class {box.category} has no token: a vocabulary of {layout.vocabulary} has room "
                f"for the classes 0 to {layout.none - 1}"
            )
    by_area = sorted(
        range(len(boxes)),
        key=lambda number: (_area(boxes[number]), -number),
        reverse=True,
    )
    kept = sorted(by_area[: layout.objects])
    ids: list[int] = []
    for number in kept:
        ids += [boxes[number].category, *_corner_ids(boxes[number][1:], layout)]
    ids += [layout.none] * (IDS_OF_AN_OBJECT * (layout.objects - len(kept)))
    ids += _corner_ids(crop, layout)
    return Layout(torch.tensor(ids, dtype=torch.int64), len(boxes) - len(kept))


def boxes_of_layout(ids: Ids, layout: LayoutFormat = PAPER) -> tuple[tuple[Box, ...], Corners]:
    """The boxes that ids stand for, and the part that is seen.

    Corners come back within half a cell; a box smaller than that has no area any more.

    Raises:
        ValueError: these are no ids of this format.
    """
    numbers = ids.tolist()
    cells = layout.sections**2
    if len(numbers) != layout.length:
        raise ValueError(f"{len(numbers)} ids are no layout: one has {layout.length}")
    boxes = []
    for start in range(0, len(numbers) - IDS_OF_THE_CROP, IDS_OF_AN_OBJECT):
        category, low, high = numbers[start : start + IDS_OF_AN_OBJECT]
        if category == layout.none:
            continue
        if not (0 <= category < layout.none and 0 <= low < cells and 0 <= high < cells):
            raise ValueError(f"[{category}, {low}, {high}] are not a class and two corners")
        boxes.append(Box(category, *_corners(low, high, layout)))
    low, high = numbers[-IDS_OF_THE_CROP:]
    if low == high == layout.none:
        return tuple(boxes), WHOLE
    return tuple(boxes), _corners(low, high, layout)


def shuffled_objects(
    values: BatchIds, generator: torch.Generator, layout: LayoutFormat = PAPER
) -> BatchIds:
    """The objects of each row in another order, for training; what is not there stays behind them.

    Args:
        values: ids `[b, count]`, on the CPU.
        generator: decides the order of all rows.
        layout: the format.
    """
    objects = values[:, :-IDS_OF_THE_CROP].view(len(values), layout.objects, IDS_OF_AN_OBJECT)
    keys = torch.rand(objects.shape[:2], generator=generator)
    order = torch.where(objects[..., 0] == layout.none, 2.0, keys).argsort(dim=1)
    moved = objects.gather(1, order[..., None].expand_as(objects))
    return torch.cat([moved.flatten(1), values[:, -IDS_OF_THE_CROP:]], dim=1)


def boxes_of_rows(rows: Float[Tensor, "count 5"], classes: int) -> tuple[Box, ...]:
    """Boxes as a latent set stores them (a piece of `boxes.values`): category, x0, y0, x1, y1.

    Args:
        rows: in shares of the picture that was encoded.
        classes: how many box classes the set has.

    Raises:
        ValueError: a row is no box in the picture, or of no known class.
    """
    boxes = []
    for category, *corners in rows.tolist():
        if not (category.is_integer() and 0 <= category < classes):
            raise ValueError(f"a box has class {category:g}, and there are {classes} box classes")
        x0, y0, x1, y1 = corners
        if not (0.0 <= x0 < x1 <= 1.0 and 0.0 <= y0 < y1 <= 1.0):
            raise ValueError(
                f"a box from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}) is none in shares of a picture: "
                "low corners lie below high ones, both within 0 and 1"
            )
        boxes.append(Box(int(category), x0, y0, x1, y1))
    return tuple(boxes)


class LayoutConditioner(nn.Module):
    """Ids of boxes to tokens that are attended to, by a transformer trained along.

    Values are ids `[b, count]`, int64, as `layout_of_boxes` makes them.

    Args:
        width: of the tokens.
        objects: that a row has room for.
        vocabulary: ids that there are; no square number, since the last one is no corner.
        depth: blocks of the transformer; the paper's for OpenImages has 16.
        heads: attention heads.
        head_width: of each head.

    Raises:
        ValueError: there is no such format.
    """

    def __init__(
        self,
        width: int,
        *,
        objects: int = PAPER.objects,
        vocabulary: int = PAPER.vocabulary,
        depth: int = 16,
        heads: int = 8,
        head_width: int = 64,
    ) -> None:
        super().__init__()
        self.layout = LayoutFormat(objects, vocabulary)
        if objects < 1 or self.layout.sections < 2 or self.layout.sections**2 == vocabulary:
            raise ValueError(
                f"a layout of {objects} objects and {vocabulary} ids: take one object or more, and 5 "
                "ids or more, but no square number (the last id would be a corner, and mean none)"
            )
        self.encoder = TokenTransformer(
            self.layout.vocabulary,
            self.layout.length,
            width,
            depth=depth,
            heads=heads,
            head_width=head_width,
        )
        with torch.no_grad():
            cells = self.layout.sections**2
            self.encoder.token_embedding.weight[:cells] += corner_waves(self.layout.sections, width)

    def empty(self, values: BatchIds) -> BatchIds:
        """All none, the seen part too."""
        return torch.full_like(values, self.layout.none)

    def forward(self, values: BatchIds) -> Condition:
        """Tokens `[b, count, width]`."""
        device = self.encoder.token_embedding.weight.device
        return Condition(tokens=self.encoder(values.to(device)))


def _area(box: Box) -> float:
    return (box.x1 - box.x0) * (box.y1 - box.y0)


def _corner_ids(corners: Sequence[float], layout: LayoutFormat) -> list[int]:
    x0, y0, x1, y1 = corners
    return [corner_id(x0, y0, layout.sections), corner_id(x1, y1, layout.sections)]


def _corners(low: int, high: int, layout: LayoutFormat) -> Corners:
    return (*corner_of(low, layout.sections), *corner_of(high, layout.sections))


def format_of(config: LayoutCondition) -> LayoutFormat:
    """How this model writes boxes as ids."""
    return LayoutFormat(config.objects, config.vocabulary)


def _settle(options: LayoutOptions, latents: LatentSet) -> LayoutCondition:
    names = latents.manifest.box_names
    if not names:
        raise DataError(f"--condition layout: {latents.directory} has no boxes")
    return LayoutCondition(**options.model_dump(exclude={"dropout"}), names=names)


def _build(config: LayoutCondition, widths: Widths) -> LayoutConditioner:
    return LayoutConditioner(
        widths.context,
        objects=config.objects,
        vocabulary=config.vocabulary,
        depth=config.depth,
        heads=config.heads,
        head_width=config.head_width,
    )


def _reader(config: LayoutCondition, options: LayoutOptions, latents: LatentSet) -> Reader:
    if latents.manifest.box_names != config.names:
        raise DataError(f"{latents.directory} has other classes of boxes than the model")
    layout = format_of(config)
    crowded = int((latents.box_counts() > layout.objects).sum())
    if crowded:
        say(f"{crowded} pictures have more than {layout.objects} boxes; the model sees the largest")

    def read(indices: np.ndarray, generator: torch.Generator) -> BatchIds:
        found = [
            layout_of_boxes(
                boxes_of_rows(torch.from_numpy(latents.boxes(index)), len(config.names)), layout
            ).ids
            for index in indices.tolist()
        ]
        return shuffled_objects(torch.stack(found), generator, layout)

    return read


def _row(config: LayoutCondition, value: object) -> Ids:
    layout = format_of(config)
    if value == ():  # nothing said, which is another thing than an empty list: no objects
        return torch.full((layout.length,), layout.none)
    return layout_of_boxes(boxes_of_json(value, config.names), layout).ids


LAYOUT = Kind(
    settle=_settle,
    build=_build,
    reader=_reader,
    row=_row,
    silence=(),
    words=lambda config, value: "",
)
