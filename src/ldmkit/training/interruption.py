"""Stopping a run, or saving it, from outside without losing it."""

import faulthandler
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from ldmkit.errors import InterruptedRun
from ldmkit.terminal import BEGAN, say
from ldmkit.training import ranks

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM) + (
    (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()
)
MARGIN = 2.0
"""Of the longest step so far: what has to be left of the time limit when a step begins."""
SAVE_NOW = "SAVE_NOW"
LOOK_SECONDS = 1.0
"""Between looks for SAVE_NOW, which may lie on a slow disk."""


class Interruption:
    """While this context is open, the loop learns once a step whether to save, or to save and stop.

    `requested` is whether this process is to stop, as of now; `stopping` and `saving` hold for a step. SIGINT,
    SIGTERM, SIGUSR1 and the time limit ask to stop; a second Ctrl-C leaves at once. A file SAVE_NOW in the
    run directory asks for a checkpoint. Of several processes one is enough that is asked: all settle it
    together.

    Args:
        run: the run directory, where there is one to look for SAVE_NOW in.
        time_limit: seconds since the command began after which it must have ended.
        stall_timeout: seconds after which a single step counts as stuck.
    """

    def __init__(
        self,
        run: Path | None = None,
        *,
        time_limit: float | None = None,
        stall_timeout: float | None = None,
    ) -> None:
        self.file = None if run is None else run / SAVE_NOW
        self.time_limit, self.stall_timeout = time_limit, stall_timeout
        self.requested = self.stopping = self.saving = False
        self._former: dict[int, object] = {}
        self._looked: float | None = None
        self._looked_for_file = -LOOK_SECONDS
        self._longest = 0.0

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # signals reach only this one
            for number in STOP_SIGNALS:
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        # torchrun signals the others when the first one leaves: they are on their way out already
        leaving = ranks.size() > 1 and kind is InterruptedRun
        for number, handler in self._former.items():
            restored = signal.SIG_IGN if leaving else handler
            signal.signal(number, restored)  # pyright: ignore[reportArgumentType]

    def look(self) -> None:
        """Called once before each step: settles `stopping` and `saving` until the next call."""
        faulthandler.cancel_dump_traceback_later()
        now = time.monotonic()
        if self._looked is not None:
            self._longest = max(self._longest, now - self._looked)
        self._looked = now
        limit = self.time_limit
        if not self.requested and limit is not None:
            self.requested = now - BEGAN + MARGIN * self._longest >= limit
            if self.requested:
                say(f"stopping: --time-limit is {limit:g} s, and {now - BEGAN:.0f} s are gone")
        asked = ranks.first() and self._asked_to_save(now)
        self.stopping, saving = ranks.any_rank(self.requested, asked)
        self.saving = self.stopping or saving

    def expect_a_step(self) -> None:
        """From now to the next look, being stuck ends the process and prints where every thread is.

        The clock starts when all processes are here: the first one may have written or measured.
        """
        ranks.wait_for_all()
        if self.stall_timeout is not None and sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(
                self.stall_timeout, exit=True, file=sys.__stderr__.fileno()
            )

    def saved(self) -> None:
        """A checkpoint is on disk: the file that asked for it goes. All processes wait for that."""
        ranks.wait_for_all()
        if self.saving and self.file is not None and ranks.first():
            self.file.unlink(missing_ok=True)

    def _asked_to_save(self, now: float) -> bool:
        if self.file is None or now - self._looked_for_file < LOOK_SECONDS:
            return False
        self._looked_for_file = now
        return self.file.exists()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        say("stopping after this step (again Ctrl-C: at once, without saving)")
