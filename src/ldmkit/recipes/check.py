"""`ldmkit check`: what is wrong or odd with these pictures, before anything is trained on them?"""

from collections import Counter
from typing import Any

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.audit import Examined, examinations
from ldmkit.data.census import (
    HELD_BACK,
    OTHER,
    TRAINING,
    Finding,
    classes,
    duplicates,
    facts,
    incomplete,
    missing_scalars,
    mixed,
    near_duplicates,
)
from ldmkit.data.items import Item, Problem
from ldmkit.data.order import is_held_back
from ldmkit.data.sources import scan_source
from ldmkit.data_configs import CheckConfig
from ldmkit.durable import write_text
from ldmkit.recipes.audit_page import page
from ldmkit.seals import sealed_html
from ldmkit.terminal import say, track

SCHEMA_VERSION = 1
SHOWN = 5
"""Names in a line of the text."""


def check(config: CheckConfig) -> dict[str, Any]:
    """Read everything as training would, and say what is wrong; OUT is written if it is given.

    Returns:
        `{"schema_version": 1, "data", "against", "pictures", "errors", "warnings", "findings",
        "facts"}`; each finding has kind, severity, count and found, a list of name and text. An error
        is a picture that cannot be used or a leak, a warning one that is used otherwise than it looks.

    Raises:
        DataError: nothing is there.
        StorageError: OUT cannot be written.
    """
    preprocessing = PreprocessingConfig(
        size=config.size, channels=config.channels, range=config.range
    )
    source = scan_source(config)
    items, problems = list(source.items), list(source.problems)
    parts = [part_of(item, config.holdout) for item in items]
    if config.against is not None:
        other = scan_source(config.model_copy(update={"data": config.against}))
        items += other.items
        problems += other.problems
        parts += [OTHER] * len(other.items)

    examined: list[Examined] = []
    with track("check", len(items), unit="picture") as progress:
        for chunk in examinations(items, preprocessing, config.workers):
            examined += chunk
            progress.advance(len(chunk))

    count = len(source.items)
    own = examined[:count]
    findings = [
        *(from_problem(problem) for problem in problems),
        *(
            Finding(note.kind, note.severity, items[index].key, note.text, (index,))
            for index, found in enumerate(examined)
            for note in found.notes
            if index < count or note.severity == "error"
        ),
        *mixed(source.items, own),
        *incomplete(source.items, {(problem.kind, problem.where) for problem in source.problems}),
        *missing_scalars(source),
        *classes(source),
        *duplicates(items, examined, parts),
        *near_duplicates(items, examined, parts, preprocessing),
    ]
    if not source.items:
        text = f"no pictures found in {config.data}"
        findings.append(Finding("no pictures", "error", config.data, text))
    kinds = by_kind(findings)
    severities = Counter(finding.severity for finding in findings)
    report = {
        "schema_version": SCHEMA_VERSION,
        "data": config.data,
        "against": config.against,
        "pictures": count,
        "errors": severities["error"],
        "warnings": severities["warning"],
        "findings": [described(group) for group in kinds],
        "facts": facts(source, own)
        | ({"parts": dict(Counter(parts))} if len(set(parts)) > 1 else {}),
    }
    if config.out is not None:
        write_text(config.out, sealed_html(page(report, kinds, items, preprocessing)))
        say(f"page with the pictures concerned: {config.out}")
    return report


def part_of(item: Item, holdout: float) -> str:
    """Where training with this `--holdout` puts a picture; as `data.images.split`."""
    return HELD_BACK if is_held_back(item.group or item.key, holdout) else TRAINING


def from_problem(problem: Problem) -> Finding:
    """What listing the pictures found; a fatal problem is an error here."""
    severity = "warning" if problem.severity == "warning" else "error"
    return Finding(problem.kind, severity, problem.where, problem.text)


def by_kind(findings: list[Finding]) -> list[list[Finding]]:
    """The findings of each kind and severity: errors first, then what is most frequent."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.kind), []).append(finding)
    order = sorted(groups, key=lambda key: (key[0], -len(groups[key]), key[1]))
    return [groups[key] for key in order]


def described(group: list[Finding]) -> dict[str, Any]:
    """The findings of a kind as they stand in the report."""
    return {
        "kind": group[0].kind,
        "severity": group[0].severity,
        "count": len(group),
        "found": [{"name": encodable(item.name), "text": encodable(item.text)} for item in group],
    }


def encodable(text: str) -> str:
    """The text with what is no character (bytes of a file name that are not UTF-8) spelled out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def complaint(report: dict[str, Any]) -> str | None:
    """One sentence if anything was found that cannot be used; None if not."""
    if not report["errors"]:
        return None
    first = report["findings"][0]
    return (
        f"{report['errors']} error(s) in {report['data']}, the first: {first['found'][0]['text']}"
    )


def as_text(report: dict[str, Any]) -> str:
    """The report for people: a line for what the pictures are, and one for each kind of finding."""
    lines = [
        f"{report['pictures']} pictures in {report['data']}: "
        f"{report['errors']} error(s), {report['warnings']} warning(s)",
        *facts_as_text(report["facts"]),
    ]
    for finding in report["findings"]:
        names = ", ".join(one_line(entry["name"]) for entry in finding["found"][:SHOWN])
        more = f" and {finding['count'] - SHOWN} more" if finding["count"] > SHOWN else ""
        lines.append(
            f"{finding['severity']}: {finding['kind']} ({finding['count']}): {names}{more}"
        )
    return "\n".join(lines)


def facts_as_text(found: dict[str, Any]) -> list[str]:
    """What the pictures are, for people."""
    lines = [
        f"{name}: {', '.join(f'{one_line(key)} ({count})' for key, count in found[name].items())}"
        for name in ("formats", "channels", "bits", "classes", "parts")
        if found.get(name)
    ]
    for name, spread in (
        ("shorter side, pixels", found["shorter_side_pixels"]),
        ("caption, characters", found["captions"]["characters"]),
    ):
        if spread:
            lines.append(f"{name}: {spread['min']} to {spread['max']}, median {spread['median']:g}")
    for name, spread in found["scalars"].items():
        line = f"{one_line(name)}: missing in {spread['missing']} picture(s)"
        if "min" in spread:
            line += f", else {spread['min']:g} to {spread['max']:g}, median {spread['median']:g}"
        lines.append(line)
    return lines


def one_line(text: str) -> str:
    """The text with line breaks and other control characters spelled out."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
