"""How like the real pictures samples are that were told a part of them: super-resolution and inpainting."""

import argparse

import torch
import torch.nn.functional as F
from case import AT_ONCE, Case, Row, mean_of
from torch import Tensor

from ldmkit.autoencoder.perceptual import PerceptualDistance, box_distance
from ldmkit.conditioning.mask import blended
from ldmkit.metrics.reconstruction import psnr
from ldmkit.metrics.st_lpips import load_st_lpips
from ldmkit.training.runtime import pick_device


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
