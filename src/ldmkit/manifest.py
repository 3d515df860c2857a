"""The page that commits a latent set, on disk: read, write, and check shards against it.

Needs no torch, so that `ldmkit inspect` and whoever else only looks can use it too.
"""

import json
from pathlib import Path

from ldmkit.container import FORMAT_VERSIONS
from ldmkit.digests import file_digest
from ldmkit.durable import write_text
from ldmkit.errors import DataError
from ldmkit.facts import Manifest, ShardEntry, validated
from ldmkit.seals import read_page, sealed_page

MANIFEST = "manifest.json"


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Commit a latent set."""
    text = json.dumps(
        manifest.model_dump(mode="json"), indent=1, ensure_ascii=False, sort_keys=True
    )
    write_text(directory / MANIFEST, sealed_page(text + "\n"))


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a committed latent set.

    Raises:
        DataError: there is none, it is damaged, or it is not understood.
    """
    path = directory / MANIFEST
    if not path.exists():
        hint = (
            "it is unfinished: run `ldmkit encode` again"
            if directory.is_dir()
            else "no such directory"
        )
        raise DataError(f"{directory} is no latent set ({hint})")
    value, _ = read_page(path)
    manifest = validated(Manifest, value, str(path))
    if manifest.format != f"ldmkit.latents/{FORMAT_VERSIONS['latents']}":
        raise DataError(f"{path} has the unknown format {manifest.format!r}")
    return manifest


def verify_shard(directory: Path, entry: ShardEntry) -> None:
    """Raise DataError unless a shard's bytes are the ones the manifest names."""
    path = directory / entry.name
    if not path.is_file():
        raise DataError(f"{path} is missing; run `ldmkit encode` again")
    if path.stat().st_size != entry.bytes or file_digest(path) != entry.sha256:
        raise DataError(
            f"{path} is damaged (sha256 differs from the manifest); run `ldmkit encode` again"
        )
