"""The parts of a report on one directory, as markup."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ldmkit.facts import Manifest
from ldmkit.pages.figures import channel_figures, run_figures
from ldmkit.pages.findings import Finding
from ldmkit.pages.handoffs import claims, fingerprint_of
from ldmkit.pages.markup import (
    details,
    facts_table,
    figure,
    figures,
    preformatted,
    section,
    shown,
    table,
    text_of,
)
from ldmkit.pages.pictures import as_image, chosen, name_and_step
from ldmkit.pages.reading import CONFIG, METRICS, Evaluation, Subject

TITLES = {
    "autoencoder": "Autoencoder (train-ae)",
    "diffusion": "Diffusion model (train-diffusion)",
    "latents": "Latent set (encode)",
    "evaluation": "Evaluation",
    "run": "Run directory",
}
MOST_ROWS, MOST_NAMES, MOST_EVALUATION_PICTURES = 60, 100, 8
ASIDE = ("kind", "config", "versions", "units", "findings", "thresholds", "files", "schema_version")
"""Parts of an evaluation's report that have words or a place of their own."""


def findings_list(findings: Sequence[Finding]) -> str:
    """Findings as a list; "" without any."""
    rows = [
        f'<li class="{one.mood}"><b>{text_of(one.head)}:</b> {text_of(one.text)}</li>'
        for one in findings
    ]
    return f'<ul class="findings">{"".join(rows)}</ul>' if rows else ""


def identity(subject: Subject) -> str:
    """What it is: kind, fingerprints, what it was made from."""
    facts, manifest = subject.facts, subject.manifest
    makers = dict.fromkeys(one.fingerprint for one in claims(subject))
    rows: dict[str, Any] = {
        "kind": TITLES[subject.kind],
        "directory": str(subject.path),
        "fingerprint": fingerprint_of(subject) or None,
        "names autoencoder": ", ".join(makers) or None,
        "latents": _latents_in_words(subject),
        "training": _known(facts, "trained"),
        "averages": _known(facts, "averages"),
        "last written": _written(subject),
        "class names": _class_names(manifest) if manifest else None,
    }
    return section("What it is", facts_table(rows))


def _class_names(manifest: Manifest) -> str | None:
    if not manifest.label_sets:
        return _names(manifest.class_names)
    return "; ".join(f"{one.name}: {_names(one.classes)}" for one in manifest.label_sets)


def curves(subject: Subject) -> str:
    """The curves of a run."""
    made = run_figures(subject)
    if subject.kind in ("latents", "evaluation"):
        return ""
    return section("Curves", figures(made) or "<p>The log has no numbers yet.</p>")


def previews(subject: Subject, most_bytes: int) -> str:
    """Preview pictures of a run: the first, the middle and the newest few."""
    made = []
    for picture in chosen(subject.samples):
        name, step = name_and_step(picture)
        title = f"{name}, step {step}" if step >= 0 else name
        made.append(figure(title, as_image(picture, most_bytes), _preview_caption(name)))
    if not made:
        return (
            section("Pictures", "<p>There are no preview pictures in samples/.</p>")
            if subject.kind in ("autoencoder", "diffusion")
            else ""
        )
    left = len(subject.samples) - len(made)
    more = f"<p>{left} more lie in samples/.</p>" if left else ""
    return section("Pictures over time", figures(made, "wide"), more)


def latent_health(subject: Subject) -> str:
    """Channels, counts, and what was left out or changed."""
    manifest = subject.manifest
    if manifest is None:
        return ""
    whitening = manifest.whitening
    rows = [
        (channel, mean, std)
        for channel, (mean, std) in enumerate(zip(whitening.mean, whitening.std, strict=True))
    ]
    reasons = Counter(reason for _, reason in manifest.skipped)
    skipped = [(key, reason) for key, reason in manifest.skipped[:MOST_ROWS]]
    converted = [
        (what, count, ", ".join(keys)) for what, (count, keys) in manifest.converted.items()
    ]
    return section(
        "Health of the latents",
        table(("channel", "mean", "std"), rows[:MOST_ROWS]),
        figures(channel_figures(whitening.mean, whitening.std)),
        _counted("skipped, by reason", ("reason", "pictures"), reasons.most_common(MOST_ROWS)),
        details(f"Skipped pictures ({len(manifest.skipped)})", table(("key", "reason"), skipped)),
        _counted("converted", ("what", "pictures", "such as"), converted[:MOST_ROWS]),
    )


def evaluations(subject: Subject, most_bytes: int) -> str:
    """What was measured, from each report that lies in the directory."""
    return "\n".join(_evaluation(subject, one, most_bytes) for one in subject.evaluations)


def provenance(subject: Subject) -> str:
    """Settings, versions and files."""
    versions = _known(subject.facts, "versions")
    if subject.manifest is not None:
        versions = subject.manifest.versions
    files = [
        (name, header.kind, str(header.facts.get("fingerprint", ""))[:16], header.payload_bytes)
        for name, header in subject.models.items()
    ]
    if subject.manifest is not None:
        files = [
            (one.name, f"{one.count} latents", one.sha256[:16], one.bytes)
            for one in subject.manifest.shards[:MOST_ROWS]
        ]
    recipe = subject.manifest.recipe if subject.manifest else {}
    steps = ", ".join(map(str, subject.checkpoints)) or None
    return section(
        "Settings, versions, provenance",
        facts_table({"made with": versions, "checkpoints of steps": steps}),
        details("Files", table(("file", "holds", "digest", "bytes"), files)),
        details("Recipe of the latents", preformatted(_json(recipe) if recipe else "")),
        details(CONFIG, preformatted(subject.config_text)),
    )


def _evaluation(subject: Subject, evaluation: Evaluation, most_bytes: int) -> str:
    report, directory = evaluation.report, evaluation.file.parent
    kind = report.get("kind") or ("check" if "warnings" in report else "measured")
    name = evaluation.file.relative_to(subject.path)
    told = [str(one) for one in _sequence(report.get("findings")) if isinstance(one, str)]
    thresholds = [
        Finding("good" if one.get("met") else "bad", "threshold", str(one.get("sentence", "")))
        for one in _sequence(report.get("thresholds"))
        if isinstance(one, dict)
    ]
    rows = [
        (one.get("severity"), one.get("kind"), one.get("count"))
        for one in _sequence(report.get("findings"))
        if isinstance(one, dict)
    ]
    sheets = evaluation_pictures(evaluation)
    return section(
        f"Measured by {shown(kind)} ({name})",
        findings_list([*thresholds, *(Finding("plain", "finding", one) for one in told)]),
        table(("severity", "what", "pictures"), rows[:MOST_ROWS]),
        *(_tables(report)),
        figures(
            [figure(s.stem, as_image(s, most_bytes), f"{s.name} in {directory}") for s in sheets],
            "wide",
        ),
        details("Units", facts_table(_known(report, "units") or {})),
    )


def evaluation_pictures(evaluation: Evaluation) -> list[Path]:
    """The pictures a report names, as far as they lie beside it; plots are drawn for paper and left out."""
    names = [one for one in _sequence(evaluation.report.get("files")) if isinstance(one, str)]
    plain = [one for one in names if one == Path(one).name and one.endswith(".png")]
    sheets = [one for one in plain if not one.startswith("plot-")]
    return [evaluation.file.parent / one for one in sheets[:MOST_EVALUATION_PICTURES]]


def _tables(report: Mapping[str, Any]) -> list[str]:
    """The numbers of a report: a table for each family of the same columns, and one for the rest."""
    made, rest = [], {}
    for name, value in report.items():
        if name in ASIDE:
            continue
        if not isinstance(value, dict):
            rest[name.replace("_", " ")] = value
            continue
        families = {key: part for key, part in value.items() if isinstance(part, dict) and part}
        if families and len(families) == len(value):
            made.append(_family(name, families))
        else:
            inner = {
                key.replace("_", " "): part for key, part in value.items() if not _nested(part)
            }
            made.append(details(name.replace("_", " "), facts_table(inner)))
    return [facts_table(dict(list(rest.items())[:MOST_ROWS])), *made]


def _family(name: str, families: Mapping[str, Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for part in families.values() for key in part))[:12]
    rows = [(metric, *(part.get(key, "") for key in columns)) for metric, part in families.items()]
    return table((name.replace("_", " "), *columns), rows[:MOST_ROWS])


def _nested(value: Any) -> bool:  # noqa: ANN401 - whatever JSON holds
    parts = value if isinstance(value, list) else ()
    return (isinstance(value, dict) and len(value) > 20) or any(
        isinstance(p, list | dict) for p in parts
    )


def _counted(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return f"<p>{text_of(title)}:</p>{table(head, rows)}" if rows else ""


def _sequence(value: Any) -> list[Any]:  # noqa: ANN401 - whatever JSON holds
    return value if isinstance(value, list) else []


def _known(facts: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    value = facts.get(name)
    return value if isinstance(value, dict) else None


def _latents_in_words(subject: Subject) -> str | None:
    manifest = subject.manifest
    if manifest is None:
        shape = _sequence(subject.facts.get("latent_shape"))
        return " x ".join(map(str, shape)) or None
    shapes = {entry.shape or manifest.latent_shape for entry in manifest.shards}
    sizes = "; ".join(" x ".join(map(str, shape)) for shape in sorted(shapes))
    return f"{manifest.count} of {sizes}, with {', '.join(manifest.columns)}"


def _names(names: Sequence[str]) -> str | None:
    if not names:
        return None
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"{len(names)}: {', '.join(names[:MOST_NAMES])}{more}"


def _written(subject: Subject) -> str | None:
    files = [subject.path / METRICS, subject.path / "manifest.json", subject.path / CONFIG]
    times = [file.stat().st_mtime for file in files if file.is_file()]
    if not times:
        return None
    return datetime.fromtimestamp(max(times), UTC).strftime("%Y-%m-%d %H:%M UTC")


def _preview_caption(name: str) -> str:
    if name == "reconstructions":
        return "Pictures above, their reconstructions below: compare edges, text and fine texture."
    if name == "samples":
        return "Fixed seeds throughout, so that the same place shows the same picture becoming sharper."
    return "As the run wrote it."


def _json(value: Any) -> str:  # noqa: ANN401 - whatever JSON holds
    return json.dumps(value, indent=1, ensure_ascii=False)
