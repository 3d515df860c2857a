"""`ldmkit likelihood`: how likely does a model find latents, in bits per dimension?"""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ldmkit.diffusion.grids import AMPLE_NOISE
from ldmkit.diffusion.likelihood import (
    bits_per_dimension,
    gaussian_log_density,
    levels_between,
    log_density,
)
from ldmkit.durable import write_text
from ldmkit.errors import DataError
from ldmkit.measures_configs import LikelihoodConfig
from ldmkit.tensors import Latents
from ldmkit.terminal import say, track
from ldmkit.told_latents import denoise_of, groups, noise_of, told_latents, whitened

SCHEMA_VERSION = 1
NOISE, PROBES = 24, 25  # places in the seed tree


class Item(NamedTuple):
    """One latent; all in bits per dimension."""

    row: int
    """Of the set."""
    key: str
    whitened: float
    """-log2 of the density of the whitened latent with noise of the least level."""
    raw: float
    """The same in the autoencoder's own space."""
    gaussian: float
    """What N(0, 1), that is whitening alone, gives to `whitened`."""


def likelihood(config: LikelihoodConfig) -> dict[str, Any]:
    """Bits per dimension of latents by the probability-flow ODE (Song et al. 2021, App. D.2).

    It is the density of latents, not of pictures: of different autoencoders it says nothing.

    Args:
        config: which model, which latents, how fine.

    Returns:
        `{"schema_version", "autoencoder", "diffusion", "sigma", "count", "dimensions", "whitened", "raw",
        "gaussian"}`; the last three have mean and standard_error in bits per dimension of the latents.

    Raises:
        DataError: latents and model do not belong together, or the model gives no finite numbers.
    """
    told = told_latents(config, config.num)
    schedule = told.model.schedule
    low, high = schedule.lowest, min(schedule.highest, AMPLE_NOISE)
    sigmas = levels_between(low, high, config.steps)
    items: list[Item] = []
    dimensions = set[int]()
    with track("likelihood", len(told.indices), unit="latent") as progress:
        for group in groups(told):
            clean = whitened(told, group, drawn=True)
            x = clean + low * noise_of(told.generators(group.rows, NOISE), clean)
            probes = signs(told.generators(group.rows, PROBES), x, config.probes)
            density = log_density(denoise_of(told, group), x, sigmas, probes)
            values, area = x[0].numel(), x.shape[2] * x.shape[3]
            stretched = area * float(told.model.latent_std.double().log().sum())
            columns = (density, density - stretched, gaussian_log_density(x, low))
            bits = torch.stack([bits_per_dimension(one, values) for one in columns], dim=1)
            for row, numbers in zip(group.rows[: group.kept], bits.tolist(), strict=False):
                if not all(map(math.isfinite, numbers)):
                    raise DataError(
                        f"{config.model} makes no finite numbers of latent {row}: retrain it"
                    )
                items.append(Item(row, told.latents.text("key", row), *numbers))
            dimensions.add(values)
            progress.advance(group.kept)
    items.sort()
    if config.csv is not None:
        write_text(config.csv, as_csv(items))
        say(f"{len(items)} latents in {config.csv}")
    return {
        "schema_version": SCHEMA_VERSION,
        "autoencoder": told.facts.autoencoder,
        "diffusion": told.facts.fingerprint,
        "sigma": low,
        "count": len(items),
        "dimensions": sorted(dimensions),
        **{name: summary([getattr(one, name) for one in items]) for name in Item._fields[2:]},
    }


def signs(generators: list[torch.Generator], like: Latents, count: int) -> torch.Tensor:
    """Random signs `[count, b, z, y, x]`, row by row of a latent's own generator."""
    rows = [
        torch.randint(2, (count, *like.shape[1:]), generator=generator) for generator in generators
    ]
    return (torch.stack(rows, dim=1) * 2 - 1).to(like)


def summary(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and its standard error; the latter takes two values."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "standard_error": error}


def as_csv(items: Sequence[Item]) -> str:
    """A line for each latent; bits per dimension."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("index", *Item._fields[1:]))
    writer.writerows(items)
    return file.getvalue()


def as_text(report: dict[str, Any]) -> str:
    """Means and standard errors."""
    lines = [f"{report['count']} latents, bits per dimension of the latents"]
    meanings = {
        "whitened": "whitened latents under the model",
        "raw": "the same in the autoencoder's own space",
        "gaussian": "whitened latents under N(0, 1)",
    }
    for name, meaning in meanings.items():
        mean, error = report[name]["mean"], report[name]["standard_error"]
        lines.append(f"{mean:9.4f}{'' if error is None else f' +- {error:.4f}'}  {meaning}")
    return "\n".join(lines)
