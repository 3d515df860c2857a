"""What can go wrong, and the exit code each kind of trouble ends a command with.

Every error carries one sentence for the user: what, where, and what to do about it. The command
line prints that sentence and leaves with `exit_code`; the traceback shows only under `--debug`.
"""


class LdmkitError(Exception):
    """An error that a user can act on; its text is the whole message.

    `alike` says that all processes of a run meet it, so that the first one's word is enough.
    """

    exit_code = 1
    alike = False


class UsageError(LdmkitError):
    """A command or a configuration that cannot be carried out as typed."""

    exit_code = 2
    alike = True


class DataError(LdmkitError):
    """Input that cannot be used, or two files that do not belong together."""

    exit_code = 3


class QualityError(DataError):
    """A result that misses a threshold which the user set."""


class StorageError(LdmkitError):
    """No space, or reading or writing failed."""

    exit_code = 4


class NonFiniteError(LdmkitError):
    """Training met a loss or gradient that is not a finite number."""

    exit_code = 5
    alike = True


class CollapseError(LdmkitError):
    """Adversarial training broke down; `step` is the one before which it was noticed."""

    exit_code = 5
    alike = True

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class OutOfMemoryError(LdmkitError):
    """The machine or the device ran out of memory."""

    exit_code = 6


class InterruptedRun(LdmkitError):
    """A run that was asked to stop, saved its state, and continues when started again."""

    exit_code = 75
    alike = True


class LostProcessError(LdmkitError):
    """Another of the processes that train together has ended."""

    alike = True
