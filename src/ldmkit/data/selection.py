"""What is done with the pictures of a source whatever its format: some are picked, some are completed."""

from collections.abc import Iterable
from pathlib import Path

from ldmkit.data.colour_tables import read_colour_table
from ldmkit.data.formats.folder import files_below
from ldmkit.data.formats.sidecars import EMPTY_CAPTION, IMAGE_SUFFIXES, suffix_of
from ldmkit.data.items import Item, Problem, Source, Span
from ldmkit.data.labelmaps import ColourMap
from ldmkit.errors import DataError
from ldmkit.seals import read_limited

MAX_LIST_BYTES = 1 << 30
COMPANION_SUFFIXES = ("png", "npy")


def only_keys(source: Source, file: Path) -> Source:
    """The pictures whose keys stand in a text file, one a line, in the order of the source.

    A key that the source does not have is an error.

    Raises:
        DataError: the file cannot be read, is no UTF-8, or holds no key.
    """
    try:
        lines = read_limited(file, MAX_LIST_BYTES).decode("utf-8-sig").replace("\r", "").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8; save it as UTF-8") from error
    wanted = {key: number for number, key in reversed([*enumerate(lines, start=1)]) if key.strip()}
    if not wanted:
        raise DataError(f"{file} holds no key; write one a line")
    known = {item.key for item in source.items}
    problems = [
        Problem(
            "unknown key",
            f"{file}, line {number}",
            f"{file}, line {number}: no picture has the key {key}{_example(source.items)}",
        )
        for key, number in sorted(wanted.items(), key=lambda pair: pair[1])
        if key not in known
    ]
    items = [item for item in source.items if item.key in wanted]
    return source._replace(items=items, problems=(*source.problems, *problems))


def with_labelmaps(source: Source, folder: Path) -> Source:
    """Give each picture the label map of the same name, `.png` or `.npy`, below a folder.

    A picture without one is an error and is left out.

    Raises:
        DataError: there is no such folder.
    """
    found, problems = _companions(source, folder, "label map", "--labelmaps")
    items = [item._replace(labelmap=found[item.key]) for item in source.items if item.key in found]
    return source._replace(items=items, problems=(*source.problems, *problems))


def with_labelmap_colours(source: Source, table: Path) -> Source:
    """Let label maps that are RGB pictures be read by a table of colours.

    Raises:
        DataError: it is no such table, or no picture has a label map.
    """
    colours = read_colour_table(table)
    if not any(item.labelmap for item in source.items):
        raise DataError(
            f"--labelmap-colours {table}: no picture has a label map; give their folder with --labelmaps"
        )
    items = [
        item._replace(labelmap=ColourMap(item.labelmap, colours)) if item.labelmap else item
        for item in source.items
    ]
    return source._replace(items=items, labelmap_colours=colours)


def with_hole_masks(source: Source, folder: Path) -> Source:
    """Give each picture the mask of its hole, of the same name, `.png` or `.npy`, below a folder.

    A picture without one is an error and is left out.

    Raises:
        DataError: there is no such folder.
    """
    found, problems = _companions(source, folder, "hole mask", "--hole-masks")
    items = [item._replace(hole=found[item.key]) for item in source.items if item.key in found]
    return source._replace(items=items, problems=(*source.problems, *problems))


def _companions(
    source: Source, folder: Path, what: str, option: str
) -> tuple[dict[str, Span], list[Problem]]:
    """Key -> the file of the same name below a folder, and what does not match."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder} of {what}s ({option})")
    problems: list[Problem] = []
    files: dict[str, Span] = {}
    for name, size in sorted(files_below(str(folder), problems)):
        if suffix_of(name) not in COMPANION_SUFFIXES:
            continue
        stem = name.rpartition(".")[0]
        if stem in files:
            text = f"{folder}/{name} and {files[stem].name} are {what}s of one picture; keep one"
            problems.append(Problem(f"two {what}s", name, text))
        files[stem] = Span(f"{folder}/{name}", 0, size)
    found: dict[str, Span] = {}
    stems = {item.key: stem_of(item.key) for item in source.items}
    for item in source.items:
        stem = stems[item.key]
        if stem in files:
            found[item.key] = files[stem]
            continue
        text = f"{item.name} has no {what}: {folder}/{stem}.png or .npy is needed"
        problems.append(Problem(f"missing {what}", item.key, text))
    for stem in sorted(files.keys() - set(stems.values())):
        text = f"{files[stem].name} is the {what} of no picture"
        problems.append(Problem(f"{what} without a picture", stem, text, "warning"))
    return found, problems


def empty_captions(items: Iterable[Item], known: Iterable[Problem]) -> list[Problem]:
    """A warning for each picture without a caption in a source where others have one.

    Args:
        items: all of the source.
        known: problems found before; what they name as an empty caption is not named twice.
    """
    items = list(items)
    if not any(item.caption for item in items):
        return []
    named = {problem.where for problem in known if problem.kind == EMPTY_CAPTION}
    return [
        Problem(EMPTY_CAPTION, item.key, f"{item.name} has no caption, and others have", "warning")
        for item in items
        if not item.caption and item.key not in named
    ]


def stem_of(key: str) -> str:
    """A key without the extension of a picture, if it has one."""
    return key.rpartition(".")[0] if suffix_of(key) in IMAGE_SUFFIXES else key


def _example(items: list[Item]) -> str:
    return f"; keys look like {items[0].key}" if items else ""
