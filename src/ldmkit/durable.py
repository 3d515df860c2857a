"""Files and directories that are whole or absent, even when the machine stops in between.

The order is always: write under a temporary name, flush to disk, rename, flush the directory.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldmkit.errors import StorageError

TEMPORARY_MARK = ".tmp-"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path near `path`; when the block ends well it becomes `path`.

    It lies in a directory of its own beside `path`, so that what a library leaves there when it is
    killed (safetensors writes under a name of its own first) is swept with it.

    The new file gets the permissions the user's umask asks for. If the block raises, `path` is
    left as it was and the temporary file is removed.

    Raises:
        StorageError: the file cannot be written, for example because the disk is full.
    """
    workshop = path.with_name(f"{path.name}{TEMPORARY_MARK}{uuid.uuid4().hex[:8]}")
    temporary = workshop / path.name
    try:
        make_directory(path.parent)
        workshop.mkdir()
        # safetensors leaves 0600 whatever the umask says; the directory has what it says, and asking
        # the umask itself would mean to change it, for all threads
        allowed = workshop.stat().st_mode & 0o666
        yield temporary
        temporary.chmod(allowed)
        flush_to_disk(temporary)
        temporary.replace(path)
        flush_to_disk(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; when the block ends well it becomes `path`.

    Raises:
        StorageError: something in it cannot be written.
    """
    temporary = path.with_name(f"{path.name}{TEMPORARY_MARK}{uuid.uuid4().hex[:8]}")
    try:
        make_directory(path.parent)
        temporary.mkdir()
        yield temporary
        for inside in temporary.rglob("*"):
            flush_to_disk(inside)
        flush_to_disk(temporary)
        temporary.replace(path)
        flush_to_disk(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_directory(path: Path) -> None:
    """Make a directory and those above it, so that what is put there later outlasts a loss of power.

    A new directory is an entry of the one above it, which has to be flushed like any other.

    Raises:
        OSError: one of them cannot be made, or is something else than a directory.
    """
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    flush_to_disk(path.parent)


def drop_directory(path: Path) -> None:
    """Remove a directory that was made whole, so that no name ever stands for a part of it.

    It gets a temporary name first: what is left of it when the machine stops in between is swept.

    Raises:
        StorageError: it cannot be renamed.
    """
    aside = path.with_name(f"{path.name}{TEMPORARY_MARK}{uuid.uuid4().hex[:8]}")
    try:
        path.replace(aside)
        flush_to_disk(path.parent)
    except OSError as error:
        raise StorageError(f"cannot remove {path}: {error.strerror or error}") from error
    shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one piece (UTF-8)."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def require_room(directory: Path, needed: int, what: str) -> None:
    """Refuse work whose files the disk has no room for, before it begins.

    Args:
        directory: where they go; it is there.
        needed: bytes.
        what: the files are, in the plural.

    Raises:
        StorageError: fewer bytes are free.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise StorageError(
            f"{directory}: {what} need about {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free: make "
            "room, or give another --out"
        )


def sweep_temporaries(directory: Path, name: str = "*") -> None:
    """Remove what an earlier, killed process left unfinished in `directory`.

    Args:
        directory: where to look.
        name: of the files whose remains go, or a pattern; others may be another process's at work.
    """
    for leftover in temporaries(directory, name):
        remove(leftover)


def temporaries(directory: Path, name: str = "*") -> list[Path]:
    """What lies unfinished in `directory`: a process is at work on it, or was killed."""
    return list(directory.glob(f"{name}{TEMPORARY_MARK}*"))


def remove(path: Path) -> None:
    """Remove a file, or a directory with all that is in it; it may be gone already.

    Raises:
        OSError: a file cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Ask the operating system to have `path` (a file or a directory) on disk.

    Raises:
        OSError: it cannot; the error names the path.
    """
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle for this; it writes directories through
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # which does not say of what
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)
