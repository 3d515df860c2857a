"""`ldmkit verify`: is every byte of these files the one that was written?"""

from collections import Counter
from pathlib import Path
from typing import Any

from ldmkit.artefacts import check_path
from ldmkit.care_configs import VerifyConfig
from ldmkit.errors import DataError
from ldmkit.terminal import say

SCHEMA_VERSION = 1
SHOWN = 20
"""Names of files that nothing is known of, in the text."""


def verify(config: VerifyConfig) -> dict[str, Any]:
    """Recompute the digests of all that ldmkit wrote below some paths.

    Returns:
        `{"schema_version": 1, "files", "problems", "notes", "unknown"}`: how many files of each kind were
        checked, a sentence for each damage, a sentence for each thing that no digest covers, and the
        files that ldmkit did not write, of which nothing can be said.

    Raises:
        DataError: a path is not there, or holds nothing that ldmkit wrote.
    """
    kinds: Counter[str] = Counter()
    problems: list[dict[str, str]] = []
    notes: list[str] = []
    unknown: list[str] = []
    for path in config.path:
        before = kinds.total()
        for checked in check_path(path):
            name = shown(checked.path)
            problems += [{"path": name, "text": shown(text)} for text in checked.problems]
            notes += [shown(text) for text in checked.notes]
            if checked.kind:
                kinds[checked.kind] += 1
            elif not checked.notes:
                unknown.append(name)
        if kinds.total() == before:
            raise DataError(f"{path} holds nothing that ldmkit wrote and could check")
    say(f"{kinds.total()} files checked, {len(problems)} problem(s)")
    return {
        "schema_version": SCHEMA_VERSION,
        "files": dict(sorted(kinds.items())),
        "problems": problems,
        "notes": notes,
        "unknown": unknown,
    }


def shown(text: str | Path) -> str:
    """The text on one line of proper UTF-8, whatever a file is called."""
    plain = str(text).encode("utf-8", "backslashreplace").decode()
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in plain)


def complaint(report: dict[str, Any]) -> str | None:
    """One sentence if anything is damaged; None if not."""
    if not report["problems"]:
        return None
    return f"{len(report['problems'])} problem(s), the first: {report['problems'][0]['text']}"


def as_text(report: dict[str, Any]) -> str:
    """A line for what was checked, and one for each problem and note."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in report["files"].items())
    state = f"{len(report['problems'])} problem(s)" if report["problems"] else "whole"
    lines = [f"{state}: {kinds}"]
    lines += [f"damaged: {problem['text']}" for problem in report["problems"]]
    lines += [f"note: {note}" for note in report["notes"]]
    unknown = report["unknown"]
    lines += [f"not ldmkit's, not checked: {name}" for name in unknown[:SHOWN]]
    if len(unknown) > SHOWN:
        lines.append(f"... and {len(unknown) - SHOWN} more files (--json lists them)")
    return "\n".join(lines)
