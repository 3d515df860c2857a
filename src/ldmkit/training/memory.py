"""How much memory there is, how much a process has taken, and how much a step would take.

The last is asked of tensors without memory: torch's fake tensors go through the very code of a step,
and what they would hold is added up.
"""

import os
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldmkit.errors import UsageError

KIBI = 1024
Module = TypeVar("Module", bound=nn.Module)
SPARE = {"cpu": 0.2, "cuda": 0.1}
"""Share of the free memory that is left alone, by kind of device: for what a trial does not see
(previews, measurements on held-back samples, other programs)."""


class Free(NamedTuple):
    """Memory that nobody uses."""

    amount: int
    """Bytes."""
    told_by: str
    """Where the number is from."""

    def usable(self, device: torch.device) -> int:
        """Bytes that training may take; the rest is spare."""
        return int(self.amount * (1.0 - SPARE[device.type]))


def require_known(device: torch.device) -> None:
    """Raise UsageError for devices whose memory cannot be measured."""
    if device.type not in SPARE:
        raise UsageError(
            f"--batch-size auto measures memory on cpu and cuda, not on {device.type}: give a number"
        )


def free_memory(device: torch.device) -> Free:
    """The memory that is free on a device, or in this machine and the container that we are in.

    Raises:
        UsageError: this cannot be told here.
    """
    require_known(device)
    if device.type == "cuda":
        return Free(torch.cuda.mem_get_info(device)[0], "CUDA")
    return min((_of_the_machine(), *cgroup_rooms()), key=lambda free: free.amount)


def _of_the_machine() -> Free:
    info = Path("/proc/meminfo")
    if info.exists():
        return Free(KIBI * _number_behind("MemAvailable:", info.read_text()), "MemAvailable")
    try:
        count = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError) as error:
        raise UsageError(
            "--batch-size auto: this system does not tell how much memory it has; give a number"
        ) from error
    return Free(count, "all memory of this machine: what others use of it is not known")


def cgroup_rooms(
    member: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[Free]:
    """What is left below each memory limit of the control groups we are in, of version 1 and 2.

    File pages that nobody has touched for a while are given up under pressure, so they count as free.

    Args:
        member: names our groups, one line for each hierarchy.
        root: where the hierarchies are mounted.
    """
    names = {False: ("memory.max", "memory.current", "inactive_file")}
    names[True] = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    found = []
    for line in member.read_text().splitlines() if member.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = root / controllers
        inside = base / path.lstrip("/")
        groups = [inside, *inside.parents[: len(inside.parts) - len(base.parts)]]
        found += [_room(group, *names[bool(controllers)]) for group in groups]
    return [Free(count, "limit of the control group") for count in found if count is not None]


def _room(group: Path, limit: str, usage: str, given_up: str) -> int | None:
    """Bytes left in a control group; None without a limit."""
    try:
        allowed, used = (group / limit).read_text().strip(), int((group / usage).read_text())
        cached = _number_behind(given_up, (group / "memory.stat").read_text())
    except OSError:
        return None  # not mounted here, as in a container that sees only its own group
    return None if allowed == "max" else max(int(allowed) - used + cached, 0)


def resident() -> int:
    """Bytes of this process that are in memory now, or the most so far where only that is told."""
    return _of_this_process("VmRSS:")


def peak_resident() -> int:
    """The most bytes of this process that were in memory at once."""
    return _of_this_process("VmHWM:")


def _of_this_process(name: str) -> int:
    # not ru_maxrss where there is a choice: on Linux a new process begins with that of its parent
    status = Path("/proc/self/status")
    if status.exists() and name in (text := status.read_text()):
        return KIBI * _number_behind(name, text)
    import resource  # not on every system

    unit = 1 if sys.platform == "darwin" else KIBI
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _number_behind(name: str, text: str) -> int:
    words = text.split()
    return int(words[words.index(name) + 1]) if name in words else 0


class HeldBytes(TorchDispatchMode):
    """Adds up the bytes of the tensors that are made in the block, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the operation returns
        """Note the memory behind what an operation returns."""
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.note(value)
        return result

    def note(self, value: Tensor) -> None:
        """Count the memory behind a tensor, once, until it is given up."""
        storage = value.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        count = storage.nbytes()
        self.now += count
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._give_up, count)

    def _give_up(self, count: int) -> None:
        self.now -= count


def pretended(module: Module) -> Module:
    """A module on the meta device with fake tensors of the CPU instead; call it among them."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            fake = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
            part.register_parameter(name, nn.Parameter(fake, requires_grad=weight.requires_grad))
        for name, value in part.named_buffers(recurse=False):
            part.register_buffer(name, torch.empty(value.shape, dtype=value.dtype, device="cpu"))
    return module


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes of tensors that `work` would hold at once; it is done with fake tensors.

    What kernels need beside their results, and what an allocator wastes, is not in it.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), HeldBytes() as held:
        result = work()
        del result
    return held.peak
