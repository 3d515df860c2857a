"""`ldmkit train-ae`: pictures in, an autoencoder file out."""

from pathlib import Path

import torch

from ldmkit.assembly import (
    autoencoder_facts,
    build_autoencoder,
    init_autoencoder,
    save_autoencoder,
)
from ldmkit.autoencoder.adversarial_phase import phase_of
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder.loss import where_valid
from ldmkit.autoencoder.perceptual import PerceptualDistance, box_distance, build_perceptual
from ldmkit.autoencoder.training_step import (
    CODES,
    Learners,
    at_resolution,
    batch_of,
    learners_of,
    take_step,
)
from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.configs import TrainAEConfig
from ldmkit.data.gaps import fill_gaps
from ldmkit.data.images import (
    Split,
    depth_of,
    read_images,
    say_what_is_clipped,
    split,
    training_batches,
)
from ldmkit.data.items import Item
from ldmkit.data.locations import shown
from ldmkit.data.order import generator_for, indices_of_step, seed_for
from ldmkit.data.sources import open_source
from ldmkit.data.survey import usable_items
from ldmkit.durable import sweep_temporaries, temporaries
from ldmkit.errors import CollapseError, InterruptedRun, UsageError
from ldmkit.metrics.reconstruction import psnr
from ldmkit.pixels import grid, to_pixels
from ldmkit.terminal import say, track
from ldmkit.training import ranks
from ldmkit.training.checkpoint import TrainingState
from ldmkit.training.optimization import learning_rate, set_learning_rate
from ldmkit.training.optimizers import parameters_of
from ldmkit.training.run import as_begun, due, finished, interruption, open_run, require_same_run
from ldmkit.training.runlog import RunLog
from ldmkit.training.runtime import noise_from, pick_device
from ldmkit.training.setback import Setback, read_setback, write_setback
from ldmkit.trials import autoencoder_trial, with_largest_batch

WEIGHTS, NOISE = 2, 3  # places in the seed tree; 4, 5 and 6 are DROPOUT, CODES and RESOLUTION
PREVIEWS = 8
CHECK_EVERY = 25
"""Steps between looks at the watch, each of which waits for the device."""
MARGIN = 500
"""Steps before a collapse was noticed in which a state is not trusted any more."""


def train_ae(config: TrainAEConfig) -> Path:
    """Train the paper's autoencoder; the same call again resumes, or returns at once when done.

    Returns:
        The path of the model file, OUT/autoencoder.safetensors.

    Raises:
        DataError: a picture or the data set cannot be used.
        UsageError: OUT holds a run with other settings, or several processes cannot share the work.
        InterruptedRun: a signal asked to stop; the state is saved.
        CollapseError: adversarial training broke down, and again after it was set back.
    """
    result = config.out / "autoencoder.safetensors"
    if finished(as_begun(config), result) and not temporaries(config.out, "**/*"):
        return result
    with ranks.joined(config.device, config.out):
        return _trained(as_begun(config), result)


def _trained(config: TrainAEConfig, result: Path) -> Path:
    """The run in a directory that no other process writes to, but for those of the run itself."""
    if finished(config, result):  # by who had the directory before
        if ranks.first():
            sweep_temporaries(config.out, "**/*")
        return result
    if config.autoencoder.bottleneck == "identity":
        open_run(config)
        model = build_autoencoder(config.autoencoder, config.preprocessing)
        if ranks.first():
            save_autoencoder(result, model, config.preprocessing, {"pictures": 0, "steps": 0})
        return result
    device = pick_device(config.device)
    items = open_source(config, max_bad=config.max_bad).items
    if config.look_first:
        require_same_run(config)
        with ranks.first_before_others():
            items = usable_items(
                items,
                config.preprocessing,
                config.out,
                max_bad=config.max_bad,
                workers=config.workers,
            )
    data = split(items, config.holdout)
    training, held_back = (len(items) for items in data)
    say(f"{training} pictures to train on, {held_back} held back, from {shown(config.data)}")
    say_what_is_clipped(data.training, config.preprocessing)
    depth = depth_of(data.training, config.preprocessing)
    if config.batch_size == "auto":
        config = with_largest_batch(config, autoencoder_trial, training)
    ranks.require_equal_parts(config.samples_per_step, config.accumulate, config.smallest_part)
    if ranks.size() > 1 and device.type == "cpu" and config.disc.norm == "sync-batch":
        raise UsageError("--disc.norm sync-batch works on cuda only: take batch, group or act")
    perceptual = build_perceptual(config.loss)
    open_run(config)
    learners = build_learners(config, perceptual, device)
    optimizers = {"generator": learners.optimizer, "discriminator": learners.disc_optimizer}
    counts_from = config.disc_start + config.disc.warmup
    state = TrainingState(config.out, learners.modules, optimizers, lasting=counts_from)
    state.require_room(2 * sum(p.nbytes for p in parameters_of(optimizers.values())))  # Adam's
    while True:
        setback = read_setback(config.out)
        start = state.load_latest(device)
        if start == 0 and ranks.first():
            begin(config, learners, data.training)
        ranks.share(learners.modules.values())
        try:
            quality = train(config, learners, state, data, start, setback)
            break
        except CollapseError as collapse:
            set_back(config, state, setback, collapse)

    if not ranks.first():
        return result
    trained = {
        "pictures": training,
        "steps": config.steps,
        "holdout": config.holdout,
        "seen": config.steps * config.samples_per_step,
    }
    decodes: tuple[str, ...] = ()
    if config.decoder_only and config.init is not None:
        former = autoencoder_facts(config.init)
        decodes = (former.fingerprint, *former.decodes)
    save_autoencoder(
        result,
        learners.result,
        config.preprocessing,
        trained | quality,
        depth=depth,
        decodes=decodes,
    )
    return result


def train(
    config: TrainAEConfig,
    learners: Learners,
    state: TrainingState,
    data: Split,
    start: int,
    setback: Setback | None,
) -> dict[str, float]:
    """Carry the run from step `start` to its end; returns the quality on held-back pictures.

    Raises:
        CollapseError: adversarial training broke down.
        InterruptedRun: a signal asked to stop; the state is saved.
    """
    device = learners.model.device
    log = RunLog(config.out, start, tensorboard=config.tensorboard)
    if setback is not None and start == setback.step:
        log.write(start, {"set_back_from": float(setback.failed)})
        learners.watch.forgive()
    counts_from = config.disc_start + config.disc.warmup
    previews = (data.held_back or data.training)[:PREVIEWS]
    batches = training_batches(
        data.training,
        config.preprocessing,
        batch_size=config.samples_per_step,
        seed=config.seed,
        start=start,
        workers=config.workers,
        rows=ranks.own(config.samples_per_step),
    )
    means: dict[str, float] = {}
    with (
        interruption(config) as stop,
        track("train-ae", config.steps, done=start, unit="step") as progress,
    ):
        for step in range(start, config.steps + 1):
            stop.look()
            entering = step == counts_from  # a state to fall back to
            saving = stop.saving or entering or due(step, config.save_every, config.steps)
            logging = saving or due(step, config.log_every, config.steps)
            if step > counts_from and (logging or step % CHECK_EVERY == 0):
                learners.watch.raise_if_collapsed(step)
            if logging:
                means = log.write_means(step, config.samples_per_step) or means
            if ranks.first() and due(step, config.sample_every, config.steps) and step > start:
                pictures = fill_gaps(read_images(previews, config.preprocessing)).images
                sheet = grid(compare(learners.result, pictures.to(device)), PREVIEWS)
                log.picture(step, "reconstructions", sheet)
            if saving:
                log.flush()
                state.save(step)
                stop.saved()
            if step == config.steps:
                break
            if stop.stopping:
                raise InterruptedRun(f"stopped and saved before step {step}; run again to go on")

            stop.expect_a_step()
            rate = learning_rate(config.lr, step, config)
            set_learning_rate(learners.optimizer, rate)
            set_learning_rate(learners.disc_optimizer, rate)
            phase = phase_of(step, config.disc_start, config.disc)
            weight = phase.weight * (1.0 if setback is None else 0.5)
            images, valid = fill_gaps(at_resolution(next(batches), config, step))
            noise = noise_from(generator_for(config.seed, NOISE, step))
            valid = valid if valid is None else valid.to(device)
            batch = batch_of(images.to(device), valid, learners.model, noise)
            log.add(take_step(learners, config, batch, step, phase._replace(weight=weight)))
            progress.advance(note=f"pixel {means['pixel']:.4f}" if "pixel" in means else "")
    measured = data.held_back if ranks.first() else []
    quality = evaluate(learners.result, measured, config.preprocessing, config.samples_per_step)
    if quality:
        log.write(config.steps, quality)
        say("held back: " + ", ".join(f"{name} {value:.4g}" for name, value in quality.items()))
    return quality


def build_learners(
    config: TrainAEConfig, perceptual: PerceptualDistance | None, device: torch.device
) -> Learners:
    """Networks with fresh weights, losses and optimizers."""
    torch.manual_seed(seed_for(config.seed, WEIGHTS))
    model = build_autoencoder(config.autoencoder, config.preprocessing).to(device)
    return learners_of(model, perceptual, config)


@torch.no_grad()
def begin(config: TrainAEConfig, learners: Learners, items: list[Item]) -> None:
    """Before the first step: weights of --init, codes by k-means of the first batch's latents."""
    model = learners.model
    missing = sorted(model.state_dict())
    if config.init is not None:
        missing = init_autoencoder(model, config.init)
        names = ", ".join(missing) or "all of them were found"
        say(f"{len(missing)} tensors not loaded from {config.init}: {names}")
    if learners.upkeep is not None:
        latents = None
        if config.autoencoder.codebook.kmeans_start and "codebook.codes" in missing:
            order = indices_of_step(
                0, count=len(items), batch_size=config.samples_per_step, seed=config.seed
            )
            first = read_images([items[index] for index, _ in order], config.preprocessing)
            latents = model.encode(fill_gaps(first).images.to(model.device)).mean
        learners.upkeep.begin(latents, generator_for(config.seed, CODES))
    if learners.average is not None:
        learners.average.load_state_dict(model.state_dict())


def set_back(
    config: TrainAEConfig,
    state: TrainingState,
    former: Setback | None,
    collapse: CollapseError,
) -> None:
    """After a collapse: drop the states that may be spoilt; the next attempt has half the weight.

    Raises:
        CollapseError: it had been done before, or there is no good state.
    """
    failed = collapse.step
    if former is not None:
        raise CollapseError(
            f"{collapse}; so it did before step {former.failed} ({former.reason}), after which it "
            "had half the weight: begin anew with a smaller --disc.weight, or a longer --disc.warmup",
            failed,
        ) from collapse
    last_good = state.drop_after(max(config.disc_start + config.disc.warmup, failed - MARGIN))
    if last_good is None:
        raise collapse
    say(f"{collapse}; going back to step {last_good}, with half the weight of the discriminator")
    if ranks.first():
        write_setback(config.out, Setback(step=last_good, failed=failed, reason=str(collapse)))
    ranks.wait_for_all()


@torch.no_grad()
def compare(model: Autoencoder, images: torch.Tensor) -> torch.Tensor:
    """8-bit pixels of images, followed by their reconstructions from the posterior's mean."""
    was_training = model.training
    model.eval()
    reconstructions = model.decode(model.encode(images).mean)
    model.train(was_training)
    return to_pixels(torch.cat([images, reconstructions]))


@torch.no_grad()
def evaluate(
    model: Autoencoder, items: list[Item], preprocessing: PreprocessingConfig, batch_size: int
) -> dict[str, float]:
    """Mean PSNR (dB) and VGG16 distance of reconstructions of held-back pictures; {} without any."""
    if not items:
        return {}
    model.eval()
    device = model.device
    distance: PerceptualDistance = box_distance().to(device)
    decibels, distances = [], []
    for first in range(0, len(items), batch_size):
        images, valid = fill_gaps(read_images(items[first : first + batch_size], preprocessing))
        images = images.to(device)
        made = model.decode(model.encode(images).mean).clamp(-1.0, 1.0)
        made = where_valid(images, made, valid if valid is None else valid.to(device))
        decibels.append(psnr(images, made))
        distances.append(distance(images, made))
    return {
        "held_back_psnr": float(torch.cat(decibels).mean()),
        "held_back_vgg16": float(torch.cat(distances).mean()),
    }
