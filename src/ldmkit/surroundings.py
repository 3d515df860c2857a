"""What the work depends on beside the code: packages, processor, devices, memory, disk, limits.

Each check gives lines with a state and, where something is not as it should be, what to do. None of
them changes anything, but for a file that is written to try the disk and removed again.
"""

import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from packaging.requirements import Requirement

from ldmkit.durable import flush_to_disk
from ldmkit.errors import UsageError
from ldmkit.training.memory import free_memory
from ldmkit.training.runtime import in_bfloat16

State = Literal["ok", "warn", "fail"]
GIGA = 1 << 30
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the device is looked at, nothing is put there
LEAST_SHARED, LEAST_MEMORY, LEAST_DISK = GIGA, 2 * GIGA, 10 * GIGA
"""Bytes below which a warning is due: reading processes, a small network, checkpoints."""
LEAST_FILES = 1024
TRIAL_BYTES = 4 << 20
SLOW_FLUSH = 1.0
"""Seconds for `TRIAL_BYTES` from which on checkpoints will be felt."""


class Line(NamedTuple):
    """One thing that was looked at."""

    name: str
    state: State
    text: str
    advice: str = ""
    """What to do; "" where nothing need be done."""


def packages() -> Iterator[Line]:
    """Versions against the ranges of the package's own metadata, and against a checkout's constraints."""
    minor = sys.version_info[:2]
    yield Line(
        "python",
        "ok" if minor >= (3, 11) else "fail",
        f"{platform.python_version()} on {platform.platform()}",
        "" if minor >= (3, 11) else "install Python 3.11 or newer",
    )
    tested = constraints()
    needs = [Requirement(text) for text in sorted(metadata.requires("ldmkit") or [])]
    # the same package may stand in several extras; what everybody needs comes first
    for need in {need.name: need for need in sorted(needs, key=_is_extra, reverse=True)}.values():
        extra = _is_extra(need)
        found = _version(need.name)
        if found is None and extra:
            continue
        wanted = tested.get(need.name.lower().replace("_", "-"), "")
        if found is None or not need.specifier.contains(found, prereleases=True):
            problem = "is missing" if found is None else f"is {found}"
            advice = f"pip install '{need.name}{need.specifier}'"
            state: State = "warn" if extra else "fail"
            yield Line("package", state, f"{need.name} {problem}, not {need.specifier}", advice)
        elif wanted and found.split("+")[0] != wanted:
            text = f"{need.name} is {found}; {wanted} was tested"
            yield Line("package", "warn", text, "make setup-dev, if anything behaves oddly")
        else:
            yield Line("package", "ok", f"{need.name} {found}")


def constraints() -> dict[str, str]:
    """The tested versions by name in lower case with hyphens; {} unless this runs from a checkout."""
    file = Path(__file__).parents[2] / "constraints.txt"
    if not (file.is_file() and file.with_name("pyproject.toml").is_file()):
        return {}
    lines = [line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    pairs = (line.partition("==") for line in lines if "==" in line)
    return {name.lower().replace("_", "-"): version for name, _, version in pairs}


def processor() -> Iterator[Line]:
    """Cores, threads, and what bfloat16 would bring."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    advice = f"set OMP_NUM_THREADS={cores}" if cores and threads > cores else ""
    state: State = "warn" if advice else "ok"
    text = f"{cores} cores may be used, torch computes with {threads} threads"
    yield Line("cpu", state, f"{text} ({torch.backends.cpu.get_cpu_capability()})", advice)
    fast = in_bfloat16(torch.device("cpu"), "auto")
    yield Line("cpu bfloat16", "ok", "in hardware" if fast else "not in hardware: fp32 is faster")


def devices() -> Iterator[Line]:
    """CUDA and MPS, and whether the build of torch fits the machine."""
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            name, capability = (
                torch.cuda.get_device_name(number),
                torch.cuda.get_device_capability(number),
            )
            text = (
                f"{number}: {name}, {free / GIGA:.1f} of {total / GIGA:.1f} GiB free, compute "
                f"{'.'.join(map(str, capability))}, CUDA {torch.version.cuda}{_driver()}"
            )
            yield Line("cuda", "ok", text)
    elif Path("/proc/driver/nvidia/version").exists():
        advice = "install a build of torch for CUDA, and a driver that is not older than it"
        text = f"an NVIDIA driver{_driver()} is there, and torch {torch.__version__} cannot use it"
        yield Line("cuda", "warn", text, advice)
    else:
        yield Line("cuda", "ok", f"none; torch {torch.__version__} computes on the CPU")
    if torch.backends.mps.is_available():
        yield Line("mps", "ok", "available")


def memory() -> Iterator[Line]:
    """Memory that is free here or in the container, and memory shared between processes."""
    try:
        free = free_memory(torch.device("cpu"))
        low = free.amount < LEAST_MEMORY
        advice = "close other programs, or lower --batch-size and the widths" if low else ""
        text = f"{free.amount / GIGA:.1f} GiB free"
        yield Line("memory", "warn" if low else "ok", text, advice)
    except UsageError:
        yield Line("memory", "warn", "this system does not say how much is free", "look yourself")
    if SHARED_MEMORY.is_dir():
        room = shutil.disk_usage(SHARED_MEMORY).free
        low = room < LEAST_SHARED
        advice = "docker run --ipc=host or --shm-size 8g, or --workers 0" if low else ""
        text = f"{room / GIGA:.1f} GiB free in {SHARED_MEMORY}, for reading processes"
        yield Line("shared memory", "warn" if low else "ok", text, advice)


def limits() -> Iterator[Line]:
    """What the shell allows a process."""
    try:
        import resource
    except ImportError:  # Windows has none of them
        return
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    low = 0 <= files < LEAST_FILES
    advice = f"ulimit -n {LEAST_FILES}" if low else ""
    yield Line("open files", "warn" if low else "ok", _limit(files), advice)
    for name, kind in (("file size", resource.RLIMIT_FSIZE), ("address space", resource.RLIMIT_AS)):
        value = resource.getrlimit(kind)[0]
        bounded = value != resource.RLIM_INFINITY
        advice = f"ulimit -{'f' if name == 'file size' else 'v'} unlimited" if bounded else ""
        yield Line(name, "warn" if bounded else "ok", _limit(value), advice)


def disk(directory: Path) -> Iterator[Line]:
    """Room in a directory, and whether a file can be written, flushed to disk and renamed there."""
    try:
        room = shutil.disk_usage(directory).free
    except OSError as error:
        text = f"{directory} cannot be looked at: {error.strerror}"
        yield Line("disk", "fail", text, "name a directory that is there")
        return
    low = room < LEAST_DISK
    advice = "checkpoints and latents need room: name another directory" if low else ""
    text = f"{room / GIGA:.1f} GiB free in {directory}"
    yield Line("disk", "warn" if low else "ok", text, advice)
    try:
        seconds = _write_and_flush(directory)
    except OSError as error:
        text = f"writing in {directory} failed: {error.strerror or error}"
        yield Line("fsync", "fail", text, "name a directory that you may write to")
        return
    slow = seconds > SLOW_FLUSH
    advice = "take larger --save-every, or a faster disk" if slow else ""
    text = f"{TRIAL_BYTES >> 20} MiB written, flushed and renamed in {seconds * 1000:.0f} ms"
    yield Line("fsync", "warn" if slow else "ok", text, advice)


def weights() -> Iterator[Line]:
    """Which networks for losses and metrics are here without being given by path."""
    box = Path(__file__).with_name("autoencoder") / "weights/vgg16-relu3_3.safetensors"
    there = box.is_file()
    yield Line(
        "weights",
        "ok" if there else "fail",
        f"VGG16 in the box: {_there(there)}",
        "" if there else "install ldmkit again",
    )
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    optional = {
        "LPIPS (vgg)": ("vgg16-*.pth", "--loss.perceptual-weights FILE"),
        "LPIPS (alex)": ("alexnet-*.pth", "--loss.perceptual-weights FILE"),
        "Inception of FID": ("weights-inception-*.pth", "--inception FILE"),
        "EfficientNet-Lite0": ("efficientnet?lite0*.pth", "--effnet FILE"),
    }
    for name, (pattern, option) in optional.items():
        there = cache.is_dir() and any(cache.glob(pattern))
        text = f"{name} in {cache}: {_there(there)}"
        yield Line("weights", "ok", text, "" if there else f"if it is asked for, give {option}")


def _there(there: bool) -> str:
    return "there" if there else "not there"


def _is_extra(need: Requirement) -> bool:
    return need.marker is not None and not need.marker.evaluate({"extra": ""})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    file = Path("/proc/driver/nvidia/version")
    words = file.read_text(encoding="utf-8", errors="replace").split() if file.exists() else []
    number = next((word for word in words if word[:1].isdigit() and "." in word), "")
    return f", driver {number}" if number else ""


def _limit(value: int) -> str:
    return "unlimited" if value < 0 or value >= 1 << 62 else f"at most {value:,}"


def _write_and_flush(directory: Path) -> float:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ldmkit-doctor-", dir=directory) as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        first.write_bytes(bytes(TRIAL_BYTES))
        flush_to_disk(first)
        first.replace(second)
        flush_to_disk(second.parent)
    return time.perf_counter() - started
