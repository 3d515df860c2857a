"""Towers of open_clip, frozen: their architectures by name, and weights that the user gives as a file.

Nothing is downloaded, and nothing unpickled here.
"""

import difflib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ldmkit.errors import DataError, UsageError
from ldmkit.modelfile import fingerprint, require_tensors
from ldmkit.torchvision_import import import_torchvision
from ldmkit.unpickling import read_tensors

Embeddings = Float[Tensor, "batch count width"]

OPENAI_MARKS = {"input_resolution", "context_length", "vocab_size"}
SUGGESTIONS = 3
WEIGHTS_FILE = "open_clip_model.safetensors"


class Weights(NamedTuple):
    """Which weights a tower is to have, and how the user said so."""

    name: str
    """Of the architecture, such as ViT-H-14."""
    file: Path | None
    """safetensors or a checkpoint; what it holds beside the tower is left out."""
    option: str
    """That gives the file, for errors: `--text-weights`."""


class FrozenNetwork:
    """A network of open_clip with its weights, in evaluation mode and without gradients.

    Not a module on purpose: what holds one neither trains it nor saves it. A deep copy is the same one.

    Args:
        network: open_clip's.
    """

    def __init__(self, network: Any) -> None:  # noqa: ANN401
        self.network = network.eval().requires_grad_(False)
        self.fingerprint = fingerprint(network.state_dict())
        """Of its weights, for the facts of what is made with it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenNetwork":
        return self

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.network.parameters()).device


def architecture(name: str) -> dict[str, Any]:
    """open_clip's own config of an architecture.

    Raises:
        UsageError: it has none of that name.
    """
    import_torchvision()
    import open_clip

    known = open_clip.list_models()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=SUGGESTIONS, cutoff=0.0)
        raise UsageError(
            f"open_clip has no architecture {name!r}; the nearest are {', '.join(nearest)}"
        )
    config: dict[str, Any] = open_clip.get_model_config(name)  # pyright: ignore[reportAssignmentType]
    return config


def published(name: str) -> list[dict[str, Any]]:
    """What open_clip says of each set of weights that was published for an architecture."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    return [get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)]


def read_weights(weights: Weights, config: Mapping[str, Any]) -> tuple[Path, dict[str, Tensor]]:
    """The file, and every tensor in it under its own name.

    Raises:
        UsageError: no file is given.
        DataError: it is missing, damaged or a program, or its weights want another architecture.
    """
    if weights.file is None:
        raise UsageError(f"{weights.name} needs its weights: {_advice(weights, config)}")
    path = weights.file
    if not path.is_file():
        raise DataError(f"there is no file {path}: {_advice(weights, config)}")
    if path.suffix != ".safetensors" and _is_torchscript(path):
        raise DataError(
            f"{path} is a TorchScript archive, a program: get the same weights as safetensors "
            f"({WEIGHTS_FILE} of timm's copies of OpenAI's models)"
        )
    return path, read_tensors(path)


def require_activation(path: Path, name: str, tensors: Mapping[str, Tensor], quick: bool) -> None:
    """Check that weights which bear OpenAI's marks get the activation that they were trained with.

    Raises:
        DataError: they do not.
    """
    if tensors.keys() >= OPENAI_MARKS and not quick:
        raise DataError(
            f"{path} holds OpenAI's weights, which were trained with another activation than "
            f"{name} has: take {name}-quickgelu"
        )


def give_weights(network: Any, tensors: dict[str, Tensor], path: Path, name: str) -> None:  # noqa: ANN401
    """Fill a network with tensors under its own names.

    Raises:
        DataError: one is missing, unknown, of another shape, or not finite.
    """
    require_tensors(network.state_dict(), tensors, f"{path} (as {name})")
    if odd := next((n for n, tensor in tensors.items() if not tensor.isfinite().all()), None):
        raise DataError(f"{path}: tensor {odd} holds NaN or infinity; get the file again")
    network.load_state_dict(tensors, assign=True)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in member for member in archive.namelist())


def _advice(weights: Weights, config: Mapping[str, Any]) -> str:
    """Where the weights are published, and how to pass them."""
    quick = config.get("quick_gelu", False)
    homes = [
        entry["hf_hub"].rpartition("/")
        for entry in published(weights.name)
        if entry.get("hf_hub") and entry.get("quick_gelu", False) == quick
    ]
    homes.sort(key=lambda home: not home[0].startswith("laion/"))
    if not homes:
        return (
            "open_clip names none that are published, so give a file that you trained with "
            f"{weights.option}"
        )
    where = " or ".join(
        f"{file or WEIGHTS_FILE} of {home}" for home, _, file in homes[:SUGGESTIONS]
    )
    return f"get {where} at huggingface.co, and give its path with {weights.option}"
