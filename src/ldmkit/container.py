"""The safetensors container as ldmkit uses it: header, limits, fingerprint, messages in a pipe.

Every file and every message that ldmkit writes is one safetensors block

    [8 bytes: header length, little endian][header: JSON][payload: the tensors' bytes]

whose metadata holds one key, `ldmkit`, with one JSON value:
`{"digest": ..., "format": "ldmkit.KIND/VERSION", "config": {...}, "facts": {...}, "crc32": [...]}`. The
block delimits itself, so a pipe carries several of them one after the other with bounded memory.

`facts.fingerprint` is the sha256 over names, dtypes, shapes and bytes of the tensors: it survives a
rewritten header, names a model in every file derived from it, and finds a flipped bit of the payload.
`digest` finds one of the header (see `seals`), and `crc32`, a checksum for each tensor in the order of
their names, tells which tensor was hit. Files of earlier versions have neither.

This module needs no torch, so `ldmkit inspect` starts at once.
"""

import json
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

from ldmkit.digests import FingerprintBuilder, crc32
from ldmkit.errors import DataError
from ldmkit.seals import ZEROS, sealed, state_of

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
    "features": 1,
}
"""The newest version of each kind of file that this version of ldmkit reads and writes."""

MAX_HEADER_BYTES = 10_000_000
MAX_TENSORS = 100_000
MAX_MESSAGE_BYTES = 4 << 30
MAX_AXES = 16
MAX_LENGTH = 1 << 62
"""Of an axis, and of a tensor in bytes: larger numbers are no sizes."""
CHUNK = 16 << 20
"""Bytes that are asked of a pipe at once: a header that promises more takes no memory."""
HEADER_START = b'{"__metadata__":{"ldmkit":"{\\"digest\\": \\"'
UNSEALED, SEALED = {"config", "facts", "format"}, {"config", "crc32", "digest", "facts", "format"}
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
    crc32: tuple[str, ...] = ()
    """Of each tensor's bytes, in the order of their names (8 hex digits); () in an older file."""
    sealed: bool = False
    """Whether a digest covers this header; False in an older file."""

    @property
    def fingerprint(self) -> str:
        """The sha256 the writer stated for the tensors (hex)."""
        return str(self.facts.get("fingerprint", ""))


def metadata(
    kind: str, config: dict[str, Any], facts: dict[str, Any], crc32: Sequence[str] = ()
) -> dict[str, str]:
    """The safetensors metadata of a block of this kind, with room for `sealed_header`'s digest."""
    value = {
        "format": f"ldmkit.{kind}/{FORMAT_VERSIONS[kind]}",
        "config": config,
        "facts": facts,
        "crc32": list(crc32),
    }
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return {METADATA_KEY: f'{{"digest": "{ZEROS.decode()}", {text.removeprefix("{")}'}


def sealed_header(start: bytes) -> bytes:
    """The header of a block, its length before it, with the digest in its place.

    Args:
        start: the block as safetensors writes it, at least to the end of its header.
    """
    length = struct.unpack("<Q", start[:8])[0]
    return start[:8] + sealed(start[8 : 8 + length], HEADER_START, start[:8])


def read_header(path: Path) -> Header:
    """Read the header of a file, checking it against the file's size.

    Raises:
        DataError: there is no such file, or it is not a whole file that ldmkit wrote.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = parse_header(file, str(path))
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
        header = parse_header(reader, source)
        if header is None:
            return
        if header.payload_bytes > MAX_MESSAGE_BYTES:
            raise DataError(f"{source}: a message of {header.payload_bytes} bytes is too large")
        block = reader.seen
        while missing := header.payload_start + header.payload_bytes - len(block):
            piece = stream.read(min(missing, CHUNK))
            if not piece:
                raise DataError(f"{source} ends in the middle of a message: its writer was stopped")
            block += piece
        yield header, bytes(block)


def read_headers(path: Path) -> Iterator[Header]:
    """The headers of all blocks of a file, one after the other, without their payloads.

    Raises:
        DataError: there is no such file, or it is not made of whole blocks that ldmkit wrote.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            while (header := parse_header(file, str(path))) is not None:
                stop = file.seek(header.payload_bytes, os.SEEK_CUR)
                _require(stop <= size, f"{path} ends in the middle of a message; make it again")
                yield header
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


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
        damaged = ", ".join(damaged_tensors(header, payload)[:5])
        which = f"tensor {damaged} does" if damaged else "its tensors do"
        raise DataError(
            f"{source} is damaged: {which} not match the fingerprint; make or copy it again"
        )


def damaged_tensors(header: Header, payload: memoryview) -> list[str]:
    """The names of tensors whose bytes do not have the checksum that the header states."""
    stated = dict(zip(sorted(header.tensors), header.crc32, strict=False))
    return [
        name
        for name, checksum in stated.items()
        if checksum != crc32(payload[header.tensors[name].start : header.tensors[name].stop])
    ]


def verify_file(header: Header, path: Path) -> None:
    """`verify` for a file, read through a memory map."""
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as whole,
        whole[header.payload_start :] as payload,
    ):
        verify(header, payload, str(path))


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


def parse_header(file: "BufferedIOBase | _Recorder", source: str) -> Header | None:
    """Read the header at the current position of a file; None at its very end.

    Raises:
        DataError: something else lies there, or the header is damaged.
    """
    prefix = file.read(8)
    if not prefix:
        return None
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise DataError(f"{source} is not a file of ldmkit (no safetensors header)")
    text = file.read(length)
    if len(text) != length:
        raise DataError(f"{source} is cut off; make or copy it again")
    is_sealed = state_of(text, HEADER_START, f"the header of {source}", prefix) == "whole"
    try:
        table = json.loads(text, object_pairs_hook=_unambiguous)
        value = json.loads(table.pop("__metadata__")[METADATA_KEY], object_pairs_hook=_unambiguous)
        if len(table) > MAX_TENSORS:
            raise DataError(
                f"{source} declares {len(table)} tensors; at most {MAX_TENSORS} are read"
            )
        kind = _kind_of(value["format"], source)
        tensors = {name: _entry(entry) for name, entry in table.items()}
        config, facts = dict(value["config"]), dict(value["facts"])
        checksums = tuple(str(checksum) for checksum in value.get("crc32", ()))
        if value.keys() != (SEALED if is_sealed else UNSEALED):
            raise ValueError("it has other parts than a header has")
        payload_bytes = _payload_bytes(tensors)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise DataError(f"{source} is not a file of ldmkit (header not understood)") from error
    return Header(kind, config, facts, tensors, 8 + length, payload_bytes, checksums, is_sealed)


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object; of two values of one name another reader might take the other one."""
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name stands there twice")
    return dict(pairs)


def _payload_bytes(tensors: dict[str, TensorEntry]) -> int:
    """Bytes of all tensors, which lie one after the other without holes."""
    stop = 0
    for entry in sorted(tensors.values(), key=lambda entry: (entry.start, entry.stop)):
        if entry.start != stop:
            raise ValueError("tensors overlap or leave a hole")
        stop = entry.stop
    return stop


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
    if len(shape) > MAX_AXES or max((start, stop, *shape)) > MAX_LENGTH:
        raise ValueError("sizes that no tensor has")
    count = 1
    for length in shape:
        count *= length
    if min((start, *shape)) < 0 or stop - start != count * DTYPE_BYTES[value["dtype"]]:
        raise ValueError("byte range and shape disagree")
    return TensorEntry(value["dtype"], shape, start, stop)
