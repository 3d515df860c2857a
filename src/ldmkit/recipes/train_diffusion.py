"""`ldmkit train-diffusion`: latents in, a diffusion model file out."""

from collections.abc import Mapping
from functools import partial
from io import BufferedIOBase
from pathlib import Path
from typing import NamedTuple

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
from ldmkit.canvas import pixels_of_a_latent
from ldmkit.conditioning.box_lists import draw_boxes
from ldmkit.conditioning.kind import Reader
from ldmkit.conditioning.kinds import KINDS, in_words, readers_of, values_of
from ldmkit.conditioning.layout import boxes_of_rows
from ldmkit.configs import STREAM, TrainDiffusionConfig
from ldmkit.data.latent_batches import samples_of_step, training_buckets
from ldmkit.data.latent_set import LatentSet
from ldmkit.data.latent_stream import receive_latents
from ldmkit.data.order import generator_for, seed_for
from ldmkit.diffusion_configs import DiffusionConfig
from ldmkit.diffusion_step import (
    Learner,
    draw_batch,
    learner_of,
    take_step,
)
from ldmkit.drawing import Manner, draw_latents, guide_together
from ldmkit.durable import sweep_temporaries, temporaries
from ldmkit.errors import InterruptedRun, NonFiniteError, UsageError
from ldmkit.facts import DiffusionFacts
from ldmkit.held_back import VALIDATED, VALUES, HeldBack, as_sentence, held_back_latents, validate
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.modelfile import versions
from ldmkit.pixels import grid, to_pixels
from ldmkit.terminal import say, track
from ldmkit.training import ranks
from ldmkit.training.checkpoint import TrainingState
from ldmkit.training.guard import PATIENCE, NonFiniteGuard
from ldmkit.training.optimization import learning_rate, lr_decay
from ldmkit.training.optimizers import moment_bytes
from ldmkit.training.recomputation import compilation_explained
from ldmkit.training.run import as_begun, due, finished, interruption, open_run
from ldmkit.training.runlog import RunLog
from ldmkit.training.runtime import noise_from, pick_device
from ldmkit.training.sharding import runnable
from ldmkit.training.snapshots import (
    drop_snapshots_after,
    save_snapshot,
)
from ldmkit.trials import diffusion_trial, with_largest_batch

WEIGHTS, NOISE, PREVIEW = 2, 3, 5  # places in the seed tree; 4 is DROPOUT, 8 UNCERTAINTY
PREVIEWS, COLUMNS = 16, 8
NAMED = 8
"""Samples whose keys are told when an update is left out."""


class Data(NamedTuple):
    """What is trained on, and what the validation loss is measured on."""

    latents: LatentSet
    buckets: list[np.ndarray]
    """Samples to train on, apart by the shape of their latents."""
    readers: Mapping[str, Reader]
    """Of what the samples are told."""
    held_back: HeldBack | None


def train_diffusion(config: TrainDiffusionConfig, stream: BufferedIOBase | None = None) -> Path:
    """Train the paper's diffusion model; the same call again resumes, or returns when it is done.

    Args:
        config: what to train on what, to where.
        stream: where the latents come from if `config.latents` is `-`; they are kept in OUT/latents.

    Returns:
        The path of the model file (averaged weights), OUT/diffusion.safetensors.

    Raises:
        DataError: the latent set is unfinished or damaged, or not of the autoencoder given.
        UsageError: OUT holds a run with other settings, the network cannot be compiled, or several
            processes cannot share the work.
        InterruptedRun: a signal asked to stop; the state is saved.
        NonFiniteError: too many updates in a row had to be left out; the state is saved.
    """
    result = config.out / "diffusion.safetensors"
    if finished(as_begun(config), result) and not temporaries(config.out, "**/*"):
        return result
    with ranks.joined(config.device, config.out):
        return _trained(as_begun(config), result, stream)


def _trained(config: TrainDiffusionConfig, result: Path, stream: BufferedIOBase | None) -> Path:
    """The run in a directory that no other process writes to, but for those of the run itself."""
    if finished(config, result):  # by who had the directory before
        if ranks.first():
            sweep_temporaries(config.out, "**/*")
        return result
    device = pick_device(config.device)
    latents_at = latents_of(config, stream)
    latents = LatentSet(latents_at, verify=ranks.first())
    manifest = latents.manifest
    buckets = training_buckets(latents, config.holdout)
    training = np.concatenate(buckets)
    model_config = diffusion_config(config, latents)
    told = ", ".join(in_words(condition) for condition in model_config.conditions) or "no condition"
    readers = readers_of(model_config.conditions, config.options_of, latents)
    shapes = ", ".join(str(shape) for shape in latents.shapes)
    say(f"{len(training)} latents of {shapes} from {config.latents}, {told}")
    if config.batch_size == "auto":
        trial = partial(diffusion_trial, latents_at)
        config = with_largest_batch(config, trial, max(map(len, buckets)))
    ranks.require_equal_parts(config.samples_per_step, config.accumulate)
    if config.scale_lr:
        say(f"learning rate {config.peak_lr:g} = {config.lr:g} x {config.samples_per_step} samples")
    held_back, autoencoder = None, None
    if ranks.first():  # previews and the validation loss are its work
        held_back = held_back_latents(config, latents, training)
    if config.ae is not None and ranks.first():
        require_same_autoencoder(manifest.recipe["autoencoder"], config.ae, str(config.latents))
        autoencoder = load_autoencoder(config.ae, device)
    open_run(config)
    if config.shard == "fsdp2" and ranks.size() == 1:
        say("--shard fsdp2: one process has nobody to divide weights with, so it holds all")

    model = fresh_model(config, model_config, latents)
    ranks.share([model])
    learner = learner_of(model, config, device)
    data = Data(latents, buckets, readers, held_back)
    quality = train(config, learner, data, autoencoder)

    average = runnable(learner.average)
    if ranks.first():
        facts = facts_after(config.steps, config, learner, data, quality)
        save_diffusion(result, average, facts)
    return result


def facts_after(
    step: int, config: TrainDiffusionConfig, learner: Learner, data: Data, quality: dict[str, float]
) -> DiffusionFacts:
    """The facts of a model after so many steps."""
    manifest, average = data.latents.manifest, config.average
    chosen = {"ema": {"decay": average.decay}, "power": {"width": average.width}}
    trained: dict[str, object] = {
        "latents": sum(len(indices) for indices in data.buckets),
        "steps": step,
        "seen": step * config.samples_per_step,
        "average": {"kind": average.kind} | chosen[average.kind],
        "condition_dropout": config.condition_dropout,
        **{name: quality[name] for name in VALIDATED if quality},
    }
    if config.scale_lr:
        trained["learning_rate"] = config.peak_lr
    if int(learner.guard.skipped):
        trained["skipped_updates"] = int(learner.guard.skipped)
    return DiffusionFacts(
        fingerprint="",
        autoencoder=manifest.recipe["autoencoder"],
        latent_shape=manifest.latent_shape,
        factor=pixels_of_a_latent(manifest),
        whitening=manifest.whitening,
        trained=trained,
        versions=versions(),
    )


def train(
    config: TrainDiffusionConfig, learner: Learner, data: Data, autoencoder: Autoencoder | None
) -> dict[str, float]:
    """Carry the run from its newest checkpoint to its end; returns the losses on held-back latents.

    Raises:
        InterruptedRun: a signal asked to stop; the state is saved.
        NonFiniteError: too many updates in a row had to be left out; the state is saved.
    """
    model, average, tracked, uncertainty, guard, optimizers, autocast = learner
    balance = {"uncertainty": uncertainty} if uncertainty is not None else {}
    modules = {"model": model, "average": average, "guard": guard, **tracked, **balance}
    state = TrainingState(config.out, modules, optimizers)
    start = state.load_latest(model.latent_mean.device)
    state.require_room(moment_bytes(model, config))
    drop_snapshots_after(config.out, start)
    log = RunLog(config.out, start, tensorboard=config.tensorboard)
    (validates,) = ranks.any_rank(data.held_back is not None)
    means: dict[str, float] = {}
    quality: dict[str, float] = {}
    rate = 0.0
    with (
        interruption(config) as stop,
        track("train-diffusion", config.steps, done=start, unit="step") as progress,
    ):
        for step in range(start, config.steps + 1):
            stop.look()
            last = step == config.steps
            saving = stop.saving or due(step, config.save_every, config.steps)
            logging = saving or due(step, config.log_every, config.steps)
            looking = logging or guard.look_is_due(step)
            trouble = look_at(guard, data.latents) if looking else None
            if logging or trouble:
                also = {"learning_rate": rate, "skipped_updates": float(guard.skipped)}
                means = log.write_means(step, config.samples_per_step, also) or means
            picturing = config.ae is not None and due(step, config.sample_every, config.steps)
            picturing = picturing and step > start
            measuring = validates and due(step, config.validate_every, config.steps)
            measuring = measuring and (step > start or last)
            seen = runnable(average) if picturing or measuring else average
            if autoencoder and picturing:
                pixels = preview(seen, autoencoder, data, config)
                log.picture(step, "samples", grid(pixels, COLUMNS))
            if data.held_back and measuring:
                quality = validate(data.held_back, seen, autocast, config.objective)
                log.write(step, quality)
                say(f"step {step}: {as_sentence(quality)}")
            del seen  # where the average is divided, a copy of all of it
            if tracked and step > 0 and due(step, config.average.snapshots, config.steps):
                data.latents.wait_until_verified()
                facts = facts_after(step, config, learner, data, {})
                save_snapshot(config.out, step, tracked, model.config, facts, config.average)
            if saving or trouble:
                data.latents.wait_until_verified()  # nothing learnt from damaged latents is kept
                log.flush()
                state.save(step)
                stop.saved()
            if trouble:
                raise trouble
            if last:
                break
            if stop.stopping:
                raise InterruptedRun(f"stopped and saved before step {step}; run again to go on")

            stop.expect_a_step()
            indices = samples_of_step(
                step, data.buckets, batch_size=config.samples_per_step, seed=config.seed
            )
            generator = generator_for(config.seed, NOISE, step)
            read = data.latents.read(indices[ranks.own(len(indices))])
            values = values_of(data.readers, indices, generator_for(config.seed, VALUES, step))
            batch = draw_batch(model, read, values, generator, config)
            rate = learning_rate(config.peak_lr, step, config) * lr_decay(step, config)
            with compilation_explained():
                log.add(take_step(learner, config, step, indices, batch, rate))
            progress.advance(note=f"loss {means['loss']:.4f}" if "loss" in means else "")
    return quality


def fresh_model(
    config: TrainDiffusionConfig, model_config: DiffusionConfig, latents: LatentSet
) -> LatentDiffusion:
    """A model with fresh weights, and what it takes over from the data."""
    torch.manual_seed(seed_for(config.seed, WEIGHTS))
    model = build_diffusion(model_config)
    model.set_whitening(latents.manifest.whitening)
    for kind, conditioner in model.conditioners.items():
        KINDS[kind].start(conditioner, latents)
    return model


def look_at(guard: NonFiniteGuard, latents: LatentSet) -> NonFiniteError | None:
    """Name the samples of updates that were left out; an error if these are too many in a row."""
    skipped, exhausted = guard.look()
    keys = list(latents.texts("key")) if skipped else []
    names = ""
    for step, indices in skipped:
        more = f" and {len(indices) - NAMED} more" if len(indices) > NAMED else ""
        names = ", ".join(keys[index] for index in indices[:NAMED]) + more
        say(f"step {step}: loss or gradient is not finite, so no update; samples {names}")
    if not exhausted:
        return None
    return NonFiniteError(
        f"{PATIENCE} updates in a row had a loss or gradient that is not finite, the last one at step "
        f"{skipped[-1].step} with {names}; the weights from before are saved: look at these latents "
        "(ldmkit inspect), or take a lower --lr in a new run; run again to try the next samples"
    )


def latents_of(config: TrainDiffusionConfig, stream: BufferedIOBase | None) -> Path:
    """The directory of the latents to train on.

    Raises:
        UsageError: they are to come through a pipe, and there is none, or several processes would read
            it; or OUT holds another run.
    """
    if config.latents != STREAM:
        return config.latents
    if stream is None:
        raise UsageError("latents is `-`, and no stream was given to read from")
    if ranks.size() > 1:
        raise UsageError(
            "several processes cannot read one pipe: let `encode` write a directory first"
        )
    open_run(config)
    return receive_latents(stream, config.out / "latents")


def preview(
    model: LatentDiffusion, autoencoder: Autoencoder, data: Data, config: TrainDiffusionConfig
) -> torch.Tensor:
    """8-bit pixels of samples from fixed seeds, told what some of the latents are; classes take turns."""
    latents = data.latents
    of_shape = latents.shapes[latents.manifest.latent_shape]
    indices = latents.in_turns(of_shape)[np.arange(PREVIEWS) % len(of_shape)]
    values = values_of(data.readers, indices, generator_for(config.seed, VALUES))
    shape = (PREVIEWS, *latents.manifest.latent_shape)
    noise = noise_from(generator_for(config.seed, PREVIEW))
    guide = guide_together(model.config.conditions, config.preview_guidance)
    clean = draw_latents(model, values, shape, noise, Manner(config.preview_steps, guide))
    with torch.no_grad():
        pixels = to_pixels(autoencoder.decode(clean))
    for told in model.config.conditions:
        if told.kind == "layout" and pixels.shape[1] == 3:
            rows = [torch.from_numpy(latents.boxes(index)) for index in indices.tolist()]
            boxes = [boxes_of_rows(row, len(told.names)) for row in rows]
            pixels = draw_boxes(pixels, boxes, told.names)
    return pixels
