"""What was measured, as people and programs read it."""

import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clock import Ratio, Spread, Timing, ratio_of, spread_of
from measuring import OURS_NAME, REFERENCE, CaseRun, Run

PACKAGES = ("torch", "diffusers", "monai", "denoising-diffusion-pytorch", "lpips", "ldmkit")
SCHEMA = 1
NOTES = {
    "ae-train": (
        "Pictures to pictures, L1 and KL, backward, update (peers AdamW, ldmkit Adam: the same work but for one "
        "product a weight). ldmkit: `training_step.take_step`."
    ),
    "ae-train-gan": (
        "With VGG16 of the lpips package (random weights), PatchGAN and its adaptive weight, both sides updated. "
        "Peers: a plain loop with ldmkit's discriminator; `ldmkit:vgg16` has the distance of the box, VGG16 up to "
        "relu3_3: less work."
    ),
    "encode": "Pictures to moments, no gradients; ldmkit: `encode_batch`, to tensors as they are stored.",
    "decode": "Latents to pictures, no gradients; ldmkit: the groups that `decode` makes of a block.",
    "unet-train": (
        "Noise, forward, mean squared error, backward, norm of the gradient, AdamW, average of the weights. ldmkit: "
        "`draw_batch`, `take_step`."
    ),
    "sample": (
        "25 DDIM steps with guidance. Peers: one doubled batch, a plain loop; ldmkit: `draw_latents` in the groups that "
        "`sample` makes."
    ),
}


class Line(NamedTuple):
    """A case as it is shown."""

    case: CaseRun
    spread: Spread
    over_default: Ratio | None
    """Times as fast as diffusers as it is."""
    over_best: Ratio | None
    """Times as fast as diffusers' fastest sound setting of the run."""
    share: float | None
    """Of the measured peak of its number format."""
    others: float
    """Cores that others used, median over the timings."""


def best_of(run: Run) -> CaseRun | None:
    """The fastest setting of diffusers that one would use."""
    peers = [one for one in run.cases if one.name.startswith("diffusers:") and one.sound]
    return min(peers, key=lambda one: _spread(run, one).median) if peers else None


def lines_of(run: Run) -> list[Line]:
    """Sum up a run."""
    default = next((one for one in run.cases if one.name == REFERENCE), None)
    best = best_of(run)
    lines = []
    for one in run.cases:
        spread, peak = _spread(run, one), run.peaks[one.number]
        share = one.flops / spread.median / peak if one.flops and peak else None
        ratios = [_ratio(run, reference, one) for reference in (default, best)]
        others = sorted(timing.others for timing in one.timings)[len(one.timings) // 2]
        lines.append(Line(one, spread, ratios[0], ratios[1], share, others))
    return lines


def markdown(name: str, kind: str, run: Run) -> str:
    """A table of one workload for docs/performance.md."""
    best = best_of(run)
    title = (
        f"**{name}**: {NOTES[kind]} {run.threads} threads of {run.cores} cores, {run.device}; peak of this run "
        + ", ".join(f"{number} {rate / 1e9:,.0f} GFLOP/s" for number, rate in run.peaks.items())
        + (f"; diffusers' best sound setting: {best.name.partition(':')[2]}." if best else ".")
    )
    rows = [
        "| case | parameters | ms (quartiles) | x default | x best | model GFLOP | of peak | peak MB | others | undisturbed |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *("| " + " | ".join(cells(line)) + " |" for line in lines_of(run)),
    ]
    return "\n".join([title, "", *rows])


def text(name: str, kind: str, run: Run) -> str:
    """The same for a terminal."""
    head = ["case", "parameters", "ms (quartiles)", "x default", "x best", "GFLOP", "peak %"]
    table = [[*head, "MB", "others", "calm"], *(cells(line) for line in lines_of(run))]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rows = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    peaks = ", ".join(f"{number} {rate / 1e9:,.0f}" for number, rate in run.peaks.items())
    return "\n".join([f"{name}: {NOTES[kind]}", f"peak of this run, GFLOP/s: {peaks}", *rows])


def cells(line: Line) -> list[str]:
    """A line of a table."""
    case, spread = line.case, line.spread
    marks = ("" if case.same else " (other work)") + ("" if case.sound else " (unsound)")
    name = f"**{case.name}**" if case.name == OURS_NAME else case.name
    ms = f"{spread.median * 1e3:,.0f} ({spread.low * 1e3:,.0f} to {spread.high * 1e3:,.0f})"
    return [
        name + marks,
        f"{case.parameters:,}",
        ms,
        _shown(line.over_default),
        _shown(line.over_best),
        "" if case.flops is None else f"{case.flops / 1e9:,.1f}",
        "" if line.share is None else f"{100 * line.share:.0f} %",
        "" if case.memory is None else f"{case.memory / 1e6:,.0f}",
        f"{line.others:.2f}",
        f"{spread.undisturbed} of {spread.taken}"
        + (" !" if spread.undisturbed < spread.taken else ""),
    ]


def machine() -> dict[str, Any]:
    """What was measured on, and with which versions."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(": ")[2] for line in cpu.splitlines() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "python": platform.python_version(),
        "versions": found,
    }


def document(runs: Sequence[tuple[str, str, Run]]) -> dict[str, Any]:
    """Everything that was measured, down to each timing: (title, kind, run) of each workload."""
    return {
        "schema_version": SCHEMA,
        "machine": machine(),
        "runs": [
            {
                "title": title,
                "kind": kind,
                **run._asdict(),
                "cases": [
                    {**one._asdict(), "timings": [timing._asdict() for timing in one.timings]}
                    for one in run.cases
                ],
            }
            for title, kind, run in runs
        ],
    }


def read_document(page: dict[str, Any]) -> list[tuple[str, str, Run]]:
    """What `document` made.

    Raises:
        SystemExit: it is of another version.
    """
    if page.get("schema_version") != SCHEMA:
        raise SystemExit(
            f"the document has schema_version {page.get('schema_version')}, not {SCHEMA}"
        )
    found = []
    for entry in page["runs"]:
        title, kind = entry.pop("title"), entry.pop("kind")
        cases = [
            CaseRun(**{**one, "timings": [Timing(**timing) for timing in one["timings"]]})
            for one in entry.pop("cases")
        ]
        found.append((title, kind, Run(**entry, cases=cases)))
    return found


def _spread(run: Run, case: CaseRun) -> Spread:
    return spread_of(case.timings, run.threads, run.cores)


def _ratio(run: Run, reference: CaseRun | None, case: CaseRun) -> Ratio | None:
    if reference is None:
        return None
    return ratio_of(reference.timings, case.timings, run.threads, run.cores)


def _shown(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
