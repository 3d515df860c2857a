"""The validation loss: measured on latents that are not trained on, always with the same noise."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ldmkit.assembly import diffusion_config
from ldmkit.conditioning.kind import Reader
from ldmkit.conditioning.kinds import readers_of, values_of
from ldmkit.configfile import read_run_config
from ldmkit.configs import STREAM, TrainDiffusionConfig
from ldmkit.data.latent_set import LatentSet
from ldmkit.data.order import generator_for, seed_for
from ldmkit.diffusion.noise_draw import LEVELS, even_sigmas, level_of
from ldmkit.diffusion.validation import ComparedLosses, compared_losses
from ldmkit.diffusion_configs import ObjectiveConfig
from ldmkit.diffusion_step import Autocast, losses_by_bin
from ldmkit.errors import DataError
from ldmkit.facts import validated
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.terminal import say
from ldmkit.training.run import CONFIG_FILE
from ldmkit.training.runtime import autocast_for, noise_from, pick_device

VALIDATION, VALUES = 7, 9  # places in the seed tree
VALIDATION_BATCH = 16
VALIDATED = ("validation_loss", "validation_linear", "validation_zero")


class HeldBack(NamedTuple):
    """Latents that are not trained on."""

    latents: LatentSet
    indices: np.ndarray
    seed: int
    readers: Mapping[str, Reader]
    """Of what they are told."""


def chosen(indices: np.ndarray, *, count: int, seed: int) -> np.ndarray:
    """At most `count` of these samples, sorted, by chance but always the same ones."""
    order = np.random.default_rng(seed_for(seed, VALIDATION)).permutation(len(indices))
    return np.sort(indices[order[:count]])


def held_back_latents(
    config: TrainDiffusionConfig, latents: LatentSet, training: np.ndarray
) -> HeldBack | None:
    """What the validation loss is measured on, if there is anything.

    Raises:
        DataError: --validation-latents are of another autoencoder, or have other classes.
    """
    if config.validation_latents is None:
        indices = np.delete(np.arange(len(latents)), training)
        if config.holdout and not len(indices):
            say(f"--holdout {config.holdout:g} keeps none of so few latents back: no validation")
        others = latents
    else:
        others = LatentSet(config.validation_latents)
        indices = np.arange(len(others))
        if latents.manifest.recipe["autoencoder"] != others.manifest.recipe["autoencoder"]:
            raise DataError(
                f"{config.validation_latents} are of another autoencoder than {config.latents}: encode "
                "both with one"
            )
    if not len(indices):
        return None
    few = chosen(indices, count=config.validate_num, seed=config.seed)
    readers = readers_of(diffusion_config(config, latents).conditions, config.options_of, others)
    return HeldBack(others, few, config.seed, readers)


def validation_of(run: Path) -> Callable[[LatentDiffusion], float] | None:
    """The validation loss that a run measures, of any model like its own; None where it has none.

    Raises:
        DataError: the run's config or its latents cannot be read.
    """
    file = run / CONFIG_FILE
    config = validated(TrainDiffusionConfig, read_run_config(file), str(file))
    directory = run / "latents" if config.latents == STREAM else config.latents
    if not config.holdout and config.validation_latents is None:
        return None
    if not directory.is_dir():
        say(f"{directory}, the latents of the run, are not there any more: no validation loss")
        return None
    latents = LatentSet(directory)
    held = held_back_latents(config, latents, latents.training_indices(config.holdout))
    if held is None:
        return None
    device = pick_device(config.device)
    autocast = autocast_for(device, config.precision)

    def score(model: LatentDiffusion) -> float:
        return validate(held, model.to(device), autocast, config.objective)["validation_loss"]

    return score


@torch.no_grad()
def validate(
    held: HeldBack, model: LatentDiffusion, autocast: Autocast, objective: ObjectiveConfig
) -> dict[str, float]:
    """Losses on held-back latents: of the model, beside them those that take no learning.

    Noise and noise levels are functions of the seed and the sample, so that two measurements differ by
    the model alone.

    Returns:
        validation_loss, validation_linear, validation_zero, and validation_loss_by_noise_0 ... 9.
    """
    device, count = model.latent_mean.device, len(held.indices)
    sigmas = even_sigmas(
        model.schedule, objective.draw, count, generator_for(held.seed, VALIDATION)
    )
    compared = []
    for rows in _rows_of_one_shape(held):
        batch = held.latents.read(held.indices[rows])
        sources = [generator_for(held.seed, VALIDATION, row) for row in rows.tolist()]
        posterior, noise = (
            torch.cat([noise_from(source)(batch.mean[:1].float()) for source in sources]).to(device)
            for _ in range(2)
        )
        mean, std = batch.mean.to(device).float(), batch.std.to(device).float()
        chance = generator_for(held.seed, VALUES, int(rows[0]))
        values = model.received(values_of(held.readers, held.indices[rows], chance))
        with autocast():
            losses = compared_losses(
                model.denoise,
                model.parameterization,
                model.whiten(mean + std * posterior),
                sigmas[rows].to(device),
                noise,
                model.condition(values),
                objective,
            )
        compared.append((rows, losses))
    return _summary(compared, level_of(model.schedule, sigmas))


def _rows_of_one_shape(held: HeldBack) -> list[np.ndarray]:
    """Places in `held.indices` that go through the network together."""
    shapes = held.latents.shapes.values()
    alike = [np.flatnonzero(np.isin(held.indices, members)) for members in shapes]
    return [
        rows[first : first + VALIDATION_BATCH]
        for rows in alike
        for first in range(0, len(rows), VALIDATION_BATCH)
    ]


def _summary(
    compared: Sequence[tuple[np.ndarray, ComparedLosses]], bins: Int[Tensor, " count"]
) -> dict[str, float]:
    order = np.concatenate([rows for rows, _ in compared])
    columns = zip(*(losses for _, losses in compared), strict=True)
    model, linear, zero = (torch.cat(column).double().cpu() for column in columns)
    total, number = losses_by_bin(model, bins[order])
    means = {"loss": model, "linear": linear, "zero": zero}
    return {f"validation_{name}": float(values.mean()) for name, values in means.items()} | {
        f"validation_loss_by_noise_{place}": float(total[place] / number[place])
        for place in range(LEVELS)
        if number[place]
    }


def as_sentence(quality: dict[str, float]) -> str:
    """The three losses that say whether it learns."""
    loss, linear, zero = (f"{quality[name]:.4g}" for name in VALIDATED)
    return f"validation {loss}, linear {linear}, zero {zero}"
