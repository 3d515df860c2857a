"""COCO instances and captions: a JSON file of images, annotations and categories (Lin et al. 2014).

Boxes, captions or both become conditions of the pictures it lists. Crowd boxes mean no single object
and are left out; of the others, what lies in the picture counts.
"""

import json
import os
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeGuard

from ldmkit.data.formats.boxes import box_in_shares, pixel_size
from ldmkit.data.formats.columns import caption_of, require_unicode
from ldmkit.data.items import MAX_BYTES, Box, Item, Problem, Source, Span
from ldmkit.data_configs import SourceConfig
from ldmkit.errors import DataError
from ldmkit.seals import read_limited

TRIED = 8
"""How many of the first pictures are looked for in each folder."""


class Document(NamedTuple):
    """One JSON file, as far as its outermost lists."""

    path: Path
    images: list[Any]
    annotations: list[Any]
    categories: list[Any]


class Image(NamedTuple):
    """One entry of `images`."""

    file_name: str
    width: float
    """Pixels; 0 = unknown."""
    height: float


class Annotations(NamedTuple):
    """What is known of the pictures, by image id."""

    boxes: dict[Any, list[tuple[object, int, str]]]
    """(box in pixels, index of its category, what to call it)."""
    captions: dict[Any, list[str]]


def scan_coco(config: SourceConfig) -> Source:
    """List the pictures of a COCO file in its order, with their boxes and captions.

    Raises:
        DataError: it is no COCO file, or its pictures are not found.
    """
    document = read_coco(Path(config.data))
    problems: list[Problem] = []
    images = _images(document, problems)
    folder = config.images or _folder(document.path, images)
    categories, box_names = _categories(document, problems)
    found = Annotations(defaultdict(list), defaultdict(list))
    _annotate(document, set(images), categories, found, problems)
    if config.captions is not None:
        _annotate_captions(config.captions, set(images), found, problems)
    items: dict[str, Item] = {}
    for number, image in images.items():
        where = f"{document.path}, image {number}"
        try:
            if image.file_name in items:
                raise DataError(f"{where}: the file name {image.file_name} comes twice")
            items[image.file_name] = _item(folder, number, image, found, problems)
        except DataError as error:
            problems.append(Problem(_kind(image, items), where, str(error)))
        except OSError as error:
            text = f"{where}: cannot read {folder / image.file_name} ({error.strerror})"
            problems.append(Problem("image without a file", where, text))
    return Source(list(items.values()), (), box_names, tuple(problems))


def read_coco(path: Path) -> Document:
    """Read a COCO file as far as its outermost lists.

    Raises:
        DataError: it cannot be read, is no JSON, or lacks what makes a COCO file.
    """
    try:
        content = json.loads(read_limited(path, MAX_BYTES))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is no COCO file: it is a JSON {type(content).__name__}, no object")
    for name in ("images", "annotations"):
        if not isinstance(content.get(name), list):
            keys = ", ".join(list(content)[:10]) or "nothing"
            raise DataError(f"{path} is no COCO file: it lacks the list {name!r} (it has {keys})")
    categories = content.get("categories", [])
    if not isinstance(categories, list):
        raise DataError(f"{path} is no COCO file: 'categories' is no list")
    return Document(path, content["images"], content["annotations"], categories)


def _images(document: Document, problems: list[Problem]) -> dict[Any, Image]:
    """Image id -> image."""
    found: dict[Any, Image] = {}
    for place, entry in enumerate(document.images, start=1):
        where = f"{document.path}, entry {place} of images"
        try:
            number, image = _image(entry, where)
            if number in found:
                raise DataError(f"{where} has the id {number} of another image")
            found[number] = image
        except DataError as error:
            problems.append(Problem("bad image entry", where, str(error)))
    return found


def _image(entry: object, where: str) -> tuple[int | str, Image]:
    if not isinstance(entry, dict):
        raise DataError(f"{where} is no object")
    number, name = entry.get("id"), entry.get("file_name")
    if not _is_id(number) or not isinstance(name, str) or not name or "\0" in name:
        raise DataError(
            f'{where} lacks an id or a file_name; a valid one is {{"id": 1, "file_name": "a.jpg", '
            '"width": 640, "height": 480}'
        )
    require_unicode(name, where)
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{where}: {name[:200]} leads out of the folder of pictures; remove the ..")
    width, height = _side(entry.get("width")), _side(entry.get("height"))
    known = width > 0 and height > 0
    return number, Image(path.as_posix(), width if known else 0.0, height if known else 0.0)


def _side(value: object) -> float:
    return float(value) if isinstance(value, int | float) and 0 < value < 2**31 else 0.0


def _is_id(value: object) -> TypeGuard[int | str]:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _folder(path: Path, images: dict[Any, Image]) -> Path:
    """Where the pictures lie, seen from the JSON file as the COCO data set has it."""
    parent, split = path.parent.absolute().parent, path.stem.rpartition("_")[2]
    folders = [path.parent, parent / split, parent / "images", parent / "images" / split]
    names = [image.file_name for image in list(images.values())[:TRIED]]
    for folder in folders:
        if any(os.access(folder / name, os.F_OK) for name in names):
            return folder
    if not names:
        return path.parent
    raise DataError(
        f"the pictures of {path} ({names[0]} ...) are not in "
        f"{', '.join(map(str, folders))}; give their folder with --images DIR"
    )


def _categories(
    document: Document, problems: list[Problem]
) -> tuple[dict[Any, int], tuple[str, ...]]:
    """Category id -> index, and the names, ordered by id."""
    names: dict[Any, str] = {}
    for place, entry in enumerate(document.categories, start=1):
        where = f"{document.path}, entry {place} of categories"
        number = entry.get("id") if isinstance(entry, dict) else None
        if not _is_id(number) or number in names:
            text = f'{where} has no id of its own; a valid one is {{"id": 1, "name": "person"}}'
            problems.append(Problem("bad category", where, text))
            continue
        name = str(entry.get("name", number))
        try:
            require_unicode(name, where)
        except DataError as error:
            problems.append(Problem("bad category", where, str(error)))
            continue
        names[number] = name
    order = sorted(names, key=lambda number: (isinstance(number, str), number))
    return {number: place for place, number in enumerate(order)}, tuple(
        names[number] for number in order
    )


def _annotate(
    document: Document,
    images: set[Any],
    categories: dict[Any, int],
    found: Annotations,
    problems: list[Problem],
) -> None:
    """Sort the annotations by image."""
    for place, entry in enumerate(document.annotations, start=1):
        number = entry.get("id", f"number {place}") if isinstance(entry, dict) else place
        where = f"{document.path}, annotation {number}"
        problem = _unusable(entry, images, categories, where)
        if problem is not None:
            problems.append(problem)
            continue
        if "bbox" in entry:
            box = (entry["bbox"], categories[entry["category_id"]], where)
            found.boxes[entry["image_id"]].append(box)
        if "caption" in entry:
            try:
                text = " ".join(caption_of(entry["caption"], where).split())
                found.captions[entry["image_id"]] += [text] if text else []
            except DataError as error:
                problems.append(Problem("bad caption", where, str(error)))


def _unusable(
    entry: object, images: set[Any], categories: dict[Any, int], where: str
) -> Problem | None:
    """Why an annotation cannot be used; None if it can."""
    if not isinstance(entry, dict):
        return Problem("bad annotation", where, f"{where} is no object")
    image = entry.get("image_id")
    if not _is_id(image) or image not in images:
        text = f"{where} is of image {str(image)[:40]}, which the file does not list"
        return Problem("unknown image", where, text)
    if entry.get("iscrowd"):
        text = f"{where} is a crowd (iscrowd), no single object, and is left out"
        return Problem("crowd box", where, text, "warning")
    category = entry.get("category_id")
    if "bbox" in entry and (not _is_id(category) or category not in categories):
        text = f"{where} is of category {str(category)[:40]}, which the file does not list"
        return Problem("unknown category", where, text)
    if "bbox" not in entry and "caption" not in entry:
        text = f"{where} has neither a bbox nor a caption and is left out"
        return Problem("empty annotation", where, text, "warning")
    return None


def _annotate_captions(
    path: Path, images: set[Any], found: Annotations, problems: list[Problem]
) -> None:
    """Captions of a second file, which may list more images than the first."""
    document = read_coco(path)
    ids = [entry.get("id") for entry in document.images if isinstance(entry, dict)]
    theirs = {number for number in ids if _is_id(number)} - images
    captions, others = [], 0
    for entry in document.annotations:
        if isinstance(entry, dict) and _is_id(entry.get("image_id")):
            if entry["image_id"] in theirs:
                others += 1
                continue
            entry = {name: value for name, value in entry.items() if name != "bbox"}
        captions.append(entry)
    if others:
        text = (
            f"{path} has {others} captions of pictures that DATA does not list; they are left out"
        )
        problems.append(Problem("caption of another picture", str(path), text, "warning"))
    _annotate(document._replace(annotations=captions), images, {}, found, problems)


def _item(
    folder: Path, number: object, image: Image, found: Annotations, problems: list[Problem]
) -> Item:
    path = folder / image.file_name
    picture = Span(str(path), 0, path.stat().st_size)
    entries = found.boxes.get(number, [])
    boxes: list[Box | None] = []
    if entries:
        size = (image.width, image.height) if image.width else pixel_size(picture)
        boxes = [
            box_in_shares(bbox, index, size, where, problems) for bbox, index, where in entries
        ]
    return Item(
        key=image.file_name,
        picture=picture,
        caption="\n".join(found.captions.get(number, [])),
        boxes=tuple(box for box in boxes if box is not None),
    )


def _kind(image: Image, items: dict[str, Item]) -> str:
    return "duplicate key" if image.file_name in items else "unreadable picture"
