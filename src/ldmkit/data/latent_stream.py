"""A latent set that comes through a pipe: kept in a directory, where it can be read at random."""

import hashlib
from io import BufferedIOBase
from pathlib import Path

from ldmkit.container import Header, read_messages, verify
from ldmkit.data.latents import shard_name
from ldmkit.durable import atomic_file
from ldmkit.errors import DataError
from ldmkit.facts import Manifest, ShardEntry, validated
from ldmkit.manifest import MANIFEST, write_manifest
from ldmkit.terminal import say


def receive_latents(stream: BufferedIOBase, directory: Path) -> Path:
    """Write what `ldmkit encode -o -` sends as the latent set it would have written itself.

    Args:
        stream: one message a shard, then the manifest.
        directory: of the set; a former one there is replaced.

    Raises:
        DataError: the stream holds something else, is damaged, or ends before its manifest.
        StorageError: the set cannot be written.
    """
    source = "standard input"
    written: list[tuple[int, str]] = []
    (directory / MANIFEST).unlink(missing_ok=True)
    for header, block in read_messages(stream, source):
        verify(header, memoryview(block)[header.payload_start :], source)
        if header.kind == "manifest":
            write_manifest(directory, _completed(header, written, source))
            say(f"received {len(written)} shards of latents, kept in {directory}")
            return directory
        if header.kind != "latents":
            raise DataError(f"{source} holds {header.kind}; pipe `ldmkit encode -o -` into this")
        with atomic_file(directory / shard_name(len(written))) as temporary:
            temporary.write_bytes(block)
        written.append((len(block), hashlib.sha256(block).hexdigest()))
    state = "ended before its manifest: encode was stopped" if written else "is empty"
    raise DataError(f"{source} {state}; run both commands again")


def _completed(header: Header, written: list[tuple[int, str]], source: str) -> Manifest:
    """The manifest with sizes and digests, which its sender could not know."""
    facts = {name: value for name, value in header.facts.items() if name != "fingerprint"}
    manifest = validated(Manifest, facts, source)
    if len(written) != len(manifest.shards):
        raise DataError(
            f"{source} brought {len(written)} shards and a manifest of {len(manifest.shards)}; "
            "run both commands again"
        )
    shards: list[ShardEntry] = [
        entry.model_copy(update={"bytes": size, "sha256": digest})
        for entry, (size, digest) in zip(manifest.shards, written, strict=True)
    ]
    return manifest.model_copy(update={"shards": tuple(shards)})
