"""Whether samples are nearer to the picture whose caption they were told than to others: a ranking, no classifier."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmkit.autoencoder.perceptual import box_distance
from ldmkit.tensors import Images

GRID = 8
"""Cells to a side over which features are averaged: where something is counts, but not to the pixel."""
AT_ONCE = 64


@torch.no_grad()
def described(images: Images, device: torch.device) -> Tensor:
    """`[batch, features]`: features of VGG16's three layers, in unit length at each place, averaged over GRID x GRID cells."""
    distance = box_distance().to(device)
    found = []
    for some in images.split(AT_ONCE):
        maps = distance.maps(some.to(device))
        cells = [F.adaptive_avg_pool2d(F.normalize(one, dim=1), GRID).flatten(1) for one in maps]
        found.append(F.normalize(torch.cat(cells, 1), dim=1).cpu())
    return torch.cat(found)


def ranks(samples: Tensor, pictures: Tensor) -> Tensor:
    """Of each sample, how many pictures are nearer than its own; both `[n, features]` in the same order.

    The mean of the samples and that of the pictures are taken off first, since all samples differ from
    all pictures in the same ways.
    """
    one, other = (F.normalize(part - part.mean(0), dim=1) for part in (samples, pictures))
    near = one @ other.T
    return (near > near.diagonal()[:, None]).sum(1)


def hit(rank: Tensor, among: int) -> tuple[float, float]:
    """The share that has its own among the nearest ones, and its standard error."""
    share = float((rank < among).double().mean())
    return share, math.sqrt(max(share * (1 - share), 1e-12) / len(rank))
