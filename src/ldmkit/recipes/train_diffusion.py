"""`ldmkit train-diffusion`: latents in, a diffusion model file out."""

from io import BufferedIOBase
from pathlib import Path

import numpy as np
import torch

from ldmkit.assembly import (
    build_diffusion,
    diffusion_config,
    load_autoencoder,
    require_same_autoencoder,
    save_diffusion,
)
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.conditioning.condition import dropped, stacked
from ldmkit.configs import STREAM, TrainDiffusionConfig
from ldmkit.data.latent_set import LatentSet
from ldmkit.data.latent_stream import receive_latents
from ldmkit.data.order import (
    bucketed_indices_of_step,
    generator_for,
    indices_of_step,
    seed_for,
)
from ldmkit.diffusion.denoiser import guided
from ldmkit.diffusion.noise_draw import draw_sigmas
from ldmkit.diffusion.objective import denoising_loss
from ldmkit.diffusion.samplers import sample_ddim
from ldmkit.diffusion_configs import DiffusionConfig
from ldmkit.errors import InterruptedRun, UsageError
from ldmkit.facts import DiffusionFacts, Manifest
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.modelfile import versions
from ldmkit.pixels import grid, to_pixels
from ldmkit.terminal import say, track
from ldmkit.training.averages import averaged_copy, decay_at, update_average
from ldmkit.training.checkpoint import TrainingState
from ldmkit.training.interruption import Interruption
from ldmkit.training.optimization import learning_rate, set_learning_rate
from ldmkit.training.run import due, finished, open_run
from ldmkit.training.runlog import RunLog
from ldmkit.training.runtime import autocast_for, noise_from, pick_device
from ldmkit.training.snapshots import (
    drop_snapshots_after,
    save_snapshot,
    tracked_averages,
    update_tracked,
)

WEIGHTS, NOISE, GLOBAL, PREVIEW = 2, 3, 4, 5  # places in the seed tree
PREVIEWS, COLUMNS = 16, 8


def train_diffusion(config: TrainDiffusionConfig, stream: BufferedIOBase | None = None) -> Path:
    """Train the paper's diffusion model; the same call again resumes, or returns when it is done.

    Args:
        config: what to train on what, to where.
        stream: where the latents come from if `config.latents` is `-`; they are kept in OUT/latents.

    Returns:
        The path of the model file (averaged weights), OUT/diffusion.safetensors.

    Raises:
        DataError: the latent set is unfinished or damaged, or not of the autoencoder given.
        UsageError: OUT holds a run with other settings.
        InterruptedRun: a signal asked to stop; the state is saved.
    """
    result = config.out / "diffusion.safetensors"
    if finished(config, result):
        return result
    device = pick_device(config.device)
    latents = LatentSet(latents_of(config, stream))
    manifest = latents.manifest
    buckets = training_buckets(latents, config.holdout)
    model_config = diffusion_config(config, latents)
    told = f"{model_config.classes} classes" if model_config.classes else "no condition"
    count = sum(len(indices) for indices in buckets)
    shapes = ", ".join(str(shape) for shape in latents.shapes)
    say(f"{count} latents of {shapes} from {config.latents}, {told}")
    autoencoder = None
    if config.ae is not None:
        require_same_autoencoder(manifest.recipe["autoencoder"], config.ae, str(config.latents))
        autoencoder = load_autoencoder(config.ae, device)
    open_run(config)

    torch.manual_seed(seed_for(config.seed, WEIGHTS))
    model = build_diffusion(model_config)
    model.set_whitening(manifest.whitening)
    model.to(device)
    average, tracked = averaged_copy(model), tracked_averages(model, config.average)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.lr, weight_decay=config.weight_decay, fused=True
    )
    modules = {"model": model, "average": average, **tracked}
    state = TrainingState(config.out, modules, {"model": optimizer})
    start = state.load_latest(device)
    drop_snapshots_after(config.out, start)
    log = RunLog(config.out, start, tensorboard=config.tensorboard)
    autocast = autocast_for(device, config.precision)

    means: dict[str, float] = {}
    with (
        Interruption() as stop,
        track("train-diffusion", config.steps, done=start, unit="step") as progress,
    ):
        for step in range(start, config.steps + 1):
            saving = stop.requested or due(step, config.save_every, config.steps)
            if saving or due(step, config.log_every, config.steps):
                means = log.write_means(step, config.batch_size) or means
            if autoencoder and due(step, config.sample_every, config.steps) and step > start:
                pixels = preview(average, autoencoder, manifest, config)
                log.picture(step, "samples", grid(pixels, COLUMNS))
            if tracked and step > 0 and due(step, config.average.snapshots, config.steps):
                latents.wait_until_verified()
                facts = facts_after(step, config, manifest, model_config, count)
                save_snapshot(config.out, step, tracked, model_config, facts, config.average)
            if saving:
                latents.wait_until_verified()  # nothing learnt from damaged latents is kept
                log.flush()
                state.save(step)
            if step == config.steps:
                break
            if stop.requested:
                raise InterruptedRun(f"stopped and saved before step {step}; run again to go on")

            torch.manual_seed(seed_for(config.seed, GLOBAL, step))  # for dropout
            generator = generator_for(config.seed, NOISE, step)
            noise = noise_from(generator)
            batch = latents.read(samples_of_step(step, buckets, config))
            mean, std = batch.mean.to(device).float(), batch.std.to(device).float()
            clean = model.whiten(mean + std * noise(mean))
            sigma = draw_sigmas(model.schedule, config.objective.draw, len(clean), generator)
            sigma = sigma.to(device)
            drop = torch.rand(len(clean), generator=generator) < config.condition_dropout
            with autocast():
                condition = dropped(model.condition(batch.label), model.null(len(clean)), drop)
                loss = denoising_loss(
                    *(model.denoise, model.parameterization, clean, sigma, noise, condition),
                    config.objective,
                ).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            set_learning_rate(optimizer, learning_rate(config.lr, step, config))
            optimizer.step()
            update_average(average, model, decay_at(step, config.average))
            update_tracked(tracked, model, step)
            log.add({"loss": loss})
            progress.advance(note=f"loss {means['loss']:.4f}" if means else "")

    facts = facts_after(config.steps, config, manifest, model_config, count)
    save_diffusion(result, average, facts)
    return result


def facts_after(
    step: int,
    config: TrainDiffusionConfig,
    manifest: Manifest,
    model_config: DiffusionConfig,
    count: int,
) -> DiffusionFacts:
    """The facts of a model after so many steps on `count` latents."""
    chosen = {"ema": {"decay": config.average.decay}, "power": {"width": config.average.width}}
    return DiffusionFacts(
        fingerprint="",
        autoencoder=manifest.recipe["autoencoder"],
        latent_shape=manifest.latent_shape,
        whitening=manifest.whitening,
        class_names=manifest.class_names if model_config.classes else (),
        trained={
            "latents": count,
            "steps": step,
            "seen": step * config.batch_size,
            "average": {"kind": config.average.kind} | chosen[config.average.kind],
            "condition_dropout": config.condition_dropout,
        },
        versions=versions(),
    )


def latents_of(config: TrainDiffusionConfig, stream: BufferedIOBase | None) -> Path:
    """The directory of the latents to train on.

    Raises:
        UsageError: they are to come through a pipe, and there is none; or OUT holds another run.
    """
    if config.latents != STREAM:
        return config.latents
    if stream is None:
        raise UsageError("latents is `-`, and no stream was given to read from")
    open_run(config)
    return receive_latents(stream, config.out / "latents")


def training_buckets(latents: LatentSet, holdout: float) -> list[np.ndarray]:
    """The samples to train on, apart by the shape of their latents.

    Raises:
        DataError: there are none.
    """
    training = latents.training_indices(holdout)
    if len(latents.shapes) == 1:
        return [training]
    buckets = [np.intersect1d(training, indices) for indices in latents.shapes.values()]
    return [indices for indices in buckets if len(indices)]


def samples_of_step(
    step: int, buckets: list[np.ndarray], config: TrainDiffusionConfig
) -> np.ndarray:
    """Indices of the samples of a step, all of one shape."""
    counts, size, seed = [len(indices) for indices in buckets], config.batch_size, config.seed
    if len(buckets) == 1:
        bucket, places = 0, indices_of_step(step, count=counts[0], batch_size=size, seed=seed)
    else:
        bucket, places = bucketed_indices_of_step(step, counts=counts, batch_size=size, seed=seed)
    return buckets[bucket][[index for index, _ in places]]


@torch.no_grad()
def preview(
    model: LatentDiffusion,
    autoencoder: Autoencoder,
    manifest: Manifest,
    config: TrainDiffusionConfig,
) -> torch.Tensor:
    """8-bit pixels of samples from fixed seeds; the classes take turns."""
    device = model.latent_mean.device
    labels = torch.arange(PREVIEWS) % max(model.config.classes, 1)
    noise = noise_from(generator_for(config.seed, PREVIEW))
    sigmas = model.schedule.steps(config.preview_steps)
    start = noise(torch.empty(PREVIEWS, *manifest.latent_shape, device=device))
    condition = stacked(model.condition(labels), model.null(PREVIEWS))
    denoise = guided(model.denoise, config.preview_guidance)
    clean = sample_ddim(
        lambda x, sigma: denoise(x, sigma, condition),
        model.schedule.initial(start, float(sigmas[0])),
        sigmas,
        noise=noise,
    )
    return to_pixels(autoencoder.decode(model.unwhiten(clean)))
