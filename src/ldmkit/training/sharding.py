"""FSDP2: weights, gradients, averages and moments divided among the processes, instead of held by each.

torch's `fully_shard` (Zhao et al. 2023, "PyTorch FSDP") keeps a part of every weight in each process, puts a
block's weights together when the block is run, and leaves each process its part of the summed gradient.
What is divided is a DTensor; averages are DTensors too, of the same parts, so they are moved without
asking others. Files hold whole tensors and know nothing of it.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn

from ldmkit.training import ranks

if TYPE_CHECKING:  # takes long to import, and one process has no use for it
    from torch.distributed.tensor import DTensor

Module = TypeVar("Module", bound=nn.Module)


def shard(blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Divide the weights of modules among the processes, from here on on a device.

    Args:
        blocks: whose weights are put together when they are called, the inner ones before those around
            them; the weights may still be on the CPU.
        device: where they are computed with; process n has the current one of its kind.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks.size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)


def shard_like(kept: nn.Module, module: nn.Module) -> None:
    """Leave of a copy of a module, made before that was divided, the parts that the module has now."""
    for target, source in zip(kept.modules(), module.modules(), strict=True):
        for name, weight in source.named_parameters(recurse=False):
            part = nn.Parameter(weight.detach().clone(), requires_grad=False)
            target.register_parameter(name, part)


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Bring to a device what is not divided."""
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


def is_divided(value: Tensor) -> bool:
    """Whether each process has a part of it only."""
    return hasattr(value, "full_tensor")


def shares_weights(module: nn.Module) -> bool:
    """Whether a module's weights are divided among the processes."""
    return any(map(is_divided, module.parameters()))


def divided(values: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those of which each process has a part, and those of which it has everything."""
    parts: list[Tensor] = []
    whole: list[Tensor] = []
    for value in values:
        (parts if is_divided(value) else whole).append(value)
    return parts, whole


@torch.no_grad()
def whole(value: Tensor) -> Tensor:
    """All of a tensor; where it is divided, all processes have to ask at the same time.

    Raises:
        LostProcessError: another process of the run ended.
    """
    if not is_divided(value):
        return value
    with ranks.lost_explained():
        return cast("DTensor", value).full_tensor().detach()


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors for the first process, one after the other; the others help it, and get nothing.

    What was divided comes to the CPU, so that the device has room for one whole tensor only.

    Raises:
        LostProcessError: another process of the run ended.
    """
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        complete = whole(value)
        if ranks.first():
            found[name] = complete.cpu() if is_divided(value) else complete
    return found


def runnable(module: Module) -> Module:
    """A module that the first process can call alone: a copy with whole weights where they are divided.

    All processes have to ask at the same time; the others get the module as it is.

    Raises:
        LostProcessError: another process of the run ended.
    """
    if not shares_weights(module):
        return module
    complete = copy.deepcopy(module) if ranks.first() else module
    for target, source in zip(complete.modules(), module.modules(), strict=True):
        for name, weight in source.named_parameters(recurse=False):
            value = whole(weight)
            if ranks.first():
                target.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return complete


def as_held(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, or all of it, as another tensor of that shape is held."""
    if not is_divided(like):
        return value.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    held = cast("DTensor", like)
    # every process has read the file: none needs to send it
    return distribute_tensor(value, held.device_mesh, held.placements, src_data_rank=None)


def local_elements(value: Tensor) -> int:
    """How many numbers of a tensor this process holds."""
    return (cast("DTensor", value).to_local() if is_divided(value) else value).numel()
