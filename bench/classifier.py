"""A plain classifier of small pictures, trained on real ones, for `bench/following.py`."""

import math
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmkit.data.order import generator_for

SEEN, BATCH = 32, 64
"""Side of what the classifier sees, pixels; its batch."""
WIDTHS = (32, 64, 128)


def network(classes: int) -> nn.Sequential:
    """A plain convolutional classifier of pictures of SEEN pixels."""
    layers: list[nn.Module] = []
    for before, width in zip((3, *WIDTHS), WIDTHS, strict=False):
        for channels in (before, width):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    side = SEEN // 2 ** len(WIDTHS)
    last = nn.Linear(WIDTHS[-1] * side * side, classes)
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.5), last)


def trained(
    path: Path,
    pictures: Callable[[], tuple[Tensor, Tensor]],
    classes: int,
    epochs: int,
    device: torch.device,
) -> nn.Sequential:
    """The classifier kept in a file, or one trained now on pictures of SEEN pixels and their classes."""
    torch.manual_seed(0)
    model = network(classes).to(device)
    if path.exists():
        model.load_state_dict(safetensors.torch.load_file(path))
        return model.eval()
    images, labels = (part.to(device) for part in pictures())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * math.ceil(len(images) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    draw = generator_for(0)
    for _ in range(steps):
        rows = torch.randint(len(images), (BATCH,), generator=draw).to(device)
        loss = F.cross_entropy(model(moved(images[rows], draw)), labels[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return model.eval()


def moved(images: Tensor, draw: torch.Generator) -> Tensor:
    """Pictures mirrored, and moved by up to 3 pixels, each its own way."""
    count = len(images)
    flip = 1.0 - 2.0 * (torch.rand(count, generator=draw) < 0.5)
    shift = (torch.rand(count, 2, generator=draw) - 0.5) * (12 / SEEN)
    zero = torch.zeros(count)
    rows = [
        torch.stack([flip, zero, shift[:, 0]], 1),
        torch.stack([zero, zero + 1, shift[:, 1]], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1).to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def small(images: Tensor) -> Tensor:
    """As the classifier sees them."""
    return F.interpolate(images, (SEEN, SEEN), mode="bilinear", antialias=True)


@torch.no_grad()
def classes_of(model: nn.Sequential, images: Tensor) -> Tensor:
    """What the classifier takes small pictures for."""
    device = next(model.parameters()).device
    return torch.cat([model(part.to(device)).argmax(1).cpu() for part in images.split(256)])


def balanced(found: Tensor, told: Tensor, classes: int) -> tuple[float, float]:
    """Mean over the classes of the share that is right, and its standard error."""
    shares, variances = [], []
    for label in range(classes):
        right = (found[told == label] == label).double()
        if len(right):
            shares.append(float(right.mean()))
            variances.append(shares[-1] * (1 - shares[-1]) / len(right))
    return sum(shares) / len(shares), math.sqrt(sum(variances)) / len(shares)
