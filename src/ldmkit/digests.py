"""What tells bytes from other bytes: the fingerprint of tensors, their checksums, a file's digest."""

import hashlib
import json
import zlib
from pathlib import Path


def crc32(data: memoryview) -> str:
    """The CRC-32 of bytes (8 hex digits)."""
    with data:
        return f"{zlib.crc32(data):08x}"


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
