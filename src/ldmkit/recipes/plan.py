"""`--dry-run`: what a command would need, without doing it."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldmkit.assembly import autoencoder_facts, build_autoencoder, build_diffusion, diffusion_config
from ldmkit.autoencoder.discriminator import PatchDiscriminator
from ldmkit.conditioning.kinds import readers_of, values_of
from ldmkit.configs import STREAM, TrainAEConfig, TrainDiffusionConfig
from ldmkit.data.images import read_images, split
from ldmkit.data.latent_set import LatentSet
from ldmkit.data.latents import STORED_DTYPES
from ldmkit.data.order import generator_for
from ldmkit.data.sources import open_source
from ldmkit.data_configs import EncodeConfig
from ldmkit.errors import UsageError
from ldmkit.fields import Config
from ldmkit.training.checkpoint import KEEP
from ldmkit.training.snapshots import FORMATS, WIDTHS

FLOAT_BYTES = 4
BACKWARD = 3  # training costs a forward pass and two for the gradients
TRAINED_COPIES = 4  # weight, gradient, two Adam moments


def plan(config: Config) -> str:
    """The estimates for a command, one line each."""
    return "\n".join(PLANS[type(config)](config))


def plan_train_ae(config: TrainAEConfig) -> list[str]:
    """Open one batch, build the networks without memory, count."""
    source = open_source(config)
    training, held_back = split(source.items, config.holdout)
    images = read_images(training[: config.batch_size], config.preprocessing)
    counted = 1.0 - float(images.isnan().float().mean())
    ends = float((images.abs() == 1.0).float().mean()) / counted
    with torch.device("meta"):
        model = build_autoencoder(config.autoencoder, config.preprocessing)
        discriminator = PatchDiscriminator(config.preprocessing.channels, config.disc)
        batch = torch.empty(config.batch_size, *images.shape[1:])
        saved = saved_bytes(lambda: discriminator(model.decode(model.encode(batch).mean)))
        latents = model.encode(batch).mean
    trained = parameters(model) + parameters(discriminator)
    checkpoint = trained * FLOAT_BYTES * (TRAINED_COPIES - 1)
    return [
        f"data: {len(training)} pictures to train on, {len(held_back)} held back; a batch is {list(batch.shape)}",
        f"values: {counted:.1%} of the pixels of a batch count, {ends:.1%} of these are at an end of the range",
        f"latents: {list(latents.shape[1:])}, {config.autoencoder.factor} times smaller along each side",
        f"parameters: {parameters(model):,} (autoencoder), {parameters(discriminator):,} (discriminator)",
        *_effective_kl_weight(config, images[0].numel(), latents[0].numel()),
        f"memory: about {size(trained * FLOAT_BYTES * TRAINED_COPIES + saved)} without the perceptual network",
        f"disk: about {size(checkpoint * (KEEP + 1) + parameters(model) * FLOAT_BYTES)} in {config.out}",
        f"steps: {config.steps:,}, {config.steps * config.batch_size / len(training):.1f} times through the data",
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
    stored = 2 * count * math.prod(shape) * STORED_DTYPES[config.dtype].itemsize
    shards = -(-len(source.items) // config.shard_size)
    return [
        f"data: {len(source.items)} pictures, {len(source.class_names)} classes",
        f"latents: {count} of {list(shape)} in {shards} shards",
        f"disk: about {size(stored)} in {config.out}",
    ]


def plan_train_diffusion(config: TrainDiffusionConfig) -> list[str]:
    """Open one batch, build the network without memory, count."""
    if config.latents == STREAM:
        raise UsageError("--dry-run reads no stream: name a latent set on disk")
    latents = LatentSet(config.latents)
    largest = max(latents.shapes, key=math.prod)
    indices = latents.shapes[largest][: config.batch_size]
    batch = latents.read(indices)
    settled = diffusion_config(config, latents)
    readers = readers_of(settled.conditions, config.options_of, latents)
    first = values_of(readers, indices[:1], generator_for(config.seed))
    with torch.device("meta"):
        model = build_diffusion(settled)
        x = torch.empty(config.batch_size, *batch.mean.shape[1:])
        times = torch.empty(config.batch_size)
        one = {kind: value.to("meta") for kind, value in first.items()}
        whole = {
            kind: value.expand(config.batch_size, *value.shape[1:]) for kind, value in one.items()
        }
        saved = saved_bytes(lambda: model.unet(x, times, *model.condition(whole)))
        work = operations(lambda: model.unet(x[:1], times[:1], *model.condition(one)))
    told = ", ".join(condition.kind for condition in settled.conditions) or "nothing"
    trained = parameters(model)
    tracked = len(WIDTHS) if config.average.snapshots else 0
    copies = TRAINED_COPIES + tracked
    checkpoint = trained * FLOAT_BYTES * copies  # weights, averages, two moments
    disk = checkpoint * (KEEP + 1) + trained * FLOAT_BYTES
    if tracked:
        snapshots = -(-config.steps // config.average.snapshots)
        width = FORMATS[config.average.snapshot_format].itemsize
        disk += snapshots * tracked * trained * width
    return [
        f"data: {len(latents)} latents of {list(batch.mean.shape[1:])}; a batch is {list(x.shape)}",
        f"parameters: {trained:,}; told: {told}",
        f"compute: {work / 1e9:,.1f} GFLOPs for each image and model call, {BACKWARD * work / 1e9:,.1f} to train on it",
        f"memory: about {size(trained * FLOAT_BYTES * (copies + 1) + saved)}",
        f"disk: about {size(disk)} in {config.out}",
        f"steps: {config.steps:,}, {config.steps * config.batch_size / len(latents):.1f} times through the data",
    ]


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd would keep for the backward pass; the tensors may be without memory."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[id(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    activations = [tensor for tensor in kept.values() if not isinstance(tensor, nn.Parameter)]
    del result
    return sum(tensor.numel() * tensor.element_size() for tensor in activations)


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
