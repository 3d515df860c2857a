"""How ldmkit talks to people: on standard error, and only there.

On a terminal a progress bar with rate and time left; in a notebook tqdm's; anywhere else (a log
file, a batch job) one plain line each half minute, because a bar redrawn into a log is megabytes
and a bar that hides is silence.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

HEARTBEAT_SECONDS = 30.0
BEGAN = time.monotonic()
"""About when the command began: this file is among the first that are imported."""

_quiet = False


@runtime_checkable
class Track(Protocol):
    """A running progress display."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Report `count` more units of work done, with a short note on how it goes."""
        ...


def be_quiet(quiet: bool) -> None:
    """Silence `say` and `track` for the rest of the process (errors still show)."""
    global _quiet
    _quiet = quiet


def say(text: str) -> None:
    """Tell the user one line, on standard error."""
    if not _quiet and speaks_for_all():
        print(text, file=sys.stderr, flush=True)


def speaks_for_all() -> bool:
    """Whether this is the first, or the only one, of the processes that torchrun started together."""
    return os.environ.get("RANK", "0") == "0"


def complain(text: str) -> None:
    """Print an error sentence on standard error, quiet or not."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def track(title: str, total: int, *, done: int = 0, unit: str = "it") -> Iterator[Track]:
    """Show progress from `done` to `total` units of work while the block runs."""
    if _quiet or not speaks_for_all():
        yield _Silence()
    elif _in_notebook():
        with _notebook_bar(title, total, done, unit) as bar:
            yield bar
    elif sys.stderr.isatty():
        with _terminal_bar(title, total, done, unit) as bar:
            yield bar
    else:
        heartbeat = _Heartbeat(title, total, done, unit)
        yield heartbeat
        heartbeat.close()


class _Silence:
    def advance(self, count: int = 1, note: str = "") -> None:
        pass


class _Heartbeat:
    def __init__(self, title: str, total: int, done: int, unit: str) -> None:
        self.title, self.total, self.done, self.unit = title, total, done, unit
        self.started = self.spoken = time.monotonic()
        self.start_count, self.note = done, ""
        say(f"{title}: {done}/{total} {unit}")

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        self.note = note or self.note
        if time.monotonic() - self.spoken >= HEARTBEAT_SECONDS:
            self._speak()

    def _speak(self) -> None:
        self.spoken = time.monotonic()
        rate = (self.done - self.start_count) / max(self.spoken - self.started, 1e-9)
        left = (self.total - self.done) / rate if rate else float("inf")
        say(
            f"{self.title}: {self.done}/{self.total} {self.unit}, {rate:.2f} {self.unit}/s, "
            f"{format_duration(left)} left{'  ' + self.note if self.note else ''}"
        )

    def close(self) -> None:
        seconds = time.monotonic() - self.started
        say(
            f"{self.title}: {self.done}/{self.total} {self.unit} in {format_duration(seconds)}"
            f"{'  ' + self.note if self.note else ''}"
        )


class _RichBar:
    def __init__(self, progress: Progress, started: float, done: int, unit: str) -> None:
        self.progress, self.started, self.first, self.done = progress, started, done, done
        self.unit, self.note = unit, ""

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        rate = (self.done - self.first) / max(time.monotonic() - self.started, 1e-9)
        task = self.progress.task_ids[0]
        self.note = note or self.note
        self.progress.update(
            task, completed=self.done, rate=f"{rate:.1f} {self.unit}/s", note=self.note
        )


@contextmanager
def _terminal_bar(title: str, total: int, done: int, unit: str) -> Iterator[Track]:
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=5) as progress:
        progress.add_task(title, total=total, completed=done, rate="", note="")
        yield _RichBar(progress, time.monotonic(), done, unit)


@contextmanager
def _notebook_bar(title: str, total: int, done: int, unit: str) -> Iterator[Track]:
    from tqdm.auto import tqdm  # only in notebooks: the terminal's bar is rich's

    class NotebookBar:
        def advance(self, count: int = 1, note: str = "") -> None:
            if note:
                bar.set_postfix_str(note)
            bar.update(count)

    with tqdm(desc=title, total=total, initial=done, unit=unit) as bar:
        yield NotebookBar()


def _in_notebook() -> bool:
    shell = sys.modules.get("IPython")
    return bool(shell and getattr(shell.get_ipython(), "kernel", None))


def format_duration(seconds: float) -> str:
    """Seconds as a person would say them: 42s, 3m10s, 2h05m."""
    if seconds == float("inf"):
        return "unknown time"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
