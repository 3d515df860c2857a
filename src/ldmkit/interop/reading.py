"""From a file or folder of another project to an autoencoder of ours."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ldmkit.container import METADATA_KEY
from ldmkit.errors import DataError
from ldmkit.interop.diffusers_layout import from_diffusers
from ldmkit.interop.layout import Imported, Tensors
from ldmkit.interop.ldm_layout import from_ldm
from ldmkit.unpickling import read_pickled_tensors

CONFIG = "config.json"
"""Beside every model in folders of diffusers."""
PICKLED = (".ckpt", ".pt", ".pth", ".bin")
SUBFOLDERS = ("", "vae", "vqvae", "movq")
"""Where a folder of diffusers has its autoencoder: itself, or within a whole pipeline."""
WEIGHTS = "diffusion_pytorch_model"
WEIGHTS_FILES = (f"{WEIGHTS}.safetensors", f"{WEIGHTS}.fp16.safetensors", f"{WEIGHTS}.bin")
LEGACY_KEY, RESOLUTION_KEY = "legacy_commitment", "resolution"
"""In the metadata of files that ldmkit exports: what their layouts have no place for."""
MAX_PAGE_BYTES = 1 << 20


def read_autoencoder(source: Path) -> Imported:
    """The autoencoder in a single file of the ldm layout or in a folder of diffusers.

    Raises:
        DataError: it is missing, damaged, or not an autoencoder that ours can express.
    """
    if not source.is_dir():
        return autoencoder_in(*read_tensors(source), str(source))
    folders = (source / name for name in SUBFOLDERS)
    folder = next((folder for folder in folders if (folder / CONFIG).is_file()), source)
    page = read_page(folder / CONFIG)
    tensors, metadata = read_tensors(weights_of(folder))
    return from_diffusers(tensors, page, str(folder), legacy_commitment=_is_legacy(metadata))


def read_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """All tensors of a file, pickled or safetensors, and what the latter's header says beside them.

    Raises:
        DataError: it is missing, damaged, or a file of ldmkit already.
    """
    if path.suffix in PICKLED:
        return read_pickled_tensors(path), {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            if METADATA_KEY in metadata:
                raise DataError(f"{path} is a file of ldmkit already: `ldmkit inspect` says which")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read as safetensors: {error}") from error


def autoencoder_in(tensors: Tensors, metadata: dict[str, str], source: str) -> Imported:
    """The autoencoder among the tensors of a file of the ldm layout.

    Raises:
        DataError: there is none, or it is not one that ours can express.
    """
    imported = from_ldm(tensors, source, legacy_commitment=_is_legacy(metadata))
    resolution = metadata.get(RESOLUTION_KEY, "")
    return imported._replace(size=int(resolution) if resolution.isdecimal() else None)


def _is_legacy(metadata: dict[str, str]) -> bool:
    return metadata.get(LEGACY_KEY, "true") == "true"


def weights_of(folder: Path) -> Path:
    """The file with the weights of a model in a folder of diffusers.

    Raises:
        DataError: there is none.
    """
    weights = next((folder / name for name in WEIGHTS_FILES if (folder / name).is_file()), None)
    if weights is None:
        raise DataError(f"{folder} has none of {', '.join(WEIGHTS_FILES)}")
    return weights


def read_page(path: Path) -> dict[str, Any]:
    """A JSON file that is one table of settings.

    Raises:
        DataError: it is missing, or something else.
    """
    try:
        with path.open("rb") as file:
            page = json.loads(file.read(MAX_PAGE_BYTES))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(page, dict):
        raise DataError(f"{path} is no table of settings")
    return page
