"""`sample --batch-size auto`: how many samples have room in the device's memory at once."""

from collections.abc import Callable, Sequence

import torch

from ldmkit.errors import OutOfMemoryError
from ldmkit.job_configs import USUAL_BATCH
from ldmkit.terminal import say
from ldmkit.training.batch_size import Peak, batch_sizes, largest_within, line_through
from ldmkit.training.memory import free_memory, require_known

MEASURED = (2, 8)
"""Samples in the batches that are measured."""
LARGEST = 512


def batch_with_room(draw: Callable[[int], object], total: int, device: torch.device) -> int:
    """How many samples to draw at once.

    On the CPU samples go through the network in small groups in any case (`sample_groups`), and the usual
    number is as good as any. On CUDA the peaks of two small batches are measured, and those of larger ones lie on a line.

    Args:
        draw: draws so many samples, as far as the peak of memory needs.
        total: samples to draw.
        device: where.

    Raises:
        UsageError: memory cannot be measured on this device.
        OutOfMemoryError: not even one sample has room.
    """
    require_known(device)
    if device.type == "cpu":
        return USUAL_BATCH

    def peak(size: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device)
        draw(size)
        return torch.cuda.max_memory_reserved(device) - before

    room = free_memory(device).usable(device)
    found = largest_batch(peak, batch_sizes(1, 1, min(total, LARGEST)), room)
    say(f"batch size {found}; {room / 1e9:.2f} GB of {device.type} may be used")
    return found


def largest_batch(peak: Callable[[int], int], sizes: Sequence[int], room: int) -> int:
    """The largest of some batches that has room, extrapolated from `MEASURED` ones.

    Args:
        peak: samples -> bytes they take.
        sizes: of batches to choose from, rising.
        room: bytes.

    Raises:
        OutOfMemoryError: none has room.
    """
    first, last = (Peak(size, peak(size)) for size in MEASURED)
    found = largest_within(line_through(first, last), sizes, room)
    if found is None:
        raise OutOfMemoryError(
            f"--batch-size auto: two samples take {first.amount / 1e9:.2f} GB, and {room / 1e9:.2f} GB may be "
            "used: free memory of the device, or take --device cpu"
        )
    return found
