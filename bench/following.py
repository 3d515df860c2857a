"""How well trained models follow what they are told, on what was held back: a table and JSON.

python bench/following.py TASK RUN... --ae AE --data DATA [--num 256] [--json OUT.json]

TASK: class, text, layout, labelmap, lowres, mask, scalars. RUN: the folders of the scripts in examples/
(RUN/latents and RUN/ldm/diffusion.safetensors). DATA: the pictures that were encoded, with the same keys;
for layout, labelmap and scalars RUN/data/images. `sample --like RUN/latents --holdout 0.05` draws the samples.

    class, text  is the class of the picture, by a classifier, the one that was told? Mean over the classes
                 of the share that is right, so that chance is one in the number of classes
    text         and: is the picture whose caption was told among those nearest to the sample (VGG16's features)?
    layout       the same of the crops of all boxes; and IoU of what differs from the canvas with the boxes
    labelmap     IoU of what differs from the canvas with what the map says is no canvas
    lowres       VGG16 distance and PSNR to the real picture, beside bicubic enlargement
    mask         the same in the hole, beside the mean colour of what is known
    scalars      lightness and number of objects, measured, against what was told

"real" is the same measured on the real pictures through the autoencoder, the most that can be had;
"control" on the samples with the conditions of another sample, or what a simple method gives. The
classifier is a plain convolutional network, trained on real pictures (for layout on crops) that are not held back;
its weights are kept in --classifier. Numbers behind +- are standard errors of the mean over samples.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from canvas import count_objects, foreground, lightness, overlaps
from case import AT_ONCE, Case, Row, case_of, mean_of
from classifier import balanced, classes_of, small, trained
from likeness import follow_lowres, follow_mask
from retrieval import described, hit, ranks
from torch import Tensor, nn

from ldmkit.assembly import autoencoder_facts, preprocessing_of
from ldmkit.data.images import read_images
from ldmkit.data.latent_set import LatentSet
from ldmkit.training.runtime import pick_device


def main() -> None:
    """Measure each run, print a table, and write JSON where it is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--ae", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--num", type=int, default=256)
    parser.add_argument("--holdout", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--classifier", type=Path, default=Path("runs/classifier"))
    parser.add_argument("--epochs", type=int, default=20, help="of the classifier")
    parser.add_argument("--st-lpips", type=Path, help="weights; measured beside VGG16's distance")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    found = []
    print(f"| run | {asked.task} | made | real | control | N |\n|---|---|---|---|---|---|")
    for run in asked.runs:
        case = case_of(run, asked)
        for row in TASKS[asked.task](case, asked):
            print(
                f"| {run.name} | {row.what} | {row.made:.4g} +- {row.error:.2g} | {row.real:.4g} "
                f"| {row.control:.4g} | {row.samples} |"
            )
            found.append({"run": str(run), "task": asked.task, **row._asdict()})
    text = json.dumps(
        {"schema_version": 1, "guidance": asked.guidance, "steps": asked.steps, "rows": found}
    )
    if asked.json:
        asked.json.write_text(text + "\n")
    else:
        print(text)


# classes


def agreement(
    what: str, model: nn.Sequential, told: Tensor, case: tuple[Tensor, Tensor, Tensor], classes: int
) -> list[Row]:
    """Of made, decoded and real pictures, each with the class that was told."""
    made, decoded, real = (classes_of(model, small(images)) for images in case)
    share, error = balanced(made, told, classes)
    through = balanced(decoded, told, classes)[0]
    rows = [Row(what, share, error, through, 1 / classes, len(told))]
    shuffled, error = balanced(made, told.roll(1), classes)
    rows.append(Row(f"{what}, told shuffled", shuffled, error, through, 1 / classes, len(told)))
    own, error = balanced(real, told, classes)
    rows.append(Row(f"{what}, classifier on real", own, error, own, 1 / classes, len(told)))
    return rows


def follow_text(case: Case, asked: argparse.Namespace) -> list[Row]:
    """Classes as for `class`, and whether the picture whose caption was told is the nearest one."""
    device = pick_device(asked.device)
    made, decoded, real = (
        described(images, device) for images in (case.made, case.decoded, case.real)
    )
    rows, count = [], len(real)
    ranked = ranks(made, real), ranks(decoded, real), ranks(made.roll(1, 0), real)
    for among in (1, max(count // 20, 1)):
        own, through, shuffled = (hit(rank, among) for rank in ranked)
        what = f"own picture among the nearest {among} of {count} (chance {among / count:.2g})"
        rows.append(Row(what, *own, through[0], shuffled[0], count))
    return [*rows, *follow_class(case, asked)]


def follow_class(case: Case, asked: argparse.Namespace) -> list[Row]:
    """Whether pictures are of the class of the item whose class or caption was told."""
    names = case.latents.manifest.class_names
    items, places = case.training

    def pictures() -> tuple[Tensor, Tensor]:
        config = preprocessing_of(autoencoder_facts(asked.ae), None)
        parts = [items[i : i + AT_ONCE] for i in range(0, len(items), AT_ONCE)]
        images = torch.cat([small(read_images(list(part), config)) for part in parts])
        return images, torch.from_numpy(case.latents.labels[places])

    device = pick_device(asked.device)
    model = trained(
        asked.classifier / "pictures.safetensors", pictures, len(names), asked.epochs, device
    )
    told = torch.from_numpy(case.latents.labels[case.indices])
    images = (case.made, case.decoded, case.real)
    return agreement("class", model, told, images, len(names))


# places


def follow_layout(case: Case, asked: argparse.Namespace) -> list[Row]:
    """Classes of what the boxes hold, and whether it is there."""
    names, (items, places) = case.latents.manifest.box_names, case.training

    def pictures() -> tuple[Tensor, Tensor]:
        config = preprocessing_of(autoencoder_facts(asked.ae), None)
        found = []
        for first in range(0, len(items), AT_ONCE):
            images = read_images(list(items[first : first + AT_ONCE]), config)
            found.append(crops(images, case.latents, places[first : first + AT_ONCE]))
        return torch.cat([one for one, _ in found]), torch.cat([one for _, one in found])

    device = pick_device(asked.device)
    model = trained(
        asked.classifier / "crops.safetensors", pictures, len(names), asked.epochs, device
    )
    cut = [
        crops(images, case.latents, case.indices) for images in (case.made, case.decoded, case.real)
    ]
    images = (cut[0][0], cut[1][0], cut[2][0])
    rows = agreement("class in the box", model, cut[0][1], images, len(names))
    side = case.real.shape[2]
    boxes = torch.stack(
        [box_mask(case.latents.boxes(index), side) for index in case.indices.tolist()]
    )
    return [*rows, overlap_row("IoU with the boxes", boxes, case)]


def crops(images: Tensor, latents: LatentSet, indices: np.ndarray) -> tuple[Tensor, Tensor]:
    """What is in the boxes of pictures, small, and their classes."""
    found, labels = [], []
    for image, index in zip(images, indices.tolist(), strict=True):
        for category, *corners in latents.boxes(index).tolist():
            x0, y0, x1, y1 = (round(corner * image.shape[1]) for corner in corners)
            found.append(small(image[None, :, y0:y1, x0:x1])[0])
            labels.append(int(category))
    return torch.stack(found), torch.tensor(labels)


def box_mask(boxes: np.ndarray, side: int) -> Tensor:
    """Where the boxes are, `[side, side]`."""
    mask = torch.zeros(side, side, dtype=torch.bool)
    for _, *corners in boxes.tolist():
        x0, y0, x1, y1 = (round(corner * side) for corner in corners)
        mask[y0:y1, x0:x1] = True
    return mask


def follow_labelmap(case: Case, asked: argparse.Namespace) -> list[Row]:
    """Whether something is where the map says so."""
    del asked
    maps = case.latents.rows("labelmap", case.indices) > 0
    return [overlap_row("IoU with the map", maps, case)]


def overlap_row(what: str, told: Tensor, case: Case) -> Row:
    """Intersection over union of where something is and where it was told to be."""
    made = overlaps(foreground(case.made), told)
    other = overlaps(foreground(case.made), told.roll(1, 0))
    real = overlaps(foreground(case.decoded), told)
    return Row(what, *mean_of(made), float(real.mean()), float(other.mean()), len(told))


# numbers


def follow_scalars(case: Case, asked: argparse.Namespace) -> list[Row]:
    """Numbers of the pictures against those that were told."""
    del asked
    names = case.latents.manifest.scalar_names
    told = case.latents.rows("scalars", case.indices).double()
    rows = []
    for place, name in enumerate(names):
        measure, asked_for = MEASURES[name], told[:, place]
        made, real = measure(case.made), measure(case.decoded)
        other = asked_for.roll(1)
        count = len(told)
        share = correlation(made, asked_for)
        error = (1 - share**2) / math.sqrt(max(count - 1, 1))
        ends = correlation(real, asked_for), correlation(made, other)
        rows.append(Row(f"{name}, correlation", share, error, *ends, count))
        off = (made - asked_for).abs()
        ends = float((real - asked_for).abs().mean()), float((made - other).abs().mean())
        rows.append(Row(f"{name}, mean absolute error", *mean_of(off), *ends, count))
    return rows


def correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's; 0 where a side is constant."""
    both = torch.stack([one, other]) - torch.stack([one.mean(), other.mean()])[:, None]
    lengths = both.norm(dim=1).prod()
    return float((both[0] * both[1]).sum() / lengths) if lengths > 0 else 0.0


MEASURES: dict[str, Callable[[Tensor], Tensor]] = {"lightness": lightness, "count": count_objects}
"""Of the numbers that examples/compose.py writes."""
TASKS: dict[str, Callable[[Case, argparse.Namespace], list[Row]]] = {
    "class": follow_class,
    "text": follow_text,
    "layout": follow_layout,
    "labelmap": follow_labelmap,
    "lowres": follow_lowres,
    "mask": follow_mask,
    "scalars": follow_scalars,
}


if __name__ == "__main__":
    main()
