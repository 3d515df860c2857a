"""Several processes that train one model together, as torchrun or srun starts them; one is the usual case.

Everything random about a batch is drawn for the whole of it from (seed, step), in every process; each
then takes its own equal part (`own`). Gradients and what decides or is logged are put together again, so
that all have the same weights and come to the same decisions. Where there is one process, all of this
is nothing at all.

The processes agree over gloo on the CPU in every step, and add up tensors where they are (NCCL on CUDA). So
one that died is noticed at once by all others, which do not wait for it.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn import Parameter

from ldmkit.errors import InterruptedRun, LostProcessError, UsageError
from ldmkit.ownership import owned
from ldmkit.tensors import Noise
from ldmkit.training.meeting import fresh_name
from ldmkit.training.runtime import pick_device

TIMEOUT = timedelta(hours=2)
"""How long all wait for one: longer than what the first one does alone (looking at all pictures,
checking all latents), since one that died is noticed anyway."""
PATIENCE = timedelta(minutes=10)
"""How long the processes wait for each other at the start."""
BUCKET = 1 << 24
"""Numbers that are added up at once, 64 MiB."""
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if size() > 1 else 0


def first() -> bool:
    """Whether this process is the one that writes files."""
    return rank() == 0


@contextmanager
def joined(device: str, directory: Path) -> Iterator[None]:
    """Meet the other processes that the environment speaks of, as torchrun sets it; part at the end.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are read. A group that is there already is
    used and left. The first process is the only one that writes to `directory`.

    Args:
        device: `--device`; process n of a machine gets its n-th GPU.
        directory: of the run; all processes have to see it.

    Raises:
        UsageError: the device is not there, or not for several processes; the others cannot be met; or
            another ldmkit works in `directory`.
        LostProcessError: another process of the run ended.
    """
    if size() > 1 or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        with _owned_by_first(directory):
            yield
        return
    _meet(device)
    try:
        with _owned_by_first(directory):
            yield
            wait_for_all()
    except InterruptedRun:
        wait_for_all()  # torchrun takes the first one's leaving for a failure, and kills the others
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()  # after an error it might wait for those who are not there


def _meet(name: str) -> None:
    device, local = pick_device(name), int(os.environ.get("LOCAL_RANK", "0"))
    if device.type not in BACKENDS:
        raise UsageError(
            f"several processes train together on cpu or cuda, not on {device.type}: give --device"
        )
    try:
        found, number, count = next(rendezvous("env://", timeout=PATIENCE))
        store = PrefixStore(fresh_name(found, number, count, PATIENCE), found)
        backend = BACKENDS[device.type]
        dist.init_process_group(
            backend, store=store, rank=number, world_size=count, timeout=TIMEOUT
        )
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the other processes cannot be met ({error}): "
            "start all of them with torchrun, or as docs/cluster.md says"
        ) from error
    if device.type == "cuda":
        (short,) = any_rank(local >= torch.cuda.device_count())
        if short:
            raise UsageError("a machine has fewer GPUs than processes: lower --nproc-per-node")
        torch.cuda.set_device(local)


@contextmanager
def _owned_by_first(directory: Path) -> Iterator[None]:
    """The directory belongs to the first process; the others go on when it does."""
    if first():
        with owned(directory):
            wait_for_all()
            yield
    else:
        wait_for_all()
        yield


def own(total: int) -> slice:
    """Which of `total` things that are laid out for all processes are this one's; an equal share.

    Raises:
        ValueError: they cannot be shared equally.
    """
    share, rest = divmod(total, size())
    if rest:
        raise ValueError(f"{total} cannot be shared equally by {size()} processes")
    return slice(rank() * share, (rank() + 1) * share)


def own_places(count: int) -> range:
    """The numbers of this process's parts, where each process has `count` and all are numbered on.

    So 2 processes with 2 parts have those of one with 4.
    """
    return range(rank() * count, (rank() + 1) * count)


def own_noise(noise: Noise) -> Noise:
    """This process's rows of noise that is drawn for the whole batch."""
    if size() == 1:
        return noise

    def of_own(like: Tensor) -> Tensor:
        whole = torch.empty((size() * len(like), *like.shape[1:]), dtype=like.dtype)
        return noise(whole)[own(len(whole))].to(like.device)

    return of_own


def require_equal_parts(batch_size: int, accumulate: int, smallest: int = 1) -> None:
    """Raise UsageError if a batch cannot be divided among the processes and their parts.

    Args:
        batch_size: samples of a step, over all processes.
        accumulate: parts in each process.
        smallest: samples that a part must have.
    """
    parts = size() * accumulate
    if batch_size % parts or batch_size // parts < smallest:
        fewest = f" of at least {smallest} samples" if smallest > 1 else ""
        raise UsageError(
            f"--batch-size {batch_size} cannot be divided into {parts} equal parts{fewest} ({size()} "
            f"processes, --accumulate {accumulate} in each): take a multiple of {parts * smallest}"
        )


def any_rank(*flags: bool) -> list[bool]:
    """For each flag whether it is set in any process; all get the same answer, at the same point."""
    if size() == 1:
        return list(flags)
    raised = torch.tensor(flags, dtype=torch.int32)
    with lost_explained():
        dist.all_reduce(raised, dist.ReduceOp.MAX)
    return [bool(flag) for flag in raised.tolist()]


def wait_for_all() -> None:
    """Return when every process has come to this point."""
    any_rank(False)


@contextmanager
def first_before_others() -> Iterator[None]:
    """The first process does the block, then the others do, and find on disk what it left there."""
    if not first():
        wait_for_all()
    yield
    if first():
        wait_for_all()


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of what the processes have, the same bytes in all."""
    if size() == 1:
        return value
    total = value.detach().contiguous().clone()
    with lost_explained():
        dist.all_reduce(total)
    return total


def mean_over_ranks(values: Sequence[Tensor]) -> list[Tensor]:
    """The means of some scalars over the processes."""
    if size() == 1:
        return list(values)
    return list((sum_over_ranks(torch.stack(list(values))) / size()).unbind())


def gathered(value: Tensor) -> Tensor:
    """What all processes have, in their order, along the first dimension."""
    if size() == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(size())]
    with lost_explained():
        dist.all_gather(parts, value.contiguous())
    return torch.cat(parts)


def from_first(value: Tensor) -> Tensor:
    """What the first process has, in all."""
    if size() == 1:
        return value
    sent = value.detach().contiguous().clone()
    with lost_explained():
        dist.broadcast(sent.view(torch.uint8) if sent.dtype == torch.bool else sent, 0)
    return sent


@torch.no_grad()
def share(modules: Iterable[nn.Module]) -> None:
    """Give all processes the weights and buffers of the first one."""
    if size() == 1:
        return
    for module in modules:
        for value in module.state_dict().values():
            value.copy_(from_first(value))


@torch.no_grad()
def average_gradients(parameters: Iterable[Parameter]) -> None:
    """Replace every gradient by its mean over the processes.

    Which weights have one is the same in all: they run the same code.
    """
    if size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    # of weights that are divided (training.sharding) each process has its part of the mean already
    gradients = [gradient for gradient in gradients if not hasattr(gradient, "full_tensor")]
    for bucket in _buckets(gradients):
        total = sum_over_ranks(torch.cat([gradient.flatten() for gradient in bucket])) / size()
        pieces = total.split([gradient.numel() for gradient in bucket])
        for gradient, piece in zip(bucket, pieces, strict=True):
            gradient.copy_(piece.view(gradient.shape))


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one number format, together at most `BUCKET` numbers or a single one."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        count = sum(other.numel() for other in bucket) + gradient.numel()
        if bucket and (count > BUCKET or bucket[0].dtype != gradient.dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


@contextmanager
def lost_explained(*, only: bool = True) -> Iterator[None]:
    """Turn the failure of a collective operation into a sentence.

    Args:
        only: nothing else can fail in the block.

    Raises:
        LostProcessError: another process of the run ended.
    """
    try:
        yield
    except RuntimeError as error:
        if not only and not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise LostProcessError(
            "another process of this run has ended, or cannot be reached; what it said tells why: the last "
            "checkpoint stays, run again to go on"
        ) from error
