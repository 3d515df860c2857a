"""Remote files, staged whole into a bounded local cache; and pictures in them.

A staged file is downloaded to a temporary name, counted, digested, flushed and renamed; beside it
lies a record of its size and sha256, which are checked once in each process before it is used. What
was used longest ago is removed first when space is needed. A picture of a file that was removed
stages it again, and is refused if that is not the same file any more.
"""

import contextlib
import hashlib
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import ValidationError

from ldmkit.data.downloads import Download, TransferError, open_download
from ldmkit.data.items import MAX_BYTES
from ldmkit.data.locations import shown
from ldmkit.data_configs import SourceConfig
from ldmkit.durable import TEMPORARY_MARK, atomic_file, remove, sweep_temporaries, write_text
from ldmkit.errors import DataError, StorageError
from ldmkit.fields import Config
from ldmkit.terminal import say, track

TRIES = 5
PAUSE = 1.0
"""Seconds before the second try; doubled for each further one, times 0.5 to 1.5 at random."""
LONGEST_PAUSE = 60.0
ABANDONED = 3600.0
"""Seconds after which an unfinished download counts as left behind by a killed process."""
NOTE_EVERY = 60.0
"""Seconds between two notes of the use of a file, which a network disk would feel at each picture."""
GIBIBYTE = 1 << 30

_verified: dict[str, tuple[int, int, int]] = {}
"""Cached file -> (size, time, inode) with which its digest held in this process."""
_noted: dict[str, float] = {}
"""Cached file -> when its use was noted last."""


class Cache(NamedTuple):
    """A directory for staged files, and how many bytes may lie in it."""

    directory: str
    limit: int


class Record(Config):
    """What is known of a staged file; lies beside it as JSON."""

    format: Literal["ldmkit.staged/1"] = "ldmkit.staged/1"
    location: str
    """Where it came from, without passwords and queries."""
    size: int
    sha256: str
    etag: str
    """What the server called this version, or ""."""


class RemoteFile(NamedTuple):
    """A file that was staged; it may have been removed from the cache since."""

    url: str
    cache: Cache
    size: int
    """Bytes."""
    sha256: str

    @property
    def name(self) -> str:
        """What to call it in errors."""
        return shown(self.url)

    def path(self) -> Path:
        """Its local copy, staged again if need be.

        Raises:
            DataError: it has changed since it was first staged.
            StorageError: it cannot be staged.
        """
        path = _place(self.url, self.cache)
        if _is_verified(path):
            if time.monotonic() > _noted.get(str(path), 0.0) + NOTE_EVERY:
                _touch(path)
            return path
        found = stage(self.url, self.cache)
        if found.sha256 != self.sha256:
            raise DataError(f"{self.name} has changed since it was listed; run the command again")
        return path


class RemoteSpan(NamedTuple):
    """Bytes of a remote file: a member of a tar, or the whole."""

    file: RemoteFile
    offset: int
    size: int
    member: str = ""
    """Its name in the file; "" for the whole file."""

    @property
    def name(self) -> str:
        """The URL, or the member at its URL."""
        return f"{self.file.name}/{self.member}" if self.member else self.file.name

    def read(self) -> bytes:
        """The bytes; the file is staged again if it was removed from the cache.

        Raises:
            DataError: they are too many, or the file has changed since it was listed.
            StorageError: the file cannot be staged or read.
        """
        if self.size > MAX_BYTES:
            raise DataError(f"{self.name} has {self.size:,} bytes; at most {MAX_BYTES:,} are read")
        for _ in range(TRIES):
            path = self.file.path()
            try:
                with path.open("rb") as file:
                    file.seek(self.offset)
                    data = file.read(self.size)
            except FileNotFoundError:  # another process has just made room
                continue
            except OSError as error:
                raise StorageError(f"cannot read {path}: {error.strerror}") from error
            if len(data) == self.size:
                return data
            _verified.pop(str(path), None)  # damaged under our hands
        raise StorageError(
            f"{self.file.name} is removed from {self.file.cache.directory} as soon as it is there; "
            "give a larger --cache-size"
        )


def cache_of(config: SourceConfig) -> Cache:
    """The cache a command uses: `--cache`, else LDMKIT_CACHE, else `ldmkit` in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    default = os.environ.get("LDMKIT_CACHE") or f"{home}/ldmkit"
    directory = Path(config.cache or default).expanduser() / "remote"
    return Cache(str(directory), int(config.cache_size * GIBIBYTE))


def stage_all(urls: Sequence[str], cache: Cache) -> Iterator[RemoteFile]:
    """Stage files one after the other, so that each can be looked at before it may be removed.

    Raises:
        StorageError: one of them cannot be had.
    """
    if not urls:
        return
    for url in urls:
        _touch(_place(url, cache))  # so that what this run does not need is removed first
    total = 0
    with track("stage", len(urls), unit="file") as progress:
        for url in urls:
            staged = stage(url, cache)
            total += staged.size
            progress.advance()
            yield staged
    if total > cache.limit:
        say(
            f"the {len(urls)} files have {total / GIBIBYTE:.1f} GiB and the cache "
            f"{cache.limit / GIBIBYTE:.1f} GiB: they will be fetched again and again; "
            "give a larger --cache-size"
        )


def stage(url: str, cache: Cache) -> RemoteFile:
    """Have a remote file in the cache: the copy that is there if its digest holds, else a new one.

    The network is not asked about a file that is there. Processes that want the same file wait for
    the first of them.

    Raises:
        StorageError: it cannot be had after all tries, is larger than the cache, or the disk is full.
    """
    from filelock import FileLock

    path = _place(url, cache)
    record = _whole(path, url)
    if record is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                record = _whole(path, url) or _fetch(url, cache, path)
        except OSError as error:
            raise StorageError(f"cannot use the cache {path.parent}: {error}") from error
    _touch(path)
    return RemoteFile(url, cache, record.size, record.sha256)


def _place(url: str, cache: Cache) -> Path:
    return Path(cache.directory) / f"{hashlib.sha256(url.encode()).hexdigest()[:40]}.data"


def _record_of(path: Path) -> Path:
    return path.with_suffix(".json")


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns, state.st_ino


def _is_verified(path: Path) -> bool:
    return str(path) in _verified and _verified[str(path)] == _identity(path)


def _touch(path: Path) -> None:
    """Note the use of a staged file: the time of its record."""
    _noted[str(path)] = time.monotonic()
    with contextlib.suppress(OSError):  # not there, or a cache that only others may write
        os.utime(_record_of(path))


def _whole(path: Path, url: str) -> Record | None:
    """The record of a staged file whose size and digest hold, or None."""
    identity = _identity(path)
    try:
        record = Record.model_validate_json(_record_of(path).read_bytes())
    except (OSError, ValidationError):
        return None
    if identity is None:
        return None
    if not _is_verified(path):
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return None
        if (identity[0], digest) != (record.size, record.sha256):
            say(f"the staged copy of {shown(url)} is damaged; fetching it again")
            return None
        _verified[str(path)] = identity
    return record


def _fetch(url: str, cache: Cache, path: Path) -> Record:
    sweep_temporaries(path.parent, f"{path.stem}.*")  # we hold the lock
    for number in range(1, TRIES + 1):
        try:
            return _download(url, cache, path)
        except TransferError as error:
            if not error.again or number == TRIES:
                tries = f" (tried {number} times)" if error.again else ""
                raise TransferError(
                    f"cannot fetch {shown(url)}: {error}{tries}", again=False, status=error.status
                ) from error
            pause = PAUSE * 2 ** (number - 1) * random.SystemRandom().uniform(0.5, 1.5)
            time.sleep(min(max(pause, error.wait), LONGEST_PAUSE))
    raise AssertionError("unreachable")


def _download(url: str, cache: Cache, path: Path) -> Record:
    for damaged in (_record_of(path), path):
        damaged.unlink(missing_ok=True)
    with open_download(url) as download, atomic_file(path) as temporary:
        size, digest = _write(download, temporary, url, cache)
        etag = download.etag
    record = Record(location=shown(url), size=size, sha256=digest, etag=etag)
    write_text(_record_of(path), record.model_dump_json())
    identity = _identity(path)
    if identity is not None:
        _verified[str(path)] = identity
    return record


def _write(download: Download, temporary: Path, url: str, cache: Cache) -> tuple[int, str]:
    """Write a download to a file; its size and sha256."""
    digest, written, reserved = hashlib.sha256(), 0, 0
    with temporary.open("wb") as file:
        for chunk in download.chunks:
            written += len(chunk)
            if written > reserved:  # where no length is declared, it grows by doubling
                reserved = download.size or max(written, min(2 * written, cache.limit))
                _make_room(cache, reserved, temporary, url)
            file.write(chunk)
            digest.update(chunk)
    return written, digest.hexdigest()


def _bytes_in(path: Path) -> int:
    """Of a file, or of those in the directory where one is being written."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _make_room(cache: Cache, needed: int, keep: Path, url: str) -> None:
    """Remove staged files, the one used longest ago first, until `needed` bytes are free."""
    used, total = [], 0
    for file in Path(cache.directory).iterdir():
        partial = TEMPORARY_MARK in file.name
        if file == keep.parent or not (partial or file.suffix == ".data"):
            continue
        with contextlib.suppress(OSError):  # removed by another process meanwhile
            last, size = file.stat().st_mtime, _bytes_in(file)
            total += size
            with contextlib.suppress(OSError):
                last = _record_of(file).stat().st_mtime if not partial else last
            if not partial or time.time() - last > ABANDONED:
                used.append((last, file.name, size, file))
    for _, _, size, file in sorted(used):
        if total + needed <= cache.limit:
            return
        with contextlib.suppress(OSError):  # open in another process, where that forbids it
            remove(file)
            total -= size
            _record_of(file).unlink(missing_ok=True)
    if total + needed > cache.limit:
        raise StorageError(
            f"{shown(url)} does not fit into the cache {cache.directory} of "
            f"{cache.limit / GIBIBYTE:.3g} GiB; give a larger --cache-size"
        )
