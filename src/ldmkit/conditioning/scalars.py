"""Continuous values (age, dose, wavelength, score) by Fourier features (Tancik et al. 2020)."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ldmkit.condition_configs import ScalarCondition, ScalarOptions
from ldmkit.conditioning.condition import Condition
from ldmkit.conditioning.kind import Kind, Reader, Widths
from ldmkit.data.latent_set import LatentSet
from ldmkit.errors import DataError

FREQUENCIES = 16
SHORTEST, LONGEST = 0.1, 50.0
"""Wavelengths of the features, in standard deviations of a scalar."""
LARGEST = torch.finfo(torch.float32).max
EPS = 1e-6
"""Standard deviation over size of the mean below which float32 cannot tell the values apart."""

Values = Float[Tensor, "batch scalars"]


class ScalarStatistics(NamedTuple):
    """Mean and standard deviation of each scalar."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class ScalarConditioner(nn.Module):
    """Named numbers, each perhaps missing, to one vector or to a token each.

    Values are `[b, n]`, float32, in the user's own units; NaN = not told. A scalar is standardised,
    then becomes sines and cosines of 16 fixed wavelengths from 0.1 to 50 standard deviations, evenly
    spaced in their logarithm (ratio 1.51). So values 0.01 standard deviations apart differ, and
    values within 25 of the mean are never taken for each other. What spans many orders of magnitude (a
    dose) is better told as its logarithm. A missing one is a learnt vector in place of the features.

    Args:
        mean: of each scalar over the training data.
        std: of each scalar; above 0.
        width: of the vector, or of a token.
        way: `vector`, one for all, added to the time embedding, or `tokens`, one for each.

    Raises:
        ValueError: a mean or standard deviation that cannot be used.
    """

    mean: Tensor
    std: Tensor
    frequencies: Tensor

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        width: int,
        *,
        way: Literal["vector", "tokens"] = "vector",
    ) -> None:
        super().__init__()
        if not mean or len(mean) != len(std):
            raise ValueError(f"{len(mean)} means and {len(std)} standard deviations: give one each")
        for number, pair in enumerate(zip(mean, std, strict=True)):
            _require_spread(f"scalar {number}", *pair)
        self.way = way
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))
        steps = torch.linspace(0.0, 1.0, FREQUENCIES, dtype=torch.float64)
        wavelengths = LONGEST * (SHORTEST / LONGEST) ** steps
        self.register_buffer("frequencies", (2.0 * math.pi / wavelengths).float())
        features = 2 * FREQUENCIES
        self.missing = nn.Parameter(torch.randn(len(mean), features))
        seen = [len(mean) * features] if way == "vector" else [features] * len(mean)
        self.networks = nn.ModuleList(
            nn.Sequential(nn.Linear(count, width), nn.SiLU(), nn.Linear(width, width))
            for count in seen
        )

    def empty(self, values: Values) -> Values:
        """NaN: not told."""
        return torch.full_like(values, math.nan)

    def forward(self, values: Values) -> Condition:
        """A vector `[b, width]` or tokens `[b, n, width]`."""
        features = self.features(values.to(self.mean.device))
        if self.way == "vector":
            return Condition(vector=self.networks[0](features.flatten(1)))
        tokens = [
            network(one) for network, one in zip(self.networks, features.unbind(1), strict=True)
        ]
        return Condition(tokens=torch.stack(tokens, dim=1))

    def features(self, values: Values) -> Float[Tensor, "batch scalars features"]:
        """Cosines, then sines of each standardised value; the learnt vector where it is missing."""
        told = ~values.isnan()[..., None]
        # a NaN must not reach the sines: the values' gradient would be NaN though it is not chosen
        standard = (torch.where(told[..., 0], values, self.mean) - self.mean) / self.std
        angles = standard[..., None] * self.frequencies
        return torch.where(told, torch.cat([angles.cos(), angles.sin()], dim=-1), self.missing)


def scalar_row(given: Mapping[str, object], names: Sequence[str]) -> Float[Tensor, " scalars"]:
    """One row of values; NaN for a scalar that is not given, or given as None.

    Args:
        given: name to number, or to text that is one.
        names: of the scalars, in their order.

    Raises:
        ValueError: an unknown name, or what is no finite number.
    """
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(
            f"{str(unknown[0])[:60]!r} is no scalar of this model; it knows {', '.join(names)}"
        )
    row = [_number(given[name], name) if name in given else math.nan for name in names]
    return torch.tensor(row, dtype=torch.float32)


def scalar_statistics(
    values: Float[Tensor, "count scalars"], names: Sequence[str]
) -> ScalarStatistics:
    """Mean and standard deviation of each scalar over the rows that have it.

    Args:
        values: NaN where a row has none.
        names: of the scalars.

    Raises:
        ValueError: a scalar that no row has, or that is the same in all of them.
    """
    statistics = []
    for name, column in zip(names, values.double().unbind(1), strict=True):
        told = column[~column.isnan()]
        if not len(told):
            raise ValueError(f"{name} is missing everywhere: leave it out, or give its values")
        mean, std = float(told.mean()), float(told.std(correction=0))
        _require_spread(name, mean, std)
        statistics.append((mean, std))
    means, stds = zip(*statistics, strict=True)
    return ScalarStatistics(means, stds)


def _require_spread(name: str, mean: float, std: float) -> None:
    if not (math.isfinite(mean) and math.isfinite(std)):
        raise ValueError(f"{name} has mean {mean:g} and standard deviation {std:g}: not finite")
    if std <= 0.0:
        raise ValueError(f"{name} is the same everywhere, so it says nothing: leave it out")
    if std < EPS * abs(mean):
        raise ValueError(
            f"{name} has mean {mean:g} and standard deviation {std:g}, which float32 cannot tell "
            "apart: subtract a constant from it"
        )


def _number(given: object, name: str) -> float:
    if given is None:
        return math.nan
    try:
        if isinstance(given, bool) or not isinstance(given, int | float | str):
            raise ValueError
        number = float(given)
    except (ValueError, OverflowError):
        raise ValueError(f"{name} is {str(given)[:60]!r}, which is not a number") from None
    if not abs(number) <= LARGEST:
        raise ValueError(f"{name} is {number:g}: give a finite number, or leave it out")
    return number


def _settle(options: ScalarOptions, latents: LatentSet) -> ScalarCondition:
    names = latents.manifest.scalar_names
    if not names:
        raise DataError(
            f"--condition scalars: {latents.directory} has none; encode with --scalars NAME,NAME"
        )
    try:
        mean, std = scalar_statistics(latents.rows("scalars", range(len(latents))), names)
    except ValueError as error:
        raise DataError(f"{latents.directory}: {error}") from error
    return ScalarCondition(way=options.way, names=names, mean=mean, std=std)


def _build(config: ScalarCondition, widths: Widths) -> ScalarConditioner:
    width = widths.context if config.attended else widths.embedding
    return ScalarConditioner(config.mean, config.std, width, way=config.way)


def _reader(config: ScalarCondition, options: ScalarOptions, latents: LatentSet) -> Reader:
    if latents.manifest.scalar_names != config.names:
        raise DataError(f"{latents.directory} has other scalars than the model")
    return lambda indices, _: latents.rows("scalars", indices)


def _row(config: ScalarCondition, value: object) -> Tensor:
    if not isinstance(value, Mapping):
        raise ValueError(
            f'{str(value)[:60]!r} are no scalars: give an object such as {{"{config.names[0]}": 1.5}}'
        )
    return scalar_row(value, config.names)


SCALARS = Kind(
    settle=_settle,
    build=_build,
    reader=_reader,
    row=_row,
    silence={},
    words=lambda config, value: " ".join(f"{name} {one}" for name, one in value.items()),
)
