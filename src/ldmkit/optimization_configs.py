"""How weights are moved: what both training commands share, and the diffusion model's own settings.

Imports no torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ldmkit.fields import Config, Count, Duration, Fraction, Positive, Weight, field

ADAM_BETAS = (0.9, 0.999)


class TrainingConfig(Config):
    """What both training commands share."""

    out: Path = field(Path("run"), "Run directory: config, log, previews, checkpoints, model file")
    steps: Positive = field(100_000, "Optimizer steps of the whole run")
    batch_size: Positive | Literal["auto"] = field(
        16,
        "Samples for each step; auto = the most that a trial finds room for in the memory that is free,"
        " kept as a number in OUT/config.toml",
    )
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
    time_limit: Duration | None = field(
        None,
        "Save and stop (exit 75) before so much time has passed since the command began, such as 7.5h or"
        " 7:30:00; run again to go on",
    )
    stall_timeout: Duration = field(
        "30m",
        "When one step takes so long, print where every thread is and end the process (exit 1); the last"
        " checkpoint stays",
    )

    FREE_TO_CHANGE: ClassVar[Sequence[str]] = (
        *("steps", "out", "workers", "device", "log_every", "sample_every", "save_every"),
        *("tensorboard", "time_limit", "stall_timeout"),
    )
    """Fields that may differ when a run is resumed; any other would make it another run."""

    @property
    def steps_shape_the_run(self) -> bool:
        """Whether another number of steps would have changed those already done."""
        return self.cooldown > 0

    @property
    def samples_per_step(self) -> int:
        """The batch size as a number; `auto` has to be resolved before anything is trained.

        Raises:
            TypeError: it has not been.
        """
        if self.batch_size == "auto":
            raise TypeError("--batch-size auto has not been resolved")
        return self.batch_size

    def require_divisible_by(self, parts: int) -> None:
        """Raise ValueError if a batch cannot be cut into so many equal parts."""
        if self.batch_size != "auto" and self.batch_size % parts:
            raise ValueError(f"--accumulate {parts} does not divide --batch-size {self.batch_size}")


class OptimizationConfig(Config):
    """Optimizer, learning rate, memory and validation of `train-diffusion`."""

    lr: Annotated[float, Field(gt=0)] = field(
        1e-4,
        "Largest learning rate; of adafactor relative to the size of each weight (1e-2 is usual)",
    )
    scale_lr: bool = field(
        False, "Multiply --lr by --batch-size, as the paper does; the product is printed and stored"
    )
    lr_decay: Literal["constant", "cosine", "inverse-sqrt"] = field(
        "constant", "What the learning rate does after the warm-up, before the cooldown"
    )
    decay_start: Positive | None = field(
        None, "Step at which --lr-decay begins (default: the end of the warm-up)"
    )
    optimizer: Literal["adamw", "adamw-8bit", "adafactor", "muon"] = field(
        "adamw",
        "adamw-8bit keeps a quarter of the moments' memory, adafactor less; muon moves the matrices of linear"
        " layers, and AdamW all other weights",
    )
    betas: tuple[Fraction, Fraction] = field(ADAM_BETAS, "Decay of AdamW's two moments")
    weight_decay: Weight = field(0.01, "Weight decay, times the learning rate in each step")
    decay_all: bool = field(
        True, "Decay all weights, as the paper's code does; without, not those of norms and biases"
    )
    clip_norm: Weight = field(0.0, "Largest norm of the gradient of all weights; 0 = no limit")
    accumulate: Positive = field(
        1, "Parts in which a batch goes through the network one after the other, to save memory"
    )
    checkpointing: bool = field(
        False, "Compute activations again in the backward pass instead of keeping them"
    )
    compile: bool = field(False, "Compile the network with torch.compile (minutes, then faster)")
    shard: Literal["none", "fsdp2"] = field(
        "none",
        "fsdp2 divides weights, gradients, averages and moments among the processes, for networks that one"
        " GPU has no room for; none = each process holds all of them (docs/cluster.md)",
    )
    validation_latents: Path | None = field(
        None, "Latent set to measure the validation loss on (default: what --holdout keeps back)"
    )
    validate_every: Positive = field(1_000, "Steps between measurements of the validation loss")
    validate_num: Positive = field(256, "Largest number of latents it is measured on")

    CHANGES_ROUNDING_ONLY: ClassVar[Sequence[str]] = (
        *("accumulate", "checkpointing", "compile", "shard"),
    )
    ONLY_MEASURES: ClassVar[Sequence[str]] = (
        *("validation_latents", "validate_every", "validate_num"),
    )

    def require_fitting_schedule(self, steps: int, warmup: int) -> None:
        """Raise ValueError if the settings contradict one another, or a run of so many steps."""
        start = self.decay_start or warmup
        if self.lr_decay == "constant" and self.decay_start:
            raise ValueError("--decay-start needs --lr-decay cosine or inverse-sqrt")
        if self.lr_decay == "inverse-sqrt" and not start:
            raise ValueError(
                "--lr-decay inverse-sqrt needs --decay-start, the step from which on it falls, or "
                "--warmup"
            )
        if self.lr_decay == "cosine" and start >= steps:
            raise ValueError(
                f"--lr-decay cosine has to begin (step {start}) before the last step ({steps})"
            )
        if self.shard != "none" and self.optimizer != "adamw":
            raise ValueError(
                f"--shard {self.shard} goes with --optimizer adamw: {self.optimizer} needs whole weights, of"
                " which a process has parts"
            )
        if self.optimizer == "adafactor" and self.betas != ADAM_BETAS:
            raise ValueError("--betas are AdamW's: adafactor has none")
