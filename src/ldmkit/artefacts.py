"""Whether files that ldmkit wrote are as they were written: one by one, and all of a directory.

Needs no torch. What a file says of itself is recomputed from its bytes, and what files of a directory say
of one another (a manifest of its shards, a list of its pictures) is compared.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ldmkit.configfile import config_state
from ldmkit.container import HEADER_START
from ldmkit.data.tar_members import tar_members
from ldmkit.digests import file_digest
from ldmkit.durable import TEMPORARY_MARK
from ldmkit.errors import DataError
from ldmkit.facts import Manifest
from ldmkit.manifest import MANIFEST, read_manifest
from ldmkit.messages import Described, check_container
from ldmkit.output.listing import UNFINISHED, Entry, entries_of, entry_of
from ldmkit.output.tar import tar_member
from ldmkit.png import require_whole_png
from ldmkit.seals import HTML_START, State, line_state, lines_of, read_limited, read_page, state_of

MAX_LOG_BYTES = 1 << 30
MAX_HTML_BYTES = 1 << 30
PARTS = ".safetensors.parts"
NUMBERED = re.compile(r"step-(\d{9})")


class Checked(NamedTuple):
    """One file that was looked at."""

    path: Path
    kind: str
    """What it is; "" for what ldmkit did not write, of which nothing is known."""
    problems: tuple[str, ...] = ()
    """Sentences; () if all holds."""
    notes: tuple[str, ...] = ()
    """What no digest covers, or a killed process left."""


def check_path(path: Path) -> Iterator[Checked]:
    """Look at a file, or at all files of a directory and those below it, in the order of their names.

    Raises:
        DataError: there is nothing of that name.
    """
    if not path.exists():
        raise DataError(f"cannot read {path}: no such file or directory")
    if not path.is_dir():
        yield check_file(path)
        return
    for folder, folders, names in os.walk(path):
        folders.sort()
        yield from check_folder(Path(folder), sorted(names))


def check_folder(folder: Path, names: list[str]) -> Iterator[Checked]:
    """The files of one directory, by themselves and with one another."""
    manifest, shards = None, {}
    if MANIFEST in names and TEMPORARY_MARK not in str(folder):  # else on its way, or given up
        try:
            manifest = read_manifest(folder)
            shards = {entry.name: entry for entry in manifest.shards}
        except DataError:
            pass  # said where the manifest itself is looked at
    if re.fullmatch(NUMBERED, folder.name) and folder.parent.name == "checkpoints" and not names:
        yield Checked(folder, "checkpoint", (f"{folder} is a checkpoint without a state",))
    for name in names:
        found = check_file(folder / name)
        if manifest is not None and name in shards:
            found = _as_shard(found, manifest, name)
        elif manifest is None and found.kind == "latents" and MANIFEST not in names:
            reason = f"{found.path} belongs to a set without {MANIFEST}: run `ldmkit encode` again"
            found = found._replace(problems=(*found.problems, reason))
        yield found
    for name in sorted(shards.keys() - set(names)):
        text = f"{folder / name} is missing; run `ldmkit encode` again"
        yield Checked(folder / name, "latents", (text,))


def check_file(path: Path) -> Checked:
    """Look at one file by itself."""
    if TEMPORARY_MARK in str(path):
        return Checked(path, "", (), (f"{path} was left by a process that did not end",))
    try:
        return _checker_of(path)(path)
    except DataError as error:
        return Checked(path, "damaged", (str(error),))
    except OSError as error:
        return Checked(path, "unreadable", (f"cannot read {path}: {error.strerror or error}",))


def _checker_of(path: Path) -> Callable[[Path], Checked]:
    checker = BY_NAME.get(path.name) or BY_SUFFIX.get(path.suffix)
    if path.name.endswith(f".jsonl{UNFINISHED}"):
        checker = _check_list
    if checker is not None:
        return checker
    with path.open("rb") as file:
        start = file.read(8 + len(HEADER_START))[8:]
    same = sum(one == other for one, other in zip(start, HEADER_START, strict=False))
    return _check_container if same > len(HEADER_START) // 2 else _unknown  # a damaged one too


def _unknown(path: Path) -> Checked:
    return Checked(path, "")


def _check_container(path: Path) -> Checked:
    part = path.parent.name.endswith(PARTS)
    described = check_container(path, part=part)
    notes = [] if described.sealed else [_older(path, "its header")]
    if part and described.kind == "samples":
        notes.append(
            f"{path} is a part of samples that are not all drawn: run `ldmkit sample` again"
        )
    problems = (*described.problems, *_misplaced(path, described))
    return Checked(path, described.kind, problems, tuple(notes))


def _misplaced(path: Path, described: Described) -> Iterator[str]:
    """A checkpoint or snapshot under another step's name."""
    name = path.parent.name if described.kind == "checkpoint" else path.stem
    stated = NUMBERED.fullmatch(name)
    if described.kind in ("checkpoint", "averages") and stated is not None:
        step = described.facts.get("step")
        if step != int(stated[1]):
            yield f"{path} is of step {step}, and its name says {int(stated[1])}"


def _as_shard(found: Checked, manifest: Manifest, name: str) -> Checked:
    """A shard, compared with what its manifest says; its own seal is not needed then."""
    entry = next(entry for entry in manifest.shards if entry.name == name)
    problems = list(found.problems)
    if found.path.stat().st_size != entry.bytes or file_digest(found.path) != entry.sha256:
        problems.append(f"{found.path} is damaged: its sha256 is not the one in {MANIFEST}")
    return found._replace(problems=tuple(problems), notes=())


def _check_manifest(path: Path) -> Checked:
    manifest = read_manifest(path.parent)
    problems = []
    if sum(entry.count for entry in manifest.shards) != manifest.count:
        problems.append(f"{path} counts {manifest.count} latents, and its shards have others")
    return Checked(path, "manifest", tuple(problems), _notes(path, read_page(path)[1]))


def _check_page(path: Path) -> Checked:
    _, state = read_page(path)
    return Checked(path, "page", (), _notes(path, state))


def _check_other_page(path: Path) -> Checked:
    """JSON that may be anybody's."""
    try:
        return _unknown(path) if read_page(path)[1] == "older" else _check_page(path)
    except DataError as error:
        return Checked(path, "page", (str(error),)) if "damaged" in str(error) else _unknown(path)


def _check_config(path: Path) -> Checked:
    return Checked(path, "config", (), _notes(path, config_state(path)))


def _check_html(path: Path) -> Checked:
    state = state_of(read_limited(path, MAX_HTML_BYTES), HTML_START, str(path))
    return Checked(path, "report") if state == "whole" else _unknown(path)


def _check_png(path: Path) -> Checked:
    require_whole_png(path)
    return Checked(path, "picture")


def _check_log(path: Path) -> Checked:
    """Lines with checksums; a last one may be cut off, which the next resume repairs."""
    lines, rest = lines_of(read_limited(path, MAX_LOG_BYTES))
    states = [line_state(line) for line in lines]
    damaged = [number for number, state in enumerate(states, start=1) if state == "damaged"]
    problems = [f"{path}, line {number} does not match its checksum" for number in damaged]
    notes = [_older(path, "some of its lines")] if "older" in states else []
    if rest:
        notes.append(f"the last line of {path} is cut off: its run is writing, or was killed")
    return Checked(path, "log", tuple(problems), tuple(notes))


def _check_list(path: Path) -> Checked:
    """A list of pictures, each with the sha256 of its file."""
    known = dict(entries_of(path))
    problems, older = [], False
    for name, entry in known.items():
        picture = path.with_name(name)
        if entry is None:
            continue
        if not picture.is_file():
            problems.append(f"{picture} is missing, and {path.name} names it")
        elif not entry.sha256:
            older = True
        elif file_digest(picture) != entry.sha256:
            problems.append(f"{picture} is damaged: its sha256 is not the one in {path.name}")
    log = _check_log(path)
    notes = (*log.notes, *([_older(path, "its pictures")] if older else []))
    problems += [] if path.name.endswith(UNFINISHED) else list(log.problems)
    return Checked(path, "list", tuple(problems), notes)


def _check_tar(path: Path) -> Checked:
    """A tar of `ldmkit decode`: its bytes are those that would be written again for its members."""
    problems: list[str] = []
    entries: dict[str, Entry] = {}
    digests: dict[str, str] = {}
    ends = 0
    with path.open("rb") as file:
        for member in tar_members(file, str(path)):
            name, start = member.name.decode("ascii", "replace"), member.offset - 512
            file.seek(member.offset)
            data = file.read(member.size)
            whole = tar_member(name, data) if len(name) <= 100 else b""
            file.seek(start)
            if start != ends or file.read(len(whole)) != whole:
                problems.append(f"{path} is damaged at its member {name}, or not ldmkit's")
            ends = start + len(whole)
            digests[name] = hashlib.sha256(data).hexdigest()
            if name.endswith(".json") and line_state(data) != "older":
                stated, entry = entry_of(data)
                entries[stated] = entry or Entry({}, "")
        file.seek(ends)
        if any(file.read()):
            problems.append(f"{path} is damaged after its last member")
    if not entries:
        return _unknown(path) if not problems else Checked(path, "tar", tuple(problems[:1]))
    for name, entry in entries.items():
        if digests.get(name) != entry.sha256:
            problems.append(f"{path}: {name} is missing or damaged")
    return Checked(path, "tar", tuple(problems))


def _notes(path: Path, state: State) -> tuple[str, ...]:
    return (_older(path, "it"),) if state == "older" else ()


def _older(path: Path, what: str) -> str:
    return f"{path} was written by an earlier version: no digest covers {what}"


BY_NAME: dict[str, Callable[[Path], Checked]] = {
    MANIFEST: _check_manifest,
    "config.toml": _check_config,
    "metrics.jsonl": _check_log,
    "setback.json": _check_page,
    "pictures.json": _check_page,
    "report.json": _check_page,
}
BY_SUFFIX: dict[str, Callable[[Path], Checked]] = {
    ".safetensors": _check_container,
    ".json": _check_other_page,
    ".jsonl": _check_list,
    ".png": _check_png,
    ".html": _check_html,
    ".tar": _check_tar,
}
