"""Where data may lie: a path, or a URL of a scheme in a table; braces stand for several of them.

Nothing here opens anything, and no text of the user's ever reaches a shell.
"""

import itertools
import math
import re
from pathlib import Path
from urllib.parse import urlsplit

from ldmkit.errors import UsageError

HTTP = ("https", "http")
STORES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "hf": "huggingface_hub",
}
"""Scheme of an object store -> the package through which fsspec reads it."""
MAX_NAMES = 100_000
MAX_LENGTH = 4096
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # one letter is a drive of Windows
GROUP = re.compile(r"\{([^{}]*)\}")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
RANGE = re.compile(r"(-?\d{1,9})\.\.(-?\d{1,9})(?:\.\.(\d{1,9}))?")


def is_remote(location: str) -> bool:
    """Whether a location (or a pattern of them) is a URL.

    Raises:
        UsageError: its scheme is none that is read, or it is no whole URL.
    """
    if "://" not in location and _exists(location):
        return False
    if len(location) > MAX_LENGTH or CONTROL.search(location):
        raise UsageError(
            f"{location[:100]!r} is no location: too long, or holds control characters"
        )
    match = SCHEME.match(location)
    if match is None:
        return False
    scheme = match.group(1).lower()
    if scheme not in (*HTTP, *STORES) or not location[match.end() :].startswith("//"):
        raise UsageError(
            f"{shown(location)[:200]!r} is no path, and not read as a URL; the schemes are "
            f"{', '.join(f'{name}://' for name in (*HTTP, *STORES))} (no pipes, no commands)"
        )
    _require_host(location)
    return True


def expand(location: str) -> list[str]:
    """The paths and URLs that a location with `{000..099}`, `{0..8..2}` or `{a,b}` stands for.

    A path that is there under just this name is not expanded. Groups do not nest, so that their
    number is known before memory is taken.

    Raises:
        UsageError: a group is neither, there are too many names, or one of them is no such location.
    """
    remote = is_remote(location)
    if ("{" not in location and "}" not in location) or (not remote and _exists(location)):
        return [location]
    parts = GROUP.split(location)
    if any(brace in literal for literal in parts[::2] for brace in "{}"):
        raise UsageError(f"{shown(location)!r}: braces that nest or do not pair are not expanded")
    choices = [
        _choices(part, location) if number % 2 else [part] for number, part in enumerate(parts)
    ]
    if math.prod(map(len, choices)) > MAX_NAMES:
        raise UsageError(f"{shown(location)!r} stands for more than {MAX_NAMES:,} names")
    names = ["".join(chosen) for chosen in itertools.product(*choices)]
    for name in names:
        is_remote(name)
    return names


def shown(location: str) -> str:
    """A location as it may be printed or stored: without user name, password and signed query."""
    if "://" not in location:
        return location
    scheme, _, rest = location.partition("://")
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def _choices(inside: str, location: str) -> list[str]:
    match = RANGE.fullmatch(inside)
    if match is None and "," in inside:
        return inside.split(",")
    if match is None:
        raise UsageError(
            f"{shown(location)!r}: {{{inside}}} is neither a range such as {{000..099}} nor a list"
        )
    first, last, step = int(match[1]), int(match[2]), int(match[3] or 1)
    if step == 0 or abs(last - first) // step >= MAX_NAMES:
        raise UsageError(f"{shown(location)!r}: {{{inside}}} has no or too many numbers")
    padded = any(
        len(text.lstrip("-")) > 1 and text.lstrip("-")[0] == "0" for text in match.group(1, 2)
    )
    width = max(len(match[1]), len(match[2])) if padded else 0
    numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    return [f"{number:0{width}d}" for number in numbers]


def _exists(location: str) -> bool:
    try:
        return Path(location).exists()
    except (OSError, ValueError):  # too long for a name, or holds NUL
        return False


def _require_host(location: str) -> None:
    try:
        host = urlsplit(location).netloc
    except ValueError as error:
        raise UsageError(f"{shown(location)!r} is no URL ({error})") from error
    if not host or "::" in location or "@" in host:
        raise UsageError(
            f"{shown(location)!r} is not read: a URL names a host or bucket, and neither a password "
            "nor a chain of file systems (::)"
        )
