"""Where and how precisely to compute."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ldmkit.errors import UsageError
from ldmkit.tensors import Noise

CPU_GROUP = 2
Module = TypeVar("Module", bound=nn.Module)


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` takes CUDA, then Apple's MPS, then the CPU.

    Raises:
        UsageError: the named device is not there.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, there in present.items() if there)
    if not present[name]:
        raise UsageError(f"--device {name}: this machine (or this build of torch) has none")
    return torch.device(name)


def on_device(module: Module, device: torch.device) -> Module:
    """A module on a device; one that is there already is left alone, as fake tensors must be."""
    tensors = (*module.parameters(), *module.buffers())
    return module if all(tensor.device == device for tensor in tensors) else module.to(device)


def autocast_for(
    device: torch.device, precision: str
) -> Callable[[], AbstractContextManager[object]]:
    """What to open around a forward pass: bfloat16 autocast, or nothing for fp32.

    `auto` takes bfloat16 where the hardware multiplies it faster than float32.
    """
    if in_bfloat16(device, precision):
        return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext


def settled(precision: str, device: torch.device) -> Literal["fp32", "bf16"]:
    """The precision that `--precision` means on this device."""
    return "bf16" if in_bfloat16(device, precision) else "fp32"


def in_bfloat16(device: torch.device, precision: str) -> bool:
    """Whether `--precision` means bfloat16 on this device."""
    return precision == "bf16" or (precision == "auto" and _fast_bfloat16(device))


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":  # torch has no public name for this question
        ask = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        return bool(ask())
    return False


def groups_of(
    count: int, batch_size: int, device: torch.device
) -> Iterator[tuple[Int[Tensor, " width"], int]]:
    """Divide `count` samples into the groups that go through a network at once.

    On the CPU a group always has two samples, whatever the batch size: its kernels round differently
    for other sizes, and a sample must not depend on the batch it was in. Elsewhere a group is a
    batch.

    Yields:
        The samples' indices, the last one repeated to fill the group, and how many are not filling.
    """
    return in_groups(count, CPU_GROUP if device.type == "cpu" else batch_size)


def in_groups(count: int, width: int) -> Iterator[tuple[Int[Tensor, " width"], int]]:
    """As `groups_of`, of that width."""
    for first in range(0, count, width):
        yield torch.arange(first, first + width).clamp(max=count - 1), min(width, count - first)


def noise_from(generator: torch.Generator) -> Noise:
    """Standard normal noise like a tensor, drawn on the CPU so that every device gets the same."""

    def noise(like: Tensor) -> Tensor:
        drawn = torch.randn(like.shape, generator=generator, dtype=torch.float32)
        return drawn.to(like.device, like.dtype)

    return noise
