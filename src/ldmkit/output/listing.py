"""`samples.jsonl`: a line for each picture of a directory, and what a job that was stopped left of it.

While pictures are written their lines go to `samples.jsonl.part`, one by one; at the end both become
one list, sorted by file. So a job that was stopped and resumed leaves the bytes of one that was not.
A line holds the sha256 of its picture's file, and a checksum of itself.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from ldmkit.digests import file_digest
from ldmkit.durable import write_text
from ldmkit.errors import DataError, StorageError
from ldmkit.output.provenance import Provenance, as_text
from ldmkit.seals import line_state, lines_of, sealed_line

UNFINISHED = ".part"


class Entry(NamedTuple):
    """What is known of a picture."""

    record: Provenance
    sha256: str
    """Of its file (hex); "" in lists of earlier versions."""


class Listing:
    """What the pictures of a directory were made of, as far as it is known.

    Args:
        directory: of the pictures.
        part: which part of the job this is, and of how many: each has a list of its own, which the
            next call for the whole joins.

    Raises:
        DataError: there is a list that is none.
    """

    def __init__(self, directory: Path, part: tuple[int, int] = (1, 1)) -> None:
        whole = part == (1, 1)
        self._directory = directory
        name = "samples.jsonl" if whole else f"samples.{part[0]}-of-{part[1]}.jsonl"
        self._path = directory / name
        self._journal = directory / f"{name}{UNFINISHED}"
        names = ("samples.*-of-*.jsonl", "samples.jsonl") if whole else (name,)
        self._merged = [path for name in names for path in sorted(directory.glob(name))]
        self._merged += [
            path for name in names for path in sorted(directory.glob(name + UNFINISHED))
        ]
        self._known: dict[str, Entry | None] = {}
        for path in self._merged:
            self._known.update(entries_of(path))

    def __enter__(self) -> "Listing":
        """Open the journal; an earlier one's lines are kept."""
        try:
            self._file = self._journal.open("a", encoding="ascii")
            if self._journal.stat().st_size:
                self._file.write("\n")  # ends a line that was cut off
        except OSError as error:
            raise StorageError(f"cannot write {self._journal}: {error.strerror}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the journal; without an error, make it part of the list."""
        try:
            self._file.close()
            if kind is None:
                self._commit()
        except OSError as close_error:
            raise StorageError(
                f"cannot write {self._journal}: {close_error.strerror}"
            ) from close_error

    def record(self, file: str) -> Provenance | None:
        """What a picture was made of; None if it is not known."""
        entry = self._known.get(file)
        return entry and entry.record

    def is_damaged(self, file: str) -> bool:
        """Whether a picture that is there has other bytes than the list says."""
        entry = self._known.get(file)
        return bool(entry and entry.sha256 and file_digest(self._directory / file) != entry.sha256)

    def forget(self, file: str) -> None:
        """Say that a picture is about to be replaced: what is known of it holds no longer."""
        if self._known.get(file) is not None:
            self._write(file, None)

    def add(self, file: str, record: Provenance, sha256: str) -> None:
        """Say what a picture was made of that lies in the directory now, and its file's sha256 (hex)."""
        entry = Entry(record, sha256)
        if self._known.get(file) != entry:
            self._write(file, entry)

    def _write(self, file: str, entry: Entry | None) -> None:
        self._known[file] = entry
        try:
            self._file.write(line_of(file, entry) + "\n")
            self._file.flush()
        except OSError as error:
            raise StorageError(f"cannot write {self._journal}: {error.strerror}") from error

    def _commit(self) -> None:
        lines = [
            line_of(file, entry) + "\n"
            for file, entry in sorted(self._known.items())
            if entry is not None and (self._directory / file).is_file()
        ]
        if lines:
            write_text(self._path, "".join(lines))
        for path in (*self._merged, self._journal):
            if path != self._path or not lines:
                path.unlink(missing_ok=True)


def line_of(file: str, entry: Entry | None) -> str:
    """The line for a picture; without an entry, one that says that it does not hold any more."""
    known = {} if entry is None else {**entry.record, "sha256": entry.sha256}
    return sealed_line(as_text({"file": file, **known}))


def entries_of(path: Path) -> Iterator[tuple[str, Entry | None]]:
    """File -> entry, or None where a line says that it does not hold any more.

    Raises:
        DataError: the list cannot be read, is damaged, or is none.
    """
    try:
        lines, rest = lines_of(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    for number, line in enumerate((*lines, rest), start=1):
        try:
            found = [entry_of(line)] if line else []
        except DataError as error:
            if path.name.endswith(UNFINISHED):
                continue  # a line that was cut off
            raise DataError(
                f"{path}, line {number} is damaged, or not one that ldmkit wrote; move the file away"
            ) from error
        yield from found


def entry_of(line: bytes) -> tuple[str, Entry | None]:
    """The file that a line is about, and its entry.

    Raises:
        DataError: it is damaged, or no such line.
    """
    if line_state(line) == "damaged":
        raise DataError("a line that does not match its checksum")
    try:
        record = json.loads(line)
        record.pop("crc32", None)
        file, sha256 = str(record.pop("file")), str(record.pop("sha256", ""))
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise DataError("no line of a list") from error
    if file in ("", "..") or "\0" in file or file != Path(file).name:
        raise DataError("a name that leads out of the directory")
    return file, Entry(record, sha256) if record else None
