"""`--batch-size auto`: the largest batch whose step has room, found by taking such steps.

They are taken in another process, so that running out of memory, or being killed for it, does no harm
to the one that trains. On CUDA the batches grow until one has no room. On the CPU nothing says no in
time: there the peaks of two small batches are measured, and those of larger ones lie on a line.
"""

import gc
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple, TypeVar

import torch

from ldmkit.configs import TrainingConfig
from ldmkit.errors import LdmkitError, OutOfMemoryError, UsageError
from ldmkit.terminal import be_quiet, say
from ldmkit.training.memory import Free, free_memory, peak_resident, require_known, resident
from ldmkit.training.run import with_batch_size

AnyTraining = TypeVar("AnyTraining", bound=TrainingConfig)
Trial = Callable[[AnyTraining], object]
"""Takes the largest step that a run may meet; a function that another process can import."""

MEASURED = (2, 4)
"""Samples of each part in the batches that are measured on the CPU: convolutions of a single sample
are computed in another way, with other memory."""
CLEAR = 16 << 20
"""Bytes by which two peaks must differ to be told from the allocator's moods."""
KILLED = -9


class Peak(NamedTuple):
    """What the step of a batch took."""

    size: int
    """Samples of the batch."""
    amount: int
    """Bytes, beyond what the process had before."""


class Line(NamedTuple):
    """Memory as a function of the batch: `base + size * each`, bytes."""

    base: float
    each: float

    def at(self, size: int) -> int:
        """The memory of a batch."""
        return int(self.base + size * self.each)


def batch_sizes(parts: int, smallest_part: int, samples: int) -> list[int]:
    """What `auto` chooses from: so many equal parts of 1, 2, 3, 4, 6, 8, 12 ... samples, rising.

    Args:
        parts: in which a batch goes through the networks.
        smallest_part: the fewest samples that a part may have.
        samples: that there are to train on, which no batch exceeds.

    Raises:
        UsageError: there are fewer samples than the smallest batch has.
    """
    powers = [1 << n for n in range(max(samples, 1).bit_length())]
    rising = sorted({*powers, *(3 * power // 2 for power in powers[1:])})
    sizes = [parts * part for part in rising if part >= smallest_part and parts * part <= samples]
    if not sizes:
        raise UsageError(
            f"--batch-size auto: {parts} parts (--accumulate) of {smallest_part} are more than the "
            f"{samples} samples to train on"
        )
    return sizes


def largest_batch(
    trial: Trial[AnyTraining], config: AnyTraining, sizes: Sequence[int], device: torch.device
) -> int:
    """The largest of these batches whose step fits into the memory that is free, but for a spare part.

    What was found is said.

    Args:
        trial: takes the worst step of a config.
        config: of the run.
        sizes: rising; see `batch_sizes`.
        device: where to compute.

    Raises:
        UsageError: memory cannot be measured on this device.
        OutOfMemoryError: not even the smallest has room.
    """
    require_known(device)
    say(f"batch size: trying steps on {device.type}, in a process of its own")
    find = _by_trying if device.type == "cuda" else _by_extrapolation
    return find(trial, config, sizes, device)


def _by_extrapolation(
    trial: Trial[AnyTraining], config: AnyTraining, sizes: Sequence[int], device: torch.device
) -> int:
    free = free_memory(device)
    room = free.usable(device)
    parts = sizes[0] if len(sizes) == 1 else sizes[1] - sizes[0]
    peaks: list[Peak] = []
    for size in _growing(sizes, parts):
        peak = next(iter(_peaks(trial, config, [size], device)), None)
        if peak is None or peak.amount > room:
            raise OutOfMemoryError(_no_room(size, peak, free))
        peaks.append(peak)
        if peak.amount - peaks[0].amount >= CLEAR:
            break
    line = line_through(peaks[0], peaks[-1])
    found = largest_within(line, sizes, room)
    if found is None:
        raise OutOfMemoryError(_no_room(sizes[0], Peak(sizes[0], line.at(sizes[0])), free))
    measured = " and ".join(f"{_size(p.amount)} with {p.size}" for p in (peaks[0], peaks[-1]))
    say(
        f"batch size {found}: a step took {measured} samples, so about {_size(line.at(found))} with "
        f"{found}{_why(found, sizes)}; {_size(room)} of the {_size(free.amount)} free ({free.told_by}) "
        "may be used"
    )
    return found


def _growing(sizes: Sequence[int], parts: int) -> Iterator[int]:
    """Batches to measure until two differ clearly: of `MEASURED`, then four times as large each."""
    wanted = [parts * part for part in MEASURED]
    while wanted[-1] < sizes[-1]:
        wanted.append(4 * wanted[-1])
    fitting = [size for size in wanted if sizes[0] <= size <= sizes[-1]]
    yield from fitting or sizes[:1]


def line_through(first: Peak, last: Peak) -> Line:
    """The line through two peaks; through zero where they are too close to tell."""
    if last.amount - first.amount < CLEAR:
        return Line(0.0, max(first.amount, last.amount) / last.size)
    each = (last.amount - first.amount) / (last.size - first.size)
    return Line(first.amount - first.size * each, each)


def largest_within(line: Line, sizes: Sequence[int], room: int) -> int | None:
    """The largest of these batches that needs no more than `room` bytes; None if none does."""
    return max((size for size in sizes if line.at(size) <= room), default=None)


def _by_trying(
    trial: Trial[AnyTraining], config: AnyTraining, sizes: Sequence[int], device: torch.device
) -> int:
    free = free_memory(device)
    room = free.usable(device)
    found = None
    for peak in _peaks(trial, config, sizes, device):
        if peak.amount > room:
            break
        found = peak
    if found is None:
        raise OutOfMemoryError(_no_room(sizes[0], None, free))
    say(
        f"batch size {found.size}: a step took {_size(found.amount)}{_why(found.size, sizes)}; "
        f"{_size(room)} of the {_size(free.amount)} free ({free.told_by}) may be used"
    )
    return found.size


def _why(found: int, sizes: Sequence[int]) -> str:
    return ", and there are not many more samples" if found == sizes[-1] else ""


def _no_room(size: int, peak: Peak | None, free: Free) -> str:
    needs = f"takes about {_size(peak.amount)}" if peak else "ran out of memory"
    return (
        f"--batch-size auto: a step with {size} samples {needs}, and {_size(free.amount)} are free "
        f"({free.told_by}): raise --accumulate, take --checkpointing or a smaller network"
    )


def _peaks(
    trial: Trial[AnyTraining], config: AnyTraining, sizes: Sequence[int], device: torch.device
) -> Iterator[Peak]:
    """What the steps of these batches take, one after the other until one has no room."""
    context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
    receiver, sender = context.Pipe(duplex=False)
    configs = [with_batch_size(config, size) for size in sizes]
    process = context.Process(target=_try_all, args=(trial, configs, device, sender), daemon=True)
    process.start()
    sender.close()
    try:
        while isinstance(answer := receiver.recv(), Peak):
            yield answer
        if isinstance(answer, LdmkitError):
            raise answer
    except EOFError as error:
        process.join()
        if process.exitcode not in (0, KILLED):
            raise RuntimeError(
                f"the trial for --batch-size auto ended with code {process.exitcode}; a script that "
                'trains needs `if __name__ == "__main__":` around it'
            ) from error
    finally:
        process.kill()
        process.join()
        receiver.close()


def _try_all(
    trial: Trial[AnyTraining],
    configs: Sequence[AnyTraining],
    device: torch.device,
    sender: Connection,
) -> None:
    """In the other process: send the peak of each config's step; None, or an error, is the end."""
    be_quiet(True)  # the one that trains says it all
    try:
        for config in configs:
            sender.send(Peak(config.samples_per_step, _growth(lambda: trial(config), device)))  # noqa: B023
    except LdmkitError as error:
        sender.send(error)
        return
    except (MemoryError, torch.OutOfMemoryError):
        pass
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
    sender.send(None)


def _growth(work: Callable[[], object], device: torch.device) -> int:
    """Bytes by which this process grows while it works."""
    if device.type != "cuda":
        before = resident()
        work()
        return peak_resident() - before
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_reserved(device)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
