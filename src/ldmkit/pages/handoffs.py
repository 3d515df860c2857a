"""Do the stages belong together? By the fingerprints that files carry of what they were made from."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ldmkit.pages.findings import Finding
from ldmkit.pages.reading import Subject

TOLERANCE = 1e-6
"""Relative difference up to which a model's whitening is that of a latent set."""
SHORT = 12
"""Digits of a fingerprint that are shown in a sentence."""


class Claim(NamedTuple):
    """Something that names an autoencoder."""

    what: str
    """Directory or file."""
    verb: str
    """What it has to do with it: `was made from`, `measures`."""
    fingerprint: str


def handoffs(subjects: Sequence[Subject]) -> list[Finding]:
    """Whether what was derived from an autoencoder or a latent set was derived from the one given here."""
    makers = [one for one in subjects if one.kind == "autoencoder" and fingerprint_of(one)]
    found = [
        _of_claim(claim, makers)
        for subject in subjects
        for claim in claims(subject)
        if len(subjects) > 1 or makers
    ]
    sets = [one for one in subjects if one.manifest is not None]
    for subject in subjects:
        if subject.kind == "diffusion" and sets:
            found += _of_set(subject, sets)
    return found


def claims(subject: Subject) -> list[Claim]:
    """The autoencoders that a latent set, a diffusion model or evaluations name."""
    named = []
    if subject.manifest is not None:
        named.append((subject.path, "was made from", subject.manifest.recipe.get("autoencoder")))
    if subject.kind == "diffusion":
        named.append((subject.path, "was made from", subject.facts.get("autoencoder")))
    for one in subject.evaluations:
        facts = one.report.get("autoencoder")
        if isinstance(facts, dict):
            named.append((one.file, "measures", facts.get("fingerprint")))
    return [
        Claim(str(path), verb, maker)
        for path, verb, maker in named
        if isinstance(maker, str) and maker
    ]


def fingerprint_of(subject: Subject) -> str:
    """Of the run's own model file; "" before there is one."""
    value = subject.facts.get("fingerprint")
    return value if isinstance(value, str) else ""


def _of_claim(claim: Claim, makers: Sequence[Subject]) -> Finding:
    short = claim.fingerprint[:SHORT]
    if not makers:
        text = (
            f"{claim.what} names autoencoder {short}, of which no finished run is given to compare"
        )
        return Finding("plain", "not checked", text)
    for maker in makers:
        if claim.fingerprint == fingerprint_of(maker):
            return Finding("good", "agrees", f"{claim.what} {claim.verb} {maker.path} ({short})")
        decodes = maker.facts.get("decodes")
        if isinstance(decodes, list) and claim.fingerprint in decodes:
            text = f"{claim.what} {claim.verb} {short}, whose latents {maker.path} decodes too"
            return Finding("good", "agrees", text)
    others = ", ".join(f"{one.path} ({fingerprint_of(one)[:SHORT]})" for one in makers)
    text = (
        f"{claim.what} {claim.verb} autoencoder {short}, which is not {others}: what is made from "
        "one cannot be used with the other"
    )
    return Finding("bad", "does not agree", text)


def _of_set(subject: Subject, sets: Sequence[Subject]) -> list[Finding]:
    """Whether a model was whitened by a latent set that is given; unfinished runs by path alone."""
    whitening = subject.facts.get("whitening")
    if not isinstance(whitening, dict):
        here = [one for one in sets if _names(subject.config.get("latents"), one)]
        text = f"{subject.path} has no model file yet; the latents that its settings name are "
        return [Finding("plain", "by name", f"{text}{one.path}") for one in here]
    for one in sets:
        numbers = one.manifest.whitening if one.manifest else None
        if numbers and all(
            _close(whitening.get(name), values)
            for name, values in (("mean", numbers.mean), ("std", numbers.std))
        ):
            text = f"{subject.path} whitens by the means and stds of {one.path}"
            return [Finding("good", "agrees", text)]
    others = ", ".join(str(one.path) for one in sets)
    text = f"{subject.path} whitens by other means and stds than {others}: it learnt another latent set"
    return [Finding("bad", "does not agree", text)]


def _names(named: Any, subject: Subject) -> bool:  # noqa: ANN401 - from a config
    places = (str(subject.path), str(subject.path.absolute()))
    return isinstance(named, str) and named.rstrip("/") in places


def _close(theirs: Any, ours: Sequence[float]) -> bool:  # noqa: ANN401 - from a header
    return (
        isinstance(theirs, list)
        and len(theirs) == len(ours)
        and all(
            isinstance(a, int | float) and abs(a - b) <= TOLERANCE * max(1.0, abs(b))
            for a, b in zip(theirs, ours, strict=True)
        )
    )
