"""Leaving out the updates that would spoil the weights, without waiting for the device in each step.

Whether an update is sound is known on the device before it happens, and it is left out there: by the
optimizer where it can (fused or 8-bit AdamW), else by putting back what it changed. The host only looks now
and then, to count and to name the samples.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim import Optimizer

from ldmkit.tensors import Scalar, Sigmas
from ldmkit.training.adamw8bit import AdamW8bit

PATIENCE = 10
"""Updates left out in a row that end a run."""
LOOK_EVERY = 10
"""Steps between looks where looking means waiting for the device."""


class Skipped(NamedTuple):
    """An update that was left out."""

    step: int
    indices: np.ndarray
    """Of the samples whose loss is not finite; of the whole batch if only the gradient is not."""


class _Attempt(NamedTuple):
    step: int
    indices: np.ndarray
    sound: Bool[Tensor, ""]
    finite: Bool[Tensor, " batch"]


class NonFiniteGuard(nn.Module):
    """Counts the updates that were left out; a checkpoint keeps the counts.

    Buffers: `skipped` in the whole run, `in_a_row` up to now.
    """

    skipped: Tensor
    in_a_row: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))
        self.register_buffer("in_a_row", torch.zeros((), dtype=torch.int64))
        self._attempts: list[_Attempt] = []

    def judge(
        self, step: int, indices: np.ndarray, losses: Sigmas, norm: Scalar
    ) -> Bool[Tensor, ""]:
        """Whether the update of a step is sound: all losses and the gradient's norm are finite.

        Args:
            step: of the run.
            indices: of the samples, in the order of `losses`.
            losses: of each sample.
            norm: of the gradient.
        """
        finite = losses.detach().isfinite()
        sound = finite.all() & norm.detach().isfinite()
        self._attempts.append(_Attempt(step, indices, sound, finite))
        return sound

    def look_is_due(self, step: int) -> bool:
        """Whether to look before this step: always on the CPU, where it costs nothing."""
        return bool(self._attempts) and (
            self._attempts[-1].sound.device.type == "cpu" or step % LOOK_EVERY == 0
        )

    def look(self) -> tuple[list[Skipped], bool]:
        """The updates left out since the last look, and whether there were too many in a row.

        If so the count begins anew, so that a run which is started again has as many tries.
        """
        attempts, self._attempts = self._attempts, []
        if not attempts:
            return [], False
        found, exhausted = [], False
        verdicts = torch.stack([attempt.sound for attempt in attempts]).tolist()
        for attempt, sound in zip(attempts, verdicts, strict=True):
            if sound:
                self.in_a_row.zero_()
                continue
            bad = ~attempt.finite.cpu().numpy()
            found.append(Skipped(attempt.step, attempt.indices[bad if bad.any() else slice(None)]))
            self.skipped += 1
            self.in_a_row += 1
            exhausted = exhausted or int(self.in_a_row) >= PATIENCE
        if exhausted:
            self.in_a_row.zero_()
        return found, exhausted


@torch.no_grad()
def step_if(sound: Bool[Tensor, ""], optimizer: Optimizer) -> None:
    """Take a step of an optimizer if it is sound; otherwise weights and moments stay as they are.

    On the CPU, and for Adafactor, which waits for the device anyway, the host decides.
    """
    if sound.device.type == "cpu" or isinstance(optimizer, torch.optim.Adafactor):
        if bool(sound):
            optimizer.step()
    elif isinstance(optimizer, (torch.optim.AdamW, AdamW8bit)):
        step_unless_found(optimizer, (~sound).float())
    else:
        step_or_put_back(sound, optimizer)


def step_unless_found(optimizer: Optimizer, found: Scalar) -> None:
    """A step of an optimizer that changes nothing where `found` is 1, as the kernel of fused ones does.

    This is how `torch.amp.GradScaler` tells it of overflows.
    """
    optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.found_inf = found  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()


def step_or_put_back(sound: Bool[Tensor, ""], optimizer: Optimizer) -> None:
    """A step of any optimizer whose moments start at zero; what it changed is put back if not sound."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    before = [weight.clone() for weight in weights]
    moments = {
        (weight, name): value.clone()
        for weight in weights
        for name, value in optimizer.state[weight].items()
    }
    optimizer.step()
    for weight, former in zip(weights, before, strict=True):
        weight.copy_(torch.where(sound, weight, former))
        for name, value in optimizer.state[weight].items():
            kept = moments.get((weight, name))
            value.copy_(torch.where(sound, value, 0.0 if kept is None else kept))
