"""ldmkit's work, by the functions that its commands run and with the precision that they choose."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from clock import Number
from loops import Prepared
from peers import lpips_distance
from torch import nn
from workloads import (
    ADVERSARIAL_WEIGHT,
    GUIDANCE,
    KL_WEIGHT,
    LEARNING_RATE,
    SAMPLING_STEPS,
    WEIGHT_DECAY,
    Sizes,
    Workload,
)

from ldmkit.assembly import build_autoencoder, build_diffusion, ready
from ldmkit.autoencoder import training_step
from ldmkit.autoencoder.adversarial_phase import Phase
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder.latent_shards import encode_batch
from ldmkit.autoencoder.perceptual import build_perceptual
from ldmkit.autoencoder_configs import (
    AutoencoderConfig,
    AutoencoderLossConfig,
    DiscriminatorConfig,
    PreprocessingConfig,
)
from ldmkit.conditioning.stored_embedding import StoredConditioner
from ldmkit.configs import TrainAEConfig, TrainDiffusionConfig
from ldmkit.data.encoding import Batch
from ldmkit.data.latent_set import LatentBatch
from ldmkit.data.latents import STORED_DTYPES
from ldmkit.data.order import generator_for
from ldmkit.data_configs import EncodeConfig
from ldmkit.diffusion_configs import DiffusionConfig, UNetConfig
from ldmkit.diffusion_step import draw_batch, learner_of, take_step
from ldmkit.drawing import Manner, Origin, draw_latents, guide_together, seeded_noise
from ldmkit.encodings import Encodings
from ldmkit.facts import SampleFacts
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.sample_blocks import Block, decoded
from ldmkit.sample_groups import sample_groups
from ldmkit.tower_configs import EmbeddedTextCondition
from ldmkit.training.runtime import in_bfloat16, noise_from, pick_device, settled

Precision = Literal["auto", "fp32", "bf16"]
USUAL: Precision = "auto"
"""What the commands run networks in unless asked otherwise."""
ENCODE_BATCH = EncodeConfig.model_fields["batch_size"].default
TEXT = "embedded-text"


def number_of_inference(device: str) -> Number:
    """What `encode`, `decode` and `sample` compute in."""
    return settled(USUAL, pick_device(device))


def train_autoencoder(
    workload: Workload, device: str, precision: Precision, perceptual: str | None = None
) -> Prepared:
    """The whole step of `train-ae`, Adam; with the name of a perceptual distance also an adversary."""
    place = pick_device(device)
    with tempfile.TemporaryDirectory() as scratch:
        weights = None
        if perceptual == "lpips-vgg":  # read as a user's file would be
            weights = random_backbone(Path(scratch) / "vgg16.safetensors")
        config = ae_config(workload, precision, perceptual, weights)
        distance = build_perceptual(config.loss)
    torch.manual_seed(0)
    model = build_autoencoder(config.autoencoder, config.preprocessing).to(place)
    learners = training_step.learners_of(model, distance, config)
    images = workload.images(device)
    judged = perceptual is not None
    phase = Phase(True, judged, ADVERSARIAL_WEIGHT if judged else 0.0)
    noise = noise_from(generator_for(0))

    def step() -> None:
        batch = training_step.batch_of(images, None, model, noise)
        training_step.take_step(learners, config, batch, 0, phase)

    trained = (model, learners.discriminator) if judged else (model,)
    same = perceptual != "vgg16"  # which is less work than the peers'
    return Prepared(step, parameters(model), _number(place, precision), same, trained)


def train_with_adversary(workload: Workload, device: str, precision: Precision) -> Prepared:
    """The same distance as the peers'."""
    return train_autoencoder(workload, device, precision, "lpips-vgg")


def train_with_adversary_as_shipped(
    workload: Workload, device: str, precision: Precision
) -> Prepared:
    """The distance that the command takes unless asked otherwise, half of the peers' work."""
    return train_autoencoder(workload, device, precision, "vgg16")


def encode(workload: Workload, device: str, precision: Precision) -> Prepared:
    """What `encode` does with a batch, up to tensors as they are stored."""
    del precision
    model = _autoencoder(workload, device)
    batch = Batch(0, workload.images("cpu"), [])
    stored = STORED_DTYPES[EncodeConfig.model_fields["dtype"].default]

    def step() -> object:
        return encode_batch(model, batch, ENCODE_BATCH, stored)

    return Prepared(step, parameters(model), number_of_inference(device), True)


def decode(workload: Workload, device: str, precision: Precision) -> Prepared:
    """What `decode` does with a block of samples, up to pictures on the CPU."""
    del precision
    model = _autoencoder(workload, device)
    latents = workload.latents("cpu")
    count, pixels = len(latents), latents.shape[2] * latents.shape[3]
    facts = SampleFacts(
        fingerprint="", autoencoder="", diffusion="", total=count, first=0, versions={}
    )
    block = Block(latents, list(range(count)), [{}] * count, None, [""] * count, None, facts)

    def step() -> object:
        pictures = []
        for rows, kept in sample_groups(count, count, model, pixels):
            pictures += decoded(block, block.latents[rows], rows, kept, model)
        return pictures

    return Prepared(step, parameters(model), number_of_inference(device), True)


def train_unet(workload: Workload, device: str, precision: Precision) -> Prepared:
    """The step of `train-diffusion`: noise levels, both passes, AdamW, norm, guard and average."""
    place = pick_device(device)
    config = diffusion_config(workload, precision)
    model = diffusion_model(workload).to(place)
    learner = learner_of(model, config, place)
    latents = workload.latents("cpu")
    read = LatentBatch(latents, torch.zeros(()).expand_as(latents))
    values = {TEXT: workload.context("cpu")} if workload.attends else {}
    indices = np.arange(workload.batch)
    generator = generator_for(0)

    def step() -> None:
        batch = draw_batch(model, read, values, generator, config)
        take_step(learner, config, 0, indices, batch, LEARNING_RATE)

    return Prepared(step, parameters(model), _number(place, precision), True, (model.unet,))


def sample(workload: Workload, device: str, precision: Precision) -> Prepared:
    """What `sample` does with a batch, up to raw latents on the CPU."""
    del precision
    place = pick_device(device)
    model = ready(diffusion_model(workload).to(place), USUAL)
    tokens = workload.context("cpu")
    guide = guide_together(model.config.conditions, GUIDANCE)
    manner = Manner(SAMPLING_STEPS, guide, sampler="ddim")
    _, *rest = workload.latents("cpu").shape
    shape, pixels = (rest[0], rest[1], rest[2]), rest[1] * rest[2]

    def step() -> object:
        encodings, drawn = Encodings(), []
        for rows, kept in sample_groups(workload.batch, workload.batch, model.unet, pixels):
            noise = seeded_noise(rows.tolist())
            told = {TEXT: tokens[rows]} if workload.attends else {}
            size = (len(rows), *shape)
            latents = draw_latents(model, told, size, noise, manner, Origin(), encodings)
            drawn.append(latents[:kept].cpu())
        return drawn

    return Prepared(step, parameters(model), number_of_inference(device), True)


def autoencoder_config(sizes: Sizes) -> AutoencoderConfig:
    """Ours of these sizes."""
    return AutoencoderConfig(
        channels=sizes.ae_channels,
        multipliers=sizes.multipliers,
        residual_blocks=sizes.blocks,
        latent_channels=sizes.latent_channels,
        norm_groups=sizes.groups,
    )


def ae_config(
    workload: Workload, precision: Precision, perceptual: str | None, weights: Path | None
) -> TrainAEConfig:
    """A run of `train-ae` with nothing but what the workload says."""
    loss: dict[str, Any] = {"perceptual": perceptual or "none", "kl_weight": KL_WEIGHT}
    judged = ADVERSARIAL_WEIGHT if perceptual else 0.0
    return TrainAEConfig(
        data="none",
        batch_size=workload.batch,
        lr=LEARNING_RATE,
        precision=precision,
        preprocessing=PreprocessingConfig(size=workload.side),
        autoencoder=autoencoder_config(workload.sizes),
        loss=AutoencoderLossConfig(**loss, perceptual_weights=weights),
        disc=DiscriminatorConfig(weight=judged),
    )


def unet_config(sizes: Sizes) -> UNetConfig:
    """Ours of these sizes, with attention at every level."""
    levels = range(len(sizes.multipliers))
    return UNetConfig(
        channels=sizes.unet_channels,
        multipliers=sizes.multipliers,
        residual_blocks=sizes.blocks,
        attention_factors=tuple(2**level for level in levels),
        head_channels=sizes.head,
        context_channels=sizes.context,
        norm_groups=sizes.groups,
    )


def diffusion_config(workload: Workload, precision: Precision) -> TrainDiffusionConfig:
    """A run of `train-diffusion` with nothing but what the workload says."""
    return TrainDiffusionConfig(
        latents=Path("none"),
        batch_size=workload.batch,
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        precision=precision,
        condition=(TEXT,) if workload.attends else ("none",),
        unet=unet_config(workload.sizes),
    )


def diffusion_model(workload: Workload) -> LatentDiffusion:
    """Fresh, told tokens as they are stored or nothing."""
    sizes, config = workload.sizes, diffusion_config(workload, "fp32")
    told = EmbeddedTextCondition(
        encoder="",
        fingerprint="",
        count=sizes.tokens,
        width=sizes.context,
        output="penultimate",
        pad_with_end=False,
    )
    torch.manual_seed(0)
    model = build_diffusion(
        DiffusionConfig(
            unet=config.unet,
            schedule=config.schedule,
            parameterization=config.parameterization,
            latent_channels=sizes.latent_channels,
            conditions=(told,) if workload.attends else (),
        )
    )
    for conditioner in model.conditioners.values():
        if isinstance(conditioner, StoredConditioner):
            conditioner.set_empty(torch.zeros(sizes.tokens, sizes.context))
    return model


def random_backbone(path: Path) -> Path:
    """A file with torchvision's VGG16 as far as LPIPS uses it, random."""
    state = lpips_distance().get_submodule("net").state_dict()
    named = {"features." + name.split(".", 1)[1]: x.contiguous() for name, x in state.items()}
    safetensors.torch.save_file(named, path)
    return path


def parameters(module: nn.Module) -> int:
    """How many numbers a module learns."""
    return sum(weight.numel() for weight in module.parameters())


def _autoencoder(workload: Workload, device: str) -> Autoencoder:
    torch.manual_seed(0)
    config = autoencoder_config(workload.sizes)
    model = build_autoencoder(config, PreprocessingConfig(size=workload.side))
    return ready(model.to(pick_device(device)), USUAL)


def _number(place: torch.device, precision: Precision) -> Number:
    return "bf16" if in_bfloat16(place, precision) else "fp32"


Build = Callable[[Workload, str, Precision], Prepared]
OURS: dict[str, Build] = {
    "ae-train": train_autoencoder,
    "ae-train-gan": train_with_adversary,
    "encode": encode,
    "decode": decode,
    "unet-train": train_unet,
    "sample": sample,
}
