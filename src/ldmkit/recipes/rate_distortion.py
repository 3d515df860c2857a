"""`ldmkit rate-distortion`: how many bits buy how much of a picture?"""

import csv
import io
import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ldmkit.assembly import load_autoencoder, require_same_autoencoder
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.diffusion.grids import AMPLE_NOISE
from ldmkit.diffusion.likelihood import levels_between
from ldmkit.diffusion.rate_distortion import cumulated_rate, prior_rate
from ldmkit.diffusion.samplers import Levels
from ldmkit.durable import write_text
from ldmkit.errors import DataError, UsageError
from ldmkit.measures_configs import RateDistortionConfig
from ldmkit.metrics.curves import Axes, Curve, line_plot, standing_alone
from ldmkit.tensors import Images
from ldmkit.terminal import say, track
from ldmkit.told_latents import Group, Told, denoise_of, groups, noise_of, told_latents, whitened

SCHEMA_VERSION = 1
NOISE = 26  # place in the seed tree; with the number of the level


class Point(NamedTuple):
    """One noise level of the curve."""

    sigma: float
    """Standard deviation of the noise in units of whitened latents."""
    rate: float
    """Bits to come down to it, for each pixel and channel of the picture."""
    rate_standard_error: float | None
    rmse: float
    """Root mean square error of the picture decoded from it, of 255."""
    rmse_standard_error: float | None
    """None where there is a single picture."""


class Measured(NamedTuple):
    """What was measured of some pictures."""

    rates: Float[Tensor, "batch levels"]
    """Bits for each pixel and channel."""
    squares: Float[Tensor, "batch levels"]
    """Mean squared errors, of 255^2."""


def rate_distortion(config: RateDistortionConfig) -> dict[str, Any]:
    """Measure rate and distortion at many noise levels; writes OUT (*.csv) and a plot beside it (*.svg).

    Rate: see `diffusion.rate_distortion`. Distortion: between what the autoencoder makes of the latents and of
    the clean latents that the model expects behind the noisy ones (Ho et al. 2020, Sec. 4.3), both clipped
    to [-1, 1]. What the autoencoder itself loses is not in it.

    Args:
        config: which model, which latents, how many levels, to where.

    Returns:
        `{"schema_version", "out", "plot", "autoencoder", "diffusion", "count", "points"}`.

    Raises:
        DataError: latents, model and autoencoder do not belong together, or numbers are not finite.
        UsageError: OUT is no *.csv.
    """
    if config.out.suffix != ".csv":
        raise UsageError(f"--out {config.out}: name a file *.csv")
    told = told_latents(config, config.num)
    require_same_autoencoder(told.facts.autoencoder, config.ae, f"the latents in {config.latents}")
    decoder = load_autoencoder(config.ae, told.model.latent_mean.device)
    schedule = told.model.schedule
    high = min(schedule.highest, AMPLE_NOISE)
    sigmas = levels_between(schedule.lowest, high, config.levels - 1).flip(0)
    found: list[tuple[list[int], Measured]] = []
    with track("rate-distortion", len(told.indices), unit="latent") as progress:
        for group in groups(told):
            found.append((group.rows[: group.kept], measured(told, group, decoder, sigmas)))
            progress.advance(group.kept)
    # summed in the order of the set, whatever the groups were
    order = torch.tensor([row for rows, _ in found for row in rows]).argsort()
    rates, squares = (
        torch.cat(column)[order] for column in zip(*(x for _, x in found), strict=True)
    )
    if not (rates.isfinite().all() and squares.isfinite().all()):
        raise DataError(f"{config.model} or its autoencoder makes no finite numbers: retrain it")
    points = points_of(sigmas, rates, squares)
    plot = config.out.with_suffix(".svg")
    write_text(config.out, as_csv(points))
    write_text(plot, plot_of(points))
    last = points[-1]
    say(
        f"{last.rate:.3f} bits per dimension at sigma {last.sigma:.3g}, RMSE {last.rmse:.2f}; plot: {plot}"
    )
    return {
        "schema_version": SCHEMA_VERSION,
        "out": str(config.out),
        "plot": str(plot),
        "autoencoder": told.facts.autoencoder,
        "diffusion": told.facts.fingerprint,
        "count": len(rates),
        "points": [point._asdict() for point in points],
    }


@torch.no_grad()
def measured(told: Told, group: Group, decoder: Autoencoder, sigmas: Levels) -> Measured:
    """Rates and distortions of a group, at all levels."""
    model, clean = told.model, whitened(told, group, drawn=True)
    denoise = denoise_of(told, group)
    picture = as_255(decoder.decode(model.unwhiten(clean)))
    errors, squares = [], []
    for number, sigma in enumerate(sigmas.tolist()):
        noise = noise_of(told.generators(group.rows, NOISE + number), clean)
        expected = denoise(clean + sigma * noise, clean.new_full((len(clean),), sigma))
        errors.append((expected - clean).double().square().flatten(1).sum(1))
        differences = as_255(decoder.decode(model.unwhiten(expected))) - picture
        squares.append(differences.square().flatten(1).mean(1))
    rates = (
        cumulated_rate(torch.stack(errors, 1), sigmas)
        + prior_rate(clean, float(sigmas[0]))[:, None]
    )
    bits = rates / (math.log(2.0) * picture[0].numel())
    return Measured(bits[: group.kept].cpu(), torch.stack(squares, 1)[: group.kept].cpu())


def as_255(images: Images) -> Float[Tensor, "batch channels height width"]:
    """Pictures in [-1, 1], clipped, as numbers from 0 to 255; float64, not rounded."""
    return images.double().clamp(-1.0, 1.0) * 127.5 + 127.5


def points_of(
    sigmas: Levels, rates: Float[Tensor, "n levels"], squares: Float[Tensor, "n levels"]
) -> list[Point]:
    """Means over pictures and their standard errors."""
    points = []
    for number, sigma in enumerate(sigmas.tolist()):
        rate, square = rates[:, number], squares[:, number]
        rmse = float(square.mean().sqrt())
        doubt, square_doubt = standard_error(rate), standard_error(square)
        if square_doubt is not None and rmse > 0.0:  # of the root of a mean, to first order
            square_doubt /= 2.0 * rmse
        points.append(Point(sigma, float(rate.mean()), doubt, rmse, square_doubt))
    return points


def standard_error(values: Float[Tensor, " n"]) -> float | None:
    """Of the mean; it takes two values."""
    return float(values.std()) / len(values) ** 0.5 if len(values) > 1 else None


def as_csv(points: list[Point]) -> str:
    """A line for each noise level."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(Point._fields)
    writer.writerows(points)
    return file.getvalue()


def plot_of(points: list[Point]) -> str:
    """RMSE over the rate, as an SVG file."""
    curve = Curve("", [(point.rate, point.rmse) for point in points], "marked", "c0")
    axes = Axes("rate, bits per pixel and channel", "distortion, RMSE of 255")
    return standing_alone(line_plot("Distortion over rate", [curve], axes))


def as_text(report: dict[str, Any]) -> str:
    """The file of the numbers, for a shell."""
    return str(report["out"])
