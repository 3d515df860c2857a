"""Which samples go through a network together."""

from collections.abc import Iterator

from jaxtyping import Int
from torch import Tensor, nn

from ldmkit.networks.packed import is_packed
from ldmkit.training.runtime import CPU_GROUP, groups_of, in_groups

PIXELS = 2048
"""Of latents in a group on the CPU; more of them gain little, and a signal waits for the group to end."""


def sample_groups(
    count: int, batch_size: int, network: nn.Module, pixels: int
) -> Iterator[tuple[Int[Tensor, " width"], int]]:
    """Divide `count` samples into the groups that go through a network at once.

    A packed network gives a sample the same bytes in any group, which then is as large as pays.

    Args:
        count: samples.
        batch_size: at most so many, but for other networks on the CPU.
        network: made ready to draw or decode.
        pixels: of a sample's latents.

    Yields:
        As `groups_of`.
    """
    device = next(network.parameters()).device
    if device.type != "cpu" or not is_packed(network):
        return groups_of(count, batch_size, device)
    most = max(PIXELS // pixels, CPU_GROUP)
    return in_groups(count, max(min(count, batch_size, most), 1))
