"""Watches what a command writes below a directory, and lets one of its calls fail.

Python's own calls are replaced while the watch lasts. safetensors writes natively, unseen by that: its
`save_file` counts as one call, and stands in the trace as a file made and written. Nothing here changes
what a call does, but for the one that fails.
"""

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import safetensors
import safetensors.torch


class Call(NamedTuple):
    """One call that succeeded, with paths below the directory that is watched."""

    kind: str
    """mkdir, create, truncate, write, fsync, rename, unlink or rmdir."""
    path: str
    target: str = ""
    """Of a rename."""
    place: int = 0
    """Of a write, in bytes from the start of the file."""
    data: bytes = b""


class Watch:
    """Counts calls below a directory and keeps them.

    Args:
        root: the directory.
        fail_at: number of the call that fails, from 0; None for none.
        code: errno of the failure.
    """

    def __init__(self, root: Path, fail_at: int | None = None, code: int = errno.EIO) -> None:
        self.root = os.path.realpath(root)
        self.fail_at, self.code = fail_at, code
        self.trace: list[Call] = []
        self.attempts: list[str] = []

    def below(self, path: Any, folder: int | None = None) -> str | None:
        """The path below the directory, or None; `folder` is a descriptor that it is relative to."""
        if isinstance(path, int):
            path = Path(f"/proc/self/fd/{path}").readlink()
        elif folder is not None:
            path = Path(f"/proc/self/fd/{folder}").readlink() / path
        path = os.path.abspath(os.fspath(path))  # noqa: PTH100
        return path[len(self.root) + 1 :] if path.startswith(f"{self.root}/") else None

    def attempt(self, kind: str, path: str) -> None:
        """Count a call that is about to be made; raises if it is the one to fail."""
        self.attempts.append(f"{kind} {path}")
        if len(self.attempts) - 1 == self.fail_at:
            reason = os.strerror(self.code)
            if kind == "save":
                raise safetensors.SafetensorError(
                    f"Error while serializing: I/O error: {reason} (os error {self.code})"
                )
            if kind in ("write", "fsync"):
                raise OSError(self.code, reason)
            raise OSError(self.code, reason, os.path.join(self.root, path))  # noqa: PTH118


class _WatchedFile(io.FileIO):
    """A file whose writes are seen as they leave Python."""

    def __init__(self, watch: Watch, name: str, path: str, mode: str) -> None:
        self.watch, self.seen_as = watch, name
        super().__init__(path, mode)

    def write(self, data: Any) -> int:
        self.watch.attempt("write", self.seen_as)
        place = os.fstat(self.fileno()).st_size if "a" in self.mode else self.tell()
        count = super().write(data)
        if count is None:
            raise BlockingIOError
        written = bytes(memoryview(data).cast("B")[:count])
        self.watch.trace.append(Call("write", self.seen_as, place=place, data=written))
        return count


@contextmanager
def watched(watch: Watch) -> Iterator[Watch]:
    """Watch what this process does, in all its threads."""
    with ExitStack() as stack:
        for module, name, replacement in _replacements(watch):
            stack.enter_context(mock.patch.object(module, name, replacement))
        yield watch


def _replacements(watch: Watch) -> list[tuple[Any, str, Callable[..., Any]]]:
    one_path = [(os, name, _on_one_path(watch, name)) for name in ("mkdir", "rmdir", "unlink")]
    renames = [(os, name, _renaming(watch, getattr(os, name))) for name in ("rename", "replace")]
    opening = _opening(watch)
    return [
        *one_path,
        *renames,
        (os, "remove", _on_one_path(watch, "unlink")),
        (os, "fsync", _flushing(watch)),
        (os, "open", _low_opening(watch)),
        (io, "open", opening),
        (builtins, "open", opening),
        (safetensors.torch, "save_file", _native_saving(watch)),
    ]


def _on_one_path(watch: Watch, kind: str) -> Callable[..., None]:
    real = getattr(os, kind)

    def call(path: Any, *arguments: Any, dir_fd: int | None = None) -> None:
        name = watch.below(path, dir_fd)
        if name is not None:
            watch.attempt(kind, name)
        real(path, *arguments, dir_fd=dir_fd)
        if name is not None:
            watch.trace.append(Call(kind, name))

    return call


def _renaming(watch: Watch, real: Callable[..., None]) -> Callable[..., None]:
    def call(source: Any, target: Any) -> None:
        old, new = watch.below(source), watch.below(target)
        if old is not None and new is not None:
            watch.attempt("rename", new)
        real(source, target)
        if old is not None and new is not None:
            watch.trace.append(Call("rename", old, new))

    return call


def _flushing(watch: Watch) -> Callable[[int], None]:
    real = os.fsync

    def call(descriptor: int) -> None:
        name = watch.below(descriptor)
        if name is not None:
            watch.attempt("fsync", name)
        elif os.path.samestat(os.fstat(descriptor), os.stat(watch.root)):  # noqa: PTH116
            name = ""
        real(descriptor)
        if name is not None:
            watch.trace.append(Call("fsync", name))

    return call


def _low_opening(watch: Watch) -> Callable[..., int]:
    real = os.open

    def call(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        name = watch.below(path, dir_fd) if writes else None
        there = name is not None and os.path.lexists(path)
        if name is not None:
            watch.attempt("open", name)
        descriptor = real(path, flags, mode, dir_fd=dir_fd)
        if name is not None and not there:
            watch.trace.append(Call("create", name))
        return descriptor

    return call


def _opening(watch: Watch) -> Callable[..., Any]:
    real = io.open

    def call(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        writes = set(mode) & set("wax+")
        name = watch.below(file) if writes and not isinstance(file, int) else None
        if isinstance(file, int) or name is None:
            return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
        there = os.path.lexists(file)
        watch.attempt("open", name)
        raw = _WatchedFile(watch, name, os.fspath(file), mode.replace("b", "").replace("t", ""))
        if not there:
            watch.trace.append(Call("create", name))
        elif "w" in mode:
            watch.trace.append(Call("truncate", name))
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    return call


def _native_saving(watch: Watch) -> Callable[..., None]:
    real = safetensors.torch.save_file

    def call(tensors: Any, filename: Any, metadata: Any = None) -> None:
        name = watch.below(filename)
        if name is not None:
            watch.attempt("save", name)
        real(tensors, filename, metadata)
        if name is not None:
            watch.trace.append(Call("create", name))
            watch.trace.append(Call("write", name, data=Path(filename).read_bytes()))

    return call
