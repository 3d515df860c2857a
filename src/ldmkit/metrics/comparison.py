"""Originals against reconstructions: every metric of a set of pairs, gathered batch by batch."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ldmkit.metrics.frechet import Features, Frechet, FrechetComparison
from ldmkit.metrics.reconstruction import psnr, ssim
from ldmkit.tensors import Images

PairDistance = Callable[[Images, Images], Float[Tensor, " batch"]]


class Spread(NamedTuple):
    """How one metric is distributed over the pictures."""

    mean: float
    median: float
    percentile_5: float
    percentile_95: float
    min: float
    max: float


class Comparison:
    """Metrics of originals and reconstructions; memory grows by a few numbers a picture only.

    Args:
        distances: further distances of pairs by name, beside PSNR and SSIM; called with originals and
            clipped reconstructions.
        features: networks whose features give Fréchet distances, by name. For their floors pictures
            must come in random order.
    """

    def __init__(
        self, distances: Mapping[str, PairDistance], features: Mapping[str, Features]
    ) -> None:
        self.distances: dict[str, PairDistance] = {"psnr": psnr, "ssim": ssim, **distances}
        self.frechet = {name: FrechetComparison(network) for name, network in features.items()}
        self.values: dict[str, list[Tensor]] = {name: [] for name in self.distances}
        self.count = 0
        self.bias = torch.zeros(0)
        self.errors = torch.zeros(0)

    @torch.no_grad()
    def add(self, images: Images, reconstructions: Images) -> None:
        """Take in one batch of pairs in [-1, 1]; reconstructions are clipped to it."""
        reconstructions = reconstructions.float().clamp(-1.0, 1.0)
        for name, distance in self.distances.items():
            self.values[name].append(distance(images, reconstructions).float().cpu())
        for comparison in self.frechet.values():
            comparison.add(images, reconstructions)
        difference = (reconstructions - images).cpu().double()
        if self.count == 0:
            self.bias = torch.zeros(difference.shape[1], dtype=torch.float64)
            self.errors = torch.zeros(difference.shape[2:], dtype=torch.float64)
        self.bias += difference.mean(dim=(2, 3)).sum(0)
        self.errors += difference.abs().mean(1).sum(0)
        self.count += len(images)

    def per_picture(self, name: str) -> Float[Tensor, " pictures"]:
        """One metric of each pair, in the order they came."""
        return torch.cat(self.values[name])

    def spread(self, name: str) -> Spread:
        """The distribution of one metric."""
        values = self.per_picture(name).double()
        return Spread(
            mean=values.mean().item(),
            median=values.quantile(0.5).item(),
            percentile_5=values.quantile(0.05).item(),
            percentile_95=values.quantile(0.95).item(),
            min=values.min().item(),
            max=values.max().item(),
        )

    def colour_bias(self) -> Float[Tensor, " channels"]:
        """Mean of reconstruction minus original for each channel, in units of [-1, 1]."""
        return self.bias / self.count

    def error_map(self) -> Float[Tensor, "height width"]:
        """Mean absolute error at each pixel position over pictures and channels, units of [-1, 1]."""
        return (self.errors / self.count).float()

    def frechet_distances(self) -> dict[str, Frechet]:
        """Each network's Fréchet distance; none below two pictures."""
        found = {name: comparison.result() for name, comparison in self.frechet.items()}
        return {name: result for name, result in found.items() if result is not None}
