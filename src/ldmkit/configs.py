"""Every configuration, as frozen pydantic models; one field is one option of the command line.

A field is declared once: type, default, bounds and help. `options` turns it into `--name` (nested:
`--unet.channels`), `recipes` read it, files carry it. Unknown keys are errors. Imports no torch.
What a model file stores has its configs in `autoencoder_configs` and `diffusion_configs`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ldmkit.autoencoder_configs import (
    AutoencoderConfig,
    AutoencoderLossConfig,
    DiscriminatorConfig,
    PreprocessingConfig,
)
from ldmkit.condition_configs import ConditioningConfig
from ldmkit.data_configs import SourceConfig
from ldmkit.diffusion_configs import (
    AverageConfig,
    ObjectiveConfig,
    ParameterizationName,
    ScheduleConfig,
    UNetConfig,
    Width,
    require_fitting,
)
from ldmkit.fields import Config, Count, Fraction, Positive, Weight, argument, field
from ldmkit.optimization_configs import OptimizationConfig, TrainingConfig

STREAM = Path("-")
"""Stands for standard input or standard output."""


class TrainAEConfig(TrainingConfig, SourceConfig):
    """Train an autoencoder on pictures; writes OUT/autoencoder.safetensors."""

    out: Path = field(
        Path("runs/ae"), "Run directory: config, log, previews, checkpoints, model file"
    )
    lr: Annotated[float, Field(gt=0)] = field(4.5e-6 * 16, "Learning rate of both Adam optimizers")
    betas: tuple[Fraction, Fraction] = field((0.5, 0.9), "Decay of Adam's two moments")
    ema_decay: Fraction = field(0.0, "Decay of averaged weights, which are saved then; 0 = none")
    clip_norm: Weight = field(0.0, "Largest norm of a gradient; 0 = no limit")
    accumulate: Positive = field(
        1, "Parts in which a batch goes through the networks one after the other, to save memory"
    )
    checkpointing: bool = field(
        False, "Compute activations again in the backward pass instead of keeping them"
    )
    multi_resolution: tuple[Positive, ...] = field(
        (), "Sides to one of which each batch is resized, pixels; the largest comes first"
    )
    init: Path | None = field(
        None, "Autoencoder file whose weights to begin with, as far as names and shapes agree"
    )
    look_first: bool = field(
        True,
        "Read every picture once before the first step, so that what cannot be used is named then"
        " (the answer is kept in OUT/pictures.json); without, a bad picture stops the run when met",
    )
    max_bad: Fraction = field(
        0.0, "Share of unreadable pictures that may be left out, found by --look-first"
    )
    decoder_only: bool = field(
        False, "Train the decoder alone: the latents stay those of --init, and their models usable"
    )
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    loss: AutoencoderLossConfig = AutoencoderLossConfig()
    disc: DiscriminatorConfig = DiscriminatorConfig()

    FREE_TO_CHANGE: ClassVar[Sequence[str]] = (
        *TrainingConfig.FREE_TO_CHANGE,
        *("cache", "cache_size", "look_first", "accumulate"),
    )

    @property
    def disc_start(self) -> int:
        """The step at which the adversarial phase begins; after the last one if it never does."""
        never = self.steps + 1
        if not self.disc.weight:
            return never
        return self.disc.start_step(self.steps, self.samples_per_step)

    @property
    def smallest_part(self) -> int:
        """How many pictures have to go through the networks at once: norms over a batch need two."""
        return 2 if self.disc.weight and "batch" in self.disc.norm else 1

    @property
    def steps_shape_the_run(self) -> bool:
        """Whether another number of steps would have changed those already done."""
        return super().steps_shape_the_run or self.disc.start.endswith("%")

    @model_validator(mode="after")
    def _fits(self) -> "TrainAEConfig":
        factor = self.autoencoder.factor
        for name, size in (
            ("preprocessing.size", self.preprocessing.size),
            *(("multi-resolution", side) for side in self.multi_resolution),
        ):
            if size % factor:
                raise ValueError(
                    f"--{name} {size} is not a multiple of {factor}, by which the "
                    "autoencoder's levels shrink pictures"
                )
        self.require_divisible_by(self.accumulate)
        if self.batch_size == self.accumulate and self.smallest_part > 1:
            raise ValueError(
                f"--disc.norm {self.disc.norm} needs more than one picture at a time: "
                "take group or act, or larger parts"
            )
        if self.decoder_only and self.init is None:
            raise ValueError("--decoder-only needs --init, the autoencoder whose latents to keep")
        return self


class EvalAEConfig(SourceConfig):
    """Measure an autoencoder before the second stage; writes OUT/report.json, pictures and plots."""

    ae: Path = field(Path("runs/ae/autoencoder.safetensors"), "Autoencoder file")
    out: Path = field(Path("runs/eval-ae"), "Directory of the report", short="-o")
    size: Positive | None = field(None, "Picture size, pixels (default: what the autoencoder saw)")
    holdout: Fraction = field(
        0.0, "Look only at the share that training with this --holdout kept out; 0 = all pictures"
    )
    num: Positive | None = field(None, "Look at this many pictures, drawn by --seed (default: all)")
    batch_size: Positive = field(16, "Pictures at once; results agree up to rounding")
    seed: Count = field(0, "Fixes which pictures are drawn, their order, and the prior's samples")
    device: Literal["auto", "cpu", "cuda", "mps"] = field("auto", "Where to compute")
    perceptual: Literal["vgg16", "lpips-vgg", "lpips-alex", "lpips-squeeze", "none"] = field(
        "vgg16", "Perceptual distance: VGG16 in the box (not LPIPS); LPIPS comes beside it"
    )
    perceptual_weights: Path | None = field(
        None, "Backbone of LPIPS as a safetensors file with torchvision's tensor names"
    )
    st_lpips: Path | None = field(
        None, "ST-LPIPS too: its weights, alex or vgg (*.safetensors or *.pth)"
    )
    effnet: Path | None = field(
        None,
        "Fréchet distance in EfficientNet-Lite0 features too: its weights (*.safetensors or *.pth)",
    )
    rfid: bool = field(False, "Reconstruction FID too, with Inception's features (extra: eval)")
    inception: Path | None = field(
        None, "Inception weights of torch-fidelity for --rfid (default: in torch's cache)"
    )
    min_psnr: float | None = field(None, "Fail (exit code 3) below this mean PSNR, dB")
    min_ssim: float | None = field(None, "Fail below this mean SSIM, at most 1")
    max_perceptual: Weight | None = field(None, "Fail above this mean of the --perceptual distance")
    max_rfd: Weight | None = field(None, "Fail above this Fréchet distance of --effnet")
    max_rfid: Weight | None = field(None, "Fail above this reconstruction FID")
    max_dead_channels: Count | None = field(
        None, "Fail with more latent channels than this that carry nothing"
    )

    @model_validator(mode="after")
    def _thresholds_are_measured(self) -> "EvalAEConfig":
        needs = (
            ("--max-rfd", self.max_rfd, "--effnet FILE", self.effnet),
            ("--max-rfid", self.max_rfid, "--rfid", self.rfid),
            ("--max-perceptual", self.max_perceptual, "a --perceptual", self.perceptual != "none"),
            ("--inception", self.inception, "--rfid", self.rfid),
        )
        for option, value, other, given in needs:
            if value is not None and not given:
                raise ValueError(f"{option} needs {other}")
        return self


class TrainDiffusionConfig(TrainingConfig, OptimizationConfig, ConditioningConfig):
    """Train a diffusion model on a set of latents; writes OUT/diffusion.safetensors."""

    latents: Path = argument(
        "Latent set that `ldmkit encode` made; - reads one from standard input, kept in OUT/latents"
    )
    out: Path = field(
        Path("runs/ldm"), "Run directory: config, log, previews, checkpoints, model file"
    )
    ae: Path | None = field(None, "Autoencoder file, for preview pictures during training")
    parameterization: ParameterizationName = field(
        "epsilon",
        "What the network predicts: the noise (the paper), the clean latents, v (which learns layouts"
        " sooner), the velocity of rectified flow, or what Karras et al. 2022 mix of the last two",
    )
    preview_steps: Positive = field(25, "Sampling steps of the preview pictures")
    preview_guidance: Weight = field(2.0, "Guidance weight of the preview pictures")
    average: AverageConfig = AverageConfig()
    unet: UNetConfig = UNetConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    objective: ObjectiveConfig = ObjectiveConfig()

    FREE_TO_CHANGE: ClassVar[Sequence[str]] = (
        *TrainingConfig.FREE_TO_CHANGE,
        *("ae", "preview_steps", "preview_guidance"),
        *OptimizationConfig.CHANGES_ROUNDING_ONLY,
        *OptimizationConfig.ONLY_MEASURES,
    )

    @property
    def peak_lr(self) -> float:
        """The largest learning rate: as typed, or for each sample of a batch."""
        return self.lr * self.samples_per_step if self.scale_lr else self.lr

    @property
    def steps_shape_the_run(self) -> bool:
        """Whether another number of steps would have changed those already done."""
        return super().steps_shape_the_run or self.lr_decay == "cosine"

    @model_validator(mode="after")
    def _training_fits(self) -> "TrainDiffusionConfig":
        self.require_fitting_schedule(self.steps, self.warmup)
        require_fitting(self.schedule, self.parameterization)
        self.require_divisible_by(self.accumulate)
        return self

    @model_validator(mode="after")
    def _attention_has_levels(self) -> "TrainDiffusionConfig":
        # asked here and not of every U-Net, so that models trained before it was asked can be read
        if self.unet.missing_factors:
            levels = ", ".join(map(str, self.unet.factors))
            raise ValueError(
                f"--unet.attention-factors {self.unet.missing_factors[0]}: no level has that factor; the "
                f"{len(self.unet.factors)} levels have {levels} (factors of the latents, not sides "
                "in pixels)"
            )
        return self


class EMAConfig(Config):
    """Average the weights of a run over another width afterwards; writes a diffusion model file."""

    run: Path = argument("Run directory of train-diffusion with --average.snapshots")
    width: Width = field(
        0.05,
        "Relative width: standard deviation of what the average weighs, as a share of the steps",
    )
    step: Positive | None = field(None, "Snapshot up to which to average (default: the newest)")
    sweep: tuple[Width, ...] = field((), "Several widths, a file for each, instead of --width")
    out: Path | None = field(
        None,
        "Model file, or directory with --sweep (default: RUN/ema-WIDTH-step-STEP.safetensors)",
        short="-o",
    )
    reference: Path | None = field(
        None,
        "Score by the Fréchet distance to these statistics, which `evaluate --save-reference` wrote, instead"
        " of the run's validation loss",
    )
    ae: Path | None = field(None, "With --reference: autoencoder file")
    effnet: Path | None = field(None, "With --reference: weights of EfficientNet-Lite0")
    num: Annotated[int, Field(ge=2)] = field(500, "With --reference: samples for each model")
    steps: Positive = field(25, "With --reference: model calls for each sample")


class InspectConfig(Config):
    """Say what a file, directory or stream of ldmkit is, and whether its digests hold."""

    path: Path = argument(
        "Model or sample file, latent set, run directory, decoded picture; - reads standard input",
        STREAM,
    )


class PresetsConfig(Config):
    """List the named settings of the training commands, with parameters and source."""

    command: Literal["train-ae", "train-diffusion"] | None = argument(
        "Command whose presets to list (default: all)", None
    )
