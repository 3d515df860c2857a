"""Digests that stand inside the text they are of, so that no bit of it can change unnoticed.

A page (JSON, TOML, HTML) or a header begins with known bytes, then 64 hex digits: the sha256 of the
whole with zeros in their place. A line of a log ends with the CRC-32 of what comes before. Text of
earlier versions has neither; one flipped bit does not make sealed text look like it, because only one
of the two, the known bytes or the digits, can be hit.

This finds damage. It does not prove who wrote something: whoever can write a file can seal it.
"""

import hashlib
import json
import re
import zlib
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Literal

from ldmkit.errors import DataError

State = Literal["whole", "older"]
"""older = written by a version that did not seal, so nothing is known of its bytes."""
JSON_START = b'{\n "digest": "'
TOML_START = b"# digest "
HTML_START = b"<!DOCTYPE html>\n<!-- digest "
ZEROS = b"0" * 64
MAX_PAGE_BYTES = 256 << 20
"""Of a page that is read: a manifest of a million shards has some 200 MB."""
PIECE = 1 << 20
DIGITS = re.compile(rb"[0-9a-f]{64}")
CHECKSUM = "crc32"
"""The name of the last value of a line of a log."""
LINE = re.compile(rb'(.*), "crc32": "([0-9a-f]{8})"\}', re.DOTALL)
LINE_REMAINS = re.compile(rb'"crc32": "|[0-9a-f]{8}"\}$')
LINE_TORN_NOT = re.compile(rb'"crc32": "[0-9a-f]{8}"\}.', re.DOTALL)


def sealed(data: bytes, start: bytes, before: bytes = b"") -> bytes:
    """Data whose zeros after its known beginning are replaced by the digest.

    Args:
        data: begins with `start` and 64 zeros.
        start: the known beginning.
        before: what comes before it in the file, and is covered too.

    Raises:
        ValueError: it begins otherwise.
    """
    if not data.startswith(start + ZEROS):
        raise ValueError("there is no room for the digest")
    digest = hashlib.sha256(before + data).hexdigest().encode()
    return start + digest + data[len(start) + len(ZEROS) :]


def state_of(data: bytes, start: bytes, source: str, before: bytes = b"") -> State:
    """Whether sealed data is as it was written.

    Args:
        data: as read.
        start: the known beginning of sealed data of its kind.
        source: how to call it in errors.
        before: what comes before it in the file.

    Raises:
        DataError: it has changed since.
    """
    stop = len(start) + len(ZEROS)
    stated = data[len(start) : stop]
    if data[: len(start)] != start and not DIGITS.fullmatch(stated):
        return "older"
    digest = hashlib.sha256(before + start + ZEROS)
    digest.update(memoryview(data)[stop:])
    if data[: len(start)] != start or digest.hexdigest().encode() != stated:
        raise DataError(
            f"{source} is damaged: it does not match the digest in it; make or copy it again"
        )
    return "whole"


def sealed_page(text: str) -> str:
    """An indented JSON object with its digest as the first value.

    Args:
        text: begins with `{` and a line break.
    """
    return _sealed_text(JSON_START, '",\n' + text.removeprefix("{\n"))


def sealed_toml(text: str) -> str:
    """TOML below a comment with its digest."""
    return _sealed_text(TOML_START, "\n" + text)


def sealed_html(text: str) -> str:
    """HTML with its digest in a comment after the first line, which says that it is HTML."""
    return _sealed_text(HTML_START, " -->\n" + text.partition("\n")[2])


def read_page(path: Path) -> tuple[dict[str, Any], State]:
    """A JSON object from a file, without its digest.

    Raises:
        DataError: it cannot be read, is damaged, too large, or no JSON object.
    """
    data = read_limited(path, MAX_PAGE_BYTES)
    state = state_of(data, JSON_START, str(path))
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"cannot read {path}: it holds no JSON object")
    if state == "older" and "digest" in value:
        raise DataError(
            f"{path} was written anew since ldmkit wrote it; take `digest` out of it to use it so"
        )
    value.pop("digest", None)
    return value, state


def read_limited(path: Path, limit: int) -> bytes:
    """The bytes of a file that is not larger than the limit.

    Raises:
        DataError: it cannot be read, or is larger.
    """
    try:
        with path.open("rb") as file:
            return read_within(file, limit, str(path))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def read_within(file: BufferedIOBase, limit: int, source: str) -> bytes:
    """What is left of an open file or pipe; memory is taken as bytes come, not as they are promised.

    Raises:
        DataError: it is more than the limit.
    """
    data = bytearray()
    while piece := file.read(PIECE):
        data += piece
        if len(data) > limit:
            raise DataError(
                f"{source} is too large: at most {limit:,} bytes are read of such a file"
            )
    return bytes(data)


def sealed_line(text: str) -> str:
    """A JSON object on one line, with the CRC-32 of what comes before as its last value."""
    before = text.removesuffix("}")
    return f'{before}, "crc32": "{zlib.crc32(before.encode()):08x}"}}'


def line_state(line: bytes) -> State | Literal["damaged"]:
    """Whether a line of a log (without its line break) is as it was written."""
    match = LINE.fullmatch(line)
    if match is None:
        return "damaged" if LINE_REMAINS.search(line) else "older"
    return "whole" if zlib.crc32(match[1]) == int(match[2], 16) else "damaged"


def lines_of(data: bytes) -> tuple[list[bytes], bytes]:
    """The lines of a log without their breaks, and what a killed writer left of a last one."""
    *lines, rest = data.split(b"\n")
    if LINE_TORN_NOT.search(rest):  # a whole line whose break has become something else
        return [*lines, rest], b""
    return lines, rest


def _sealed_text(start: bytes, rest: str) -> str:
    return sealed(start + ZEROS + rest.encode("utf-8", "surrogatepass"), start).decode(
        "utf-8", "surrogatepass"
    )
