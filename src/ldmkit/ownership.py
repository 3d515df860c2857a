"""One writer to a directory: a second one is refused before it can spoil the first one's work."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ldmkit.errors import UsageError

LOCK = ".lock"
PATIENCE = 15.0
"""Seconds: a process that was killed may have left workers that hold its lock until they notice."""


@contextmanager
def owned(directory: Path, part: str = "") -> Iterator[None]:
    """Be the only process that writes to `directory`, which is made if it is missing.

    The lock is the operating system's, so it ends with the process, however that ends; the file
    `.lock` stays and says nothing.

    Args:
        directory: of a run, or of a set.
        part: of the work, where several processes share the directory and each has its own.

    Raises:
        UsageError: another process works there.
        OSError: the directory or the file cannot be made.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / f"{LOCK}{part}")
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout as error:
        raise UsageError(
            f"another ldmkit is at work in {directory}: wait for it, or give another --out"
        ) from error
    try:
        yield
    finally:
        lock.release()
