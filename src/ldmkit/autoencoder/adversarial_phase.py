"""How the discriminator is brought in without harm, and how a collapse is noticed.

From `start` on the discriminator first learns alone, on the reconstructions of the waiting
autoencoder; then it counts, with a weight that rises from zero. The published code lets it count
untrained and at full weight from one step to the next, which is where runs break.
"""

from typing import NamedTuple

import torch
from torch import nn

from ldmkit.autoencoder_configs import DiscriminatorConfig
from ldmkit.errors import CollapseError
from ldmkit.tensors import Scalar

NEVER_WRONG = 0.999
NONE_YET = -1.0
"""Stands for no distance yet: checkpoints refuse infinities."""
SMOOTHING = 0.02
"""Share of a step in the running mean of the perceptual distance: about 50 steps long."""


class Phase(NamedTuple):
    """What happens in a step."""

    autoencoder_learns: bool
    discriminator_learns: bool
    weight: float
    """Of the adversarial loss; 0 while the discriminator does not count."""


def phase_of(step: int, start: int, config: DiscriminatorConfig) -> Phase:
    """The phase of a step, for an adversarial phase that begins at step `start`."""
    if config.weight == 0 or step < start:
        return Phase(True, False, 0.0)
    counted = step - start - config.warmup
    if counted < 0:
        return Phase(False, True, 0.0)
    return Phase(True, True, config.weight * min(1.0, (counted + 1) / max(config.ramp, 1)))


class CollapseWatch(nn.Module):
    """Notices when the adversarial phase goes wrong; its memory is in buffers, so checkpoints hold it.

    A collapse is a value that is not finite, a discriminator that is never wrong for `patience`
    steps (then it teaches nothing), or a running mean of the perceptual distance `jump` times its
    best.

    Args:
        config: patience and jump.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("level", torch.full((), NONE_YET))
        self.register_buffer("best", torch.full((), NONE_YET))
        self.register_buffer("pinned", torch.zeros((), dtype=torch.int64))
        self.register_buffer("finite", torch.ones((), dtype=torch.bool))

    @torch.no_grad()
    def note_autoencoder(self, total: Scalar, distance: Scalar) -> None:
        """Take in a step's loss and perceptual distance, without waiting for the device."""
        level, best = self.get_buffer("level"), self.get_buffer("best")
        self.get_buffer("finite").logical_and_(total.isfinite())
        level.copy_(torch.where(level == NONE_YET, distance, level.lerp(distance, SMOOTHING)))
        best.copy_(torch.where(best == NONE_YET, level, torch.minimum(best, level)))

    @torch.no_grad()
    def note_discriminator(self, accuracy: Scalar) -> None:
        """Take in the share of patches that the discriminator judged rightly."""
        self.get_buffer("pinned").add_(1).mul_((accuracy >= NEVER_WRONG).long())

    def forgive(self) -> None:
        """Begin anew, after a setback."""
        self.get_buffer("pinned").zero_()

    def raise_if_collapsed(self, step: int) -> None:
        """Raise CollapseError, saying why, if adversarial training went wrong before `step`."""
        level, best = float(self.get_buffer("level")), float(self.get_buffer("best"))
        pinned = int(self.get_buffer("pinned"))
        reason = ""
        if not bool(self.get_buffer("finite")):
            reason = "the loss is not finite"
        elif level > self.config.jump * best:
            reason = f"the perceptual distance rose from {best:.4g} to {level:.4g}"
        elif self.config.patience and pinned >= self.config.patience:
            reason = f"the discriminator was never wrong for {pinned} steps"
        if reason:
            raise CollapseError(
                f"adversarial training collapsed before step {step}: {reason}", step
            )
