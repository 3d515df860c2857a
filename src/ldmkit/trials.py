"""The largest step that a run may meet, taken for the sake of its memory alone; for both stages.

Trials take it for real, and are measured. Plans take it with tensors that have no memory, and add up.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from ldmkit.assembly import build_autoencoder, build_diffusion, diffusion_config
from ldmkit.autoencoder import training_step as first_stage
from ldmkit.autoencoder.adversarial_phase import Phase
from ldmkit.autoencoder.perceptual import build_perceptual
from ldmkit.autoencoder.training_step import Learners
from ldmkit.conditioning.kinds import readers_of, values_of
from ldmkit.configs import TrainAEConfig, TrainDiffusionConfig
from ldmkit.data.latent_set import LatentBatch, LatentSet
from ldmkit.data.order import generator_for
from ldmkit.diffusion_step import (
    Learner,
    add_gradients,
    divided,
    draw_batch,
    learner_of,
    prepare,
    take_step,
)
from ldmkit.errors import UsageError
from ldmkit.training import ranks
from ldmkit.training.batch_size import batch_sizes, largest_batch
from ldmkit.training.guard import NonFiniteGuard
from ldmkit.training.memory import peak_bytes, pretended
from ldmkit.training.optimizers import moment_bytes
from ldmkit.training.run import with_batch_size
from ldmkit.training.runtime import autocast_for, noise_from, pick_device, settled
from ldmkit.training.snapshots import WIDTHS

AnyStage = TypeVar("AnyStage", TrainAEConfig, TrainDiffusionConfig)
STEPS = 2
"""Steps of a trial: the second one has the optimizers' moments in memory from its beginning."""


def with_largest_batch(
    config: AnyStage, trial: Callable[[AnyStage], object], samples: int
) -> AnyStage:
    """A config whose batch size is the largest that a trial finds room for.

    Args:
        config: with batch size `auto`.
        trial: of its stage.
        samples: to train on; of the commonest shape, where there are several.

    Raises:
        UsageError: memory cannot be measured here, or several processes train together.
        OutOfMemoryError: not even the smallest batch has room.
    """
    if ranks.size() > 1:
        raise UsageError(
            "--batch-size auto finds what one process has room for: give several processes a number"
        )
    sizes = batch_sizes(config.accumulate, smallest_part(config), samples)
    return with_batch_size(config, largest_batch(trial, config, sizes, pick_device(config.device)))


def smallest_part(config: TrainAEConfig | TrainDiffusionConfig) -> int:
    """How many samples have to go through the networks at once."""
    return config.smallest_part if isinstance(config, TrainAEConfig) else 1


def diffusion_trial(latents_at: Path, config: TrainDiffusionConfig) -> None:
    """Train the second stage for a moment, on its largest latents."""
    latents = LatentSet(latents_at)
    settled = diffusion_config(config, latents)
    readers = readers_of(settled.conditions, config.options_of, latents)
    model = build_diffusion(settled).to(pick_device(config.device))
    learner = learner_of(model, config, model.latent_mean.device)
    largest = max(latents.shapes, key=math.prod)
    indices = np.resize(latents.shapes[largest], config.samples_per_step)
    for step in range(STEPS):
        generator = generator_for(config.seed, step)
        values = values_of(readers, indices, generator)
        batch = draw_batch(model, latents.read(indices), values, generator, config)
        take_step(learner, config, step, indices, batch, config.peak_lr)


def autoencoder_trial(config: TrainAEConfig) -> None:
    """Train the first stage for a moment, on its largest pictures, the discriminator counting."""
    device = pick_device(config.device)
    model = build_autoencoder(config.autoencoder, config.preprocessing).to(device)
    take_full_steps(
        first_stage.learners_of(model, build_perceptual(config.loss), config), config, device
    )


def take_full_steps(learners: Learners, config: TrainAEConfig, device: torch.device) -> None:
    """Steps of the first stage in which everything learns that will ever do so."""
    phase = Phase(True, config.disc.weight > 0, config.disc.weight)
    side = max(config.multi_resolution, default=config.preprocessing.size)
    for step in range(0, STEPS * config.disc.r1_every, config.disc.r1_every):  # each with penalty
        generator = generator_for(config.seed, step)
        shape = (config.samples_per_step, config.preprocessing.channels, side, side)
        images = torch.rand(shape, generator=generator) * 2.0 - 1.0
        batch = first_stage.batch_of(images.to(device), None, learners.model, noise_from(generator))
        first_stage.take_step(learners, config, batch, step, phase)


def planned_diffusion(
    config: TrainDiffusionConfig, latents: LatentSet, device: torch.device
) -> int:
    """Bytes of the tensors that the second stage holds at most, on its largest latents."""
    config = _plain(config, device)
    settled = diffusion_config(config, latents)
    with torch.device("meta"):
        model = build_diffusion(settled)
    largest = max(latents.shapes, key=math.prod)
    shape = (config.samples_per_step, *largest)
    readers = readers_of(settled.conditions, config.options_of, latents)
    first = values_of(readers, latents.shapes[largest][:1], generator_for(config.seed))
    config = config.model_copy(update={"compile": False})
    averages = 1 + (len(WIDTHS) if config.average.snapshots else 0)
    weights = sum(parameter.nbytes for parameter in model.parameters())

    def step() -> None:
        prepare(pretended(model), config)
        learner = Learner(
            model=model,
            average=model,  # the step does not touch it; it is counted apart
            tracked={},
            uncertainty=None,  # a hundred numbers
            guard=NonFiniteGuard(),
            optimizers={},
            autocast=autocast_for(torch.device("cpu"), config.precision),
        )
        read = LatentBatch(torch.empty(shape), torch.empty(shape))
        values = {
            kind: torch.zeros((shape[0], *value.shape[1:]), dtype=value.dtype)
            for kind, value in first.items()
        }
        batch = draw_batch(model, read, values, generator_for(config.seed), config)
        parts = divided(batch, range(config.accumulate))
        add_gradients(learner, parts, config.objective)

    return averages * weights + moment_bytes(model, config) + peak_bytes(step)


def planned_autoencoder(config: TrainAEConfig, device: torch.device) -> int:
    """Bytes of the tensors that the first stage holds at most, the discriminator counting."""
    config = _plain(config, device)
    averages = (
        1 if config.ema_decay else 0
    )  # counted apart: fake tensors cannot be copied with care
    config = config.model_copy(update={"ema_decay": 0.0})
    perceptual = build_perceptual(config.loss)
    with torch.device("meta"):
        model = build_autoencoder(config.autoencoder, config.preprocessing)

    def steps() -> None:
        learners = first_stage.learners_of(pretended(model), perceptual, config)
        # what it does with idle codes depends on numbers, which there are none of
        take_full_steps(learners._replace(upkeep=None), config, torch.device("cpu"))

    beside = sum(p.nbytes for p in perceptual.parameters()) if perceptual else 0
    beside += averages * sum(parameter.nbytes for parameter in model.parameters())
    return beside + peak_bytes(steps)


def _plain(config: AnyStage, device: torch.device) -> AnyStage:
    """The same step with at most two parts, and with the precision of the device named."""
    parts = min(config.accumulate, 2)  # further ones hold no more than the second
    changes = {
        "batch_size": config.samples_per_step // config.accumulate * parts,
        "accumulate": parts,
        "precision": settled(config.precision, device),
    }
    return config.model_copy(update=changes)
