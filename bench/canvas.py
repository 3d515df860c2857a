"""What can be measured again of the pictures that examples/compose.py makes."""

import torch
import torch.nn.functional as F
from torch import Tensor

CONTRAST = 0.1
"""How far a pixel's colour lies from the canvas' that is no canvas, of the range of values, in any channel."""
RING, LEAST = 2, 40
"""Width of the rim that shows nothing but canvas, and the smallest object that counts, pixels."""
LUMA = (0.299, 0.587, 0.114)


def overlaps(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of each pair of masks `[n, y, x]`."""
    union = (one | other).sum((1, 2)).clamp_min(1)
    return (one & other).sum((1, 2)).double() / union


def canvas_of(images: Tensor) -> Tensor:
    """The canvas, `[n, 3, y, x]`: in each channel a plane through the rim of the picture.

    What deviates most from a first plane is left out of the second, should an object reach the rim.
    """
    side = images.shape[2]
    steps = torch.linspace(-1, 1, side, dtype=torch.float64)
    down, across = torch.meshgrid(steps, steps, indexing="ij")
    plane = torch.stack([torch.ones_like(down), down, across], -1)
    rim = torch.ones(side, side, dtype=torch.bool)
    rim[RING:-RING, RING:-RING] = False
    found = []
    for image in images.double():
        points, values = plane[rim], image[:, rim].T
        fit = torch.linalg.lstsq(points, values).solution
        for _ in range(3):
            off = (points @ fit - values).abs().amax(1)
            near = off <= off.quantile(0.75)
            fit = torch.linalg.lstsq(points[near], values[near]).solution
        found.append((plane @ fit).movedim(2, 0))
    return torch.stack(found)


def foreground(images: Tensor) -> Tensor:
    """What differs from the canvas, `[n, y, x]`."""
    return (images - canvas_of(images)).abs().amax(1) > 2 * CONTRAST


def lightness(images: Tensor) -> Tensor:
    """Mean luma of the canvas, 0 to 1."""
    weights = torch.tensor(LUMA, dtype=torch.float64).view(3, 1, 1)
    return ((canvas_of(images) + 1) / 2 * weights).sum(1).mean((1, 2))


def count_objects(images: Tensor) -> Tensor:
    """Connected parts of what differs from the canvas, small ones left out; objects that touch are one."""
    masks = foreground(images)
    n, height, width = masks.shape
    numbers = torch.arange(1.0, height * width + 1).view(1, 1, height, width).expand(n, 1, -1, -1)
    numbers = numbers * masks[:, None]
    while True:
        spread = F.max_pool2d(numbers, 3, stride=1, padding=1) * masks[:, None]
        if torch.equal(spread, numbers):
            break
        numbers = spread
    sizes = [one[one > 0].unique(return_counts=True)[1] for one in numbers]
    return torch.tensor([float((size >= LEAST).sum()) for size in sizes], dtype=torch.float64)
