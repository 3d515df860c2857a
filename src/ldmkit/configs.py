"""Every configuration, as frozen pydantic models; one field is one option of the command line.

A field is declared once: type, default, bounds and help. `options` turns it into `--name` (nested:
`--unet.channels`), `recipes` read it, files carry it. Unknown keys are errors. Imports no torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]
STREAM = Path("-")
"""Stands for standard input or standard output."""


def field(default: Any, text: str, *, short: str = "") -> Any:  # noqa: ANN401 - as pydantic's Field
    """A field with its default, its help text and perhaps a one-letter option."""
    return Field(default, description=text, json_schema_extra={"short": short} if short else None)


def argument(text: str, default: Any = ...) -> Any:  # noqa: ANN401
    """A field that is a positional argument on the command line."""
    return Field(default, description=text, json_schema_extra={"argument": True})


class Config(BaseModel):
    """Base of all: frozen, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PreprocessingConfig(Config):
    """From a picture file to the network's input: resize, crop, value range [-1, 1]."""

    size: Positive = field(256, "Height and width of the network's input, pixels")
    channels: Literal[1, 3] = field(3, "1 = grey, 3 = RGB")
    resize: Literal["bicubic", "bilinear", "area"] = field(
        "bicubic", "Filter that brings the shorter side to the size (anti-aliased)"
    )
    crop: Literal["center", "random"] = field("center", "Which square is cut from the longer side")
    flip: bool = field(False, "Mirror half of the training pictures at random (left and right)")


class AutoencoderConfig(Config):
    """The networks of the first stage (Rombach et al. 2022, App. E)."""

    channels: Positive = field(128, "Channels of the finest level")
    multipliers: tuple[Positive, ...] = field(
        (1, 2, 4, 4), "Channel multiplier of each level; n levels shrink pictures by 2^(n-1)"
    )
    residual_blocks: Positive = field(
        2, "Residual blocks for each level (the decoder has one more)"
    )
    attention_factors: tuple[Positive, ...] = field(
        (), "Down-sampling factors whose levels have attention"
    )
    middle_attention: bool = field(True, "Attention at the coarsest level")
    norm_groups: Positive = field(
        32, "Groups of the group normalisations, or the largest number below that divides"
    )
    latent_channels: Positive = field(4, "Channels z of the latents")
    dropout: Fraction = field(0.0, "Dropout probability in the residual blocks")

    @property
    def factor(self) -> int:
        """How much smaller latents are than pictures, along each side."""
        return 2 ** (len(self.multipliers) - 1)


class AutoencoderLossConfig(Config):
    """What the first stage minimises (Rombach et al. 2022, App. G); sums over a picture's values."""

    perceptual: Literal["vgg16", "lpips-vgg", "lpips-alex", "lpips-squeeze", "none"] = field(
        "vgg16", "Perceptual distance: VGG16 in the box (not LPIPS), or LPIPS with its networks"
    )
    perceptual_weight: Weight = field(1.0, "Weight of the perceptual distance against L1")
    perceptual_weights: Path | None = field(
        None, "Backbone of LPIPS as a safetensors file with torchvision's tensor names"
    )
    kl_weight: Weight = field(1e-6, "Weight of the KL divergence to the unit Gaussian")
    disc_start: Count = field(50_001, "Generator step from which the discriminator counts")
    disc_weight: Weight = field(0.5, "Weight of the adversarial loss; 0 trains without one")
    disc_channels: Positive = field(64, "Channels of the discriminator's first layer")
    disc_layers: Positive = field(
        3, "Strided layers of the patch discriminator (3: 70 pixel patches)"
    )


class TrainingConfig(Config):
    """What both training commands share."""

    out: Path = field(Path("run"), "Run directory: config, log, previews, checkpoints, model file")
    steps: Positive = field(100_000, "Optimizer steps of the whole run")
    batch_size: Positive = field(16, "Samples for each step")
    warmup: Count = field(0, "Steps at the start over which the learning rate rises from 0")
    cooldown: Count = field(0, "Steps at the end over which the learning rate falls to 0")
    seed: int = field(0, "Fixes weights, order and noise")
    holdout: Fraction = field(
        0.0, "Share of the data kept out of training, chosen by hash of the key"
    )
    workers: Count = field(0, "Processes that read pictures; 0 = in the training process")
    device: Literal["auto", "cpu", "cuda", "mps"] = field("auto", "Where to compute")
    precision: Literal["auto", "fp32", "bf16"] = field(
        "auto",
        "bf16 computes in bfloat16 (weights stay float32); auto = where the hardware is fast at it",
    )
    log_every: Positive = field(50, "Steps between lines in metrics.jsonl")
    sample_every: Positive = field(1_000, "Steps between preview pictures in samples/")
    save_every: Positive = field(1_000, "Steps between checkpoints (the newest two are kept)")
    tensorboard: bool = field(False, "Write TensorBoard events too (extra: tensorboard)")

    FREE_TO_CHANGE: ClassVar[Sequence[str]] = (
        *("steps", "out", "workers", "device", "log_every", "sample_every", "save_every"),
        "tensorboard",
    )
    """Fields that may differ when a run is resumed; any other would make it another run."""


class TrainAEConfig(TrainingConfig):
    """Train an autoencoder on pictures; writes OUT/autoencoder.safetensors."""

    data: Path = argument("Folder of pictures (class subfolders allowed), or webdataset tar(s)")
    out: Path = field(
        Path("runs/ae"), "Run directory: config, log, previews, checkpoints, model file"
    )
    lr: Annotated[float, Field(gt=0)] = field(4.5e-6 * 16, "Learning rate of both Adam optimizers")
    betas: tuple[Fraction, Fraction] = field((0.5, 0.9), "Decay of Adam's two moments")
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    loss: AutoencoderLossConfig = AutoencoderLossConfig()

    @model_validator(mode="after")
    def _fits(self) -> "TrainAEConfig":
        size, factor = self.preprocessing.size, self.autoencoder.factor
        if size % factor:
            raise ValueError(
                f"--preprocessing.size {size} is not a multiple of {factor}, by which the "
                "autoencoder's levels shrink pictures"
            )
        return self


class EncodeConfig(Config):
    """Turn pictures into a set of latents, once; writes OUT/*.safetensors and OUT/manifest.json."""

    data: Path = argument("Folder of pictures (class subfolders allowed), or webdataset tar(s)")
    ae: Path = field(Path("runs/ae/autoencoder.safetensors"), "Autoencoder file")
    out: Path = field(Path("runs/latents"), "Directory of the latent set; - streams it", short="-o")
    size: Positive | None = field(None, "Picture size, pixels (default: what the autoencoder saw)")
    shard_size: Positive = field(1024, "Pictures for each shard file")
    batch_size: Positive = field(32, "Pictures encoded at once")
    dtype: Literal["float16", "float32"] = field("float16", "Number format of the stored latents")
    max_bad: Fraction = field(
        0.0, "Share of unreadable pictures that may be left out (they are listed in the manifest)"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = field("auto", "Where to compute")
    force: bool = field(False, "Replace a latent set that was made differently")


class UNetConfig(Config):
    """The network of the second stage (Dhariwal and Nichol 2021; Rombach et al. 2022, App. E)."""

    channels: Positive = field(192, "Channels of the finest level")
    multipliers: tuple[Positive, ...] = field((1, 2, 3, 5), "Channel multiplier of each level")
    residual_blocks: Positive = field(2, "Residual blocks for each level (one more on the way up)")
    attention_factors: tuple[Positive, ...] = field(
        (8, 4, 2), "Down-sampling factors of the latents whose levels have attention"
    )
    head_channels: Positive | None = field(None, "Width of an attention head (default: one head)")
    transformer_depth: Positive = field(1, "Blocks of each spatial transformer")
    norm_groups: Positive = field(
        32, "Groups of the group normalisations, or the largest number below that divides"
    )
    context_channels: Positive = field(512, "Width of the tokens that are attended to")
    dropout: Fraction = field(0.0, "Dropout probability in the residual blocks")

    @model_validator(mode="after")
    def _heads_fit(self) -> "UNetConfig":
        for width in (self.channels * multiplier for multiplier in self.multipliers):
            if self.head_channels and width % self.head_channels:
                raise ValueError(
                    f"attention heads of {self.head_channels} channels do not divide a level of {width}"
                )
        return self


ParameterizationName = Literal["epsilon", "v"]


class ScheduleConfig(Config):
    """Discrete noise schedule: variances linear in their square root (Rombach et al. 2022)."""

    timesteps: Positive = field(1000, "Number of noise levels T")
    beta_start: Annotated[float, Field(gt=0, lt=1)] = field(0.0015, "Noise variance of step 1")
    beta_end: Annotated[float, Field(gt=0, lt=1)] = field(0.0195, "Noise variance of step T")


class DiffusionConfig(Config):
    """What a diffusion model file stores to build its network again."""

    unet: UNetConfig
    schedule: ScheduleConfig
    parameterization: ParameterizationName
    latent_channels: Positive
    classes: Count
    """Number of classes; 0 for a model without class condition."""


class TrainDiffusionConfig(TrainingConfig):
    """Train a diffusion model on a set of latents; writes OUT/diffusion.safetensors."""

    latents: Path = argument("Latent set that `ldmkit encode` made")
    out: Path = field(
        Path("runs/ldm"), "Run directory: config, log, previews, checkpoints, model file"
    )
    ae: Path | None = field(None, "Autoencoder file, for preview pictures during training")
    lr: Annotated[float, Field(gt=0)] = field(1e-4, "Learning rate of AdamW")
    weight_decay: Weight = field(0.01, "Weight decay of AdamW")
    ema_decay: Fraction = field(0.9999, "Decay of the averaged weights (warmed up)")
    condition: Literal["auto", "class", "none"] = field(
        "auto", "What the model is told; auto = class where the latents have labels"
    )
    condition_dropout: Fraction = field(
        0.1, "Share of samples trained without their condition, for classifier-free guidance"
    )
    parameterization: ParameterizationName = field(
        "epsilon",
        "What the network predicts: the noise (the paper), or v, which learns layouts sooner",
    )
    preview_steps: Positive = field(25, "Sampling steps of the preview pictures")
    preview_guidance: Weight = field(2.0, "Guidance weight of the preview pictures")
    unet: UNetConfig = UNetConfig()
    schedule: ScheduleConfig = ScheduleConfig()

    FREE_TO_CHANGE: ClassVar[Sequence[str]] = (
        *TrainingConfig.FREE_TO_CHANGE,
        *("ae", "preview_steps", "preview_guidance"),
    )


class SampleConfig(Config):
    """Draw latents from a diffusion model; to a file, or to standard output for `ldmkit decode`."""

    model: Path = argument("Diffusion model file")
    out: Path = field(
        STREAM, "Sample file (*.safetensors); - streams to standard output", short="-o"
    )
    num: Positive = field(16, "How many samples")
    label: tuple[str, ...] = field(
        (), "Class by name or index, or `none`; repeat for several, which take turns (default: all)"
    )
    steps: Positive = field(50, "Model calls for each sample (1 to T)")
    guidance: Weight = field(2.0, "Classifier-free guidance weight; 1 = off")
    eta: Annotated[float, Field(ge=0, le=1)] = field(0.0, "Noise put back by DDIM; 1 = DDPM")
    seed: Count = field(0, "Seed of the first sample; the next ones count up")
    batch_size: Positive = field(
        16,
        "Samples in a message and, but on the CPU, drawn at once; the result does not depend on it",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = field("auto", "Where to compute")


class DecodeConfig(Config):
    """Turn sampled latents into PNG pictures and a grid; writes OUT/*.png."""

    samples: Path = argument("Sample file; - reads standard input", STREAM)
    ae: Path = field(Path("runs/ae/autoencoder.safetensors"), "Autoencoder file")
    out: Path = field(Path("samples"), "Directory for the pictures", short="-o")
    batch_size: Positive = field(
        16, "Samples decoded at once (on the CPU always two); the result does not depend on it"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = field("auto", "Where to compute")


class InspectConfig(Config):
    """Say what a file, directory or stream of ldmkit is, and whether its digests hold."""

    path: Path = argument(
        "Model or sample file, latent set, run directory; - reads standard input", STREAM
    )
