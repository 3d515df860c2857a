"""Checking a file of one or several blocks: every header, every tensor, and how the blocks follow.

Needs no torch.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ldmkit.autoencoder_configs import AutoencoderConfig
from ldmkit.container import Header, parse_header, verify
from ldmkit.diffusion_configs import DiffusionConfig
from ldmkit.errors import DataError
from ldmkit.facts import (
    AutoencoderFacts,
    DiffusionFacts,
    Manifest,
    SampleFacts,
    ShardFacts,
    SnapshotFacts,
    validated,
)
from ldmkit.fields import Config

CONFIGS: dict[str, type[Config]] = {
    "autoencoder": AutoencoderConfig,
    "diffusion": DiffusionConfig,
    "averages": DiffusionConfig,
}
FACTS: dict[str, type[Config]] = {
    "autoencoder": AutoencoderFacts,
    "diffusion": DiffusionFacts,
    "averages": SnapshotFacts,
    "samples": SampleFacts,
    "latents": ShardFacts,
}
ROWS = {"samples": "latents", "latents": "mean"}
"""Kind -> the tensor with a row for each sample."""


class Described(NamedTuple):
    """What a file of blocks is."""

    kind: str
    facts: dict[str, Any]
    """Of the last block."""
    sealed: bool
    """Whether digests cover all headers."""
    problems: tuple[str, ...]


def check_container(path: Path, *, part: bool = False) -> Described:
    """Check every block of a file.

    Args:
        path: of the file.
        part: whether it holds some of the samples only, as one does that waits for the others.

    Raises:
        DataError: a header is damaged, so that nothing behind it can be found, or the file is empty.
        OSError: it cannot be read.
    """
    problems: list[str] = []
    headers: list[Header] = []
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as whole,
    ):
        while (header := parse_header(file, str(path))) is not None:
            start = file.tell()
            stop = start + header.payload_bytes
            if stop > len(whole):
                raise DataError(f"{path} is cut off or damaged; make or copy it again")
            with whole[start:stop] as payload:
                problems += _problems_of(header, payload, path)
            headers.append(header)
            file.seek(stop)
    problems += _following(headers, path, part)
    last = headers[-1]
    return Described(last.kind, last.facts, all(one.sealed for one in headers), tuple(problems))


def _problems_of(header: Header, payload: memoryview, path: Path) -> Iterator[str]:
    try:
        verify(header, payload, str(path))
        if header.kind in CONFIGS:
            validated(CONFIGS[header.kind], header.config, f"{path}, config")
        if header.kind in FACTS:
            validated(FACTS[header.kind], header.facts, f"{path}, facts")
        if header.kind == "manifest":
            stated = {name: x for name, x in header.facts.items() if name != "fingerprint"}
            validated(Manifest, stated, f"{path}, manifest")
    except DataError as error:
        yield str(error)
    name = ROWS.get(header.kind)
    if name is not None and name not in header.tensors:
        yield f"{path} lacks the tensor {name}"


def _following(headers: list[Header], path: Path, part: bool) -> Iterator[str]:
    """Whether the blocks of a stream are all there."""
    last = headers[-1]
    rows = [_rows(header) for header in headers if header.kind == last.kind]
    if len(headers) > 1 and last.kind not in ("samples", "manifest"):
        yield f"{path} holds {len(headers)} blocks of {last.kind}, and no manifest: it is cut off"
    if last.kind == "samples" and not part and sum(rows) != last.facts.get("total"):
        yield f"{path} ends after {sum(rows)} of {last.facts.get('total')} samples"
    if last.kind == "manifest":
        counts = [_rows(header) for header in headers[:-1]]
        if sum(counts) != last.facts.get("count"):
            yield f"{path} has {sum(counts)} latents, and a manifest of {last.facts.get('count')}"


def _rows(header: Header) -> int:
    entry = header.tensors.get(ROWS.get(header.kind, ""))
    return entry.shape[0] if entry is not None and entry.shape else 0
