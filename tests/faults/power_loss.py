"""What a disk may hold after a loss of power, from a trace of the calls before it.

The file system is taken at its word and no more: data is there if its file was flushed after it was written;
an entry of a directory (a new name, a rename, a removal) if the directory was flushed after it changed. All
else may be there or not. Of one directory changes come in their order, a rename is there in both its
directories or in neither, and data that was not flushed may be missing, half there or zeros.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from disk_watch import Call

from ldmkit.durable import TEMPORARY_MARK

ROOT = 0
State = dict[str, bytes | None]
"""Path -> bytes of a file, None for a directory."""


class Step(NamedTuple):
    """A call by what it is about, since names change."""

    kind: str
    node: int
    """The file or directory."""
    links: tuple[tuple[int, str, int | None], ...]
    """Directory, name, and what stands there afterwards: what a flush of the directory keeps."""
    place: int
    data: bytes


class Contents(NamedTuple):
    """Bytes of a file at one moment."""

    flushed: bytes
    written: bytes


class History(NamedTuple):
    """A run, call by call."""

    steps: list[Step]
    contents: list[dict[int, Contents]]
    """Of all files before each step, and at the end."""


def history_of(trace: Sequence[Call]) -> History:
    """The calls of a run in a directory that was empty before."""
    tree: dict[int, dict[str, int]] = defaultdict(dict)

    def find(path: PurePosixPath) -> int:
        node = ROOT
        for part in path.parts:
            node = tree[node][part]
        return node

    steps = []
    for number, call in enumerate(trace, start=1):
        path = PurePosixPath(call.path)
        links: tuple[tuple[int, str, int | None], ...] = ()
        if call.kind in ("mkdir", "create"):
            node = number
            links = ((find(path.parent), path.name, node),)
        else:
            node = find(path)
        if call.kind in ("unlink", "rmdir", "rename"):
            links = ((find(path.parent), path.name, None),)
        if call.kind == "rename":
            target = PurePosixPath(call.target)
            links = (*links, (find(target.parent), target.name, node))
        _apply(tree, links)
        steps.append(Step(call.kind, node, links, call.place, call.data))
    return History(steps, _contents(steps))


def states(history: History, cut: int, seeds: Iterable[int]) -> list[State]:
    """What may be there if the power goes before step `cut`: both extremes, and some in between."""
    steps, contents = history.steps, history.contents[cut]
    flushed = {
        folder: max(n for n, step in enumerate(steps[:cut]) if _flushes(step, folder))
        for folder in {step.node for step in steps[:cut] if step.kind == "fsync"}
    }
    changes = [number for number in range(cut) if steps[number].links]
    kept = {
        number
        for number in changes
        if any(flushed.get(folder, -1) > number for folder, _, _ in steps[number].links)
    }
    folders = {step.node for step in steps if step.kind == "mkdir"}

    def state(applied: Iterable[int], data_of: Callable[[Contents], bytes]) -> State:
        tree: dict[int, dict[str, int]] = defaultdict(dict)
        for number in applied:
            _apply(tree, steps[number].links)
        return {
            path: None if node in folders else data_of(contents.get(node, Contents(b"", b"")))
            for path, node in _walk(tree, ROOT, "")
        }

    found = [state(sorted(kept), _lost), state(changes, _lost), state(changes, _written)]
    for seed in seeds:
        draw = random.Random(f"{cut} {seed}")
        applied = _some(steps, changes, kept, draw)
        found.append(state(applied, lambda data, draw=draw: _any(data, draw)))
    return found


def committed(history: History, cut: int) -> dict[str, bytes]:
    """What must be there: files renamed into a directory that was flushed since, until they are removed."""
    steps, contents = history.steps, history.contents[cut]
    waiting: dict[int, set[int]] = defaultdict(set)
    safe: set[int] = set()
    tree: dict[int, dict[str, int]] = defaultdict(dict)
    for step in steps[:cut]:
        _apply(tree, step.links)
        if step.kind == "rename":
            safe -= {step.node, *(node for _, node in _walk(tree, step.node, ""))}
            waiting[step.links[1][0]].add(step.node)
        elif step.kind == "fsync":
            safe |= waiting.pop(step.node, set())
    roots = [(path, node) for path, node in _walk(tree, ROOT, "") if node in safe]
    below = [(path, node) for top, root in roots for path, node in _walk(tree, root, f"{top}/")]
    return {
        path: contents[node].written
        for path, node in (*roots, *below)
        if node in contents and TEMPORARY_MARK not in path
    }


def write(state: State, root: Path) -> None:
    """Make a state real in an empty directory."""
    for path, data in state.items():
        if data is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(data)


def _apply(tree: dict[int, dict[str, int]], links: Iterable[tuple[int, str, int | None]]) -> None:
    for folder, name, node in links:
        if node is None:
            tree[folder].pop(name, None)
        else:
            tree[folder][name] = node


def _walk(tree: dict[int, dict[str, int]], folder: int, before: str) -> list[tuple[str, int]]:
    found = []
    for name, node in sorted(tree[folder].items()):
        found += [(before + name, node), *_walk(tree, node, f"{before}{name}/")]
    return found


def _flushes(step: Step, node: int) -> bool:
    return step.kind == "fsync" and step.node == node


def _contents(steps: Sequence[Step]) -> list[dict[int, Contents]]:
    moments: list[dict[int, Contents]] = [{}]
    for step in steps:
        now = dict(moments[-1])
        flushed, written = now.get(step.node, Contents(b"", b""))
        if step.kind in ("create", "truncate"):
            now[step.node] = Contents(flushed, b"")
        elif step.kind == "write":
            stop = step.place + len(step.data)
            now[step.node] = Contents(flushed, written[: step.place] + step.data + written[stop:])
        elif step.kind == "fsync" and step.node in now:
            now[step.node] = Contents(written, written)
        moments.append(now)
    return moments


def _some(steps: Sequence[Step], changes: list[int], kept: set[int], draw: random.Random) -> list:
    """Changes that are flushed, and of the others as many first ones of each directory as chance has it."""
    applied, stopped = [], set()
    for number in changes:
        folders = {folder for folder, _, _ in steps[number].links}
        if number not in kept and (folders & stopped or draw.random() < 0.3):
            stopped |= folders
        else:
            applied.append(number)
    return applied


def _lost(data: Contents) -> bytes:
    return data.flushed


def _written(data: Contents) -> bytes:
    return data.written


def _any(data: Contents, draw: random.Random) -> bytes:
    if data.flushed == data.written:
        return data.flushed
    before = len(data.flushed)
    more = len(data.written) - before
    half = data.written[: before + more // 2] if more > 0 else data.written[: before // 2]
    zeros = data.written[:before] + bytes(max(more, 0))
    return draw.choice([data.flushed, data.written, half, zeros])
