"""The safetensors container as ldmkit uses it: header, limits, fingerprint, messages in a pipe.

Every file and every message that ldmkit writes is one safetensors block

    [8 bytes: header length, little endian][header: JSON][payload: the tensors' bytes]

whose metadata holds one key, `ldmkit`, with one JSON value:
`{"format": "ldmkit.KIND/VERSION", "config": {...}, "facts": {...}}`. The block delimits itself, so a
pipe carries several of them one after the other with bounded memory.

`facts.fingerprint` is the sha256 over names, dtypes, shapes and bytes of the tensors: it survives a
rewritten header, names a model in every file derived from it, and finds a flipped bit.

This module needs no torch, so `ldmkit inspect` starts at once.
"""

import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BufferedIOBase
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ldmkit.errors import DataError

METADATA_KEY = "ldmkit"
FORMAT_VERSIONS = {
    "autoencoder": 1,
    "diffusion": 1,
    "latents": 1,
    "manifest": 1,
    "samples": 1,
    "noise": 1,
    "checkpoint": 1,
    "averages": 1,
    "reference": 1,
}
"""The newest version of each kind of file that this version of ldmkit reads and writes."""

MAX_HEADER_BYTES = 10_000_000
MAX_TENSORS = 100_000
MAX_MESSAGE_BYTES = 4 << 30
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


class TensorEntry(NamedTuple):
    """Where one tensor lies: safetensors dtype code, shape, byte range in the payload."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """What a block says of itself."""

    kind: str
    """A key of `FORMAT_VERSIONS`."""
    config: dict[str, Any]
    facts: dict[str, Any]
    tensors: dict[str, TensorEntry]
    payload_start: int
    """Offset of the payload from the start of the block, in bytes."""
    payload_bytes: int

    @property
    def fingerprint(self) -> str:
        """The sha256 the writer stated for the tensors (hex)."""
        return str(self.facts.get("fingerprint", ""))


class Column(NamedTuple):
    """A tensor that is not in memory as a whole."""

    dtype: str
    """A key of `DTYPE_BYTES`."""
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes]]
    """Its bytes, piece by piece, from the start at each call."""


def metadata(kind: str, config: dict[str, Any], facts: dict[str, Any]) -> dict[str, str]:
    """The safetensors metadata of a block of this kind."""
    value = {"format": f"ldmkit.{kind}/{FORMAT_VERSIONS[kind]}", "config": config, "facts": facts}
    return {METADATA_KEY: json.dumps(value, ensure_ascii=False, sort_keys=True)}


def read_header(path: Path) -> Header:
    """Read the header of a file, checking it against the file's size.

    Raises:
        DataError: there is no such file, or it is not a whole file that ldmkit wrote.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = _parse(file, str(path))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if header is None or header.payload_start + header.payload_bytes != size:
        raise DataError(f"{path} is cut off or has bytes too many; make or copy it again")
    return header


def read_messages(stream: BufferedIOBase, source: str) -> Iterator[tuple[Header, bytes]]:
    """Read one block after the other from a pipe; yields each header with the whole block's bytes.

    Args:
        stream: what to read, to its end.
        source: how to name it in errors.

    Raises:
        DataError: the stream ends within a block, or holds something else.
    """
    while True:
        reader = _Recorder(stream)
        header = _parse(reader, source)
        if header is None:
            return
        if header.payload_bytes > MAX_MESSAGE_BYTES:
            raise DataError(f"{source}: a message of {header.payload_bytes} bytes is too large")
        payload = stream.read(header.payload_bytes)
        if len(payload) != header.payload_bytes:
            raise DataError(f"{source} ends in the middle of a message: its writer was stopped")
        yield header, bytes(reader.seen) + payload


def read_headers(path: Path) -> Iterator[Header]:
    """The headers of all blocks of a file, one after the other, without their payloads.

    Raises:
        DataError: there is no such file, or it is not made of whole blocks that ldmkit wrote.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            while (header := _parse(file, str(path))) is not None:
                stop = file.seek(header.payload_bytes, os.SEEK_CUR)
                _require(stop <= size, f"{path} ends in the middle of a message; make it again")
                yield header
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def write_block(
    file: BinaryIO,
    columns: Mapping[str, Column],
    *,
    kind: str,
    config: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    """Write one block whose tensors come piece by piece, so that no more than a piece is in memory.

    Every piece is asked for twice: for the fingerprint, which stands before them, and to be written.
    """
    digest = FingerprintBuilder()
    for name in sorted(columns):
        digest.begin(name, columns[name].dtype, columns[name].shape)
        for chunk in columns[name].chunks():
            digest.go_on(memoryview(chunk))
    facts = {**facts, "fingerprint": digest.hexdigest()}
    table: dict[str, Any] = {"__metadata__": metadata(kind, config, facts)}
    order = sorted(columns, key=lambda name: (-DTYPE_BYTES[columns[name].dtype], name))
    start = 0  # wide numbers come first, as in files of safetensors, so that all lie aligned
    for name in order:
        dtype, shape, _ = columns[name]
        stop = start + math.prod(shape) * DTYPE_BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in order:
        for chunk in columns[name].chunks():
            file.write(chunk)


def verify(header: Header, payload: memoryview, source: str) -> None:
    """Check the tensors' bytes against the fingerprint in the header.

    Raises:
        DataError: they differ, so the block was damaged after it was written.
    """
    digest = FingerprintBuilder()
    for name in sorted(header.tensors):
        entry = header.tensors[name]
        digest.add(name, entry.dtype, entry.shape, payload[entry.start : entry.stop])
    if digest.hexdigest() != header.fingerprint:
        raise DataError(
            f"{source} is damaged: its tensors do not match their fingerprint; make or copy it again"
        )


def verify_file(header: Header, path: Path) -> None:
    """`verify` for a file, read through a memory map."""
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as whole,
        whole[header.payload_start :] as payload,
    ):
        verify(header, payload, str(path))


class FingerprintBuilder:
    """sha256 over tensors, which must be added in sorted order of their names."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, name: str, dtype: str, shape: tuple[int, ...], data: memoryview) -> None:
        """Add one tensor: name, safetensors dtype code, shape, raw little-endian bytes."""
        self.begin(name, dtype, shape)
        self.go_on(data)

    def begin(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """Begin a tensor that comes piece by piece."""
        self._digest.update(json.dumps([name, dtype, list(shape)]).encode())

    def go_on(self, data: memoryview) -> None:
        """Add the next bytes of the tensor that was begun."""
        with data:
            self._digest.update(data)

    def hexdigest(self) -> str:
        """The digest of all that was added (64 hex digits)."""
        return self._digest.hexdigest()


def file_digest(path: Path) -> str:
    """The sha256 of a file's bytes (hex)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Recorder:
    """Reads from a stream and keeps what it read."""

    def __init__(self, stream: BufferedIOBase) -> None:
        self._stream = stream
        self.seen = bytearray()

    def read(self, count: int) -> bytes:
        data = self._stream.read(count)
        self.seen += data
        return data


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise DataError(sentence)


def _parse(file: "BufferedIOBase | _Recorder", source: str) -> Header | None:
    """Parse a header at the current position; None at the very end of the file."""
    prefix = file.read(8)
    if not prefix:
        return None
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise DataError(f"{source} is not a file of ldmkit (no safetensors header)")
    text = file.read(length)
    if len(text) != length:
        raise DataError(f"{source} is cut off; make or copy it again")
    try:
        table = json.loads(text)
        value = json.loads(table.pop("__metadata__")[METADATA_KEY])
        kind = _kind_of(value["format"], source)
        tensors = {str(name): _entry(entry) for name, entry in table.items()}
        config, facts = dict(value["config"]), dict(value["facts"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{source} is not a file of ldmkit (header not understood)") from error
    if len(tensors) > MAX_TENSORS:
        raise DataError(f"{source} declares {len(tensors)} tensors; at most {MAX_TENSORS} are read")
    payload_bytes = max((entry.stop for entry in tensors.values()), default=0)
    return Header(kind, config, facts, tensors, 8 + length, payload_bytes)


def _kind_of(format_name: str, source: str) -> str:
    family, _, rest = format_name.partition(".")
    kind, _, version = rest.partition("/")
    if family != METADATA_KEY or kind not in FORMAT_VERSIONS:
        raise DataError(f"{source} has the unknown format {format_name!r}")
    if int(version) > FORMAT_VERSIONS[kind]:
        raise DataError(
            f"{source} has format {format_name}; this ldmkit reads {kind} files up to version "
            f"{FORMAT_VERSIONS[kind]}: update ldmkit"
        )
    return kind


def _entry(value: dict[str, Any]) -> TensorEntry:
    start, stop = (int(offset) for offset in value["data_offsets"])
    shape = tuple(int(length) for length in value["shape"])
    count = 1
    for length in shape:
        count *= length
    if min((start, *shape)) < 0 or stop - start != count * DTYPE_BYTES[value["dtype"]]:
        raise ValueError("byte range and shape disagree")
    return TensorEntry(value["dtype"], shape, start, stop)
