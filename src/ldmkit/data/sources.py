"""Open a collection of pictures, whatever form it has: one protocol, one table of formats."""

import re
from collections import Counter
from collections.abc import Callable, Iterable

from ldmkit.data.detection import detect_format, require_fitting_options
from ldmkit.data.formats.coco import scan_coco
from ldmkit.data.formats.dicom import scan_dicom
from ldmkit.data.formats.folder import scan_folder
from ldmkit.data.formats.metadata import scan_metadata
from ldmkit.data.formats.nifti import scan_nifti
from ldmkit.data.formats.npz import scan_npz
from ldmkit.data.formats.parquet import scan_parquet
from ldmkit.data.formats.sidecars import IMAGE_SUFFIXES
from ldmkit.data.formats.stack import scan_stack
from ldmkit.data.formats.webdataset import scan_tars
from ldmkit.data.items import Item, Problem, Source
from ldmkit.data.locations import shown
from ldmkit.data.names import odd_names
from ldmkit.data.selection import (
    empty_captions,
    only_keys,
    with_hole_masks,
    with_labelmap_colours,
    with_labelmaps,
)
from ldmkit.data_configs import SourceConfig
from ldmkit.errors import DataError
from ldmkit.terminal import say


def open_source(config: SourceConfig, *, max_bad: float = 0.0) -> Source:
    """List the pictures of a source; nothing is decoded.

    What is wrong with single pictures is said, and they are left out, as far as `max_bad` allows.

    Args:
        config: where the pictures are, and in which form.
        max_bad: share of the pictures that may be left out.

    Raises:
        DataError: nothing is there, it holds no pictures, it is damaged, or more than `max_bad` of it
            cannot be used.
    """
    source = scan_source(config)
    fatal = [problem for problem in source.problems if problem.severity == "fatal"]
    bad = [problem for problem in source.problems if problem.severity == "error"]
    if fatal:
        raise DataError(f"{fatal[0].text}{_others(source.problems, config)}")
    if len(bad) > int(max_bad * (len(source.items) + len(bad))):
        raise DataError(f"{bad[0].text}{_others(source.problems, config)}")
    if not source.items:
        raise DataError(
            f"no pictures found in {shown(config.data)} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})"
        )
    for line in summary(source.problems):
        say(line)
    return source


def scan_source(config: SourceConfig) -> Source:
    """List the pictures of a source, and what is wrong with it.

    Raises:
        DataError: nothing is there, or a file that an option names cannot be used.
        UsageError: an option is given that the source's format does not have.
        StorageError: it is remote and cannot be had.
    """
    found = detect_format(config)
    require_fitting_options(config, found)
    source = FORMATS[found](config)._replace(scalar_names=config.scalars or ())
    if config.keys is not None:
        source = only_keys(source, config.keys)
    if config.labelmaps is not None:
        source = with_labelmaps(source, config.labelmaps)
    if config.labelmap_colours is not None:
        source = with_labelmap_colours(source, config.labelmap_colours)
    if config.hole_masks is not None:
        source = with_hole_masks(source, config.hole_masks)
    captionless = empty_captions(source.items, source.problems)
    source = source._replace(problems=(*source.problems, *captionless, *odd_names(source.items)))
    if config.group_by is None:
        return source
    pattern = re.compile(config.group_by)
    return source._replace(items=[_grouped(item, pattern) for item in source.items])


def summary(problems: Iterable[Problem]) -> list[str]:
    """One line for each kind of problem: how often, and where first."""
    counts = Counter(problem.kind for problem in problems)
    lines = []
    for kind, count in counts.most_common():
        first = [problem.where for problem in problems if problem.kind == kind][:3]
        more = f" and {count - 3} more" if count > 3 else ""
        lines.append(f"{kind} ({count}): {', '.join(first)}{more}")
    return lines


def _others(problems: Iterable[Problem], config: SourceConfig) -> str:
    count = sum(problem.severity != "warning" for problem in problems) - 1
    return f" (and {count} more; `ldmkit check {shown(config.data)}` lists all)" if count else ""


def _grouped(item: Item, pattern: re.Pattern[str]) -> Item:
    match = pattern.search(item.key)
    return item._replace(group=match.group(0)) if match else item


FORMATS: dict[str, Callable[[SourceConfig], Source]] = {
    "coco": scan_coco,
    "folder": scan_folder,
    "metadata": scan_metadata,
    "parquet": scan_parquet,
    "webdataset": scan_tars,
    "npz": scan_npz,
    "stack": scan_stack,
    "dicom": scan_dicom,
    "nifti": scan_nifti,
}
"""`--format` -> what lists such a source."""
