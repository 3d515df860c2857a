"""Whether latents are fit for the second stage: statistics of a whole set, gathered batch by batch.

Latents are raw, the autoencoder's own space. Variances, kurtosis and spectrum are those of the
posterior's means; the posterior's noise is looked at beside them.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ldmkit.tensors import Latents

DEAD_NATS = 0.01
"""A channel with noise is dead if it carries less than this for each value, nats."""
DEAD_STD = 1e-3
"""A channel without noise is dead if its standard deviation is below this share of the largest."""
Channels = Float[Tensor, " z"]


class LatentHealth(NamedTuple):
    """Statistics of a set of latents; float64 on the CPU."""

    mean: Channels
    std: Channels
    """Of the posterior's means, over pictures and positions."""
    excess_kurtosis: Channels
    """0 for a Gaussian, -1.2 for a uniform distribution; 0 where a channel is constant."""
    correlation: Float[Tensor, "z z"]
    """Of channels at the same position; 0 with a constant channel."""
    noise_std: Channels | None
    """Root mean square of the posterior's standard deviation; None for a bottleneck without noise."""
    kl: Channels | None
    """KL divergence to the unit Gaussian, nats for each value."""
    information: Channels | None
    """What a channel can carry, nats for each value: ln(1 + std^2 / noise_std^2) / 2, the capacity of
    a channel with Gaussian noise (Shannon 1948)."""
    dead: tuple[int, ...]
    """Channels that carry nothing; see `DEAD_NATS` and `DEAD_STD`."""
    frequency: Float[Tensor, " radii"]
    """Cycles for each latent pixel, from the slowest wave that fits to 1/2; empty for single pixels."""
    spectrum: Float[Tensor, "z radii"]
    """Power at these frequencies, averaged over directions, over the channel's variance: white noise
    is 1 everywhere."""
    values: int
    """Latent values of one channel that were looked at."""


class LatentStatistics:
    """Gathers what `LatentHealth` reports; memory does not grow with the data."""

    def __init__(self) -> None:
        self.pictures = self.values = 0
        self.shift = torch.zeros(0)
        self.powers: list[Tensor] = []
        self.products = self.spectrum = torch.zeros(0)
        self.noise_variance: Tensor | None = None
        self.kl: Tensor | None = None

    @torch.no_grad()
    def add(self, mean: Latents, std: Latents | None) -> None:
        """Take in the posteriors of one batch; `std` is None for a bottleneck without noise."""
        mean = mean.detach().cpu().double()
        by_channel = mean.movedim(1, 0).flatten(1)
        if self.pictures == 0:
            self._start(mean, noisy=std is not None)
        self.pictures += len(mean)
        self.values += by_channel.shape[1]
        centred = by_channel - self.shift[:, None]
        for exponent, total in enumerate(self.powers, 1):
            total += centred.pow(exponent).sum(1)
        self.products += centred @ centred.T
        power = torch.fft.fft2(mean).abs().square() / mean[0, 0].numel()
        self.spectrum += power.sum(0)
        if std is not None and self.noise_variance is not None and self.kl is not None:
            variance = std.detach().cpu().double().square().movedim(1, 0).flatten(1)
            self.noise_variance += variance.sum(1)
            tiny = torch.finfo(torch.float32).tiny  # a variance that was rounded to zero
            terms = by_channel.square() + variance - 1.0 - variance.clamp_min(tiny).log()
            self.kl += 0.5 * terms.sum(1)

    def _start(self, mean: Tensor, *, noisy: bool) -> None:
        # powers of differences from about the mean lose nothing to cancellation
        self.shift = mean.mean(dim=(0, 2, 3))
        nothing = torch.zeros_like(self.shift)
        self.powers = [nothing.clone() for _ in range(4)]
        self.products = nothing.new_zeros(len(nothing), len(nothing))
        self.spectrum = nothing.new_zeros(mean.shape[1:])
        if noisy:
            self.noise_variance, self.kl = nothing.clone(), nothing.clone()

    def health(self) -> LatentHealth:
        """The statistics of all that came so far (at least one batch)."""
        first, second, third, fourth = (total / self.values for total in self.powers)
        covariance = self.products / self.values - torch.outer(first, first)
        variance = (second - first.square()).clamp_min(0.0)
        central = fourth - 4 * first * third + 6 * first.square() * second - 3 * first.pow(4)
        std = variance.sqrt()
        constant = std <= 1e-9 * (1.0 + self.shift.abs())
        kurtosis = torch.where(constant, 0.0, central / variance.square() - 3.0)
        scale = torch.outer(std, std)
        related = torch.where(scale > 0, covariance / scale, 0.0)
        related.fill_diagonal_(1.0)
        information = noise_std = kl = None
        if self.noise_variance is not None and self.kl is not None:
            noise = self.noise_variance / self.values
            noise_std, kl = noise.sqrt(), self.kl / self.values
            information = 0.5 * torch.log1p(variance / noise.clamp_min(1e-30))
        frequency, spectrum = self._radial(variance)
        return LatentHealth(
            mean=self.shift + first,
            std=std,
            excess_kurtosis=kurtosis,
            correlation=related,
            noise_std=noise_std,
            kl=kl,
            information=information,
            dead=dead_channels(std, information),
            frequency=frequency,
            spectrum=spectrum,
            values=self.values,
        )

    def _radial(self, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Power averaged over rings of the frequency plane, one ring for each whole wave."""
        height, width = self.spectrum.shape[1:]
        shorter = min(height, width)
        y, x = torch.fft.fftfreq(height), torch.fft.fftfreq(width)
        waves = (y[:, None].square() + x[None].square()).sqrt() * shorter
        rings = waves.round().long().flatten()
        count = shorter // 2
        inside = (rings >= 1) & (rings <= count)
        power = self.spectrum.flatten(1)[:, inside] / self.pictures
        sums = power.new_zeros(len(power), count).index_add_(1, rings[inside] - 1, power)
        members = torch.bincount(rings[inside] - 1, minlength=count)
        relative = torch.where(variance > 0, 1.0 / variance, 0.0)
        return (torch.arange(1, count + 1) / shorter).double(), sums / members * relative[:, None]


def dead_channels(std: Channels, information: Channels | None) -> tuple[int, ...]:
    """Channels that carry nothing.

    With noise: less than `DEAD_NATS` for each value (the means vary by under 2 % of the noise's
    variance). Without: a standard deviation below `DEAD_STD` of the largest.
    """
    noisy = information is not None
    silent = information < DEAD_NATS if noisy else std <= DEAD_STD * std.max()
    return tuple(silent.nonzero().flatten().tolist())


class CodebookUsage:
    """Counts how often each code of a vector-quantised bottleneck is chosen.

    Args:
        size: number of codes.
    """

    def __init__(self, size: int) -> None:
        self.counts = torch.zeros(size, dtype=torch.int64)

    def add(self, indices: Int[Tensor, "batch y x"]) -> None:
        """Take in the codes of one batch."""
        self.counts += torch.bincount(indices.detach().cpu().flatten(), minlength=len(self.counts))

    def share_used(self) -> float:
        """Share of the codes that were chosen at least once."""
        return (self.counts > 0).double().mean().item()

    def perplexity(self) -> float:
        """Exponential of the codes' entropy: the size of the book if all are chosen equally often."""
        shares = self.counts.double() / self.counts.sum().clamp_min(1)
        return torch.special.entr(shares).sum().exp().item()


def described(health: LatentHealth, codes: CodebookUsage | None) -> dict[str, Any]:
    """The report's page on latents, JSON-able; what a bottleneck does not have is None."""
    tensors = {
        "mean": health.mean,
        "std": health.std,
        "noise_std": health.noise_std,
        "kl_nats_per_value": health.kl,
        "information_nats_per_value": health.information,
        "excess_kurtosis": health.excess_kurtosis,
        "correlation": health.correlation,
        "frequency": health.frequency,
        "spectrum": health.spectrum,
    }
    book = None
    if codes is not None:
        book = {
            "size": len(codes.counts),
            "share_used": codes.share_used(),
            "perplexity": codes.perplexity(),
        }
    return {
        **{name: None if value is None else value.tolist() for name, value in tensors.items()},
        "values_per_channel": health.values,
        "dead_channels": list(health.dead),
        "codebook": book,
    }
