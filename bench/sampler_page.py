"""The tables and figures of docs/sampler-choice.md from what `bench/samplers.py` measured."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldmkit.diffusion.samplers import SAMPLERS
from ldmkit.durable import atomic_file
from ldmkit.metrics.bootstrap import frechet_draws, resampling_counts
from ldmkit.metrics.curves import Axes, Curve, line_plot
from ldmkit.metrics.frechet import FeatureStatistics, covariance_root
from ldmkit.pages.markup import STYLE

PAGE = Path(__file__).parent.parent / "docs" / "sampler-choice.md"
BEGIN, END = (
    "<!-- measured: bench/samplers.py --page writes what follows -->",
    "<!-- measured: end -->",
)
DRAWS = 200
BASELINE = "ddim"
"""Sampler whose Fréchet distance the others' are compared with, at the same number of calls."""
DECODED = "decoded"
Cells = dict[tuple[str, str, int], dict[str, Any]]


def measured(results: Path, num: int) -> Cells:
    """The cells that were measured with so many samples, by sampler, grid and calls."""
    if not results.exists():
        return {}
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    return {(r["sampler"], r["grid"], r["calls"]): r for r in rows if r["num"] == num}


def write(out: Path) -> None:
    """Write tables between the marks of the page, and the figures beside it.

    Args:
        out: where `bench/samplers.py` kept its results. Of several numbers of samples the one with most cells
            counts, of equals the largest.
    """
    lines = (out / "results.jsonl").read_text().splitlines()
    counts = [json.loads(line)["num"] for line in lines]
    num = max(set(counts), key=lambda count: (counts.count(count), count))
    cells = measured(out / "results.jsonl", num)
    names = [name for name in SAMPLERS if any(key[0] == name for key in cells)]
    calls = sorted({key[2] for key in cells if key[0] in names and key[1] == "auto"} - {200})
    text = "\n\n".join(
        [
            f"{num} samples of each; {len(cells)} of the cells are measured.",
            floor(cells, num),
            f"FD-effnet on the standard grid, by model calls:\n\n{table(cells, names, calls, 'fd')}",
            "The same less that of `ddim` with as many calls, with the 95 % interval of a bootstrap in which both "
            f"lose the same seeds:\n\n{differences(out, cells, names, calls, num)}",
            "Root mean square difference of latents to those of 200 calls, in standard deviations, of samplers "
            f"without randomness:\n\n{table(cells, names, calls, 'rms')}",
            f"FD-effnet (and that difference) on other grids:\n\n{other_grids(cells)}",
        ]
    )
    page = PAGE.read_text()
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}")
    figure(cells, names, "fd", "FD-effnet", PAGE.with_name("sampler-choice-fd.svg"))
    rms = "difference to 200 calls, std"
    figure(cells, names, "rms", rms, PAGE.with_name("sampler-choice-rms.svg"))


def floor(cells: Cells, num: int) -> str:
    """What the numbers can be compared with."""
    found = cells.get((DECODED, "auto", 0))
    if found is None:
        return ""
    return (
        f"Real pictures through the autoencoder, as many and of the same classes: FD-effnet {found['fd']:.1f}. No sampler "
        "can do better than that."
    )


def table(cells: Cells, names: Sequence[str], calls: Sequence[int], what: str) -> str:
    """A row for each sampler, a column for each number of calls."""
    rows = []
    for name in names:
        found = [cells.get((name, "auto", count), {}).get(what) for count in calls]
        if any(value is not None for value in found):
            rows.append([f"`{name}`", *(_shown(value, what) for value in found)])
    return as_table(["sampler", *map(str, calls)], rows)


def differences(
    out: Path, cells: Cells, names: Sequence[str], calls: Sequence[int], num: int
) -> str:
    """Fréchet distances against the baseline's, with paired intervals."""
    statistics = FeatureStatistics()
    statistics.add(torch.from_numpy(np.load(out / "cells" / "real.npz")["features"]))
    real = statistics.moments()
    root = covariance_root(real[1])
    once = torch.ones(1, num, dtype=torch.int64)
    weights = torch.cat([once, resampling_counts(num, DRAWS, 0)])

    def drawn(name: str, count: int) -> torch.Tensor:
        with np.load(out / "cells" / f"{name}-auto-{count}.npz") as file:
            features = torch.from_numpy(file["features"][:num])
        return frechet_draws(features, real, weights, root)

    columns = {
        count: {name: drawn(name, count) for name in names if (name, "auto", count) in cells}
        for count in calls
    }
    rows = [
        [f"`{name}`", *(_difference(columns[count], name) for count in calls)]
        for name in names
        if name != BASELINE
    ]
    return as_table(["sampler", *map(str, calls)], rows)


def other_grids(cells: Cells) -> str:
    """Samplers on grids of their own, beside the standard one."""
    grids = ["auto", *sorted({grid for _, grid, _ in cells} - {"auto"})]
    pairs = sorted({(name, count) for name, grid, count in cells if grid != "auto"})
    rows = []
    for name, count in pairs:
        found = [cells.get((name, grid, count), {}) for grid in grids]
        rows.append(
            [f"`{name}`, {count} calls"]
            + [
                _shown(cell.get("fd"), "fd")
                + (f" ({cell['rms']:.3f})" if cell.get("rms") is not None else "")
                for cell in found
            ]
        )
    return as_table(["", *grids], rows) if rows else "Not measured yet."


def figure(cells: Cells, names: Sequence[str], what: str, label: str, path: Path) -> None:
    """A plot of one number over model calls as an SVG file that stands alone."""
    curves = []
    for name in names:
        found = {count: cell[what] for (n, grid, count), cell in cells.items() if n == name
                 and grid == "auto" and count < 200 and cell.get(what) is not None}  # fmt: skip
        colour = f"s{names.index(name)}"
        style = "dashed" if SAMPLERS[name].stochastic else "marked"
        curves.append(Curve(name, sorted(found.items()), style, colour))
    plot = line_plot(label, curves, Axes("model calls", label, log=what == "rms"))
    if not plot:
        return
    colours = "".join(
        f".plot .s{n} {{ stroke: hsl({n * 137 % 360} 65% 45%); }}"
        f".plot .dot.s{n} {{ fill: hsl({n * 137 % 360} 65% 45%); }}"
        for n in range(len(names))
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="620" class="plot" {plot[17:]}'
    with atomic_file(path) as temporary:
        style = f"<style>{STYLE}{colours} svg {{ background: var(--page); }}</style>"
        temporary.write_text(head.replace("<title>", f"{style}<title>", 1) + "\n")


def as_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: float | None, what: str) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if what == "fd" else f"{value:.3f}"


def _difference(column: Mapping[str, torch.Tensor], name: str) -> str:
    if name not in column or BASELINE not in column:
        return ""
    apart = column[name] - column[BASELINE]
    value, draws = apart[0], apart[1:]
    ends = (draws - draws.mean() + value).quantile(draws.new_tensor([0.025, 0.975]))
    return f"{value:+.1f} ({ends[0]:+.1f} to {ends[1]:+.1f})"
