"""One writer to a directory: a second one is refused before it can spoil the first one's work."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from ldmkit.durable import make_directory
from ldmkit.errors import UsageError

LOCK = ".lock"
PATIENCE = 15.0
"""Seconds: a process that was killed may have left workers that hold its lock until they notice."""


@contextmanager
def owned(directory: Path, part: str = "", *, patience: float | None = None) -> Iterator[None]:
    """Be the only process that writes to `directory`, which is made if it is missing.

    The lock is the operating system's, so it ends with the process, however that ends. What was made for
    it goes with it: the file `.lock` (filelock notices that a file it waited for is gone), and the
    directory where nothing was put into it.

    Args:
        directory: of a run, or of a set.
        part: of the work, where several processes share the directory and each has its own.
        patience: seconds to wait for another process to leave; `PATIENCE` if None.

    Raises:
        UsageError: another process works there.
        OSError: the directory or the file cannot be made.
    """
    was_there = directory.is_dir()
    file = directory / f"{LOCK}{part}"
    lock = FileLock(file)
    _acquire(lock, directory, PATIENCE if patience is None else patience)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # where a file that is open cannot be removed, it stays
            file.unlink()
        lock.release()
        if not was_there:
            with contextlib.suppress(OSError):  # it holds something
                directory.rmdir()


def _acquire(lock: BaseFileLock, directory: Path, patience: float) -> None:
    while True:
        try:
            make_directory(directory)
            lock.acquire(timeout=patience)
        except FileNotFoundError:  # who had the directory has just removed it
            continue
        except (
            FileExistsError
        ) as error:  # it was removed between the attempt to make it and a look at it
            if os.path.lexists(error.filename):
                raise
            continue
        except Timeout as error:
            raise UsageError(
                f"another ldmkit is at work in {directory}: wait for it, or give another --out"
            ) from error
        return
