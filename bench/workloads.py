"""The work that is compared: what networks, how large, how much at once."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["ae-train", "ae-train-gan", "encode", "decode", "unet-train", "sample"]
TRAINING: tuple[Kind, ...] = ("ae-train", "ae-train-gan", "unet-train")
SECOND_STAGE: tuple[Kind, ...] = ("unet-train", "sample")
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01
SAMPLING_STEPS, GUIDANCE = 25, 5.0
KL_WEIGHT, ADVERSARIAL_WEIGHT = 1e-6, 0.5


class Sizes(NamedTuple):
    """Of the networks, the same in every package."""

    ae_channels: int = 64
    unet_channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4)
    blocks: int = 2
    """Residual blocks of a level."""
    latent_channels: int = 4
    head: int = 32
    """Channels of an attention head of the U-Net."""
    tokens: int = 77
    context: int = 512
    """Width of a token."""
    groups: int = 32
    """Of the group norms."""

    @property
    def factor(self) -> int:
        """How much smaller latents are than pictures, along each side."""
        return 2 ** (len(self.multipliers) - 1)


class Workload(NamedTuple):
    """One comparison."""

    kind: Kind
    side: int
    """Of the pictures in pixels, or of the latents where the second stage is at work."""
    batch: int
    attends: bool = True
    """Second stage: cross-attention to tokens; False: self-attention alone."""
    sizes: Sizes = Sizes()

    @property
    def trains(self) -> bool:
        """Whether a step changes weights."""
        return self.kind in TRAINING

    @property
    def second_stage(self) -> bool:
        """Whether it is the U-Net's work."""
        return self.kind in SECOND_STAGE

    def images(self, device: str) -> Tensor:
        """A batch of pictures, the same in every case."""
        return _drawn((self.batch, 3, self.side, self.side), 1, device).clamp(-1, 1)

    def latents(self, device: str) -> Tensor:
        """A batch of latents, the same in every case."""
        side = self.side if self.second_stage else self.side // self.sizes.factor
        return _drawn((self.batch, self.sizes.latent_channels, side, side), 2, device)

    def context(self, device: str) -> Tensor:
        """The tokens of a batch, the same in every case."""
        return _drawn((self.batch, self.sizes.tokens, self.sizes.context), 3, device)


def _drawn(shape: tuple[int, ...], seed: int, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


WORKLOADS = {
    "ae-train": Workload("ae-train", 64, 4),
    "ae-train-128": Workload("ae-train", 128, 2),
    "ae-train-gan": Workload("ae-train-gan", 64, 4),
    "encode": Workload("encode", 64, 8),
    "decode": Workload("decode", 64, 8),
    "unet-train": Workload("unet-train", 16, 8),
    "unet-train-32": Workload("unet-train", 32, 2),
    "unet-train-plain": Workload("unet-train", 16, 8, attends=False),
    "unet-train-32-plain": Workload("unet-train", 32, 2, attends=False),
    "sample": Workload("sample", 16, 1),
    "sample-16": Workload("sample", 16, 16),
}
