"""Tensors out of pickled checkpoints (`.ckpt`, `.pt`, `.pth`, `.bin`), without running what is in them.

The one place where anything is unpickled: in a process of its own, by torch's restricted reader
(`weights_only`), which builds tensors and plain containers and refuses every other global. Classes of
known training frameworks that stand beside the tensors in old checkpoints become inert stand-ins.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ldmkit.errors import DataError

TIMEOUT_SECONDS = 1800
MAX_CLASSES = 64
WRAPPERS = ("state_dict", "model", "module")
HARMLESS = (
    "pytorch_lightning.",
    "lightning.",
    "lightning_fabric.",
    "omegaconf.",
    "numpy.",
    "typing.",
)
REFUSED = 3  # how the other process says that its last line is a sentence
REFUSED_GLOBAL = re.compile(r"GLOBAL:? ([\w.]+)")


class StandIn:
    """In place of a class that is not needed: takes anything, does nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        """Forget the state."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file: safetensors as it is, anything else as a pickled checkpoint.

    Raises:
        DataError: the file is missing or damaged, or holds no tensors.
    """
    if path.suffix != ".safetensors":
        return read_pickled_tensors(path)
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"{path} cannot be read as safetensors ({error})") from error


def read_pickled_tensors(path: Path, *, timeout: float = TIMEOUT_SECONDS) -> dict[str, Tensor]:
    """All tensors of a pickled checkpoint by name; a nested `state_dict` is unwrapped.

    Args:
        path: of the checkpoint.
        timeout: seconds after which the reading process is ended.

    Raises:
        DataError: it is missing or damaged, holds no tensors, or asks for a global that could run code.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    with tempfile.TemporaryDirectory(prefix="ldmkit-") as folder:
        target = Path(folder) / "tensors.safetensors"
        command = [
            sys.executable,
            "-P",
            "-m",
            "ldmkit.unpickling",
            str(path.resolve()),
            str(target),
        ]
        try:
            done = subprocess.run(  # noqa: S603 - our own module, no shell
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise DataError(f"{path} was not read within {timeout:.0f} s") from error
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            reason = lines[-1] if lines and done.returncode == REFUSED else "it is damaged"
            raise DataError(f"{path} cannot be read: {reason}")
        return safetensors.torch.load_file(target)


def main(source: Path, target: Path) -> int:
    """In the other process: read `source`, write its tensors to `target` as safetensors."""
    try:
        tensors = unwrapped(_load(source))
        safetensors.torch.save_file(tensors, target)
    except Exception as error:  # whatever the file holds becomes a sentence over there
        print(_reason(error), file=sys.stderr)
        return REFUSED
    return 0


def unwrapped(value: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """The tensors in a checkpoint's dictionary, or in the one it wraps; each with its own memory.

    Raises:
        ValueError: there are none.
    """
    while isinstance(value, dict) and (inner := next((w for w in WRAPPERS if w in value), None)):
        if not isinstance(value[inner], dict):
            break
        value = value[inner]
    items = value.items() if isinstance(value, dict) else ()
    found = {
        name: item.detach().clone().contiguous()
        for name, item in items
        if isinstance(name, str) and isinstance(item, Tensor) and not item.is_sparse
    }
    if not found:
        raise ValueError("it holds no tensors by name")
    return found


def _load(source: Path) -> Any:  # noqa: ANN401
    stand_ins = _unknown_globals(source)
    for _ in range(MAX_CLASSES):
        refused = [name for name in stand_ins if not name.startswith(HARMLESS)]
        if refused:
            raise ValueError(_refusal(refused[0]))
        allowed: list[Any] = [(StandIn, name) for name in stand_ins]
        try:
            with torch.serialization.safe_globals(allowed):
                return torch.load(source, map_location="cpu", weights_only=True)  # noqa: TID251
        except Exception as error:  # a container before torch 1.6 names its globals one by one
            unknown = REFUSED_GLOBAL.search(str(error))
            if unknown is None or unknown[1] in stand_ins:
                raise
            stand_ins.append(unknown[1])
    raise ValueError(f"it names more than {MAX_CLASSES} classes")


def _unknown_globals(source: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(source)))
    except Exception:  # an older container, or none: the reader decides alone
        return []


def _reason(error: Exception) -> str:
    """What was refused; torch's advice on how to trust the file all the same is left out."""
    text = " ".join(str(error).split())
    if match := REFUSED_GLOBAL.search(text):
        return _refusal(match[1])
    if isinstance(error, ValueError):
        return text
    return "it is damaged, or no checkpoint of torch"


def _refusal(name: str) -> str:
    return f"it asks for {name}, which could run code"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
