"""How long a step takes, and how sure that is: timings, what disturbed them, ratios, the machine's peak.

On a machine that others use, two threads may take nine times as long instead of twice: so every timing says
how many cores others kept busy meanwhile, and only ratios of timings of one round are compared.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Number = Literal["fp32", "bf16"]
DTYPES: dict[Number, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHORTEST = 0.3
"""Seconds that a timing takes at least: the kernel counts what others use in hundredths of a second."""
DISTURBED = 0.15
"""Cores used by others, beyond those that this process leaves free, from which on a timing is disturbed."""
ENOUGH = 3
"""Undisturbed timings from which on the others are left out."""
QUIET, LOOK = 0.1, 0.5
"""Waiting: cores used by others below which the machine is quiet, and the seconds of a look."""


class Timing(NamedTuple):
    """One measurement of a step."""

    seconds: float
    """For one run of the step."""
    others: float
    """Cores that other processes kept busy meanwhile."""


class Spread(NamedTuple):
    """The timings of a case, summed up; seconds."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    undisturbed: int
    taken: int
    """How many timings there are; where fewer than `ENOUGH` are undisturbed, all count."""


class Ratio(NamedTuple):
    """How many times as fast as a reference: over the rounds, reference time / this time."""

    median: float
    low: float
    """The smallest of a round."""
    high: float
    rounds: int
    """How many count."""


def busy_seconds() -> float:
    """Seconds of processor time that all other processes have used since the machine began; 0 if unknown."""
    try:
        line = Path("/proc/stat").read_text().splitlines()[0]
    except OSError:
        return 0.0
    ticks = [int(part) for part in line.split()[1:9]]
    idle = ticks[3] + ticks[4]
    own = os.times()
    children = own.children_user + own.children_system
    used = (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK")
    return used - time.process_time() - children


def timed(step: Callable[[], object], device: str, repeats: int = 1) -> Timing:
    """Run a step some times, and say how long one took."""
    before = busy_seconds()
    _wait(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    _wait(device)
    seconds = time.perf_counter() - begin
    return Timing(seconds / repeats, max(0.0, (busy_seconds() - before) / seconds))


def repeats_for(seconds: float) -> int:
    """How often to run a step of so many seconds for one timing."""
    return max(1, math.ceil(SHORTEST / max(seconds, 1e-6)))


def wait_until_quiet(limit: float) -> None:
    """Wait, so many seconds at most, until others hardly use the machine."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        before = busy_seconds()
        time.sleep(LOOK)
        if (busy_seconds() - before) / LOOK < QUIET:
            return


def is_disturbed(timing: Timing, threads: int, cores: int) -> bool:
    """Whether others used cores that this process, of so many threads, wanted."""
    return timing.others > DISTURBED + max(0, cores - threads)


def spread_of(timings: Sequence[Timing], threads: int, cores: int) -> Spread:
    """Sum up the timings of a case (at least one)."""
    calm = [one.seconds for one in timings if not is_disturbed(one, threads, cores)]
    kept = calm if len(calm) >= ENOUGH else [one.seconds for one in timings]
    low, median, high = kept[0], kept[0], kept[0]
    if len(kept) > 1:
        low, median, high = statistics.quantiles(kept, n=4, method="inclusive")
    return Spread(median, low, high, len(calm), len(timings))


def ratio_of(
    reference: Sequence[Timing], timings: Sequence[Timing], threads: int, cores: int
) -> Ratio:
    """How many times as fast as the reference; the same place in both is the same round.

    Rounds in which either was disturbed are left out, unless fewer than `ENOUGH` would be left.
    """
    pairs = list(zip(reference, timings, strict=True))
    calm = [pair for pair in pairs if not any(is_disturbed(one, threads, cores) for one in pair)]
    kept = calm if len(calm) >= ENOUGH else pairs
    ratios = [theirs.seconds / ours.seconds for theirs, ours in kept]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), len(ratios))


def rotated(count: int, round_: int) -> list[int]:
    """The order of a round: each case comes first in turn, so that none always follows the same load."""
    return [(place + round_) % count for place in range(count)]


def count_flops(step: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions of a step, both passes.

    Attention is counted as plain products: the counter does not know the fused kernels of CPUs.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


class Probe(NamedTuple):
    """A matrix product or convolution that comes near the machine's peak."""

    number: Number
    flops: int
    run: Callable[[], object]


def probes(device: str) -> list[Probe]:
    """Matrix products of 1024^3 and 2048^3 (on a GPU 4096^3 and 8192^3) and a 3x3 convolution, by number."""
    sides = (4096, 8192) if device == "cuda" else (1024, 2048)
    batch, width, side = (64, 512, 64) if device == "cuda" else (8, 128, 32)
    found = []
    for number, dtype in DTYPES.items():
        for size in sides:
            a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
            found.append(Probe(number, 2 * size**3, lambda a=a, b=b: a @ b))
        images = torch.randn(batch, width, side, side, device=device, dtype=dtype)
        images = images.to(memory_format=torch.channels_last)
        kernel = torch.randn(width, width, 3, 3, device=device, dtype=dtype)
        flops = 2 * batch * side**2 * width**2 * 9
        found.append(Probe(number, flops, lambda x=images, w=kernel: F.conv2d(x, w, padding=1)))
    return found


@torch.no_grad()
def probe_peak(tried: Sequence[Probe], device: str) -> dict[Number, float]:
    """The best rate of each number format in one go through the probes, FLOP/s."""
    best: dict[Number, float] = dict.fromkeys(DTYPES, 0.0)
    for probe in tried:
        probe.run()
        seconds = min(timed(probe.run, device).seconds for _ in range(3))
        best[probe.number] = max(best[probe.number], probe.flops / seconds)
    return best


def peak_memory(device: str) -> int:
    """Most bytes that this process has had: resident, or of the GPU's memory.

    VmHWM and not ru_maxrss, which a new process takes over from the one that started it.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
