"""Keys that other programs may stumble over, or that would lead out of a folder."""

import unicodedata
from collections.abc import Iterable, Iterator

from ldmkit.data.items import Item, Problem


def odd_names(items: Iterable[Item]) -> Iterator[Problem]:
    """A warning for each key that is absolute, goes up, or has characters that do not print.

    Nothing here writes to a place that a key names, so such pictures are used all the same.
    """
    for item in items:
        kind = _oddity(item.key)
        if kind is not None:
            text = f"the name {item.key!r} is used as it is: {kind}"
            yield Problem(kind, item.key, text, "warning")


def _oddity(key: str) -> str | None:
    if key[:1] == "/" or ".." in key.split("/"):
        return "name leads out of the folder"
    if key.isprintable():
        return None
    kinds = {unicodedata.category(sign) for sign in key}
    if "Cs" in kinds:  # how Python spells bytes that are no UTF-8
        return "name is not UTF-8"
    return "control character in a name" if kinds & {"Cc", "Zl", "Zp"} else None
