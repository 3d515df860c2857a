"""Whether two processes on this machine can add up numbers together, tried with a time limit."""

import datetime
import multiprocessing
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed

PROCESSES = 2
WRONG = 9
"""Exit code of a process whose sum is wrong."""


def try_collective(timeout: float) -> str:
    """Start two processes that add up two numbers through gloo.

    Args:
        timeout: seconds after which they are ended.

    Returns:
        What went wrong, in a few words; "" if all went well.
    """
    context = multiprocessing.get_context("spawn")
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="ldmkit-") as folder:
        meeting = Path(folder) / "meeting"
        processes = [
            context.Process(target=_take_part, args=(rank, str(meeting), timeout), daemon=True)
            for rank in range(PROCESSES)
        ]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(max(deadline - time.monotonic(), 0.0))
            return _outcome([process.exitcode for process in processes], timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _outcome(codes: list[int | None], timeout: float) -> str:
    if WRONG in codes:
        return "their sum is wrong"
    if None in codes:
        return f"they did not end within {timeout:.0f} s"
    return f"they ended with the codes {codes}" if any(codes) else ""


def _take_part(rank: int, meeting: str, timeout: float) -> None:
    """One of the processes: a file is where they meet, so no port is opened for it."""
    torch.distributed.init_process_group(
        "gloo",
        init_method=Path(meeting).as_uri(),
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=timeout),
    )
    number = torch.tensor([float(rank + 1)])
    torch.distributed.all_reduce(number)
    torch.distributed.destroy_process_group()
    if number.item() != sum(range(1, PROCESSES + 1)):
        raise SystemExit(WRONG)
