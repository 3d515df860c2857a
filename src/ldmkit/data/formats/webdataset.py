"""Webdataset tars: one, a folder of them, or a brace pattern such as `photos-{000..099}.tar`, here or remote.

A sample is KEY.jpg (or another picture) with KEY.json, KEY.cls, KEY.txt, KEY.mask.png and
KEY.labelmap.png, as img2dataset writes them. The members are indexed and read at random; nothing is
extracted, unpickled or run. What else lies beside the tars (`*_stats.json`, `*.parquet`) is not read.
"""

import json
import math
from collections.abc import Iterator, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

from webdataset.tariterators import base_plus_ext

from ldmkit.data.downloads import TransferError
from ldmkit.data.formats.scalars import missing_columns, scalars_of
from ldmkit.data.formats.sidecars import IMAGE_SUFFIXES, MASK, MAX_TEXT_BYTES, suffix_of, text_of
from ldmkit.data.items import NO_LABEL, Item, Problem, Source, Span
from ldmkit.data.locations import CONTROL, expand, is_remote, shown
from ldmkit.data.remote import Cache, RemoteFile, RemoteSpan, cache_of, stage, stage_all
from ldmkit.data.tar_members import tar_members
from ldmkit.data_configs import SourceConfig
from ldmkit.errors import DataError
from ldmkit.seals import read_limited

LABELMAP = "labelmap.png"
CLASSES = "classes.json"
MAX_CLASSES = 1_000_000
MAX_SEEN = 1000
MAX_NAMES_BYTES = 64 << 20
"""Keys of JSON that are remembered, to say what there is where a scalar is not."""
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAX_NAME_BYTES = 255
"""Of each part of a name; no file system takes longer ones."""


class Scalars(NamedTuple):
    """Which numbers of the JSON are asked for."""

    names: tuple[str, ...]
    seen: dict[str, None]
    """Keys that occurred, added to."""


class Tar(NamedTuple):
    """A tar that can be read now."""

    path: Path
    remote: RemoteFile | None = None

    @property
    def name(self) -> str:
        """What to call it in errors."""
        return self.remote.name if self.remote else str(self.path)

    def span(self, offset: int, size: int, member: str) -> Span | RemoteSpan:
        """A member, so that it can be read at any later time and in any process."""
        if self.remote:
            return RemoteSpan(self.remote, offset, size, member)
        return Span(str(self.path), offset, size, member)


def scan_tars(config: SourceConfig) -> Source:
    """Samples of all tars, in order.

    Class names come from a `classes.json` (a list) beside the tars, else from the largest label.

    Raises:
        DataError: `classes.json` is no list of names, or too short.
        StorageError: a remote tar cannot be staged.
        UsageError: the location is a URL of another kind, or its braces stand for nothing.
    """
    items: list[Item] = []
    problems: list[Problem] = []
    cache = cache_of(config)
    names = _tars(config.data)
    scalars = Scalars(config.scalars or (), {})
    for tar in _opened(names, cache):
        try:
            items += _scan_tar(tar, scalars, problems)
        except DataError as error:
            problems.append(Problem("damaged tar", tar.name, str(error), "fatal"))
    where = f"the .json of {shown(config.data)}"
    problems += missing_columns(scalars.names, scalars.seen, where)
    items = _unique(items, problems)
    largest = max((item.label for item in items), default=NO_LABEL)
    classes = _class_names(names[0], cache, largest) if names else ()
    return Source(items, classes, problems=tuple(problems))


def _tars(location: str) -> list[str]:
    """Paths and URLs of the tars."""
    if not is_remote(location) and Path(location).is_dir():
        endings = (".tar", *COMPRESSED_SUFFIXES)
        return sorted(str(path) for path in Path(location).iterdir() if path.name.endswith(endings))
    return expand(location)


def _opened(names: Sequence[str], cache: Cache) -> Iterator[Tar]:
    remote = stage_all([name for name in names if is_remote(name)], cache)
    for name in names:
        if is_remote(name):
            staged = next(remote)
            yield Tar(staged.path(), staged)
        else:
            yield Tar(Path(name))
    next(remote, None)  # ends its progress, and says what there is to say


def _unique(items: list[Item], problems: list[Problem]) -> list[Item]:
    first: dict[str, Item] = {}
    for item in items:
        if first.setdefault(item.key, item) is not item:
            text = f"{item.name}: the key {item.key} comes twice; keys must be unique"
            problems.append(Problem("duplicate key", item.name, text))
    return list(first.values())


Places = dict[str, tuple[int, int]]
"""Extension -> (offset, size)."""


def _scan_tar(tar: Tar, scalars: Scalars, problems: list[Problem]) -> list[Item]:
    try:
        with tar.path.open("rb") as file:
            return list(_items(tar, file, scalars, problems))
    except OSError as error:
        raise DataError(f"cannot read {tar.name}: {error.strerror}") from error


def _items(
    tar: Tar, file: BufferedIOBase, scalars: Scalars, problems: list[Problem]
) -> Iterator[Item]:
    for key, places in _samples(file, tar, problems).items():
        try:
            item = _item(tar, key, places, file, problems)
            if item is not None:
                yield _told(item, tar, places, file, scalars)
        except DataError as error:
            problems.append(Problem("bad sidecar", f"{tar.name}/{key}", str(error)))


def _samples(file: BufferedIOBase, tar: Tar, problems: list[Problem]) -> dict[str, Places]:
    """Sample key -> its members."""
    samples: dict[str, Places] = {}
    for member in tar_members(file, tar.name):
        if member.kind == "folder":
            continue
        shows = member.name.decode("utf-8", "backslashreplace")[:300]
        where = f"{tar.name}/{CONTROL.sub('?', shows)}"
        name, fault = _safe_name(member.name)
        if fault:
            text = f"{where} has a name that {fault}; it is left out"
            problems.append(Problem("unsafe name", where, text))
            continue
        if member.kind == "other":
            text = f"{where} is a link, a device or a sparse file; write the tar with real files (tar -h)"
            problems.append(Problem("not a file in tar", where, text))
            continue
        key, extension = base_plus_ext(name)
        if not key or key.endswith("/") or not extension:
            text = f"{where} is passed over: a member is called KEY.EXTENSION"
            problems.append(Problem("not a picture", where, text, "warning"))
            continue
        places = samples.setdefault(key, {})
        if places.setdefault(extension.lower(), (member.offset, member.size))[0] != member.offset:
            text = f"{where} comes twice; keys must be unique"
            problems.append(Problem("duplicate key", where, text))
    return samples


def _safe_name(raw: bytes) -> tuple[str, str]:
    """The name without `./` before it, and what is wrong with it ("" if nothing is)."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        return "", "is not UTF-8"
    if CONTROL.search(name):
        return "", "holds control characters"
    if name.startswith("/") or "\\" in name:
        return "", "is absolute" if name.startswith("/") else "holds a backslash"
    while name.startswith("./"):
        name = name[2:]
    parts = name.split("/")
    if ".." in parts or "." in parts or "" in parts:
        return "", "has `..`, `.` or nothing between slashes"
    if len(raw) > MAX_NAME_BYTES and max(len(part.encode()) for part in parts) > MAX_NAME_BYTES:
        return "", f"has a part of more than {MAX_NAME_BYTES} bytes"
    return name, ""


def _item(
    tar: Tar, key: str, places: Places, file: BufferedIOBase, problems: list[Problem]
) -> Item | None:
    where = f"{tar.name}/{key}"
    suffixes = [suffix for suffix in places if suffix in IMAGE_SUFFIXES]
    for suffix in places:
        if suffix_of(suffix) in IMAGE_SUFFIXES and suffix not in (*suffixes, MASK, LABELMAP):
            text = f"{where}.{suffix} is passed over: a key ends at its first dot"
            problems.append(Problem("not a picture", f"{where}.{suffix}", text, "warning"))
    if not suffixes:
        text = f"{where} has no picture, only {', '.join(places)[:100]}; it is passed over"
        problems.append(Problem("no picture", where, text, "warning"))
        return None
    pictures = [suffix for suffix in suffixes if suffix != "npy"] or suffixes
    if len(pictures) > 1:
        text = f"{where} has several pictures ({', '.join(pictures)}); the first is taken"
        problems.append(Problem("several pictures for one key", where, text, "warning"))

    return Item(
        key,
        _blob(pictures[0], tar, key, places),
        mask=_blob(MASK, tar, key, places) if MASK in places else None,
        labelmap=_blob(LABELMAP, tar, key, places) if LABELMAP in places else None,
    )


def _told(item: Item, tar: Tar, places: Places, file: BufferedIOBase, scalars: Scalars) -> Item:
    """An item with what the texts beside its picture say."""
    where = f"{tar.name}/{item.key}"
    label, caption, facts = NO_LABEL, "", dict[str, Any]()
    if "json" in places:
        facts = _object(_text("json", where, places, file), f"{where}.json")
        label, caption = _facts(facts, f"{where}.json")
    if "cls" in places:
        label = _label(_text("cls", where, places, file), f"{where}.cls")
    if "txt" in places:
        caption = _text("txt", where, places, file) or caption
    for name in facts if scalars.names else ():
        if name in scalars.names or len(scalars.seen) < MAX_SEEN:
            scalars.seen[name] = None
    numbers = scalars_of(facts, scalars.names, f"{where}.json")
    return item._replace(label=label, caption=caption, scalars=numbers)


def _blob(suffix: str, tar: Tar, key: str, places: Places) -> Span | RemoteSpan:
    return tar.span(*places[suffix], f"{key}.{suffix}")


def _text(suffix: str, where: str, places: Places, file: BufferedIOBase) -> str:
    offset, size = places[suffix]
    file.seek(offset)
    return text_of(file.read(min(size, MAX_TEXT_BYTES + 1)), f"{where}.{suffix}")


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON object ({error})") from error
    if not isinstance(facts, dict):
        raise DataError(f"{where} is no JSON object, but holds {text[:20]!r}")
    return facts


def _facts(facts: dict[str, Any], where: str) -> tuple[int, str]:
    """Label and caption of a sample's JSON; each may be absent or null."""
    label, caption = facts.get("label"), facts.get("caption")
    absent = label is None or (isinstance(label, float) and math.isnan(label))
    lines = [] if caption is None else caption if isinstance(caption, list) else [caption]
    if not all(isinstance(line, str) for line in lines):
        raise DataError(f"{where} has a caption that is no text; write a text or a list of texts")
    caption = (
        "\n".join(" ".join(line.split()) for line in lines) if len(lines) > 1 else "".join(lines)
    )
    return (NO_LABEL if absent else _label(label, where)), caption.strip()


def _label(value: object, where: str) -> int:
    """A class index, which text and JSON write in several ways."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    number = int(value) if whole and isinstance(value, int | float) else -1
    if not 0 <= number < MAX_CLASSES:
        raise DataError(
            f"{where} holds {str(value)[:20]!r} where a class index is needed: a whole-number label "
            f"from 0 to {MAX_CLASSES - 1:,}"
        )
    return number


def _class_names(first_tar: str, cache: Cache, largest: int) -> tuple[str, ...]:
    counted = tuple(str(number) for number in range(largest + 1))
    if not is_remote(first_tar):
        file, where = Path(first_tar).parent / CLASSES, ""
    elif largest == NO_LABEL:
        return ()
    else:
        url = f"{first_tar.partition('?')[0].rpartition('/')[0]}/{CLASSES}"
        try:
            file, where = stage(url, cache).path(), shown(url)
        except TransferError as error:
            if error.status not in (403, 404):  # stores answer 403 where they do not list
                raise
            return counted
    return _names_in(file, where or str(file), largest) if file.is_file() else counted


def _names_in(file: Path, where: str, largest: int) -> tuple[str, ...]:
    try:
        names = json.loads(read_limited(file, MAX_NAMES_BYTES))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error})") from error
    if not isinstance(names, list) or len(names) <= largest:
        raise DataError(f"{where} must be a list of at least {largest + 1} class names")
    return tuple(str(name) for name in names)
