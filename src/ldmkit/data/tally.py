"""How often something was done to pictures, and to which of them first."""

from collections.abc import Iterable, Mapping

NAMED = 5
"""How many pictures are named for each kind."""

Tally = dict[str, tuple[int, tuple[str, ...]]]
"""What was done -> in how many pictures, and the keys of the first of them."""


def tally_of(done: Iterable[tuple[str, Iterable[str]]]) -> Tally:
    """Count from pairs of a picture's key and all that was done to it."""
    return joined(dict.fromkeys(dict.fromkeys(changes), (1, (key,))) for key, changes in done)


def joined(tallies: Iterable[Mapping[str, tuple[int, tuple[str, ...]]]]) -> Tally:
    """The tally of several parts of a data set, given in their order."""
    whole: Tally = {}
    for tally in tallies:
        for change, (count, keys) in tally.items():
            before, first = whole.get(change, (0, ()))
            whole[change] = (before + count, (*first, *keys)[:NAMED])
    return dict(sorted(whole.items()))


def lines_of(tally: Mapping[str, tuple[int, tuple[str, ...]]]) -> list[str]:
    """One line for each kind, the most frequent first."""
    ordered = sorted(tally.items(), key=lambda pair: -pair[1][0])
    return [
        f"{change} ({count}): {', '.join(keys)}{' ...' if count > len(keys) else ''}"
        for change, (count, keys) in ordered
    ]
