"""Tensors in and out of safetensors files and messages, with config and facts in the header.

Built on `container`: what is written carries a fingerprint, what is read is checked against it.
Nothing is ever unpickled.
"""

import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ldmkit.container import (
    Header,
    metadata,
    read_header,
    read_messages,
    sealed_header,
    verify,
    verify_file,
)
from ldmkit.digests import FingerprintBuilder, crc32
from ldmkit.durable import atomic_file
from ldmkit.errors import DataError
from ldmkit.version import __version__

DTYPE_CODES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of the tensors (hex)."""
    digest = FingerprintBuilder()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.add(name, DTYPE_CODES[tensor.dtype], tuple(tensor.shape), _bytes_of(tensor))
    return digest.hexdigest()


def save(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    kind: str,
    config: dict[str, Any],
    facts: dict[str, Any],
) -> str:
    """Write a file in one piece; the fingerprint is added to the facts and returned.

    Args:
        path: where; its directory is made if need be.
        tensors: what; moved to the CPU.
        kind: a key of `container.FORMAT_VERSIONS`.
        config: JSON-able; what is needed to build the object again.
        facts: JSON-able; what is known about it.

    Raises:
        StorageError: the file cannot be written.
    """
    ready, facts, checksums = _ready(tensors, facts)
    with atomic_file(path) as temporary:
        write_tensors(temporary, ready, metadata(kind, config, facts, checksums))
        with temporary.open("r+b") as file:
            length = file.read(8)
            header = sealed_header(length + file.read(int.from_bytes(length, "little")))
            file.seek(0)
            file.write(header)
    return facts["fingerprint"]


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> None:
    """Safetensors' `save_file`, whose own error of a full disk is no OSError.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except safetensors.SafetensorError as error:
        stated = re.search(r"\(os error (\d+)\)", str(error))
        if stated is None:
            raise
        raise OSError(int(stated[1]), os.strerror(int(stated[1])), str(path)) from error


def load(path: Path, *, kind: str) -> tuple[Header, dict[str, Tensor]]:
    """Read a file of the given kind whole and check its digest.

    Raises:
        DataError: it is missing, damaged, or of another kind.
    """
    header = read_header(path)
    require_kind(header, kind, str(path))
    verify_file(header, path)
    with _understood(str(path)):
        return header, safetensors.torch.load_file(path)


def write_message(
    stream: BufferedIOBase,
    tensors: Mapping[str, Tensor],
    *,
    kind: str,
    config: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    """Write one block to a pipe and flush it."""
    ready, facts, checksums = _ready(tensors, facts)
    block = safetensors.torch.save(ready, metadata(kind, config, facts, checksums))
    header = sealed_header(block)
    stream.write(header)
    stream.write(memoryview(block)[len(header) :])
    stream.flush()


def load_messages(
    stream: BufferedIOBase, source: str, *, kind: str
) -> Iterator[tuple[Header, dict[str, Tensor]]]:
    """Read blocks of one kind from a pipe or an open file, one at a time, each checked.

    Raises:
        DataError: a block is cut off, damaged, or of another kind.
    """
    for header, block in read_messages(stream, source):
        require_kind(header, kind, source)
        verify(header, memoryview(block)[header.payload_start :], source)
        with _understood(source):
            tensors = safetensors.torch.load(block)
        yield header, tensors


@contextmanager
def _understood(source: str) -> Iterator[None]:
    """Turn what safetensors alone does not accept into a sentence; its rules may be stricter than ours."""
    try:
        yield
    except safetensors.SafetensorError as error:
        raise DataError(f"{source} is not a file of ldmkit (header not understood)") from error


def require_kind(header: Header, kind: str, source: str) -> None:
    """Raise DataError unless the header is of the kind that is wanted here."""
    if header.kind != kind:
        raise DataError(f"{source} holds {header.kind}; {kind} is needed here")


def require_tensors(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str
) -> None:
    """Raise DataError, naming the first difference, unless names and shapes agree."""
    for name in sorted(expected.keys() ^ found.keys()):
        state = "lacks" if name in expected else "has the unknown"
        raise DataError(f"{source} {state} tensor {name}")
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            raise DataError(
                f"{source}: tensor {name} has shape {list(found[name].shape)}, "
                f"its config asks for {list(tensor.shape)}"
            )


def versions() -> dict[str, str]:
    """The versions that matter for repeating a result."""
    return {
        "ldmkit": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _ready(
    tensors: Mapping[str, Tensor], facts: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """The tensors as they are stored, the facts with their fingerprint, and a checksum of each."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksums = [crc32(_bytes_of(ready[name])) for name in sorted(ready)]
    return ready, {**facts, "fingerprint": fingerprint(ready)}, checksums


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
