"""Snapshots of two averages during training, and any other average made of them afterwards.

`RUN/averages/step-000012000.safetensors` holds, for each of `WIDTHS`, the power-function average of all
parameters after 12000 updates (`0.NAME`, `1.NAME`), and the buffers as they are (`buffer.NAME`). Its
config builds the model, its facts are those of a diffusion model file of that step. Snapshots are never
removed by the run that made them, except those of steps that it is about to do again.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ldmkit.container import read_header
from ldmkit.diffusion_configs import AverageConfig, DiffusionConfig, SnapshotFormat
from ldmkit.durable import sweep_temporaries
from ldmkit.errors import DataError, NonFiniteError, UsageError
from ldmkit.facts import DiffusionFacts, SnapshotFacts, validated
from ldmkit.modelfile import load, require_kind, save
from ldmkit.terminal import say
from ldmkit.training import ranks
from ldmkit.training.averages import (
    Profile,
    Reconstruction,
    averaged_copy,
    power_decay,
    reconstruction,
    update_average,
)
from ldmkit.training.sharding import gathered

Module = TypeVar("Module", bound=nn.Module)

WIDTHS = (0.05, 0.10)
"""Relative widths of the averages that are tracked for snapshots (Karras et al. 2024, Sec. 3.2)."""
FOLDER = "averages"
FORMATS: dict[SnapshotFormat, torch.dtype] = {"float32": torch.float32, "float16": torch.float16}
MAX_ERROR = 0.05
"""Largest share of a profile that its reconstruction may miss."""
MAX_ROUNDING = 2**-8
"""Largest relative rounding error of reconstructed weights; half a step of bfloat16."""
STEP = 0.001
"""Grid of widths on which the reachable ones are looked for."""


class Snapshot(NamedTuple):
    """What the header of a snapshot says."""

    path: Path
    config: DiffusionConfig
    facts: SnapshotFacts


def tracked_averages(model: Module, config: AverageConfig) -> dict[str, Module]:
    """Copies to hold the averages for snapshots, by their name in checkpoints; none without snapshots."""
    if not config.snapshots:
        return {}
    return {f"average{index}": averaged_copy(model) for index in range(len(WIDTHS))}


def update_tracked(tracked: Mapping[str, nn.Module], model: nn.Module, step: int) -> None:
    """Move the averages for snapshots after the update of `step` (counted from 0)."""
    for width, average in zip(WIDTHS, tracked.values(), strict=False):
        update_average(average, model, power_decay(step, width))


def snapshot_path(run: Path, step: int) -> Path:
    """Where the snapshot after so many updates lies."""
    return run / FOLDER / f"step-{step:09d}.safetensors"


def snapshot_steps(run: Path) -> list[int]:
    """The steps of which a run has snapshots, in order."""
    files = (run / FOLDER).glob("step-*.safetensors")
    return sorted(int(p.stem[5:]) for p in files if re.fullmatch(r"step-\d{9}", p.stem))


def drop_snapshots_after(run: Path, step: int) -> None:
    """Remove the snapshots of steps that are to be done again, and what a killed process left.

    Of several processes that is the first one's work.
    """
    if not ranks.first():
        return
    sweep_temporaries(run / FOLDER)
    for later in snapshot_steps(run):
        if later > step:
            snapshot_path(run, later).unlink()


def save_snapshot(
    run: Path,
    step: int,
    tracked: Mapping[str, nn.Module],
    config: DiffusionConfig,
    facts: DiffusionFacts,
    average: AverageConfig,
) -> Path:
    """Write the averages after so many updates, whole or not at all.

    Of several processes that is the first one's work; the others give it their parts of what is divided.

    Args:
        run: the run directory.
        step: how many updates the averages have seen.
        tracked: what `tracked_averages` made.
        config: of the model.
        facts: of a model file of this step.
        average: in which format, and how often.

    Raises:
        NonFiniteError: a weight is not finite, or too large for float16; nothing is written.
        StorageError: it cannot be written.
        LostProcessError: another process of the run ended.
    """
    path = snapshot_path(run, step)
    tensors: dict[str, Tensor] = {}
    for index, module in enumerate(tracked.values()):
        averaged = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        for name, value in gathered(module.state_dict()).items():
            if name in averaged:
                tensors[f"{index}.{name}"] = value.to(FORMATS[average.snapshot_format])
            else:
                tensors[f"buffer.{name}"] = value
    if not ranks.first():
        return path
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise NonFiniteError(
                f"the average {name} is not finite in {average.snapshot_format} after step {step}; "
                "the last checkpoint is from before: lower --lr, or look at the data, and run again"
            )
    stated = SnapshotFacts(
        fingerprint="",
        step=step,
        every=average.snapshots,
        widths=WIDTHS,
        stored=average.snapshot_format,
        model=facts,
    )
    save(
        path,
        tensors,
        kind="averages",
        config=config.model_dump(mode="json"),
        facts=stated.model_dump(mode="json"),
    )
    return path


def find_snapshots(run: Path, step: int | None) -> list[Snapshot]:
    """The snapshots of a run up to a step, oldest first, from their headers.

    Args:
        run: the run directory.
        step: the last one; None for the newest there is.

    Raises:
        UsageError: the run has no snapshot of that step; the message says which it has.
        DataError: the run has none, one is damaged, or they are of different models.
    """
    steps = snapshot_steps(run)
    if not steps:
        raise DataError(f"{run} has no snapshots: train it with --average.snapshots STEPS")
    if step is not None and step not in steps:
        raise UsageError(
            f"--step {step}: {run} has no snapshot of that step; the nearest are {_around(step, steps)}"
        )
    chosen = [one for one in steps if step is None or one <= step]
    found = [_described(snapshot_path(run, one), one) for one in chosen]
    newest = found[-1]
    for other in found:
        same = (other.config, other.facts.widths, other.facts.stored)
        if same != (newest.config, newest.facts.widths, newest.facts.stored):
            raise DataError(
                f"{other.path} is of another run than {newest.path}: remove what does not belong here"
            )
    expected = range(newest.facts.every, chosen[-1] + 1, newest.facts.every)
    missing = sorted(set(expected) - set(chosen))
    if missing:
        names = ", ".join(snapshot_path(run, one).name for one in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        say(f"warning: {run / FOLDER} lacks {names}{more}; averages are made without")
    return found


def fits(snapshots: Sequence[Snapshot], widths: Sequence[float]) -> list[Reconstruction]:
    """How averages of these widths, up to the last snapshot, follow from the snapshots.

    Raises:
        UsageError: a width cannot be had from them; the message says which can.
    """
    found = _solved(snapshots, widths)
    for width, fit in zip(widths, found, strict=True):
        if _reached(fit):
            continue
        grid = [STEP * number for number in range(1, 289)]
        reached = [_reached(other) for other in _solved(snapshots, grid)]
        raise UsageError(
            f"a width of {width:g} cannot be made of the {len(snapshots)} snapshots up to step "
            f"{snapshots[-1].facts.step}: {fit.error:.1%} of its profile would be missing (at most "
            f"{MAX_ERROR:.0%}) and rounding would be {fit.rounding:.2g} of the weights (at most "
            f"{MAX_ROUNDING:.2g}); take {_stretches(grid, reached)}"
        )
    return found


def combined(snapshots: Sequence[Snapshot], fit: Reconstruction) -> dict[str, Tensor]:
    """The tensors of a reconstructed average, in float32; buffers are those of the last snapshot.

    One snapshot is in memory at a time, and the sum in float64.

    Raises:
        DataError: a snapshot is damaged, or lacks a tensor.
    """
    sums: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    per_snapshot = fit.coefficients.reshape(len(snapshots), -1)
    for snapshot, coefficients in zip(snapshots, per_snapshot, strict=True):
        _, tensors = load(snapshot.path, kind="averages")
        prefixes = [f"{index}." for index in range(len(coefficients))]
        buffers = _part(tensors, "buffer.")
        parts = [_part(tensors, prefix) for prefix in prefixes]
        for part in parts:
            if part.keys() != parts[0].keys() or (sums and part.keys() != sums.keys()):
                odd = sorted(part.keys() ^ (sums or parts[0]).keys())
                raise DataError(f"{snapshot.path}: the averages differ in tensor {odd[0]}")
        for coefficient, part in zip(coefficients.tolist(), parts, strict=True):
            for name, value in part.items():
                term = coefficient * value.double()
                sums[name] = sums[name].add_(term) if name in sums else term
    return {name: value.float() for name, value in sums.items()} | buffers


def _described(path: Path, step: int) -> Snapshot:
    header = read_header(path)
    require_kind(header, "averages", str(path))
    facts = validated(SnapshotFacts, header.facts, str(path))
    if facts.step != step:
        raise DataError(f"{path} is of step {facts.step}: give it back its name")
    return Snapshot(path, validated(DiffusionConfig, header.config, str(path)), facts)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}


def _solved(snapshots: Sequence[Snapshot], widths: Sequence[float]) -> list[Reconstruction]:
    kept = [Profile(one.facts.step, width) for one in snapshots for width in one.facts.widths]
    last = snapshots[-1].facts
    return reconstruction(kept, [Profile(last.step, width) for width in widths], last.stored)


def _reached(fit: Reconstruction) -> bool:
    return fit.error <= MAX_ERROR and fit.rounding <= MAX_ROUNDING


def _stretches(grid: Sequence[float], reached: Sequence[bool]) -> str:
    """The widths that can be had: 0.02 to 0.21."""
    ends = [
        (width, reached[index - 1 : index] != [True], reached[index + 1 : index + 2] != [True])
        for index, width in enumerate(grid)
        if reached[index]
    ]
    firsts = [f"{width:.3f}" for width, first, _ in ends if first]
    lasts = [f"{width:.3f}" for width, _, last in ends if last]
    pairs = zip(firsts, lasts, strict=True)
    return " or ".join(f"{low} to {high}" if low != high else low for low, high in pairs)


def _around(step: int, steps: Sequence[int]) -> str:
    below = [one for one in steps if one < step][-1:]
    above = [one for one in steps if one > step][:1]
    return " and ".join(str(one) for one in below + above)
