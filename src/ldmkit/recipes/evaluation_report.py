"""What `ldmkit evaluate` says: numbers by name, sentences, and whether thresholds are met."""

from collections.abc import Sequence
from typing import Any

from ldmkit.data.items import Item
from ldmkit.evaluation_configs import EvaluateConfig
from ldmkit.metrics.memorization import Nearness, Verdict, nearest_first
from ldmkit.metrics.quality import Quality

NAMES_SHOWN = 100
"""Copies, or held-back duplicates, that the report names."""
TELLING = 2.0
"""Standard errors from one half, from which nearness to training pictures is called telling."""


def described(found: Quality) -> dict[str, Any]:
    """The metrics of one network for the report."""
    return {
        "samples": found.samples,
        "real": found.real,
        "floor_pictures": found.floor_pictures,
        "numbers": {label: number._asdict() for label, number in found.numbers.items()},
    }


def described_memory(
    near: tuple[Nearness, Nearness],
    found: Verdict,
    nearer: float,
    names: tuple[Sequence[Item], Sequence[Item], Sequence[Item]],
) -> dict[str, Any]:
    """What the search for copies found, for the report.

    Args:
        near: of the samples, of the held-back pictures.
        found: which samples are copies.
        nearer: share of samples nearer to training than to held-back pictures.
        names: samples, held-back and training pictures.
    """
    samples, held_back, training = names
    order = nearest_first(near[0])
    copies = [i for i in order if found.copies[i]]
    duplicates = [i for i in range(len(held_back)) if near[1].same[i]]
    return {
        "training": len(training),
        "held_back": len(held_back),
        "copies": len(copies),
        "limit_areas": found.limit,
        "median_distance": {
            "samples": near[0].areas.median().item(),
            "held_back": near[1].areas.median().item(),
        },
        "nearer_to_training": nearer,
        "copied": [_pair(i, near[0], samples, training) for i in copies[:NAMES_SHOWN]],
        "nearest": [_pair(i, near[0], samples, training) for i in order[:NAMES_SHOWN]],
        "held_back_duplicates": len(duplicates),
        "duplicated": [_pair(i, near[1], held_back, training) for i in duplicates[:NAMES_SHOWN]],
    }


def findings(quality: dict[str, dict[str, Any]], memory: dict[str, Any] | None) -> list[str]:
    """Sentences on what the numbers cannot say by themselves."""
    sentences = []
    for name, found in quality.items():
        half = found["floor_pictures"]
        if half is None:
            sentences.append(f"{name}: no floor, for want of real pictures to halve")
        elif half < found["samples"]:
            sentences.append(
                f"{name}: the floor is that of {half} pictures, for want of more; of {found['samples']} it "
                "would be lower"
            )
    if memory is None:
        sentences.append("copies were not looked for: that needs --data and --holdout")
        return sentences
    sentences.append(
        f"{memory['copies']} of the samples are copies of training pictures"
        + (": nearest.png shows the nearest" if memory["copies"] else "")
    )
    if memory["held_back_duplicates"]:
        sentences.append(
            f"{memory['held_back_duplicates']} of the {memory['held_back']} held-back pictures are training "
            "pictures too (`ldmkit check --holdout` lists them)"
        )
    share = memory["nearer_to_training"]
    count = min(found["samples"] for found in quality.values())
    if abs(share - 0.5) > TELLING * 0.5 / count**0.5:
        sentences.append(
            f"{100 * share:.0f} % of the samples are nearer to training than to held-back pictures (half would "
            "be without memory)"
        )
    return sentences


def check_thresholds(config: EvaluateConfig, report: dict[str, Any]) -> list[dict[str, Any]]:
    """Each threshold that was given, with the number found and whether it is met."""
    numbers = {
        label: number["value"]
        for found in report["quality"].values()
        for label, number in found["numbers"].items()
    }
    memory = report["memorization"] or {}
    table = (
        ("--max-fd", config.max_fd, "FD-effnet", numbers.get("FD-effnet")),
        ("--max-fid", config.max_fid, "FID", numbers.get("FID")),
        ("--max-kid", config.max_kid, "KID", numbers.get("KID")),
        ("--max-copies", config.max_copies, "copies", memory.get("copies")),
    )
    checks = []
    for option, bound, metric, value in table:
        if bound is None or value is None:
            continue
        met = value <= bound
        sentence = (
            f"{metric} is {value:.4g}, which {'meets' if met else 'misses'} {option} {bound:g}"
        )
        checks.append(
            {"metric": metric, "value": value, "option": option, "bound": bound}
            | {"met": met, "sentence": sentence}
        )
    return checks


def as_text(report: dict[str, Any]) -> str:
    """The report for people: each number with interval and floor, then the findings."""
    lines = []
    for found in report["quality"].values():
        half = found["floor_pictures"]
        lines.append(
            f"{found['samples']} samples against {found['real']} real pictures"
            + (f"; floor: {half} real against {half} others" if half else "")
        )
        for label, number in found["numbers"].items():
            line = f"{label}: {number['value']:.4g}"
            if number["interval"] is not None:
                low, high = number["interval"]
                line += f" (95 %: {low:.4g} to {high:.4g})"
            if number["floor"] is not None:
                line += f"; floor {number['floor']:.4g}"
            lines.append(line)
    return "\n".join([*lines, *(f"- {sentence}" for sentence in report["findings"])])


def _pair(
    place: int, near: Nearness, pictures: Sequence[Item], training: Sequence[Item]
) -> dict[str, Any]:
    return {
        "key": pictures[place].key,
        "training": training[int(near.place[place])].key,
        "areas": near.areas[place].item(),
        "same": bool(near.same[place]),
    }
