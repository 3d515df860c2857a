"""Commands of ldmkit in processes of their own that can be killed at any moment, hundreds of times.

A server process imports torch and ldmkit once and forks a child for each command, which saves the two
seconds that Python needs to start; all else is as in a shell: the command line, real signals, exit codes.
A child counts what it does to the disk below one directory, and can be told to kill itself (SIGKILL)
before, half-way through, or after the n-th of these calls, so that every state of the disk that a kill
can leave between two of them is met. The program itself knows nothing of this: the child replaces
functions of `os`, `io` and `safetensors` before it begins. It leaves without the interpreter's last clean-up,
which writes nothing.
"""

import builtins
import contextlib
import importlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

Where = Literal["before", "half", "after"]
CALLS = ("fsync", "replace", "rename", "unlink", "remove", "rmdir", "mkdir", "chmod")
HALVES = ("write", "save")
"""What takes time, and can be cut off in the middle."""


class Orders(NamedTuple):
    """What befalls a child."""

    root: str = ""
    """Calls on paths that begin with this are counted."""
    kill_at: int = -1
    """The number of a call, from 0."""
    kill_where: Where = "before"
    stop_after: int = 0
    """Send itself SIGTERM when it has done so many steps."""
    patience: float | None = None
    """Seconds that it waits for another owner of the directory; None as usual."""
    hold: str = ""
    """While there is a file of this name, fsync of a file does not return, as on a disk that is very busy.

    That of a directory does: one comes before a command owns its directory.
    """

    def holds(self, opened: int) -> bool:
        """Whether a sync of this descriptor is to wait longer."""
        regular = stat.S_ISREG(os.fstat(opened).st_mode)
        return bool(self.hold) and regular and Path(self.hold).exists()


class Call(NamedTuple):
    """One thing that was done to the disk."""

    name: str
    path: str


class Trace(NamedTuple):
    """What a child had done when it ended."""

    calls: list[Call]
    resumed: list[int]
    """Steps that training went on with."""
    imported: list[str]
    """Modules that the server had not had."""


class Ended(NamedTuple):
    """A child that is no more."""

    code: int
    """Exit code, or minus the number of the signal."""
    seconds: float
    trace: Trace
    stdout: str
    stderr: str


class Child(NamedTuple):
    """A command at work."""

    pid: int
    began: float
    notes: Path


class Server:
    """Forks a child for each command."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._asked({"ready": True}) == 1

    def start(self, arguments: list[str], orders: Orders) -> Child:
        """Begin a command."""
        self.count += 1
        notes = self.folder / f"child-{self.count}"
        request = {"arguments": arguments, "orders": orders._asdict(), "notes": str(notes)}
        began = time.monotonic()
        return Child(self._asked(request), began, notes)

    def wait(self, child: Child) -> Ended:
        """Until it has ended by itself."""
        code = self._asked({"wait": child.pid})
        seconds = time.monotonic() - child.began
        texts = [_taken(child.notes, name) for name in ("trace", "stdout", "stderr")]
        trace = _trace(texts[0])
        if trace.imported:  # else each child would import it anew
            self._asked({"import": trace.imported})
        return Ended(code, seconds, trace, *texts[1:])

    def wait_or_kill(self, child: Child, seconds: float) -> Ended:
        """Until it has ended, or so many seconds after it began."""
        time.sleep(max(child.began + seconds - time.monotonic(), 0.0))
        with contextlib.suppress(
            ProcessLookupError
        ):  # it has ended, but is there until it is waited for
            os.kill(child.pid, signal.SIGKILL)
        return self.wait(child)

    @staticmethod
    def has_ended(child: Child) -> bool:
        """Whether a child has nothing more to do than to be waited for."""
        state = Path(f"/proc/{child.pid}/stat").read_text().rpartition(") ")[2]
        return state.startswith("Z")

    def close(self) -> None:
        """End the server."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(120)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _asked(self, request: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server while the block lasts."""
    server = Server(folder)
    try:
        yield server
    finally:
        server.close()


def _taken(notes: Path, name: str) -> str:
    file = notes.with_name(f"{notes.name}.{name}")
    text = file.read_text(errors="replace") if file.exists() else ""
    file.unlink(missing_ok=True)
    return text


def _trace(text: str) -> Trace:
    lines = [line.split("\t") for line in text.splitlines()]
    calls = [Call(name, path) for kind, name, path in lines if kind == "call"]
    resumed = [int(name) for kind, name, _ in lines if kind == "resumed"]
    imported = [name for kind, names, _ in lines if kind == "imported" for name in names.split()]
    return Trace(calls, resumed, imported)


def serve() -> None:
    """Answer requests, one a line, until there are no more."""
    cli = importlib.import_module("ldmkit.cli")
    torch = importlib.import_module("torch")
    ldmkit = importlib.import_module("ldmkit")
    for name in ("train_ae", "train_diffusion", "encode", "sample"):
        getattr(ldmkit, name)
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "arguments" in request:
            answer = os.fork()
            if answer == 0:
                os._exit(_run(request, cli.app))
        elif "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = 1
            for name in request.get("import", ()):
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        print(answer, flush=True)


def _run(request: dict[str, Any], app: Callable[[list[str]], object]) -> int:
    """The child's part."""
    notes, orders = request["notes"], Orders(**request["orders"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{notes}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    trace = os.open(f"{notes}.trace", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    disk = Disk(orders, trace)
    disk.watch_calls()
    disk.watch_files()
    disk.watch_tensors()
    watch_the_steps(orders, trace)
    if orders.patience is not None:
        vars(importlib.import_module("ldmkit.ownership"))["PATIENCE"] = orders.patience
    before = set(sys.modules)
    try:
        app(request["arguments"])
    except SystemExit as ending:
        code = ending.code or 0
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(trace, f"imported\t{' '.join(set(sys.modules) - before)}\t\n".encode())
    return code if isinstance(code, int) else 1


class Disk:
    """Counts what is done below the root, notes what is done, and kills this process where it is due."""

    def __init__(self, orders: Orders, trace: int) -> None:
        self.orders, self.trace, self.done = orders, trace, 0

    def around(
        self,
        name: str,
        path: str,
        call: Callable[[], Any],
        half: Callable[[], object] | None = None,
    ) -> Any:
        """Do a call, if nothing comes between."""
        if not path.startswith(self.orders.root):
            return call()
        where = self.orders.kill_where if self.done == self.orders.kill_at else ""
        self.done += 1
        if where == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if where == "half" and half is not None:
            half()
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            result = call()
        except OSError:  # counts too: the directory above is made first, and then it is tried again
            name = f"failed {name}"
            raise
        finally:
            os.write(self.trace, f"call\t{name}\t{path}\n".encode())
            if where == "after":
                os.kill(os.getpid(), signal.SIGKILL)
        return result

    def watch_calls(self) -> None:
        """Those of `os`, which pathlib and shutil use too."""

        def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*given: Any, **named: Any) -> Any:
                while name == "fsync" and self.orders.holds(given[0]):
                    time.sleep(0.01)
                path = _path_of(name, given, named.get("dir_fd"))
                return self.around(name, path, lambda: original(*given, **named))

            return call

        for name in CALLS:
            setattr(os, name, watched(name, getattr(os, name)))

    def watch_files(self) -> None:
        """Those opened for writing, and each write."""
        plain = io.open

        def opened(file: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
            path = "" if isinstance(file, int) else str(Path(os.fspath(file)).absolute())
            if not set(mode) & set("wax+") or not path.startswith(self.orders.root):
                return plain(file, mode, *given, **named)
            found = self.around("open", path, lambda: plain(file, mode, *given, **named))
            write = found.write

            def torn(data: Any) -> None:
                write(data[: len(data) // 2])
                found.flush()

            found.write = lambda data: self.around(
                "write", path, lambda: write(data), lambda: torn(data)
            )
            return found

        io.open = builtins.open = opened  # the first is Path's

    def watch_tensors(self) -> None:
        """What safetensors writes, which it does under another name first."""
        safe = importlib.import_module("safetensors.torch")
        save_file, to_bytes = safe.save_file, safe.save

        def save(tensors: Any, filename: Any, metadata: Any = None) -> None:
            def torn() -> None:
                data = to_bytes(tensors, metadata)
                Path(filename).with_name(".tmpAbCdEf").write_bytes(data[: len(data) // 2])

            self.around("save", str(filename), lambda: save_file(tensors, filename, metadata), torn)

        vars(safe)["save_file"] = save


def _path_of(name: str, given: tuple[Any, ...], folder: int | None) -> str:
    """What a call is about: what it makes, or takes away."""
    if name == "fsync":
        return str(Path(f"/proc/self/fd/{given[0]}").readlink())
    path = Path(os.fspath(given[1] if name in ("replace", "rename") else given[0]))
    if folder is not None:
        path = Path(f"/proc/self/fd/{folder}").readlink() / path
    return str(path.absolute())


def watch_the_steps(orders: Orders, trace: int) -> None:
    """Note the step that training goes on with, and stop it where that is due."""
    state = importlib.import_module("ldmkit.training.checkpoint").TrainingState
    log = importlib.import_module("ldmkit.training.runlog").RunLog
    load, add, steps = state.load_latest, log.add, [0]

    def load_latest(self: Any, device: Any) -> int:
        step = load(self, device)
        os.write(trace, f"resumed\t{step}\t\n".encode())
        return step

    def add_and_stop(self: Any, scalars: Any) -> None:
        add(self, scalars)
        steps[0] += 1
        if steps[0] == orders.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    state.load_latest, log.add = load_latest, add_and_stop


if __name__ == "__main__":
    serve()
