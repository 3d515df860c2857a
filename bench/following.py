"""How well trained models follow what they are told, on what was held back: a table and JSON.

python bench/following.py TASK RUN... --ae AE --data DATA [--num 256] [--json OUT.json]

TASK: class, text, layout, labelmap, lowres, mask, scalars. RUN: the folders of the scripts in examples/
(RUN/latents and RUN/ldm/diffusion.safetensors). DATA: the pictures that were encoded, with the same keys;
for layout, labelmap and scalars RUN/data/images. `sample --like RUN/latents --holdout 0.05` draws the samples.

    class, text  is the class of the picture, by a classifier, the one that was told? Mean over the classes
                 of the share that is right, so that chance is one in the number of classes
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
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from canvas import count_objects, foreground, lightness, overlaps
from classifier import balanced, classes_of, small, trained
from torch import Tensor, nn

import ldmkit
from ldmkit.assembly import autoencoder_facts, load_autoencoder, preprocessing_of
from ldmkit.autoencoder.perceptual import PerceptualDistance, box_distance
from ldmkit.conditioning.mask import blended
from ldmkit.data.images import read_images
from ldmkit.data.items import Item
from ldmkit.data.latent_set import LatentSet
from ldmkit.data.sources import open_source
from ldmkit.data_configs import SourceConfig
from ldmkit.generation_configs import SampleConfig
from ldmkit.metrics.reconstruction import psnr
from ldmkit.metrics.st_lpips import load_st_lpips
from ldmkit.modelfile import load
from ldmkit.training.runtime import pick_device

AT_ONCE = 64
"""Pictures measured together."""


class Case(NamedTuple):
    """Held-back samples of one run."""

    latents: LatentSet
    indices: np.ndarray
    """Of the latents whose conditions the samples were told."""
    real: Tensor
    """The pictures, `[n, 3, y, x]` in [-1, 1]."""
    decoded: Tensor
    """The same through the autoencoder."""
    made: Tensor
    training: tuple[Sequence[Item], np.ndarray]
    """Pictures that were not held back, and where they are in the set."""


class Row(NamedTuple):
    """One measurement."""

    what: str
    made: float
    error: float
    """Standard error of it."""
    real: float
    control: float
    samples: int


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


@torch.no_grad()
def case_of(run: Path, asked: argparse.Namespace) -> Case:
    """Draw the samples of a run, and read what they should be like."""
    latents = LatentSet(run / "latents")
    training = latents.training_indices(asked.holdout)
    held_back = np.setdiff1d(np.arange(len(latents)), training)
    count = min(asked.num, len(held_back))
    # what is concatenated stays told, unless it is guided by its name
    by_name = asked.task in ("labelmap", "lowres", "mask") and asked.guidance != 1.0
    with tempfile.TemporaryDirectory() as scratch:
        drawn = ldmkit.sample(
            SampleConfig(
                model=run / "ldm" / "diffusion.safetensors",
                out=Path(scratch) / "samples.safetensors",
                like=run / "latents",
                holdout=asked.holdout,
                num=count,
                steps=asked.steps,
                guidance=None if by_name else asked.guidance,
                guidance_of=(f"{asked.task}={asked.guidance:g}",) if by_name else (),
                device=asked.device,
                batch_size=AT_ONCE,
            )
        )
        if drawn is None:
            raise SystemExit("nothing was drawn")
        samples = load(drawn, kind="samples")[1]["latents"]
    device = pick_device(asked.device)
    model = load_autoencoder(asked.ae, device)

    def decode(some: Tensor) -> Tensor:
        parts = [model.decode(part.float().to(device)) for part in some.split(AT_ONCE)]
        return torch.cat(parts).clamp(-1, 1).float().cpu()

    indices = held_back[:count]
    items = items_of(latents, asked.data)
    preprocessing = preprocessing_of(autoencoder_facts(asked.ae), None)
    real = read_images([items[index] for index in indices], preprocessing)
    seen = [items[index] for index in training]
    decoded = decode(latents.read(indices).mean)
    return Case(latents, indices, real, decoded, decode(samples), (seen, training))


def items_of(latents: LatentSet, data: str) -> list[Item]:
    """The pictures of a set, in its order."""
    known = {item.key: item for item in open_source(SourceConfig(data=data)).items}
    keys = list(latents.texts("key"))
    missing = [key for key in keys if key not in known]
    if missing:
        raise SystemExit(f"{data} lacks {missing[0]}: give --data the pictures that were encoded")
    return [known[key] for key in keys]


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


# pictures


def follow_lowres(case: Case, asked: argparse.Namespace) -> list[Row]:
    """Enlarged pictures against the real ones, beside bicubic enlargement."""
    stored = case.latents.rows("lowres", case.indices)
    small_ones = stored / 127.5 - 1.0 if stored.dtype == torch.uint8 else stored.float()
    size = list(case.real.shape[2:])
    bicubic = F.interpolate(small_ones, size, mode="bicubic", align_corners=False).clamp(-1, 1)
    return distance_rows(case.real, (case.made, case.decoded, bicubic), asked) + psnr_rows(
        case.real, (case.made, case.decoded, bicubic), torch.ones(len(bicubic), *size).bool()
    )


def follow_mask(case: Case, asked: argparse.Namespace) -> list[Row]:
    """What stands in the hole against the real picture, beside the mean colour of what is known."""
    holes = case.latents.rows("hole", case.indices).bool()
    known = (~holes)[:, None].float()
    mean = (case.real * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True)
    filled = mean.expand_as(case.real)
    pasted = [blended(case.real, images, holes) for images in (case.made, case.decoded, filled)]
    images = (pasted[0], pasted[1], pasted[2])
    return distance_rows(case.real, images, asked) + psnr_rows(case.real, images, holes)


def distance_rows(
    real: Tensor, images: tuple[Tensor, Tensor, Tensor], asked: argparse.Namespace
) -> list[Row]:
    """Perceptual distances of made, decoded and control pictures; less is better."""
    distances = {"VGG16 distance": box_distance()}
    if asked.st_lpips:
        parts = load_st_lpips(asked.st_lpips)
        distances[parts.name] = PerceptualDistance(*parts)
    device, rows = pick_device(asked.device), []
    for name, distance in distances.items():
        network = distance.to(device)
        found = [apart(network, real, some, device) for some in images]
        ends = float(found[1].mean()), float(found[2].mean())
        rows.append(Row(name, *mean_of(found[0]), *ends, len(real)))
    return rows


@torch.no_grad()
def apart(distance: PerceptualDistance, one: Tensor, other: Tensor, device: torch.device) -> Tensor:
    """The distance of each pair."""
    pairs = zip(one.split(AT_ONCE), other.split(AT_ONCE), strict=True)
    return torch.cat([distance(a.to(device), b.to(device)).double().cpu() for a, b in pairs])


def psnr_rows(real: Tensor, images: tuple[Tensor, Tensor, Tensor], where: Tensor) -> list[Row]:
    """PSNR, dB, over some pixels; more is better."""
    share = where[:, None].float().mean((1, 2, 3)).clamp_min(1e-9)
    shift = 10 * share.log10()  # of an error that is the mean over all pixels
    inside = [torch.where(where[:, None], some, real) for some in images]
    found = [(psnr(real, some) + shift).double() for some in inside]
    ends = float(found[1].mean()), float(found[2].mean())
    return [Row("PSNR, dB", *mean_of(found[0]), *ends, len(real))]


def mean_of(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


MEASURES: dict[str, Callable[[Tensor], Tensor]] = {"lightness": lightness, "count": count_objects}
"""Of the numbers that examples/compose.py writes."""
TASKS: dict[str, Callable[[Case, argparse.Namespace], list[Row]]] = {
    "class": follow_class,
    "text": follow_class,
    "layout": follow_layout,
    "labelmap": follow_labelmap,
    "lowres": follow_lowres,
    "mask": follow_mask,
    "scalars": follow_scalars,
}


if __name__ == "__main__":
    main()
