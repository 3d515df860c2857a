"""Where pictures come from: folders and webdataset tars, both read at random.

A source is scanned once into a list of items; each item knows where its bytes lie, so that a tar is
as random access as a folder and any order of reading can be resumed.

NAME.mask.png beside a picture NAME.* says which of its pixels count; it is no picture of its own. Nor
is NAME.npy beside a picture of another kind: such files are its features.
"""

import json
import os
import tarfile
from collections.abc import Iterable
from io import BufferedIOBase
from pathlib import Path
from typing import NamedTuple

from braceexpand import braceexpand
from webdataset.tariterators import base_plus_ext

from ldmkit.errors import DataError
from ldmkit.terminal import say

IMAGE_SUFFIXES = frozenset(
    ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "npy")
)
SIDECAR_SUFFIXES = frozenset(("txt", "json", "jsonl", "csv", "parquet", "cls", "md"))
MASK = "mask.png"
NO_LABEL = -1
MAX_BYTES = 4 << 30


class Span(NamedTuple):
    """Where bytes lie."""

    file: Path
    offset: int
    size: int
    """How many bytes; -1 means the rest of the file."""


class Item(NamedTuple):
    """One picture: its name, where its bytes lie, and what is known about it."""

    key: str
    file: Path
    offset: int
    """Where its bytes start in the file."""
    size: int
    """How many bytes; -1 means the rest of the file."""
    label: int
    """Class index, or -1."""
    caption: str
    mask: Span | None = None
    """The picture that says which pixels count, where there is one."""

    @property
    def name(self) -> str:
        """What to call it in errors: the file, or the key in its tar."""
        return str(self.file if self.size < 0 else self.file / self.key)

    def read(self) -> bytes:
        """The encoded picture.

        Raises:
            DataError: the file cannot be read, is too large or has become shorter.
        """
        return _read(Span(self.file, self.offset, self.size), self.key)

    def read_mask(self) -> bytes | None:
        """The encoded mask; None without one. Raises as `read`."""
        return _read(self.mask, f"{self.key}, its mask") if self.mask else None


class Source(NamedTuple):
    """A scanned collection of pictures, in a fixed order."""

    items: list[Item]
    class_names: tuple[str, ...]
    ignored: list[str]
    """Files that are neither pictures nor known to go along with pictures."""


def open_source(path: Path) -> Source:
    """Scan a folder of pictures, a folder of tars, one tar, or a brace pattern of tars.

    Raises:
        DataError: nothing is there, it holds no pictures, or a tar is damaged.
    """
    source = _scan(path)
    if not source.items:
        raise DataError(
            f"no pictures found in {path} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})"
        )
    if source.ignored:
        more = f" and {len(source.ignored) - 3} more" if len(source.ignored) > 3 else ""
        say(f"passed over, not pictures: {', '.join(source.ignored[:3])}{more}")
    return source


def _scan(path: Path) -> Source:
    if "{" in str(path):
        return scan_tars([Path(name) for name in braceexpand(str(path))])
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        return scan_tars(tars) if tars else scan_folder(path)
    if not path.exists():
        raise DataError(f"there is no {path}; give a folder of pictures or webdataset tars")
    return scan_tars([path])


def scan_folder(root: Path) -> Source:
    """Pictures below `root`; subfolders that hold all of them are the classes.

    A `.txt` beside a picture is its caption, a `.mask.png` its mask. Hidden files are passed over.
    """
    files = sorted(
        file
        for file in root.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)
    )
    masks = {file for file in files if file.name.lower().endswith(f".{MASK}")}
    pictures = _without_features(
        [file for file in files if _suffix(file) in IMAGE_SUFFIXES and file not in masks]
    )
    of_pictures = {file.with_suffix(f".{MASK}") for file in pictures}
    ignored = [
        str(file.relative_to(root))
        for file in files
        if _suffix(file) not in IMAGE_SUFFIXES | SIDECAR_SUFFIXES
        or (file in masks and file not in of_pictures)
    ]
    in_classes = all(len(file.relative_to(root).parts) > 1 for file in pictures)
    names = sorted({file.relative_to(root).parts[0] for file in pictures}) if in_classes else []
    numbers = {name: number for number, name in enumerate(names)}
    items = []
    for file in pictures:
        relative = file.relative_to(root)
        label = numbers.get(relative.parts[0], NO_LABEL) if in_classes else NO_LABEL
        caption_file = file.with_suffix(".txt")
        caption = _text(caption_file.read_bytes(), caption_file) if caption_file.is_file() else ""
        mask_file = file.with_suffix(f".{MASK}")
        mask = Span(mask_file, 0, -1) if mask_file in masks else None
        items.append(Item(relative.as_posix(), file, 0, -1, label, caption, mask))
    return Source(items, tuple(names), ignored)


def scan_tars(tars: Iterable[Path]) -> Source:
    """Samples of webdataset tars, in order: KEY.png with KEY.json, KEY.cls, KEY.txt, KEY.mask.png.

    Class names come from a `classes.json` (a list) beside the tars, else from the largest label.
    """
    items: list[Item] = []
    folder = Path()
    for tar in tars:
        items += _tar_items(tar)
        folder = tar.parent
    seen: set[str] = set()
    for item in items:
        if item.key in seen:
            raise DataError(f"{item.file}: the key {item.key} comes twice; keys must be unique")
        seen.add(item.key)
    largest = max((item.label for item in items), default=NO_LABEL)
    names = _class_names(folder / "classes.json", largest)
    return Source(items, names, [])


def _tar_items(tar: Path) -> list[Item]:
    try:
        with tar.open("rb") as file:
            samples = _tar_members(file, tar)
            items = [_tar_item(tar, key, members, file) for key, members in samples.items()]
    except OSError as error:
        raise DataError(f"cannot read {tar}: {error.strerror}") from error
    except tarfile.TarError as error:
        raise DataError(f"{tar} is not a whole tar file ({error}); copy it again") from error
    return [item for item in items if item is not None]


def _tar_members(file: BufferedIOBase, tar: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Sample key -> extension -> (offset, size)."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            key, extension = base_plus_ext(member.name)
            if member.isfile() and key and extension:
                samples.setdefault(key, {})[extension.lower()] = (member.offset_data, member.size)
        # A tar ends with 1024 zero bytes; without them a cut one can pass for a shorter one.
        file.seek(archive.offset)
        if file.read(1024) != bytes(1024):
            raise DataError(f"{tar} lacks its end mark, so it is cut off; copy it again")
    return samples


def _tar_item(
    tar: Path, key: str, members: dict[str, tuple[int, int]], file: BufferedIOBase
) -> Item | None:
    suffixes = [suffix for suffix in members if suffix in IMAGE_SUFFIXES]
    if not suffixes:
        return None
    picture = members[next((suffix for suffix in suffixes if suffix != "npy"), "npy")]
    mask = Span(tar, *members[MASK]) if MASK in members else None
    where = tar / key

    def text(suffix: str) -> str:
        offset, size = members[suffix]
        file.seek(offset)
        return _text(file.read(size), where)

    label, caption = NO_LABEL, ""
    if "json" in members:
        try:
            facts = json.loads(text("json"))
            label, caption = int(facts.get("label", NO_LABEL)), str(facts.get("caption", ""))
        except (ValueError, AttributeError) as error:
            raise DataError(
                f"{where}.json is not a JSON object with a whole-number label"
            ) from error
    if "cls" in members:
        if not text("cls").isdigit():
            raise DataError(f"{where}.cls holds {text('cls')[:20]!r}; a class index is needed")
        label = int(text("cls"))
    if "txt" in members:
        caption = text("txt")
    return Item(key, tar, *picture, label, caption, mask)


def _class_names(file: Path, largest: int) -> tuple[str, ...]:
    if not file.is_file():
        return tuple(str(number) for number in range(largest + 1))
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is not JSON ({error})") from error
    if not isinstance(names, list) or len(names) <= largest:
        raise DataError(f"{file} must be a list of at least {largest + 1} class names")
    return tuple(str(name) for name in names)


def _text(data: bytes, where: Path) -> str:
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"the text of {where} is not UTF-8") from error


def _without_features(files: list[Path]) -> list[Path]:
    """Without the `.npy` files that stand beside a picture of another kind."""
    others = {file.with_suffix("") for file in files if _suffix(file) != "npy"}
    return [file for file in files if _suffix(file) != "npy" or file.with_suffix("") not in others]


def _read(span: Span, key: str) -> bytes:
    try:
        with span.file.open("rb") as file:
            size = span.size if span.size >= 0 else os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise DataError(
                    f"{key} in {span.file} has {size:,} bytes; at most {MAX_BYTES:,} are read"
                )
            file.seek(span.offset)
            data = file.read(span.size)
    except OSError as error:
        raise DataError(f"cannot read {span.file}: {error.strerror}") from error
    if span.size >= 0 and len(data) != span.size:
        raise DataError(f"{span.file} is cut off at {key}; copy it again")
    return data


def _suffix(file: Path) -> str:
    return file.suffix.lower().removeprefix(".")
