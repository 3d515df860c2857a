"""`ldmkit split`: which pictures are held back, written down."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ldmkit.data import images
from ldmkit.data.items import NO_LABEL, Item
from ldmkit.data.sources import open_source
from ldmkit.data_configs import SplitConfig
from ldmkit.durable import write_text
from ldmkit.errors import DataError
from ldmkit.terminal import say

SCHEMA_VERSION = 1


def split(config: SplitConfig) -> dict[str, Any]:
    """Write the keys of training to OUT/training.txt and the others to OUT/held-back.txt.

    The division is that of every command with the same `--holdout` and `--group-by`: it depends on each
    key (or its group) alone, so that further pictures change nothing about those already there.

    Returns:
        `{"schema_version": 1, "out", "holdout", "training", "held_back"}`; the last two have pictures,
        groups and classes (name -> pictures).

    Raises:
        DataError: the source cannot be used, a part would be empty, or a key has a line break.
        StorageError: OUT cannot be written.
    """
    source = open_source(config)
    parts = images.split(source.items, config.holdout)
    if not parts.held_back:
        raise DataError(
            f"--holdout {config.holdout} keeps none of the {len(source.items)} pictures out; "
            "give a larger share"
        )
    texts = {
        "training.txt": listed(parts.training),
        "held-back.txt": listed(parts.held_back),
    }
    for name, text in texts.items():
        write_text(config.out / name, text)
    report = {
        "schema_version": SCHEMA_VERSION,
        "out": str(config.out),
        "holdout": config.holdout,
        "training": counted(parts.training, source.class_names),
        "held_back": counted(parts.held_back, source.class_names),
    }
    for name in ("training", "held_back"):
        found = report[name]
        classes = ", ".join(f"{label} {number}" for label, number in found["classes"].items())
        say(
            f"{name.replace('_', ' ')}: {found['pictures']} pictures in {found['groups']} groups"
            f"{': ' if classes else ''}{classes}"
        )
    return report


def listed(items: Sequence[Item]) -> str:
    """Keys, one a line.

    Raises:
        DataError: a key cannot stand in a line of UTF-8.
    """
    for item in items:
        broken = item.key.splitlines() != [item.key]
        if broken or item.key != item.key.encode("utf-8", "replace").decode("utf-8"):
            raise DataError(
                f"the name {item.key!r} has a line break or is not UTF-8, so it cannot stand in a list; "
                "rename it"
            )
    return "".join(f"{item.key}\n" for item in items)


def counted(items: Sequence[Item], class_names: Sequence[str]) -> dict[str, Any]:
    """Pictures, groups (a picture of no group is one), and pictures by class."""
    labels = Counter(item.label for item in items if item.label != NO_LABEL)
    return {
        "pictures": len(items),
        "groups": len({item.group or item.key for item in items}),
        "classes": {name: labels[number] for number, name in enumerate(class_names)},
    }


def as_text(report: dict[str, Any]) -> str:
    """The directory, for a shell."""
    return report["out"]
