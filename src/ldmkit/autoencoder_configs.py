"""Configs of the first stage: its pictures, networks and bottleneck, its loss and its adversary.

Imports no torch.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from ldmkit.fields import Config, Count, Fraction, Positive, ValueRange, Weight, field

Bottleneck = Literal["kl", "deterministic", "vq", "identity"]
BACKGROUNDS = {"white": "255,255,255", "black": "0,0,0", "grey": "128,128,128"}
MOMENT = re.compile(r"(\d+)(?: ?(images))?|(\d+(?:\.\d+)?)%")


def _is_colour(value: str) -> str:
    parts = BACKGROUNDS.get(value, value).split(",")
    if len(parts) != 3 or not all(re.fullmatch(r"[0-9]{1,3}", part) for part in parts):
        raise ValueError(f"{value!r} is no colour: give white, black, grey, or R,G,B")
    if max(int(part) for part in parts) > 255:
        raise ValueError(f"{value!r} is no colour: R, G and B are 0 to 255")
    return value


class PreprocessingConfig(Config):
    """From a picture file to the network's input: resize, crop, value range [-1, 1]."""

    size: Positive = field(256, "Height and width of the network's input, pixels")
    channels: Positive = field(3, "1 = grey, 3 = RGB, any other number = as the files have them")
    range: ValueRange | None = field(
        None,
        "LO,HI: the values that become -1 and 1; values outside are clipped to them, as a CT window"
        " does (default: 0,255 for 8 bits, 0,65535 for 16; all other numbers need it)",
    )
    resize: Literal["bicubic", "bilinear", "area", "none"] = field(
        "bicubic",
        "Filter that brings the shorter side to the size (anti-aliased); none = pixels stay as they are,"
        " and the crop is cut from the picture at its own scale",
    )
    crop: Literal["center", "random", "none"] = field(
        "center", "Which square is cut from the longer side; none = others than squares are refused"
    )
    flip: bool = field(False, "Mirror half of the training pictures at random (left and right)")
    background: Annotated[str, AfterValidator(_is_colour)] = field(
        "white", "What transparency is laid over: white, black, grey, or R,G,B from 0 to 255 each"
    )
    dct_scaling: bool = field(
        False,
        "Decode large JPEGs at 1/2, 1/4 or 1/8 of their size where that is still at least the target"
        " size: faster, pixels differ slightly",
    )

    @property
    def background_rgb(self) -> tuple[int, int, int]:
        """The background's red, green and blue, 0 to 255."""
        red, green, blue = BACKGROUNDS.get(self.background, self.background).split(",")
        return int(red), int(green), int(blue)


class CodebookConfig(Config):
    """The codebook of the `vq` bottleneck (van den Oord et al. 2017; Esser et al. 2021)."""

    size: Positive = field(8192, "Codes in the codebook")
    commitment: Weight = field(0.25, "Weight of the pull on latents towards their codes")
    legacy_commitment: bool = field(
        False, "Put that weight on the codes' pull instead, as the code published with LDM did"
    )
    ema_decay: Fraction = field(
        0.0, "Decay of codes kept as running means of their latents; 0 = learned by gradient"
    )
    kmeans_start: bool = field(True, "Begin with k-means of the first batch's latents")
    restart_after: Count = field(
        0, "Steps without use after which a code moves to a latent of the batch; 0 = never"
    )


class AutoencoderConfig(Config):
    """The networks of the first stage (Rombach et al. 2022, App. E)."""

    bottleneck: Bottleneck = field(
        "kl",
        "Latents: Gaussian with KL penalty, without noise, quantised by the decoder, "
        "or the pictures themselves (no network: diffusion works on pixels)",
    )
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
    codebook: CodebookConfig = CodebookConfig()

    @property
    def factor(self) -> int:
        """How much smaller latents are than pictures, along each side."""
        return 1 if self.bottleneck == "identity" else 2 ** (len(self.multipliers) - 1)


class AutoencoderLossConfig(Config):
    """What the first stage minimises (Rombach et al. 2022, App. G); sums over a picture's values."""

    reconstruction: Literal["l1", "l2"] = field("l1", "Distance of pixel values")
    perceptual: Literal[
        "vgg16", "lpips-vgg", "lpips-alex", "lpips-squeeze", "efficientnet-lite0", "none"
    ] = field(
        "vgg16",
        "Perceptual distance: VGG16 in the box (not LPIPS), LPIPS with its networks, or "
        "EfficientNet-Lite0; one channel is shown as grey, N as the mean over channels 1-3, 4-6 ... "
        "(the last three wrap around)",
    )
    perceptual_weight: Weight = field(1.0, "Weight of the perceptual distance against the pixels'")
    perceptual_weights: Path | None = field(
        None,
        "Network of the perceptual distance as a safetensors file (LPIPS: torchvision's tensor names)",
        short="--perceptual-weights",
    )
    frequency_weight: Weight = field(
        0.0, "Weight of the distance of amplitude spectra (Dhariwal et al. 2020)"
    )
    kl_weight: Weight = field(1e-6, "Weight of the KL divergence to the unit Gaussian")
    codebook_weight: Weight = field(
        1.0, "Weight of the codebook's loss, against the reconstruction's mean over a picture"
    )
    learn_variance: bool = field(
        False, "Learn the variance of the reconstruction (one number) that divides its loss"
    )


def _as_text(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _is_moment(value: str) -> str:
    if not MOMENT.fullmatch(value):
        raise ValueError(f"{value!r} is no time: give steps (50001), images (600000images) or 40%")
    return value


class DiscriminatorConfig(Config):
    """The adversary of the first stage, and how it is brought in without harm."""

    weight: Weight = field(0.5, "Weight of the adversarial loss; 0 trains without one")
    start: Annotated[str, BeforeValidator(_as_text), AfterValidator(_is_moment)] = field(
        "50001",
        "When the adversarial phase begins: steps (50001), images (600000images), share of the run (40%)",
        short="--disc-start",
    )
    warmup: Count = field(
        500, "Steps at its beginning in which only the discriminator learns, the autoencoder waits"
    )
    ramp: Count = field(2000, "Steps after those over which the weight rises from 0")
    loss: Literal["hinge", "vanilla"] = field("hinge", "Loss of the discriminator")
    norm: Literal["batch", "sync-batch", "group", "act"] = field(
        "batch", "Normalisation: BatchNorm, over all processes, GroupNorm or ActNorm"
    )
    channels: Positive = field(64, "Channels of the discriminator's first layer")
    layers: Annotated[int, Field(ge=1, le=4)] = field(
        3, "Strided layers of the patch discriminator (3: 70 pixel patches)"
    )
    spectral_norm: bool = field(False, "Divide its weights by their largest singular value")
    r1_weight: Weight = field(
        0.0, "Weight of the gradient penalty on real pictures (Mescheder et al. 2018)"
    )
    r1_every: Positive = field(16, "Steps between gradient penalties, which then count as often")
    max_adaptive: Weight = field(1e4, "Largest adaptive weight of the adversarial loss")
    patience: Count = field(
        5000,
        "Steps of a discriminator that is never wrong that count as a collapse; 0 = any number",
    )
    jump: Annotated[float, Field(gt=1)] = field(
        2.0, "Growth of the perceptual distance in the adversarial phase that counts as a collapse"
    )

    def start_step(self, steps: int, batch_size: int) -> int:
        """The optimizer step at which the adversarial phase begins, for such a run."""
        match = MOMENT.fullmatch(self.start)
        if match is None:  # the pattern of the field forbids it
            raise ValueError(self.start)
        count, images, percent = match.groups()
        if percent is not None:
            return round(steps * float(percent) / 100)
        return -(-int(count) // batch_size) if images else int(count)
