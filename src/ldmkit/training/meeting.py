"""How processes of one run find each other, and not those of a former attempt.

torchrun keeps one store of keys when it starts its processes anew, so the addresses of the dead still lie where the
living look for each other. Here the processes first agree on a name under which nobody has written.
"""

import time
import uuid
from datetime import timedelta

from torch.distributed.distributed_c10d import Store

LOOK_SECONDS = 0.02
ROOT = "ldmkit"


def fresh_name(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """A name that these processes have agreed on, and that was never used before.

    Each says that it came, under a name of its own that nobody had before; the first one answers under that
    very name, to all that it finds, until every process has taken the answer. What the dead said is
    answered too, but they never take it.

    Args:
        store: that all of them see.
        rank: of this process.
        size: how many there are.
        timeout: how long to wait for the others.

    Raises:
        RuntimeError: not all came in time.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"{ROOT}/came/{rank}", own)
        store.wait([f"{ROOT}/answer/{own}"], timeout)
        name = store.get(f"{ROOT}/answer/{own}").decode()
        store.set(f"{ROOT}/{name}/{rank}", "here")
        return name
    missing, answered = set(range(1, size)), set[str]()
    deadline = time.monotonic() + timeout.total_seconds()
    while missing:
        for other in list(missing):
            _answer(store, other, own, answered)
            if store.check([f"{ROOT}/{own}/{other}"]):
                missing.remove(other)
        if missing and time.monotonic() > deadline:
            raise RuntimeError(f"{len(missing)} of {size} did not come")
        time.sleep(LOOK_SECONDS)
    return own


def _answer(store: Store, other: int, name: str, answered: set[str]) -> None:
    if not store.check([f"{ROOT}/came/{other}"]):
        return
    guest = store.get(f"{ROOT}/came/{other}").decode()
    if guest not in answered:
        store.set(f"{ROOT}/answer/{guest}", name)
        answered.add(guest)
