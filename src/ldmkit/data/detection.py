"""What a collection of pictures is, by the name of its path and by what lies there."""

from pathlib import Path

from ldmkit.data.formats.metadata import TABLES, has_table
from ldmkit.data.formats.sidecars import IMAGE_SUFFIXES, suffix_of
from ldmkit.data.formats.slices import format_of
from ldmkit.data.formats.webdataset import COMPRESSED_SUFFIXES
from ldmkit.data.locations import is_remote, shown
from ldmkit.data_configs import SourceConfig
from ldmkit.errors import DataError, UsageError

REMOTE_FORMATS = ("webdataset",)
"""Formats that are read from URLs too."""
BY_SUFFIX = {".json": "coco", ".parquet": "parquet", ".tar": "webdataset"}
"""What a file is by its name."""
FORMATS_WITH = {
    "caption_column": ("metadata", "parquet"),
    "label_column": ("metadata", "parquet"),
    "scalars": ("metadata", "parquet", "webdataset"),
    "images": ("coco",),
    "captions": ("coco",),
}
"""Option -> the formats that have it."""


def detect_format(config: SourceConfig) -> str:
    """The format asked for, or what DATA is.

    Raises:
        DataError: nothing is there, or it is a table that belongs to a folder.
    """
    if config.format != "auto":
        return config.format
    path = Path(config.data)
    if is_remote(config.data):
        return "webdataset"
    by_name = BY_SUFFIX.get(path.suffix.lower())
    if "{" in config.data and not path.exists():
        return by_name or "webdataset"
    if not path.exists():
        raise DataError(f"there is no {path}; give a folder of pictures or webdataset tars")
    if path.is_dir():
        return _format_of_folder(path)
    if path.name in TABLES:
        raise DataError(f"{path} describes the pictures beside it: give its folder, {path.parent}")
    return by_name or format_of(path) or "webdataset"


def _format_of_folder(path: Path) -> str:
    if _holds_tars(path):
        return "webdataset"
    if has_table(path):
        return "metadata"
    if any(path.glob("*.parquet")) or any(path.glob("data/*.parquet")):
        return "parquet"
    return format_of(path) or "folder"


def _holds_tars(folder: Path) -> bool:
    """Whether tars lie in it; compressed ones count where nothing else could be meant."""
    names = [path.name for path in folder.iterdir()]
    if any(name.endswith(".tar") for name in names):
        return True
    compressed = [name for name in names if name.endswith(COMPRESSED_SUFFIXES)]
    pictures = any(suffix_of(name) in IMAGE_SUFFIXES for name in names)
    return bool(compressed) and not pictures and not any(path.is_dir() for path in folder.iterdir())


def require_fitting_options(config: SourceConfig, found: str) -> None:
    """Raise UsageError if an option is given, or a URL, that this format does not have."""
    if found not in REMOTE_FORMATS and is_remote(config.data):
        raise UsageError(
            f"--format {found} is not read from {shown(config.data)}, only {', '.join(REMOTE_FORMATS)}"
        )
    for name, formats in FORMATS_WITH.items():
        if getattr(config, name) is not None and found not in formats:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{option} is for --format {' or '.join(formats)}, and DATA is {found}"
            )
    for option, folder, what in (
        ("--labelmaps", config.labelmaps, "label maps"),
        ("--hole-masks", config.hole_masks, "masks"),
    ):
        if folder is None or found != "folder":
            continue
        if folder.resolve().is_relative_to(Path(config.data).resolve()):
            raise UsageError(
                f"{option} {folder} lies in {config.data}, so that {what} would count as"
                " pictures: put it beside that folder"
            )
