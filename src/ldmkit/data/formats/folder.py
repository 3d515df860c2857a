"""A folder of pictures, at any depth; subfolders that hold all of them are the classes.

NAME.txt beside a picture NAME.* is its caption. NAME.mask.png says which of its pixels count; it is
no picture of its own. Nor is NAME.npy beside a picture of another kind: such files are its features.
Hidden files and folders are passed over.
"""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from ldmkit.data.formats.sidecars import (
    EMPTY_CAPTION,
    IMAGE_SUFFIXES,
    MASK,
    SIDECAR_SUFFIXES,
    suffix_of,
    text_of,
)
from ldmkit.data.items import NO_LABEL, Item, Problem, Source, Span
from ldmkit.data_configs import SourceConfig
from ldmkit.errors import DataError

BROKEN = {
    errno.ENOENT: ("dangling link", "is a link to a file that is gone"),
    errno.ELOOP: ("link loop", "is a link that leads back to itself"),
}
"""Why a file that is listed cannot be found."""


def scan_folder(config: SourceConfig) -> Source:
    """List the pictures below a folder, in the order of their relative paths."""
    root = config.data
    problems: list[Problem] = []
    sizes = dict(sorted(files_below(root, problems)))
    masks = {name for name in sizes if name.lower().endswith(f".{MASK}")}
    pictures = _without_features(
        [name for name in sizes if suffix_of(name) in IMAGE_SUFFIXES and name not in masks]
    )
    of_pictures = {f"{_stem(name)}.{MASK}" for name in pictures}
    for name in sizes:
        known = suffix_of(name) in IMAGE_SUFFIXES | SIDECAR_SUFFIXES
        if not known or (name in masks and name not in of_pictures):
            problems.append(
                Problem("not a picture", name, f"{root}/{name} is passed over", "warning")
            )
    classes = _classes(root, pictures, problems)
    items = []
    for name in pictures:
        try:
            items.append(_item(root, name, sizes, classes))
        except DataError as error:
            problems.append(Problem("bad caption", name, str(error)))
            continue
        if not items[-1].caption and f"{_stem(name)}.txt" in sizes:
            text = f"{root}/{_stem(name)}.txt is an empty caption"
            problems.append(Problem(EMPTY_CAPTION, name, text, "warning"))
    return Source(items, tuple(classes), problems=tuple(problems))


def files_below(root: str, problems: list[Problem]) -> Iterator[tuple[str, int]]:
    """Relative name and size of every file that can be read; hidden ones are passed over.

    Args:
        root: the folder.
        problems: what cannot be read is added here.
    """

    def unreadable(error: OSError) -> None:
        text = f"cannot read the folder {error.filename}: {error.strerror}"
        problems.append(Problem("no permission", str(error.filename), text))

    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        for name in [name for name in subfolders if suffix_of(name) in IMAGE_SUFFIXES]:
            text = f"{folder}/{name} is a folder that is named like a picture; rename it"
            problems.append(Problem("folder named like a picture", f"{folder}/{name}", text))
        for name in [name for name in subfolders if Path(folder, name).is_symlink()]:
            text = f"{folder}/{name} is a link to a folder and is passed over; give it as DATA"
            problems.append(Problem("linked folder", f"{folder}/{name}", text, "warning"))
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            path = f"{folder}/{name}"
            if name.startswith("."):
                continue
            try:
                size = Path(path).stat().st_size
            except OSError as error:
                kind, reason = BROKEN.get(error.errno or 0, ("no permission", error.strerror))
                problems.append(Problem(kind, path, f"{path}: {reason}"))
                continue
            yield Path(path).relative_to(root).as_posix(), size


def _classes(root: str, pictures: list[str], problems: list[Problem]) -> dict[str, int]:
    """Class name -> index; none where a picture lies outside every subfolder."""
    if not all("/" in name for name in pictures):
        return {}
    names = sorted({name.partition("/")[0] for name in pictures})
    for folder in sorted(path for path in Path(root).iterdir() if path.is_dir()):
        if folder.name not in names and not folder.name.startswith("."):
            text = f"the class folder {folder} holds no picture, so that it is no class"
            problems.append(Problem("empty class folder", folder.name, text, "warning"))
    return {name: number for number, name in enumerate(names)}


def _item(root: str, name: str, sizes: dict[str, int], classes: dict[str, int]) -> Item:
    caption, mask = f"{_stem(name)}.txt", f"{_stem(name)}.{MASK}"
    text = ""
    if caption in sizes:
        text = text_of(_span(root, caption, sizes).read(), f"{root}/{caption}")
    return Item(
        key=name,
        picture=_span(root, name, sizes),
        label=classes.get(name.partition("/")[0], NO_LABEL),
        caption=text,
        mask=_span(root, mask, sizes) if mask in sizes else None,
    )


def _span(root: str, name: str, sizes: dict[str, int]) -> Span:
    return Span(f"{root}/{name}", 0, sizes[name])


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _without_features(names: list[str]) -> list[str]:
    """Without the `.npy` files that stand beside a picture of another kind."""
    others = {_stem(name) for name in names if suffix_of(name) != "npy"}
    return [name for name in names if suffix_of(name) != "npy" or _stem(name) not in others]
