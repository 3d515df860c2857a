"""`ldmkit doctor`: can this machine and installation do the work?"""

from collections.abc import Iterator
from typing import Any

from ldmkit import surroundings
from ldmkit.care_configs import DoctorConfig
from ldmkit.surroundings import Line
from ldmkit.terminal import say
from ldmkit.training.collective import try_collective

SCHEMA_VERSION = 1


def doctor(config: DoctorConfig) -> dict[str, Any]:
    """Look at everything the work depends on.

    Returns:
        `{"schema_version": 1, "ok", "warn", "fail", "lines"}`; each line has name, state (ok, warn, fail),
        text and advice ("" where nothing need be done).
    """
    lines = [*examined(config)]
    counts = {state: sum(line.state == state for line in lines) for state in ("ok", "warn", "fail")}
    say(f"{counts['fail']} of {len(lines)} checks failed, {counts['warn']} warn")
    return {
        "schema_version": SCHEMA_VERSION,
        **counts,
        "lines": [line._asdict() for line in lines],
    }


def examined(config: DoctorConfig) -> Iterator[Line]:
    """All checks, the quick ones first."""
    yield from surroundings.packages()
    yield from surroundings.processor()
    yield from surroundings.devices()
    yield from surroundings.memory()
    yield from surroundings.limits()
    yield from surroundings.disk(config.directory)
    yield from surroundings.weights()
    trouble = try_collective(config.timeout)
    yield Line(
        "processes",
        "fail" if trouble else "ok",
        f"two processes that add up numbers (gloo): {trouble or 'they can'}",
        "see that this machine's own name resolves, or set GLOO_SOCKET_IFNAME=lo"
        if trouble
        else "",
    )


def complaint(report: dict[str, Any]) -> str | None:
    """One sentence if a check failed; None if not."""
    failed = [line for line in report["lines"] if line["state"] == "fail"]
    if not failed:
        return None
    first = failed[0]
    return f"{len(failed)} check(s) failed, the first: {first['text']}: {first['advice']}"


def as_text(report: dict[str, Any]) -> str:
    """A line for each check, and one below it for what to do."""
    lines: list[str] = []
    for line in report["lines"]:
        lines.append(f"{line['state']:<4}  {line['name']}: {line['text']}")
        if line["advice"]:
            lines.append(f"      {line['advice']}")
    return "\n".join(lines)
