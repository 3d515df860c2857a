"""A safetensors block written column by column, whose tensors are never in memory as a whole."""

import json
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple

from ldmkit.container import DTYPE_BYTES, metadata, sealed_header
from ldmkit.digests import FingerprintBuilder


class Column(NamedTuple):
    """A tensor that is not in memory as a whole."""

    dtype: str
    """A key of `DTYPE_BYTES`."""
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes]]
    """Its bytes, piece by piece, from the start at each call."""


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
    digest, checksums = FingerprintBuilder(), []
    for name in sorted(columns):
        digest.begin(name, columns[name].dtype, columns[name].shape)
        checksum = 0
        for chunk in columns[name].chunks():
            checksum = zlib.crc32(chunk, checksum)
            digest.go_on(memoryview(chunk))
        checksums.append(f"{checksum:08x}")
    facts = {**facts, "fingerprint": digest.hexdigest()}
    table: dict[str, Any] = {"__metadata__": metadata(kind, config, facts, checksums)}
    order = sorted(columns, key=lambda name: (-DTYPE_BYTES[columns[name].dtype], name))
    start = 0  # wide numbers come first, as in files of safetensors, so that all lie aligned
    for name in order:
        dtype, shape, _ = columns[name]
        stop = start + math.prod(shape) * DTYPE_BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(sealed_header(struct.pack("<Q", len(text)) + text))
    for name in order:
        for chunk in columns[name].chunks():
            file.write(chunk)
