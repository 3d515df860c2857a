"""One step of each side of the first stage: the autoencoder's, then the discriminator's.

Both see the same pictures, the discriminator those reconstructions that the autoencoder was judged
by, cut off from its graph (Esser et al. 2021). Neither side's gradients reach the other's weights.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldmkit.autoencoder.adversarial_phase import CollapseWatch, Phase
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder.codebook import CodebookUpkeep
from ldmkit.autoencoder.discriminator import (
    DISCRIMINATOR_LOSSES,
    PatchDiscriminator,
    accuracy,
    gradient_penalty,
)
from ldmkit.autoencoder.loss import (
    Adversary,
    GeneratorLoss,
    ReconstructionLoss,
    Valid,
    where_valid,
)
from ldmkit.autoencoder.perceptual import PerceptualDistance
from ldmkit.autoencoder.posterior import Posterior
from ldmkit.configs import TrainAEConfig
from ldmkit.data.order import generator_for, seed_for
from ldmkit.data.preprocessing import AnySize, resize
from ldmkit.tensors import Images, Latents, Noise
from ldmkit.training import ranks
from ldmkit.training.averages import averaged_copy, update_average, warmed_decay
from ldmkit.training.optimization import clip_gradients
from ldmkit.training.optimizers import parameters_of
from ldmkit.training.runtime import autocast_for, on_device

DROPOUT, CODES, RESOLUTION = 4, 5, 6  # places in the seed tree
LARGEST_FIRST = 10
"""Steps at the largest resolution, so that a lack of memory shows at once."""


class Learners(NamedTuple):
    """Everything of the first stage that learns, and what it learns by."""

    model: Autoencoder
    average: Autoencoder | None
    loss: ReconstructionLoss
    discriminator: PatchDiscriminator
    upkeep: CodebookUpkeep | None
    watch: CollapseWatch
    optimizer: Optimizer
    disc_optimizer: Optimizer
    autocast: Callable[[], AbstractContextManager[object]]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds, by name."""
        parts: dict[str, nn.Module | None] = {
            "autoencoder": self.model,
            "average": self.average,
            "loss": self.loss,
            "discriminator": self.discriminator,
            "upkeep": self.upkeep,
            "watch": self.watch,
        }
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def result(self) -> Autoencoder:
        """The autoencoder that is shown, judged and saved."""
        return self.average or self.model


class Part(NamedTuple):
    """A batch, or as much of one as goes through the networks at once."""

    images: Images
    valid: Valid | None
    """Pixels that count; all if None."""
    noise: Latents
    """What the posterior is drawn with."""
    seed: int = 0
    """Of dropout; each part has its own."""


class Shown(NamedTuple):
    """What the autoencoder made of a part, without its graph."""

    images: Images
    reconstructions: Images
    latents: Latents


def learners_of(
    model: Autoencoder, perceptual: PerceptualDistance | None, config: TrainAEConfig
) -> Learners:
    """A model with its adversary, losses and optimizers, ready to train where its weights are."""
    device = model.device
    model.checkpoint_activations(config.checkpointing)
    frozen = [model.encoder, model.to_moments, model.codebook] if config.decoder_only else []
    for module in frozen:
        if module is not None:
            module.requires_grad_(False)
    discriminator = PatchDiscriminator(config.preprocessing.channels, config.disc)
    discriminator = on_device(discriminator, device)
    loss = ReconstructionLoss(config.loss, perceptual.to(device) if perceptual else None)
    loss = on_device(loss, device)
    trained = [p for p in (*model.parameters(), *loss.parameters()) if p.requires_grad]
    disc_trained = list(discriminator.parameters())
    codebook = None if config.decoder_only else model.codebook
    return Learners(
        model=model,
        average=averaged_copy(model) if config.ema_decay else None,
        loss=loss,
        discriminator=discriminator,
        upkeep=CodebookUpkeep(codebook) if codebook is not None else None,
        watch=on_device(CollapseWatch(config.disc), device),
        optimizer=torch.optim.Adam(trained, config.lr, config.betas, fused=True),
        disc_optimizer=torch.optim.Adam(disc_trained, config.lr, config.betas, fused=True),
        autocast=autocast_for(device, config.precision),
    )


def batch_of(images: Images, valid: Valid | None, model: Autoencoder, noise: Noise) -> Part:
    """A batch with the noise for its latents, which is the same however it is divided.

    Args:
        images: this process's rows of the batch.
        valid: pixels of them that count.
        model: whose latents.
        noise: of the whole batch.
    """
    factor = model.config.factor
    size = (images.shape[2] // factor, images.shape[3] // factor)
    drawn = ranks.own_noise(noise)(images.new_empty(len(images), model.latent_channels, *size))
    return Part(images, valid, drawn)


def divided(batch: Part, seeds: Sequence[int]) -> list[Part]:
    """Parts of equal size, one for each seed."""
    count = len(seeds)
    masks = [None] * count if batch.valid is None else batch.valid.chunk(count)
    parts = zip(batch.images.chunk(count), masks, batch.noise.chunk(count), seeds, strict=True)
    return [Part(*part) for part in parts]


def reconstruct(learners: Learners, part: Part) -> tuple[Images, Posterior]:
    """A part's reconstructions, with the pictures' own values where pixels do not count."""
    model = learners.model
    torch.manual_seed(part.seed)
    with learners.autocast():
        posterior = model.encode(part.images)
        reconstructions = model.decode(posterior.sample(lambda mean: part.noise.to(mean.dtype)))
    return where_valid(part.images, reconstructions.float(), part.valid), posterior


def take_step(
    learners: Learners, config: TrainAEConfig, batch: Part, step: int, phase: Phase
) -> dict[str, Tensor]:
    """One step of whichever side learns in this phase; returns what it adds to the log."""
    places = ranks.own_places(config.accumulate)
    seeds = [seed_for(config.seed, DROPOUT, step, place) for place in places]
    parts = divided(batch, seeds)
    scalars: dict[str, Tensor] = {}
    if phase.autoencoder_learns:
        shown, terms = update_autoencoder(learners, config, parts, phase.weight)
        distance = terms.perceptual if learners.loss.has_perceptual else terms.pixel
        learners.watch.note_autoencoder(terms.total, distance)
        scalars |= terms._asdict()
        if learners.upkeep is not None:
            latents = torch.cat([part.latents for part in shown])
            draw = generator_for(config.seed, CODES, step)
            scalars |= learners.upkeep.update(latents, draw)
        if learners.average is not None:
            update_average(learners.average, learners.model, warmed_decay(step, config.ema_decay))
    else:
        shown = watch_autoencoder(learners, parts)
    if phase.discriminator_learns:
        penalize = config.disc.r1_weight > 0 and step % config.disc.r1_every == 0
        judged = update_discriminator(learners, config, shown, penalize=penalize)
        if phase.autoencoder_learns:
            learners.watch.note_discriminator(judged["accuracy"])
        scalars |= judged
    return scalars


def update_autoencoder(
    learners: Learners, config: TrainAEConfig, parts: Sequence[Part], weight: float
) -> tuple[list[Shown], GeneratorLoss]:
    """One step of the autoencoder.

    Args:
        learners: whose model moves.
        config: of the run.
        parts: of the batch.
        weight: of the adversarial loss; at 0 the discriminator is not even asked.

    Returns:
        What it made of each part, and the terms of its loss, means over the parts of all processes.
    """
    learners.discriminator.requires_grad_(False)
    adversary = None
    if weight > 0:
        adversary = Adversary(
            learners.discriminator, weight, learners.model.last_layer, config.disc.max_adaptive
        )
    learners.optimizer.zero_grad(set_to_none=True)
    shown, terms = [], []
    for part in parts:
        reconstructions, posterior = reconstruct(learners, part)
        with learners.autocast():
            loss = learners.loss(
                part.images, reconstructions, posterior, valid=part.valid, adversary=adversary
            )
        (loss.total / len(parts)).backward()
        shown.append(Shown(part.images, reconstructions.detach(), posterior.mean.detach()))
        terms.append([term.detach() for term in loss])
    ranks.average_gradients(parameters_of([learners.optimizer]))
    clip_gradients(learners.optimizer, config.clip_norm)
    learners.optimizer.step()
    means = [torch.stack(term).mean() for term in zip(*terms, strict=True)]
    return shown, GeneratorLoss(*ranks.mean_over_ranks(means))


@torch.no_grad()
def watch_autoencoder(learners: Learners, parts: Sequence[Part]) -> list[Shown]:
    """What the autoencoder makes of each part while it waits."""
    shown = []
    for part in parts:
        reconstructions, posterior = reconstruct(learners, part)
        shown.append(Shown(part.images, reconstructions, posterior.mean))
    return shown


def update_discriminator(
    learners: Learners, config: TrainAEConfig, shown: Sequence[Shown], *, penalize: bool
) -> dict[str, Tensor]:
    """One step of the discriminator.

    Args:
        learners: whose discriminator moves.
        config: of the run.
        shown: pictures and reconstructions.
        penalize: add the gradient penalty, for all the steps until it is added again.

    Returns:
        Its loss, accuracy and mean logits, means over the parts of all processes.
    """
    discriminator = learners.discriminator.requires_grad_(True)
    learners.disc_optimizer.zero_grad(set_to_none=True)
    scalars: dict[str, list[Tensor]] = {}
    for images, reconstructions, _ in shown:
        with learners.autocast():
            real, fake = discriminator(images), discriminator(reconstructions)
            loss = DISCRIMINATOR_LOSSES[config.disc.loss](real, fake)
        numbers = {"disc_loss": loss, "accuracy": accuracy(real, fake)}
        numbers |= {"logits_real": real.float().mean(), "logits_fake": fake.float().mean()}
        if penalize:
            numbers["r1"] = gradient_penalty(discriminator, images)
            loss = loss + config.disc.r1_weight * config.disc.r1_every * numbers["r1"]
        (loss / len(shown)).backward()
        for name, value in numbers.items():
            scalars.setdefault(name, []).append(value.detach())
    ranks.average_gradients(parameters_of([learners.disc_optimizer]))
    clip_gradients(learners.disc_optimizer, config.clip_norm)
    learners.disc_optimizer.step()
    means = [torch.stack(values).mean() for values in scalars.values()]
    return dict(zip(scalars, ranks.mean_over_ranks(means), strict=True))


def at_resolution(images: AnySize, config: TrainAEConfig, step: int) -> AnySize:
    """The batch at one of the sides of --multi-resolution, chosen by (seed, step)."""
    sides = sorted(config.multi_resolution, reverse=True)
    if not sides:
        return images
    pick = torch.randint(len(sides), (), generator=generator_for(config.seed, RESOLUTION, step))
    side = sides[0 if step < LARGEST_FIRST else int(pick)]
    return resize(images, (side, side), config.preprocessing.resize)
