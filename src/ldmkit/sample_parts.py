"""Samples on their way to a file: whole parts in OUT.parts/, which the last of them makes one file.

A part is a sample file of its own, and says in its facts what was asked for. So a command that was stopped,
or divided into jobs, takes what is there already, whatever the parts' sizes, and the file that is joined
in the end has the bytes of one that was drawn at once.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from filelock import FileLock

from ldmkit.block_writing import Column, write_block
from ldmkit.container import read_header, verify_file
from ldmkit.data.latents import text_columns, unragged
from ldmkit.durable import atomic_file, remove, sweep_temporaries
from ldmkit.errors import DataError
from ldmkit.facts import Facts, SampleFacts, validated
from ldmkit.modelfile import DTYPE_CODES
from ldmkit.sample_blocks import TOLD
from ldmkit.terminal import say

SUFFIX = ".safetensors"


class Part(NamedTuple):
    """Some samples that are drawn."""

    path: Path
    first: int
    """Number of the first sample."""
    stop: int


def asked_digest(asked: Facts) -> str:
    """What a command asked for, as sha256 (hex) of its JSON."""
    return sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def parts_of(out: Path) -> Path:
    """The directory of the parts of a sample file."""
    return out.with_name(f"{out.name}.parts")


def part_path(out: Path, first: int) -> Path:
    """Where the part lies that begins with the sample of that number."""
    return parts_of(out) / f"{first:09d}{SUFFIX}"


def is_complete(out: Path, asked: str) -> bool:
    """Whether the file is there already, of what is asked for."""
    try:
        return out.is_file() and read_header(out).facts.get("asked") == asked
    except DataError:
        return False  # no sample file of ours: it is replaced, as any other is


def drop_leftovers(out: Path, asked: str) -> None:
    """Remove what a process left that was killed just after the file was complete.

    Parts of another command stay: it may be run again.
    """
    sweep_temporaries(out.parent, out.name)
    try:
        others = [path for path in _files(out) if read_header(path).facts.get("asked") != asked]
    except DataError:
        return  # what is damaged is the affair of the command that made it; what is gone is another's
    if not others and parts_of(out).is_dir():
        remove(parts_of(out))


def found_parts(out: Path, asked: str) -> list[Part]:
    """The whole parts that are there, in order; damaged ones are removed.

    Raises:
        DataError: the directory holds parts of something else.
    """
    found = []
    for path in _files(out):
        try:
            header = read_header(path)
            facts = validated(SampleFacts, header.facts, str(path))
            verify_file(header, path)
        except DataError as error:
            say(f"drawing again: {error}")
            remove(path)
            continue
        if facts.asked != asked:
            raise DataError(
                f"{parts_of(out)} holds unfinished samples of another command: run that one again, give "
                "another --out, or remove the directory"
            )
        found.append(Part(path, facts.first, facts.first + header.tensors["seed"].shape[0]))
    return sorted(found, key=lambda part: part.first)


def _files(out: Path) -> list[Path]:
    """Of parts, in order."""
    try:
        return sorted(parts_of(out).glob(f"*{SUFFIX}"))
    except (
        FileNotFoundError
    ):  # the directory went while it was listed: another process joined the parts
        return []


def missing(parts: Sequence[Part], wanted: range) -> list[range]:
    """The numbers of `wanted` that no part holds, as ranges; parts in order."""
    gaps, place = [], wanted.start
    for part in parts:
        if place < min(part.first, wanted.stop):
            gaps.append(range(place, min(part.first, wanted.stop)))
        place = max(place, part.stop)
    return [*gaps, range(place, wanted.stop)] if place < wanted.stop else gaps


def joined(out: Path, asked: str, facts: SampleFacts) -> bool:
    """Make one file of the parts, if they are all there.

    Args:
        out: the file.
        asked: digest of what was asked for.
        facts: of the whole.

    Returns:
        Whether the file is there now; else other jobs are at work still.

    Raises:
        StorageError: the file cannot be written.
    """
    directory = parts_of(out)
    if not directory.is_dir():
        return is_complete(out, asked)
    try:
        held = FileLock(directory / "join.lock").acquire()  # several jobs may end at the same time
    except (
        FileNotFoundError,
        FileExistsError,
    ):  # another one has just removed the parts: it is made
        return is_complete(out, asked)
    with held:
        done = is_complete(out, asked)
        if not done:
            parts = found_parts(out, asked)
            if missing(parts, range(facts.total)):
                return False
            sweep_temporaries(out.parent, out.name)
            with atomic_file(out) as temporary, temporary.open("wb") as file:
                columns = _columns(parts)
                dump = facts.model_dump(mode="json", exclude_none=True)
                write_block(file, columns, kind="samples", config={}, facts=dump)
    remove(directory)
    return True


def _columns(parts: Sequence[Part]) -> dict[str, Column]:
    """All samples; of what is large, only a part is in memory at once."""
    rows = list(_new_rows(parts))
    total = parts[-1].stop
    found: dict[str, Column] = {}
    for name, entry in read_header(parts[0].path).tensors.items():
        if not name.startswith(f"{TOLD}."):
            chunks = partial(_chunks, rows, name)
            found[name] = Column(entry.dtype, (total, *entry.shape[1:]), chunks)
    lines = []
    for path, skipped in rows:
        with safetensors.safe_open(path, "pt") as file:
            data, offsets = (file.get_tensor(f"{TOLD}.{name}") for name in ("bytes", "offsets"))
        lines += unragged(data.numpy(), offsets.numpy())[skipped:]
    for name, tensor in text_columns(TOLD, lines).items():
        data = _bytes(tensor)
        found[name] = Column(DTYPE_CODES[tensor.dtype], tuple(tensor.shape), lambda d=data: (d,))
    return found


def _new_rows(parts: Iterable[Part]) -> Iterator[tuple[Path, int]]:
    """The parts that add samples, with how many of their first ones others have already."""
    place = 0
    for part in parts:
        if part.stop > place:
            yield part.path, place - part.first
            place = part.stop


def _chunks(rows: Sequence[tuple[Path, int]], name: str) -> Iterator[bytes]:
    for path, skipped in rows:
        with safetensors.safe_open(path, "pt") as file:
            yield _bytes(file.get_tensor(name)[skipped:])


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
