"""Stopping a run from outside without losing it."""

import signal
import threading
from types import FrameType

from ldmkit.terminal import say

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM) + (
    (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()
)


class Interruption:
    """While this context is open, SIGINT, SIGTERM and SIGUSR1 ask the loop to save and stop.

    The loop looks at `requested` once a step. A second Ctrl-C leaves at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._former: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # signals reach only this one
            for number in STOP_SIGNALS:
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        say("stopping after this step (again Ctrl-C: at once, without saving)")
