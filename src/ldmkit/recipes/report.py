"""`ldmkit report`: what came of these runs, on one page that stands alone."""

from collections.abc import Sequence
from pathlib import Path

from ldmkit.durable import write_text
from ldmkit.pages.findings import Finding, findings_of
from ldmkit.pages.handoffs import handoffs
from ldmkit.pages.markup import text_of, whole_page
from ldmkit.pages.pictures import chosen, share
from ldmkit.pages.reading import Subject, read_subject
from ldmkit.pages.sections import (
    TITLES,
    curves,
    evaluation_pictures,
    evaluations,
    findings_list,
    identity,
    latent_health,
    previews,
    provenance,
)
from ldmkit.report_configs import ReportConfig
from ldmkit.seals import sealed_html
from ldmkit.version import __version__


def report(config: ReportConfig) -> Path:
    """Write the page about the directories given; they are only read, and need not be finished.

    Returns:
        The path of the page.

    Raises:
        DataError: one of them is no directory of ldmkit's.
        StorageError: the page cannot be written.
    """
    subjects = [read_subject(path) for path in with_kept_latents(config.run)]
    shown = sum(map(pictures_of, subjects))
    title = "Report on " + ", ".join(
        dict.fromkeys(one.path.name or str(one.path) for one in subjects)
    )
    parts = [
        contents(subjects),
        *summary(subjects),
        *(part for n, one in enumerate(subjects, 1) for part in parts_of(n, one, share(shown))),
        f"<p>Written by ldmkit {__version__}. Digests are taken as stated: "
        "<code>ldmkit inspect</code> recomputes them.</p>",
    ]
    write_text(config.out, sealed_html(whole_page(title, parts)))
    return config.out


def with_kept_latents(paths: Sequence[Path]) -> list[Path]:
    """The directories, each once, and after a run the latents that it received through a pipe and kept."""
    found = [
        one
        for path in paths
        for one in (
            path,
            *([path / "latents"] if (path / "latents/manifest.json").is_file() else []),
        )
    ]
    return list({one.absolute(): one for one in found}.values())


def pictures_of(subject: Subject) -> int:
    """How many pictures the page will show of it."""
    sheets = sum(len(evaluation_pictures(one)) for one in subject.evaluations)
    return len(chosen(subject.samples)) + sheets


def contents(subjects: Sequence[Subject]) -> str:
    """Links to the parts."""
    links = [
        f'<a href="#part-{number}">{text_of(f"{number}. {one.path}")}</a>'
        for number, one in enumerate(subjects, 1)
    ]
    return f"<nav>{''.join(links)}</nav>" if len(links) > 1 else ""


def summary(subjects: Sequence[Subject]) -> list[str]:
    """What concerns several directories: hand-offs, and versions that differ."""
    found = [*handoffs(subjects), *differing_versions(subjects)]
    return ["<h2>Together</h2>", findings_list(found)] if found else []


def differing_versions(subjects: Sequence[Subject]) -> list[Finding]:
    """A sentence for each package of which the directories were made with different versions."""
    seen: dict[str, dict[str, str]] = {}
    for one in subjects:
        versions = one.manifest.versions if one.manifest else one.facts.get("versions")
        for package, version in (versions if isinstance(versions, dict) else {}).items():
            seen.setdefault(str(package), {})[str(version)] = str(one.path)
    return [
        Finding(
            "plain",
            "versions",
            f"{package}: " + ", ".join(f"{version} ({path})" for version, path in places.items()),
        )
        for package, places in seen.items()
        if len(places) > 1
    ]


def parts_of(number: int, subject: Subject, most_bytes: int) -> list[str]:
    """All of one directory."""
    return [
        f'<h2 id="part-{number}">{text_of(f"{TITLES[subject.kind]}: {subject.path}")}</h2>',
        findings_list(findings_of(subject)),
        identity(subject),
        curves(subject),
        previews(subject, most_bytes),
        latent_health(subject),
        evaluations(subject, most_bytes),
        provenance(subject),
    ]
