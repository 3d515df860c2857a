"""Which samples go through the U-Net together."""

from collections.abc import Iterator

from jaxtyping import Int
from torch import Tensor

from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.networks.packed import is_packed
from ldmkit.training.runtime import CPU_GROUP, groups_of, in_groups

PIXELS = 2048
"""Of latents in a group on the CPU; more of them gain little, and a signal waits for the group to end."""


def sample_groups(
    count: int, batch_size: int, model: LatentDiffusion, shape: tuple[int, int, int]
) -> Iterator[tuple[Int[Tensor, " width"], int]]:
    """Divide `count` samples into the groups that are drawn at once.

    A packed network gives a sample the same bytes in any group, which then is as large as pays.

    Args:
        count: samples.
        batch_size: at most so many, but for other networks on the CPU.
        model: made ready to draw.
        shape: of the latents of a sample.

    Yields:
        As `groups_of`.
    """
    device = model.latent_mean.device
    if device.type != "cpu" or not is_packed(model.unet):
        return groups_of(count, batch_size, device)
    most = max(PIXELS // (shape[1] * shape[2]), CPU_GROUP)
    return in_groups(count, max(min(count, batch_size, most), 1))
