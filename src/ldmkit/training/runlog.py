"""What a run leaves for its owner to read: numbers as JSON lines, preview pictures, TensorBoard."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ldmkit.durable import atomic_file, flush_to_disk, sweep_temporaries, write_text
from ldmkit.errors import NonFiniteError, StorageError, UsageError
from ldmkit.pixels import Sheet, save_png
from ldmkit.seals import CHECKSUM, line_state, lines_of, sealed_line
from ldmkit.terminal import say
from ldmkit.training import ranks

SAMPLES = "samples"


class Weighted(NamedTuple):
    """Sums over as many things as `number` says, with which the mean between two lines is taken.

    Of several numbers (both `[n]`) each has its own name, NAME_0 and so on. What nothing was counted
    of is left out of the line.
    """

    total: Tensor
    number: Tensor


class RunLog:
    """Averages scalars between log lines and appends them to `RUN/metrics.jsonl`.

    Lines that a resumed run will write again are cut off first, and those of the step it goes on with are not
    written twice, so that each stands there once. Unfinished previews of a killed process are removed.
    Of several processes the first one writes.

    Args:
        run: the run directory.
        start: the step that the run begins or goes on with.
        tensorboard: mirror the numbers as TensorBoard events in `RUN/tensorboard`.
    """

    def __init__(self, run: Path, start: int, *, tensorboard: bool) -> None:
        self.run = run
        self.file = run / "metrics.jsonl"
        self._writes = ranks.first()
        self._start = start
        self._there: set[frozenset[str]] = set()  # names in lines of the step it goes on with
        if self._writes:
            sweep_temporaries(run / SAMPLES)
            self._cut(start)
        self._sums: dict[str, tuple[Tensor, int]] = {}  # total, and how many steps had it
        self._weighted: dict[str, Weighted] = {}
        self._count, self._since = 0, time.monotonic()
        self._events = (
            _tensorboard_writer(run / "tensorboard", start)
            if tensorboard and self._writes
            else None
        )

    def add(self, scalars: Mapping[str, Tensor | Weighted]) -> None:
        """Add one step's scalars; they stay on their device until a line is due.

        The line gets their means over the steps that had them, or over what was counted.
        """
        for name, value in scalars.items():
            if isinstance(value, Weighted):
                former = self._weighted.get(name, Weighted(*map(torch.zeros_like, value)))
                self._weighted[name] = Weighted(
                    former.total + value.total.detach(), former.number + value.number
                )
            else:
                total, count = self._sums.get(name, (torch.zeros_like(value), 0))
                self._sums[name] = (total + value.detach(), count + 1)
        self._count += 1

    def write_means(
        self, step: int, batch_size: int, also: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Write the averages since the last line, and the rate; returns the averages.

        Args:
            step: before which the line is written.
            batch_size: samples of each step.
            also: further numbers for the same line.

        Raises:
            NonFiniteError: one of them is not a finite number.
        """
        if not self._count:
            return {}
        means = {name: float(total) / count for name, (total, count) in self._sums.items()}
        for name, value in means.items():
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"{name} became {value} between steps {step - self._count} and {step}; the last "
                    "checkpoint is from before: lower --lr, or look at the data there, and run again"
                )
        for name, value in self._weighted.items():
            means |= _means_of(name, value)
        now = time.monotonic()
        rate = self._count * batch_size / max(now - self._since, 1e-9)
        self._sums, self._weighted, self._count, self._since = {}, {}, 0, now
        self.write(step, {**means, **(also or {}), "images_per_second": rate})
        return means

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append one line; none that the step which the run goes on with has already."""
        if not self._writes or (step == self._start and frozenset(scalars) in self._there):
            return
        try:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(sealed_line(json.dumps({"step": step, **scalars})) + "\n")
        except OSError as error:
            raise StorageError(f"cannot write {self.file}: {error.strerror or error}") from error
        for name, value in scalars.items():
            if self._events is not None:
                self._events.add_scalar(name, value, step)

    def picture(self, step: int, name: str, sheet: Sheet) -> Path:
        """Write a sheet of preview pictures to `RUN/samples/NAME-STEP.png`."""
        path = self.run / SAMPLES / f"{name}-{step:09d}.png"
        with atomic_file(path) as temporary:
            save_png(temporary, sheet)
        if self._events is not None:
            self._events.add_image(name, sheet, step)
        return path

    def flush(self) -> None:
        """Have all lines on disk (called beside each checkpoint)."""
        if self._writes and self.file.exists():
            try:
                flush_to_disk(self.file)
                flush_to_disk(self.run)  # a new file is an entry of its directory
            except OSError as error:
                raise StorageError(
                    f"cannot write {self.file}: {error.strerror or error}"
                ) from error

    def _cut(self, start: int) -> None:
        if not self.file.exists():
            return
        kept, damaged = [], 0
        lines, _ = lines_of(self.file.read_bytes())  # not what a killed process left half written
        for line in lines:
            step = _step_of(line)
            damaged += step is None and bool(line.strip())
            if step is not None and step <= start:
                kept.append(line.decode() + "\n")
            if step == start:
                self._there.add(frozenset(json.loads(line)) - {"step", CHECKSUM})
        if damaged:
            say(f"warning: {damaged} damaged line(s) of {self.file} are left out from now on")
        write_text(self.file, "".join(kept))


def _step_of(line: bytes) -> int | None:
    """The step of a line of the log; None if it is none, or damaged."""
    if line_state(line) == "damaged":
        return None
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, OverflowError):
        return None


def _means_of(name: str, value: Weighted) -> dict[str, float]:
    totals, counts = value.total.flatten().tolist(), value.number.flatten().tolist()
    names = [name] if value.total.ndim == 0 else [f"{name}_{i}" for i in range(len(totals))]
    rows = zip(names, totals, counts, strict=True)
    return {key: total / count for key, total, count in rows if count}


def _tensorboard_writer(directory: Path, start: int):  # noqa: ANN202 - the class is an extra's
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "--tensorboard needs an extra: pip install 'ldmkit[tensorboard]'"
        ) from error
    return SummaryWriter(str(directory), purge_step=start)
