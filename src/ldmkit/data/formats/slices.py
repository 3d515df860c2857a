"""What formats with many pictures in one file share: finding files, holding them, one picture as bytes.

What is open or inflated is held for the next picture of the same file, in each process up to
`HELD_BYTES`, and forgotten in a forked process, where two readers would move one file's position.
"""

import contextlib
import io
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ldmkit.data.formats.sidecars import IMAGE_SUFFIXES, suffix_of
from ldmkit.data.items import Item, Problem, Source
from ldmkit.errors import DataError, LdmkitError

HELD_BYTES = 1 << 30
OPEN_FILE = HELD_BYTES // 8
"""What an open file counts in `HELD_BYTES`: at most eight are open."""
LOOKED_AT = 1000
"""How many files of a folder are looked at to tell its format."""
MAX_PICTURES = 10_000_000
"""In one file: more than any has, and no list of them fills the memory."""
DICOM_MARK = b"DICM"
FORMAT_OF_SUFFIX = {
    "npz": "npz",
    "nii": "nifti",
    "nii.gz": "nifti",
    "dcm": "dicom",
    "dicom": "dicom",
}

Held = TypeVar("Held")


class Listed(NamedTuple):
    """A file of a source."""

    path: str
    name: str
    """Relative to the source, with `/`."""
    size: int
    """Bytes."""


class _Entry(NamedTuple):
    thing: Any
    size: int
    close: Callable[[Any], None] | None


_entries: OrderedDict[tuple[str, ...], _Entry] = OrderedDict()
_lock = threading.RLock()


def scan_files(
    data: str,
    kind: str,
    is_wanted: Callable[[Listed], bool],
    pictures_of: Callable[[Listed, list[Problem]], list[Item]],
) -> Source:
    """List the pictures in all files of a kind, in the order of their relative paths.

    Args:
        data: a file, or a folder of files at any depth; hidden ones are passed over.
        kind: what to call such a file in errors.
        is_wanted: whether a file of a folder is of this kind.
        pictures_of: the pictures of one file; it may add problems, and raises DataError if it has none.

    Raises:
        DataError: nothing is there.
    """
    problems: list[Problem] = []
    items: list[Item] = []
    seen = 0
    for file in _files(data, problems):
        try:
            if file.path != data and not is_wanted(file):
                text = f"{file.path} is passed over, as it is no {kind} file"
                problems.append(Problem("not a picture", file.name, text, "warning"))
                continue
            seen += 1
            items += pictures_of(file, problems)
        except DataError as error:
            problems.append(Problem(f"damaged {kind} file", file.path, str(error)))
    if not seen:
        text = f"there is no {kind} file in {data}; give the folder that holds them"
        problems.append(Problem("nothing found", data, text, "fatal"))
    return Source(items, problems=tuple(problems))


def format_of(path: Path) -> str | None:
    """Which format of many pictures in a file (or of slices) a file or folder has; None for others.

    A folder with one ordinary picture among its first files has none: what else is there stands beside.
    """
    if path.is_file():
        suffix = _double_suffix(path.name)
        if suffix in FORMAT_OF_SUFFIX:
            return FORMAT_OF_SUFFIX[suffix]
        if suffix_of(path.name) in ("tif", "tiff"):
            return "stack"
        return "dicom" if has_dicom_mark(str(path)) else None
    found = set()
    for file, _ in zip(_files(str(path), []), range(LOOKED_AT), strict=False):
        suffix = _double_suffix(file.name)
        if suffix in IMAGE_SUFFIXES:
            return None
        if suffix in FORMAT_OF_SUFFIX:
            found.add(FORMAT_OF_SUFFIX[suffix])
        elif file.name.rpartition("/")[2] == "DICOMDIR" or (
            suffix not in ("json", "txt", "csv", "tsv") and has_dicom_mark(file.path)
        ):
            found.add("dicom")
    return found.pop() if len(found) == 1 else None


def has_dicom_mark(path: str) -> bool:
    """Whether a file begins as DICOM files do: 128 bytes, then DICM (PS3.10, 7.1).

    Raises:
        DataError: it cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return file.read(132)[128:] == DICOM_MARK
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


@contextlib.contextmanager
def borrowed(
    key: tuple[str, ...],
    load: Callable[[], Held],
    size: int,
    close: Callable[[Held], None] | None = None,
) -> Iterator[Held]:
    """What was loaded for `key`, held from the last time where it still is; one thread at a time.

    Args:
        key: the file and what else tells it apart.
        load: makes it.
        size: bytes it counts.
        close: what to do before it is forgotten.
    """
    with _lock:
        if key not in _entries:
            while _entries and sum(entry.size for entry in _entries.values()) + size > HELD_BYTES:
                _forget(next(iter(_entries)))
            _entries[key] = _Entry(load(), size, close)
        _entries.move_to_end(key)
        yield _entries[key].thing


def forget_all() -> None:
    """Close and forget everything that is held in this process."""
    for key in list(_entries):
        _forget(key)


@contextlib.contextmanager
def named_if_damaged(name: str, kind: str) -> Iterator[None]:
    """Turn whatever a parser raises over a damaged file into a sentence.

    Raises:
        DataError: in place of any other exception.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the file lacks is checked by its reader
            yield
    except (LdmkitError, MemoryError):
        raise
    except PermissionError as error:
        raise DataError(f"cannot read {name}: {error.strerror}") from error
    except Exception as error:  # a foreign parser meets anything in damaged bytes
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise DataError(f"{name} is a damaged {kind} file ({reason}); copy it again") from error


def require_unchanged(path: str, size: int) -> None:
    """Check that a file still has the bytes it was listed with.

    Raises:
        DataError: it is gone, or has another length.
    """
    try:
        found = Path(path).stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if found != size:
        raise DataError(f"{path} has changed since it was listed; run the command again")


def npy_bytes(array: np.ndarray) -> bytes:
    """An array as a `.npy` file, in this machine's byte order."""
    buffer = io.BytesIO()
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    np.lib.format.write_array(buffer, np.asarray(native), allow_pickle=False)
    return buffer.getvalue()


def rescaled(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """`slope * stored + intercept`: as stored where that changes nothing, else int32 or float32.

    Whole numbers with a whole slope and intercept stay exact; all else is computed in float64.
    """
    if slope == 1 and intercept == 0:
        return stored
    values = stored.astype(np.float64) * slope + intercept
    whole = (
        stored.dtype.kind in "iu" and float(slope).is_integer() and float(intercept).is_integer()
    )
    limits = np.iinfo(np.int32)
    if whole and values.size and limits.min <= values.min() and values.max() <= limits.max:
        return values.astype(np.int32)
    with np.errstate(over="ignore"):  # beyond float32 is infinite, a pixel that does not count
        return values.astype(np.float32)


def _files(data: str, problems: list[Problem]) -> Iterator[Listed]:
    """Every file that can be looked at, in the order of folders and names."""
    root = Path(data)
    if root.is_file():
        yield Listed(data, root.name, root.stat().st_size)
        return
    if not root.is_dir():
        raise DataError(f"there is no {data}; give a file or a folder of files")

    def unreadable(error: OSError) -> None:
        text = f"cannot read the folder {error.filename}: {error.strerror}"
        problems.append(Problem("no permission", str(error.filename), text))

    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for path in (Path(folder, name) for name in sorted(names) if not name.startswith(".")):
            try:
                size = path.stat().st_size
            except OSError as error:
                gone = isinstance(error, FileNotFoundError)
                kind = "dangling link" if gone else "no permission"
                reason = "is a link to a file that is gone" if gone else f": {error.strerror}"
                problems.append(Problem(kind, str(path), f"{path} {reason}"))
                continue
            if path.is_file():  # a pipe would wait for ever
                yield Listed(str(path), path.relative_to(root).as_posix(), size)


def _double_suffix(name: str) -> str:
    return "nii.gz" if name.lower().endswith(".nii.gz") else suffix_of(name)


def _forget(key: tuple[str, ...]) -> None:
    entry = _entries.pop(key)
    if entry.close is not None:
        entry.close(entry.thing)


def _start_anew() -> None:
    """In a forked process: another thread may have held the lock, and the files share positions."""
    global _lock
    _lock = threading.RLock()
    forget_all()


os.register_at_fork(after_in_child=_start_anew)
