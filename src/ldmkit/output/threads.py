"""Reading ahead and writing behind: what the disk does while the network computes.

The order of what comes out is that of what goes in, so no result depends on the number of threads.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


def read_ahead(blocks: Iterator[In]) -> Generator[In, None, None]:
    """The same blocks; while one is worked on, a thread reads the next (and no more)."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = reader.submit(next, blocks, None)
            yield block


def in_order(
    work: Callable[[In], Out], items: Iterator[In], threads: int, ahead: int
) -> Iterator[Out]:
    """`work` on each item in some threads, results in the items' order.

    Items are taken in the calling thread, which is where they may be computed meanwhile.

    Args:
        work: must not depend on other items.
        items: taken one by one.
        threads: how many work.
        ahead: items that may be waiting or in work at once, which bounds the memory.
    """
    waiting: deque[Future[Out]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            while waiting and (len(waiting) >= ahead or waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
