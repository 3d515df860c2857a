"""The members of an uncompressed tar, from its headers alone: ustar, GNU and PAX long names.

The standard library's reader takes five times as long and ends silently at a damaged header or at
the end of a cut file. This one reads nothing but headers, and accepts a tar only up to its end mark.
Layouts: POSIX.1-2017, `pax`; the GNU tar manual, "Basic Tar Format".
"""

import os
from collections.abc import Iterator
from io import BufferedIOBase
from typing import Literal, NamedTuple

from ldmkit.errors import DataError

BLOCK = 512
END = bytes(2 * BLOCK)
MAX_EXTENSION = 1 << 20
"""Bytes of a long name or a PAX header at most; a name has no more than some thousands."""
FILES = frozenset((b"0", b"\0", b"7"))
WITHOUT_DATA = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))
EXTENSIONS = frozenset((b"x", b"g", b"X", b"L", b"K"))
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


class Member(NamedTuple):
    """One entry of a tar."""

    name: bytes
    """As stored, not yet checked."""
    kind: Literal["file", "folder", "other"]
    """other = a link, a device, a sparse file."""
    offset: int
    """Where its data begins in the tar."""
    size: int


class _Header(NamedTuple):
    name: bytes
    size: int
    kind: bytes


def tar_members(file: BufferedIOBase, where: str) -> Iterator[Member]:
    """List a tar in order.

    Args:
        file: the tar, opened for reading; it may be read elsewhere between two members.
        where: what to call it in errors.

    Raises:
        DataError: it is cut off at any place, a header is damaged, or data follows its end mark;
            what came before has been listed by then.
    """
    length = file.seek(0, os.SEEK_END)
    offset = 0
    globally: dict[bytes, bytes] = {}  # PAX records of the members from here on
    own: dict[bytes, bytes] = {}  # PAX records and long name of the next member
    while (block := _read(file, offset, BLOCK, where))[0] or block != END[:BLOCK]:
        header = _header(block, where, offset)
        offset += BLOCK
        if header.kind in EXTENSIONS:
            if header.size > MAX_EXTENSION:
                raise DataError(
                    f"{where} is damaged: a name of {header.size:,} bytes at {offset:,}"
                )
            data = _read(file, offset, header.size, where)
            offset = _next_block(offset + header.size)
            if header.kind == b"L":
                own.setdefault(b"path", data.split(b"\0", 1)[0])
            elif header.kind != b"K":
                (globally if header.kind == b"g" else own).update(_pax(data, where, offset))
            continue
        member = _member(header, globally | own if globally else own, offset, where)
        own = {}
        offset = _next_block(offset + (0 if header.kind in WITHOUT_DATA else member.size))
        if offset > length:
            raise DataError(f"{where} is cut off at byte {length:,}; copy it again")
        yield member
    if own:
        raise DataError(f"{where} is damaged: its last name belongs to no member; copy it again")
    _require_end(file, offset, length, where)


def _header(block: bytes, where: str, offset: int) -> _Header:
    """The fields of a header whose checksum holds."""
    expected = _number(block[148:156])
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if total != expected:
        signed = total - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
        if signed != expected:  # some old writers added signed bytes
            raise DataError(_damage(block, where, offset))
    size = _number(block[124:136])
    kind = block[156:157]
    if size is None or kind == b"S":
        reason = "a size that is no number" if size is None else "a sparse file, which is not read"
        raise DataError(
            f"{where} holds {reason}, at byte {offset:,}; write it again without --sparse"
        )
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return _Header(name, size, kind)


def _member(header: _Header, records: dict[bytes, bytes], offset: int, where: str) -> Member:
    name, size, kind = header.name, header.size, "other"
    if records:
        name = records.get(b"path", name)
        if b"size" in records:
            stated = records[b"size"]
            if not stated.isdigit() or len(stated) > 18:
                raise DataError(f"{where} is damaged: a size that is no number at byte {offset:,}")
            size = int(stated)
    if header.kind == b"5" or (header.kind == b"\0" and name.endswith(b"/")):
        kind = "folder"
    elif header.kind in FILES:
        sparse = records and any(key.startswith(b"GNU.sparse") for key in records)
        kind = "other" if sparse else "file"
    return Member(name, kind, offset, size)


def _number(field: bytes) -> int | None:
    """A number in octal digits, or in binary where the first bit is set; None if it is neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ")
    if not digits:
        return 0
    return (
        int(digits, 8) if digits.isdigit() and b"8" not in digits and b"9" not in digits else None
    )


def _pax(data: bytes, where: str, offset: int) -> dict[bytes, bytes]:
    """Records `LENGTH KEY=VALUE` with a line feed, where LENGTH counts all of the record."""
    records, start = {}, 0
    while start < len(data):
        space = data.find(b" ", start, start + 8)
        digits = data[start:space] if space > 0 else b""
        stop = start + int(digits) if digits.isdigit() else 0
        equals = data.find(b"=", space, stop)
        if not space < equals < stop <= len(data) or data[stop - 1 : stop] != b"\n":
            raise DataError(
                f"{where} is damaged: a PAX header before byte {offset:,} is no such thing"
            )
        records[data[space + 1 : equals]] = data[equals + 1 : stop - 1]
        start = stop
    return records


def _read(file: BufferedIOBase, offset: int, size: int, where: str) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) < size and offset == 0:
        raise DataError(_damage(data, where, offset))
    if len(data) < size:
        raise DataError(
            f"{where} lacks its end mark, so it is cut off at byte {offset + len(data):,}; copy it again"
        )
    return data


def _next_block(offset: int) -> int:
    return -(-offset // BLOCK) * BLOCK


def _damage(begin: bytes, where: str, offset: int) -> str:
    """The sentence for a header that is none; `begin` is what stands there."""
    if offset:
        return f"{where} is damaged: the checksum of the header at byte {offset:,} is wrong; copy it again"
    if begin.startswith(COMPRESSED):
        return (
            f"{where} is compressed, so that its members cannot be read at random; unpack it to a .tar "
            "(gunzip, bunzip2, unxz, unzstd): pictures hardly shrink"
        )
    return f"{where} is not a whole tar file (its first header is cut off or damaged)"


def _require_end(file: BufferedIOBase, offset: int, length: int, where: str) -> None:
    """A tar ends with two blocks of zeros, and zeros as far as it goes, in whole blocks."""
    if length - offset < len(END) or length % BLOCK:
        raise DataError(
            f"{where} lacks its end mark, or part of it, so it is cut off at byte {length:,}; "
            "copy it again"
        )
    file.seek(offset)
    while chunk := file.read(1 << 20):
        if chunk.count(0) != len(chunk):
            raise DataError(
                f"{where} has data after its end mark at byte {offset:,}, which would be passed over; "
                "if tars were joined, list them one by one"
            )
