"""`ldmkit train-ae`: pictures in, an autoencoder file out."""

from pathlib import Path

import torch

from ldmkit.assembly import build_autoencoder, save_autoencoder
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder.discriminator import PatchDiscriminator, discriminator_loss
from ldmkit.autoencoder.loss import generator_loss
from ldmkit.autoencoder.perceptual import PerceptualDistance, box_distance, build_perceptual
from ldmkit.configs import PreprocessingConfig, TrainAEConfig
from ldmkit.data.images import read_images, split, training_batches
from ldmkit.data.order import generator_for, seed_for
from ldmkit.data.sources import Item, open_source
from ldmkit.errors import InterruptedRun
from ldmkit.metrics.reconstruction import psnr
from ldmkit.pixels import grid, to_pixels
from ldmkit.terminal import say, track
from ldmkit.training.checkpoint import TrainingState
from ldmkit.training.interruption import Interruption
from ldmkit.training.optimization import learning_rate, set_learning_rate
from ldmkit.training.run import due, finished, open_run
from ldmkit.training.runlog import RunLog
from ldmkit.training.runtime import autocast_for, noise_from, pick_device

WEIGHTS, NOISE, GLOBAL = 2, 3, 4  # places in the seed tree
PREVIEWS = 8


def train_ae(config: TrainAEConfig) -> Path:
    """Train the paper's autoencoder; the same call again resumes, or returns at once when done.

    Returns:
        The path of the model file, OUT/autoencoder.safetensors.

    Raises:
        DataError: a picture or the data set cannot be used.
        UsageError: OUT holds a run with other settings.
        InterruptedRun: a signal asked to stop; the state is saved.
    """
    result = config.out / "autoencoder.safetensors"
    if finished(config, result):
        return result
    device = pick_device(config.device)
    source = open_source(config.data)
    training, held_back = split(source.items, config.holdout)
    say(f"{len(training)} pictures to train on, {len(held_back)} held back, from {config.data}")
    perceptual = build_perceptual(config.loss)
    open_run(config)

    torch.manual_seed(seed_for(config.seed, WEIGHTS))
    loss = config.loss
    model = build_autoencoder(config.autoencoder, config.preprocessing).to(device)
    discriminator = PatchDiscriminator(
        config.preprocessing.channels, channels=loss.disc_channels, layers=loss.disc_layers
    ).to(device)
    perceptual = perceptual.to(device) if perceptual else None
    optimizer = torch.optim.Adam(model.parameters(), config.lr, config.betas, fused=True)
    disc_optimizer = torch.optim.Adam(
        discriminator.parameters(), config.lr, config.betas, fused=True
    )
    state = TrainingState(
        config.out,
        {"autoencoder": model, "discriminator": discriminator},
        {"generator": optimizer, "discriminator": disc_optimizer},
    )
    start = state.load_latest(device)
    log = RunLog(config.out, start, tensorboard=config.tensorboard)
    autocast = autocast_for(device, config.precision)
    batches = training_batches(
        training,
        config.preprocessing,
        batch_size=config.batch_size,
        seed=config.seed,
        start=start,
        workers=config.workers,
    )

    means: dict[str, float] = {}
    with (
        Interruption() as stop,
        track("train-ae", config.steps, done=start, unit="step") as progress,
    ):
        for step in range(start, config.steps + 1):
            saving = stop.requested or due(step, config.save_every, config.steps)
            if saving or due(step, config.log_every, config.steps):
                means = log.write_means(step, config.batch_size) or means
            if due(step, config.sample_every, config.steps) and step > start:
                pictures = read_images((held_back or training)[:PREVIEWS], config.preprocessing)
                sheet = grid(compare(model, pictures.to(device)), PREVIEWS)
                log.picture(step, "reconstructions", sheet)
            if saving:
                log.flush()
                state.save(step)
            if step == config.steps:
                break
            if stop.requested:
                raise InterruptedRun(f"stopped and saved before step {step}; run again to go on")

            torch.manual_seed(seed_for(config.seed, GLOBAL, step))  # for dropout
            rate = learning_rate(config.lr, step, config)
            set_learning_rate(optimizer, rate)
            set_learning_rate(disc_optimizer, rate)
            images = next(batches).to(device)
            noise = noise_from(generator_for(config.seed, NOISE, step))
            judged = loss.disc_weight > 0 and step >= loss.disc_start

            discriminator.requires_grad_(False)
            with autocast():
                posterior = model.encode(images)
                reconstructions = model.decode(posterior.sample(noise))
                terms = generator_loss(
                    images,
                    reconstructions,
                    posterior,
                    loss,
                    perceptual=perceptual,
                    discriminator=discriminator if judged else None,
                    last_layer=model.decoder.conv_out.weight,
                )
            optimizer.zero_grad(set_to_none=True)
            terms.total.backward()
            optimizer.step()
            scalars = terms._asdict()

            if judged:
                discriminator.requires_grad_(True)
                with autocast():
                    real, fake = discriminator(images), discriminator(reconstructions.detach())
                    disc_loss = discriminator_loss(real, fake)
                disc_optimizer.zero_grad(set_to_none=True)
                disc_loss.backward()
                disc_optimizer.step()
                scalars |= {
                    "disc_loss": disc_loss,
                    "logits_real": real.mean(),
                    "logits_fake": fake.mean(),
                }

            log.add(scalars)
            progress.advance(note=f"l1 {means['pixel']:.4f}" if means else "")

    quality = evaluate(model, held_back, config.preprocessing, config.batch_size)
    if quality:
        log.write(config.steps, quality)
        say("held back: " + ", ".join(f"{name} {value:.4g}" for name, value in quality.items()))
    trained = {
        "pictures": len(training),
        "steps": config.steps,
        "holdout": config.holdout,
        "seen": config.steps * config.batch_size,
    }
    save_autoencoder(result, model, config.preprocessing, trained | quality)
    return result


@torch.no_grad()
def compare(model: Autoencoder, images: torch.Tensor) -> torch.Tensor:
    """8-bit pixels of images, followed by their reconstructions from the posterior's mean."""
    model.eval()
    reconstructions = model.decode(model.encode(images).mean)
    model.train()
    return to_pixels(torch.cat([images, reconstructions]))


@torch.no_grad()
def evaluate(
    model: Autoencoder, items: list[Item], preprocessing: PreprocessingConfig, batch_size: int
) -> dict[str, float]:
    """Mean PSNR (dB) and VGG16 distance of reconstructions of held-back pictures; {} without any."""
    if not items:
        return {}
    model.eval()
    device = next(model.parameters()).device
    distance: PerceptualDistance = box_distance().to(device)
    decibels, distances = [], []
    for first in range(0, len(items), batch_size):
        images = read_images(items[first : first + batch_size], preprocessing).to(device)
        reconstructions = model.decode(model.encode(images).mean)
        decibels.append(psnr(images, reconstructions))
        distances.append(distance(images, reconstructions.clamp(-1.0, 1.0)))
    model.train()
    return {
        "held_back_psnr": float(torch.cat(decibels).mean()),
        "held_back_vgg16": float(torch.cat(distances).mean()),
    }
