"""Latents of a set that a model is measured on, whitened, with what it is told of them, group by group."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldmkit.assembly import diffusion_facts, load_diffusion
from ldmkit.condition_configs import ConditioningConfig
from ldmkit.conditioning.kind import Reader, Values
from ldmkit.conditioning.kinds import KINDS, readers_of, values_of
from ldmkit.data.latent_set import LatentSet
from ldmkit.data.order import generator_for, seed_for
from ldmkit.diffusion.samplers import DenoiseAt
from ldmkit.drawing import denoise_at
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import DiffusionFacts
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.measures_configs import MeasuringConfig
from ldmkit.tensors import Latents
from ldmkit.training.runtime import groups_of, pick_device

CHOICE, CHANCE, POSTERIOR = 20, 21, 22  # places in the seed tree


class Told(NamedTuple):
    """A model, and the latents it is measured on."""

    model: LatentDiffusion
    facts: DiffusionFacts
    latents: LatentSet
    indices: np.ndarray
    """Of the latents to look at, sorted."""
    readers: Mapping[str, Reader]
    """Of what is told; none where nothing is."""
    config: MeasuringConfig

    def generators(self, rows: list[int], place: int) -> list[torch.Generator]:
        """A source of noise for each of some latents, a function of the seed, the latent and `place`."""
        return [generator_for(self.config.seed, place, row) for row in rows]


class Group(NamedTuple):
    """Latents that go through the network together."""

    rows: list[int]
    """Indices into the set; the last ones may be filling, for `kept` says how many count."""
    kept: int


def told_latents(config: MeasuringConfig, num: int | None) -> Told:
    """Load a model and open the latents that a command measures it on.

    Args:
        config: which model, which latents, what is told.
        num: how many latents at most, drawn by the seed; None for all.

    Raises:
        DataError: the latents are of another autoencoder than the model's, of a size it cannot take, do
            not hold what it is told, or none are held back.
        UsageError: the model cannot be told nothing, or the device is not there.
    """
    device = pick_device(config.device)
    facts, latents = diffusion_facts(config.model), LatentSet(config.latents)
    made_by = str(latents.manifest.recipe["autoencoder"])
    if made_by != facts.autoencoder:
        raise DataError(
            f"{config.latents} were made with another autoencoder ({made_by[:12]}) than the latents of "
            f"{config.model} ({facts.autoencoder[:12]}); encode the pictures with that one"
        )
    model = load_diffusion(config.model, device)
    _require_sizes(config, model, facts, latents)
    readers = {}
    if config.told == "set":
        readers = readers_of(model.config.conditions, ConditioningConfig().options_of, latents)
    else:
        _silence(config, model, 1)  # refused before any work
    return Told(model, facts, latents, _indices(config, latents, num), readers, config)


def groups(told: Told) -> Iterator[Group]:
    """The latents in groups of one shape; which go together on the CPU does not change the result."""
    device = told.model.latent_mean.device
    for members in told.latents.shapes.values():
        alike = told.indices[np.isin(told.indices, members)]
        for places, kept in (
            groups_of(len(alike), told.config.batch_size, device) if len(alike) else ()
        ):
            yield Group([int(alike[place]) for place in places.tolist()], kept)


def whitened(told: Told, group: Group, *, drawn: bool) -> Latents:
    """Whitened latents of a group, on the model's device.

    Args:
        told: model and set.
        group: of which latents.
        drawn: from their posteriors, as training sees them; otherwise their means.
    """
    batch = told.latents.read(group.rows)
    raw = batch.mean.float()
    if drawn:
        raw = raw + batch.std.float() * noise_of(told.generators(group.rows, POSTERIOR), raw)
    return told.model.whiten(raw.to(told.model.latent_mean.device))


def denoise_of(told: Told, group: Group) -> DenoiseAt:
    """The model told of a group what it is to be told: a function of latents and noise level alone.

    Without guidance, and without what a self-conditioned network expected in an earlier call.
    """
    condition = told.model.condition(told.model.received(_values(told, group)))
    return lambda x, sigma: told.model.denoise(x, sigma, condition)


def sampling_denoise_of(told: Told, group: Group) -> DenoiseAt:
    """The same for one run of a sampler, where a self-conditioned network does see its earlier estimate."""
    return denoise_at(told.model, _values(told, group), None, torch.zeros(1))


def noise_of(generators: list[torch.Generator], like: Latents) -> Latents:
    """Standard normal noise whose row i is of generator i, drawn on the CPU."""
    rows = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
    return torch.stack(rows).to(like.device)


def _values(told: Told, group: Group) -> Values:
    if told.config.told == "nothing":
        return _silence(told.config, told.model, len(group.rows))
    chance = told.generators(group.rows, CHANCE)
    alone = [
        values_of(told.readers, np.array([row]), source)
        for row, source in zip(group.rows, chance, strict=True)
    ]
    return {kind: torch.cat([one[kind] for one in alone]) for kind in told.readers}


def _silence(config: MeasuringConfig, model: LatentDiffusion, count: int) -> dict[str, Tensor]:
    values = {}
    for condition in model.config.conditions:
        kind = KINDS[condition.kind]
        if kind.silence is None:
            raise UsageError(
                f"--told nothing: {config.model} has to be told {condition.kind}; leave it out"
            )
        row = kind.row(condition, kind.silence)
        values[condition.kind] = torch.stack([row] * count)
    return values


def _indices(config: MeasuringConfig, latents: LatentSet, num: int | None) -> np.ndarray:
    indices = np.arange(len(latents))
    if config.holdout:
        indices = np.delete(indices, latents.training_indices(config.holdout))
        if not len(indices):
            raise DataError(
                f"--holdout {config.holdout:g} keeps none of the {len(latents)} latents in "
                f"{config.latents} back: take a larger share"
            )
    order = np.random.default_rng(seed_for(config.seed, CHOICE)).permutation(len(indices))
    return np.sort(indices[order[:num]])


def _require_sizes(
    config: MeasuringConfig, model: LatentDiffusion, facts: DiffusionFacts, latents: LatentSet
) -> None:
    shrink = 2 ** (len(model.config.unet.multipliers) - 1)
    spatial = any(one.channels for one in model.config.conditions)
    for shape in latents.shapes:
        if any(side % shrink for side in shape[1:]) or (spatial and shape != facts.latent_shape):
            raise DataError(
                f"{config.latents} has latents of {list(shape)}, which {config.model} cannot take: it was "
                f"trained on {list(facts.latent_shape)}"
            )
