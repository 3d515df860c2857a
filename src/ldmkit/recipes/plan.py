"""`--dry-run`: what a command would need, without doing it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldmkit.assembly import autoencoder_facts, build_autoencoder, build_diffusion, diffusion_config
from ldmkit.autoencoder.discriminator import PatchDiscriminator
from ldmkit.autoencoder.latent_shards import bytes_of
from ldmkit.conditioning.kinds import readers_of, values_of
from ldmkit.configs import STREAM, TrainAEConfig, TrainDiffusionConfig
from ldmkit.data.images import read_images, split
from ldmkit.data.latent_batches import training_buckets
from ldmkit.data.latent_set import LatentSet
from ldmkit.data.order import generator_for
from ldmkit.data.sources import open_source
from ldmkit.data_configs import EncodeConfig
from ldmkit.errors import UsageError
from ldmkit.fields import Config
from ldmkit.training.batch_size import Peak, batch_sizes, largest_within, line_through
from ldmkit.training.checkpoint import KEEP
from ldmkit.training.memory import free_memory, resident
from ldmkit.training.optimizers import moment_bytes
from ldmkit.training.run import AUTO, AnyTraining, as_begun, with_batch_size
from ldmkit.training.runtime import pick_device
from ldmkit.training.snapshots import FORMATS, WIDTHS
from ldmkit.trials import planned_autoencoder, planned_diffusion

FLOAT_BYTES = 4
BACKWARD = 3  # training costs a forward pass and two for the gradients
KERNELS = 120_000_000
"""Bytes that torch's kernels for the CPU take beside tensors: code made at run time, and its buffers."""


def plan(config: Config) -> str:
    """The estimates for a command, one line each."""
    return "\n".join(PLANS[type(config)](config))


def plan_train_ae(config: TrainAEConfig) -> list[str]:
    """Open one batch, build the networks without memory, take a step of them, count."""
    config, device = as_begun(config), pick_device(config.device)
    source = open_source(config)
    training, held_back = split(source.items, config.holdout)
    with torch.device("meta"):
        model = build_autoencoder(config.autoencoder, config.preprocessing)
        discriminator = PatchDiscriminator(config.preprocessing.channels, config.disc)
    sizes = (
        batch_sizes(config.accumulate, config.smallest_part, len(training))
        if config.batch_size == AUTO
        else []
    )
    config, memory = planned_memory(
        config, sizes, device, lambda config: planned_autoencoder(config, device)
    )
    images = read_images(training[: config.samples_per_step], config.preprocessing)
    counted = 1.0 - float(images.isnan().float().mean())
    ends = float((images.abs() == 1.0).float().mean()) / counted
    with torch.device("meta"):
        latents = model.encode(torch.empty(1, *images.shape[1:])).mean
    trained = parameters(model) + parameters(discriminator)
    averages = parameters(model) if config.ema_decay else 0
    checkpoint = (3 * trained + averages) * FLOAT_BYTES  # weights, two moments
    shape = [config.samples_per_step, *images.shape[1:]]
    return [
        f"data: {len(training)} pictures to train on, {len(held_back)} held back; a batch is {shape}",
        f"values: {counted:.1%} of the pixels of a batch count, {ends:.1%} of these are at an end of the range",
        f"latents: {list(latents.shape[1:])}, {config.autoencoder.factor} times smaller along each side",
        f"parameters: {parameters(model):,} (autoencoder), {parameters(discriminator):,} (discriminator)",
        *_effective_kl_weight(config, images[0].numel(), latents[0].numel()),
        *memory,
        f"disk: about {size(checkpoint * (KEEP + 1) + parameters(model) * FLOAT_BYTES)} in {config.out}",
        f"steps: {config.steps:,}, {config.steps * config.samples_per_step / len(training):.1f} times through the data",
    ]


def _effective_kl_weight(config: TrainAEConfig, values: int, latent_values: int) -> list[str]:
    """The KL weight as codes state it that take means over pictures and latents instead of sums."""
    if config.autoencoder.bottleneck != "kl":
        return []
    weight = config.loss.kl_weight * latent_values / values
    return [f"KL weight: {config.loss.kl_weight:g} for sums, as {weight:.3g} would be for means"]


def plan_encode(config: EncodeConfig) -> list[str]:
    """Count pictures and bytes."""
    source = open_source(config)
    facts = autoencoder_facts(config.ae)
    side = (config.size or facts.preprocessing.size) // facts.factor
    shape = (facts.latent_channels, side, side)
    count = config.views * len(source.items)
    shards = -(-len(source.items) // config.shard_size)
    return [
        f"data: {len(source.items)} pictures, {len(source.class_names)} classes",
        f"latents: {count} of {list(shape)} in {shards} shards",
        f"disk: about {size(bytes_of(config, facts, len(source.items)))} in {config.out}",
    ]


def plan_train_diffusion(config: TrainDiffusionConfig) -> list[str]:
    """Open one batch, build the network without memory, take a step of it, count."""
    if config.latents == STREAM:
        raise UsageError("--dry-run reads no stream: name a latent set on disk")
    config, device = as_begun(config), pick_device(config.device)
    latents = LatentSet(config.latents)
    largest = max(latents.shapes, key=math.prod)
    samples = max(map(len, training_buckets(latents, config.holdout)))
    sizes = batch_sizes(config.accumulate, 1, samples) if config.batch_size == AUTO else []
    config, memory = planned_memory(
        config, sizes, device, lambda config: planned_diffusion(config, latents, device)
    )
    settled = diffusion_config(config, latents)
    readers = readers_of(settled.conditions, config.options_of, latents)
    first = values_of(readers, latents.shapes[largest][:1], generator_for(config.seed))
    told = ", ".join(condition.kind for condition in settled.conditions) or "nothing"
    with torch.device("meta"):
        model = build_diffusion(settled)
        x, one = torch.empty(1, *largest), {kind: value.to("meta") for kind, value in first.items()}
        work = operations(lambda: model.denoise(x, torch.empty(1), model.condition(one)))
    trained = parameters(model)
    tracked = len(WIDTHS) if config.average.snapshots else 0
    moments = moment_bytes(model, config)
    checkpoint = trained * FLOAT_BYTES * (2 + tracked) + moments  # weights and averages
    disk = checkpoint * (KEEP + 1) + trained * FLOAT_BYTES
    if tracked:
        snapshots = -(-config.steps // config.average.snapshots)
        width = FORMATS[config.average.snapshot_format].itemsize
        disk += snapshots * tracked * trained * width
    shape = [config.samples_per_step, *largest]
    if config.shard != "none":
        memory = [
            *memory,
            f"--shard {config.shard}: each process will hold less than that estimate",
        ]
    return [
        f"data: {len(latents)} latents of {list(largest)}; a batch is {shape}",
        f"parameters: {trained:,}; told: {told}",
        f"compute: {work / 1e9:,.1f} GFLOPs for each image and model call, {BACKWARD * work / 1e9:,.1f} to train on it",
        *memory,
        f"disk: about {size(disk)} in {config.out}",
        f"steps: {config.steps:,}, {config.steps * config.samples_per_step / len(latents):.1f} times through the data",
    ]


def planned_memory(
    config: AnyTraining,
    sizes: Sequence[int],
    device: torch.device,
    held: Callable[[AnyTraining], int],
) -> tuple[AnyTraining, list[str]]:
    """The config with a number as batch size, and a line on what its step takes.

    Args:
        config: whose batch size may be `auto`; then the largest that the estimate lets in is assumed.
        sizes: what `auto` chooses from.
        device: where it would be computed.
        held: bytes of the tensors that a step holds.
    """
    own = resident() + KERNELS if device.type == "cpu" else 0
    said = []
    if config.batch_size == AUTO:
        free = free_memory(device)
        first, last = (
            Peak(size, held(with_batch_size(config, size))) for size in (sizes[0], sizes[-1])
        )
        line = line_through(first, last)
        size_ = largest_within(line, sizes, free.usable(device) - own) or sizes[0]
        config = with_batch_size(config, size_)
        said.append(
            f"batch size: auto is found by measuring when training starts; {size_} is assumed here, by "
            f"the estimate and the {size(free.amount)} that are free now ({free.told_by})"
        )
    tensors = held(config)
    of_torch = f", {size(own)} of it for Python and torch" if own else ""
    return config, [*said, f"memory: about {size(own + tensors)}{of_torch}"]


def operations(forward: Callable[[], Tensor]) -> int:
    """Floating-point operations of matrix products and convolutions, a multiply-add being two.

    The tensors must be without memory: there attention is made of matrix products, which are counted;
    the fused kernel of the CPU is not.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    return counter.get_total_flops()


def parameters(module: nn.Module) -> int:
    """How many numbers a module trains."""
    return sum(parameter.numel() for parameter in module.parameters())


def size(count: int) -> str:
    """Bytes for people: 3.2 MB, 1.5 GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


PLANS: dict[type[Config], Callable[[Any], list[str]]] = {
    TrainAEConfig: plan_train_ae,
    EncodeConfig: plan_encode,
    TrainDiffusionConfig: plan_train_diffusion,
}
