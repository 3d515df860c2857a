"""An autoencoder of ours into files of other projects' layouts."""

import json
from pathlib import Path
from typing import Any

from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.durable import atomic_file
from ldmkit.interop import diffusers_layout
from ldmkit.interop.layout import Tensors
from ldmkit.interop.reading import CONFIG, LEGACY_KEY, RESOLUTION_KEY, WEIGHTS_FILES
from ldmkit.modelfile import write_tensors


def write_autoencoder_folder(
    folder: Path, model: Autoencoder, preprocessing: PreprocessingConfig, scaling: dict[str, Any]
) -> dict[str, Any]:
    """Write the two files of an autoencoder in diffusers' layout into a folder that exists.

    Args:
        folder: where.
        model: any but the identity.
        preprocessing: of its pictures.
        scaling: what `config.json` is to say of the scale of its latents.

    Returns:
        What `config.json` says.

    Raises:
        DataError: diffusers has no word for something in the config; it is named.
    """
    page = diffusers_layout.config_page(model.config, preprocessing, scaling)
    tensors = diffusers_layout.to_diffusers(model.state_dict(), model.config)
    with atomic_file(folder / WEIGHTS_FILES[0]) as temporary:
        save_foreign(temporary, tensors, model, preprocessing)
    with atomic_file(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(page, indent=2) + "\n", encoding="utf-8")
    return page


def save_foreign(
    path: Path, tensors: Tensors, model: Autoencoder, preprocessing: PreprocessingConfig
) -> None:
    """Write an autoencoder's tensors, and in the metadata what the layouts have no place for."""
    legacy = model.config.codebook.legacy_commitment
    metadata = {
        "format": "pt",  # other readers insist on it
        LEGACY_KEY: "true" if legacy else "false",
        RESOLUTION_KEY: str(preprocessing.size),
    }
    write_tensors(path, tensors, metadata)
