"""One step of the second stage: a batch with everything random about it, its losses, its gradients.

All that is random is drawn for the whole batch before it is divided among processes and into parts, so
that the parts see the same samples, noise levels and noise however many they are, wherever they are.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from ldmkit.conditioning.condition import replaced
from ldmkit.conditioning.kind import Values
from ldmkit.conditioning.self_conditioning import SHARE, estimating_first
from ldmkit.configs import TrainDiffusionConfig
from ldmkit.data.latent_set import LatentBatch
from ldmkit.data.order import generator_for, seed_for
from ldmkit.diffusion.noise_draw import LEVELS, draw_sigmas, level_of
from ldmkit.diffusion.objective import denoising_loss
from ldmkit.diffusion.weighting import Uncertainty
from ldmkit.diffusion_configs import ObjectiveConfig
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.networks.blocks import ResidualBlock
from ldmkit.networks.unet import Stage
from ldmkit.tensors import Latents, Mask, Noise, Scalar, Sigmas
from ldmkit.training import ranks
from ldmkit.training.averages import averaged_copy, decay_at, update_average
from ldmkit.training.guard import NonFiniteGuard, step_if
from ldmkit.training.optimization import gradient_norm, set_learning_rate
from ldmkit.training.optimizers import build_optimizers, parameters_of
from ldmkit.training.recomputation import recompute
from ldmkit.training.runlog import Weighted
from ldmkit.training.runtime import autocast_for, noise_from, on_device
from ldmkit.training.sharding import move_buffers, shard, shard_like, shares_weights
from ldmkit.training.snapshots import tracked_averages, update_tracked

DROPOUT, UNCERTAINTY = 4, 8  # places in the seed tree
Autocast = Callable[[], AbstractContextManager[object]]


class Learner(NamedTuple):
    """Everything of the second stage that learns, and what it learns by."""

    model: LatentDiffusion
    average: LatentDiffusion
    tracked: Mapping[str, LatentDiffusion]
    """Averages of which snapshots are written."""
    uncertainty: Uncertainty | None
    """Balances the noise levels, where the objective asks for it."""
    guard: NonFiniteGuard
    optimizers: Mapping[str, Optimizer]
    autocast: Autocast


class Part(NamedTuple):
    """A batch, or as much of one as goes through the network at once."""

    latents: Latents
    """Clean and whitened."""
    values: dict[str, Tensor]
    """What the samples are told."""
    sigma: Sigmas
    remembers: Mask
    """Which samples see the network's own estimate, where it is self-conditioned."""
    bins: Int[Tensor, " batch"]
    """Of the noise levels."""
    noise: Noise
    seed: int = 0
    """Of dropout; each part has its own."""


def divides_weights(config: TrainDiffusionConfig) -> bool:
    """Whether the processes divide the weights: it is asked for, and there are several."""
    return config.shard == "fsdp2" and ranks.size() > 1


def prepare(model: LatentDiffusion, config: TrainDiffusionConfig) -> None:
    """Let a model compute its activations again and be compiled, as the config asks."""
    if config.checkpointing:
        recompute(part for part in model.unet.modules() if isinstance(part, Stage))
    if config.compile:  # torch 2.13 fails on divided weights where a size is left open
        model.unet.compile(dynamic=False if divides_weights(config) else None)


def blocks_of(model: LatentDiffusion) -> list[nn.Module]:
    """What is put together at a time where a model is divided among processes, the inner ones first."""
    stages = [part for part in model.unet.modules() if isinstance(part, Stage)]
    within = {id(part) for stage in stages for part in stage.modules()}
    lone = [
        part
        for part in model.unet.modules()
        if isinstance(part, ResidualBlock) and id(part) not in within
    ]
    told = [part for part in model.conditioners.values() if any(True for _ in part.parameters())]
    return [*stages, *lone, *told, model.unet]


def learner_of(
    model: LatentDiffusion, config: TrainDiffusionConfig, device: torch.device
) -> Learner:
    """A model with its averages and optimizers, ready to train on a device.

    Where it is to be divided among processes, it should come on the CPU: then the device never holds all of it.
    """
    divides = divides_weights(config)
    if not divides:
        on_device(model, device)
    average = averaged_copy(model)  # before what follows, which is for training alone
    tracked = tracked_averages(model, config.average)
    prepare(model, config)
    if divides:
        shard(blocks_of(model), device)
        for kept in (average, *tracked.values()):
            shard_like(kept, model)
        for module in (model, average, *tracked.values()):
            move_buffers(module, device)
    uncertainty, optimizers = None, build_optimizers(model, config)
    if config.objective.weighting == "uncertainty":
        uncertainty = on_device(Uncertainty(generator_for(config.seed, UNCERTAINTY)), device)
        weights = uncertainty.parameters()
        optimizers["uncertainty"] = torch.optim.AdamW(weights, weight_decay=0.0, fused=True)
    return Learner(
        model=model,
        average=average,
        tracked=tracked,
        uncertainty=uncertainty,
        guard=NonFiniteGuard(),
        optimizers=optimizers,
        autocast=autocast_for(device, config.precision),
    )


def draw_batch(
    model: LatentDiffusion,
    batch: LatentBatch,
    values: Values,
    generator: torch.Generator,
    config: TrainDiffusionConfig,
) -> Part:
    """Everything random about a batch, in a fixed order; of several processes each gets its rows.

    Args:
        model: its device, whitening and schedule.
        batch: this process's rows, as read.
        values: what the samples of the whole batch are told.
        generator: of the step.
        config: distribution of the noise levels, and the share of samples that are told nothing.
    """
    device = model.latent_mean.device
    noise = ranks.own_noise(noise_from(generator))
    mean, std = batch.mean.to(device).float(), batch.std.to(device).float()
    latents = model.whiten(mean + std * noise(mean))
    count = ranks.size() * len(latents)
    rows = ranks.own(count)
    sigma = draw_sigmas(model.schedule, config.objective.draw, count, generator)[rows]
    told = model.received({kind: value[rows] for kind, value in values.items()})
    empty = model.empty(told)
    for kind, share in config.dropouts(tuple(told)).items():
        drop = torch.rand(count, generator=generator) < share
        told[kind] = replaced(told[kind], empty[kind], drop[rows])
    if "class" in told and told["class"].shape[1] > 1:  # of several label sets each alone as well
        drawn = torch.rand((count, told["class"].shape[1]), generator=generator)
        alone = drawn[rows] < config.set_dropout
        told["class"] = torch.where(alone.to(device), empty["class"], told["class"])
    bins = level_of(model.schedule, sigma).to(device)
    remembers = torch.zeros(len(latents), dtype=torch.bool)
    if model.config.unet.self_conditioning:
        remembers = (torch.rand(count, generator=generator) < SHARE)[rows]
    return Part(latents, told, sigma.to(device), remembers, bins, noise)


def divided(batch: Part, seeds: Sequence[int]) -> list[Part]:
    """Parts of equal size, one for each seed."""
    count = len(seeds)
    values = {kind: value.chunk(count) for kind, value in batch.values.items()}
    told = [{kind: chunks[part] for kind, chunks in values.items()} for part in range(count)]
    sources = noise_of_parts(batch.noise, count)
    latents, sigma = batch.latents.chunk(count), batch.sigma.chunk(count)
    remembers, bins = batch.remembers.chunk(count), batch.bins.chunk(count)
    rows = zip(latents, told, sigma, remembers, bins, sources, seeds, strict=True)
    return [Part(*row) for row in rows]


def noise_of_parts(noise: Noise, count: int) -> list[Noise]:
    """Sources of noise for equal parts of a batch, which together get what the whole batch would.

    Each part has to ask for the same noise in the same order.
    """
    drawn: list[Tensor] = []

    def source(number: int) -> Noise:
        asked = iter(range(1 << 62))

        def of_part(like: Tensor) -> Tensor:
            place = next(asked)
            if place == len(drawn):
                drawn.append(noise(like.new_empty((count * len(like), *like.shape[1:]))))
            return drawn[place].chunk(count)[number]

        return of_part

    return [source(number) for number in range(count)]


def add_gradients(learner: Learner, parts: Sequence[Part], objective: ObjectiveConfig) -> Sigmas:
    """The gradient of the batch's mean loss, added up part by part; returns each sample's loss.

    With learned uncertainty the gradient is that of the balanced losses; those returned are plain.
    """
    model, losses = learner.model, []
    together = shares_weights(model)
    for part in parts:
        torch.manual_seed(part.seed)
        with learner.autocast():
            denoise = model.denoise
            if model.config.unet.self_conditioning:
                denoise = estimating_first(denoise, part.remembers, always=together)
            loss = denoising_loss(
                denoise,
                model.parameterization,
                part.latents,
                part.sigma,
                part.noise,
                model.condition(part.values),
                objective,
            )
            balanced = loss
            if learner.uncertainty is not None:
                balanced = learner.uncertainty.balanced(part.sigma, loss)
        (balanced.mean() / len(parts)).backward()
        losses.append(loss.detach())
    return torch.cat(losses)


def losses_by_bin(losses: Sigmas, bins: Int[Tensor, " batch"]) -> Weighted:
    """Sum and number of the losses at each noise level; what is not finite does not count."""
    finite = losses.isfinite()
    members = F.one_hot(bins, LEVELS).to(losses.dtype) * finite[:, None]
    values = torch.where(finite, losses, 0.0)
    return Weighted((members * values[:, None]).sum(0), members.sum(0))


def measured(
    losses: Sigmas, norm: Scalar, sound: Bool[Tensor, ""], bins: Int[Tensor, " batch"]
) -> dict[str, Weighted]:
    """What a step adds to the log: nothing but losses by noise level if its update was left out."""
    zero, count = torch.zeros_like(norm), sound.to(norm.dtype)
    return {
        "loss": Weighted(torch.where(sound, losses.mean(), zero), count),
        "loss_by_noise": losses_by_bin(losses, bins),
        "gradient_norm": Weighted(torch.where(sound, norm, zero), count),
    }


def take_step(
    learner: Learner,
    config: TrainDiffusionConfig,
    step: int,
    indices: np.ndarray,
    batch: Part,
    rate: float,
) -> dict[str, Weighted]:
    """Move the weights and their averages by one batch.

    Args:
        learner: what moves.
        config: of the run.
        step: counted from 0.
        indices: the whole batch's samples, to be named where the update is left out.
        batch: as drawn; this process's rows.
        rate: learning rate of the step.

    Returns:
        What the step adds to the log.
    """
    optimizers = learner.optimizers.values()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
        set_learning_rate(optimizer, rate)
    places = ranks.own_places(config.accumulate)
    seeds = [seed_for(config.seed, DROPOUT, step, place) for place in places]
    parts = divided(batch, seeds)
    with ranks.lost_explained(only=False):
        losses = ranks.gathered(add_gradients(learner, parts, config.objective))
    ranks.average_gradients(parameters_of(optimizers))
    norm = gradient_norm(parameters_of(optimizers), config.clip_norm)
    sound = learner.guard.judge(step, indices, losses, norm)
    for optimizer in optimizers:
        step_if(sound, optimizer)
    update_average(learner.average, learner.model, decay_at(step, config.average))
    update_tracked(learner.tracked, learner.model, step)
    return measured(losses, norm, sound, ranks.gathered(batch.bins))
