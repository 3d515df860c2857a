"""A diffusion model of ours and its autoencoder as a folder that diffusers runs.

`LDMPipeline` takes the folder where it fits (no condition, a discrete schedule, square latents);
elsewhere a short program, `use.py`, lies in it. What was written is run by diffusers against ours
before the folder gets its name.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.durable import atomic_directory, atomic_file, write_text
from ldmkit.interop.autoencoder_writing import write_autoencoder_folder
from ldmkit.interop.class_tables import TABLE
from ldmkit.interop.diffusers_import import CLASS_FILE, CLASS_NAMES, CLASS_TABLE, SCHEDULER
from ldmkit.interop.diffusers_proof import import_diffusers, prove
from ldmkit.interop.diffusers_scheduler import DDIM, FLOW, schedule_page
from ldmkit.interop.diffusers_unet import unet_page
from ldmkit.interop.diffusers_usage import Parts, usage_program
from ldmkit.interop.latent_scale import with_one_scale
from ldmkit.interop.layout import Tensors
from ldmkit.interop.reading import CONFIG, WEIGHTS_FILES
from ldmkit.interop.unet_layout import UNET_DIFFUSERS, to_foreign_unet
from ldmkit.interop.whole_export import BothStages
from ldmkit.modelfile import write_tensors
from ldmkit.terminal import say


class Described(NamedTuple):
    """An autoencoder as diffusers gets it, and what its `config.json` says of the scale."""

    model: Autoencoder
    scaling: dict[str, Any]


class Folder(NamedTuple):
    """What is written where, and for what."""

    unet: dict[str, Any]
    scheduler: dict[str, Any]
    autoencoder: str
    """Name of its folder."""
    is_pipeline: bool


def export_folder(both: BothStages, out: Path) -> None:
    """Write a diffusion model and its autoencoder as a folder for diffusers, whole or not at all.

    One step of denoising and one decoding by diffusers must agree with ours within 1e-4 of the
    largest value.

    Args:
        both: what to write.
        out: the folder.

    Raises:
        DataError: diffusers cannot express something, or what was written differs from ours.
        UsageError: diffusers is not installed.
    """
    import_diffusers()  # before anything is written: the folder is proved by running it
    scaled = _described(both)
    pages = _pages(both, scaled)
    with atomic_directory(out) as folder:
        for name in ("unet", "scheduler", pages.autoencoder):
            (folder / name).mkdir()
        _write_json(folder / "unet" / CONFIG, pages.unet)
        _write_json(folder / "scheduler" / SCHEDULER, pages.scheduler)
        _write_weights(folder, both)
        kind = write_autoencoder_folder(
            folder / pages.autoencoder, scaled.model, both.preprocessing, scaled.scaling
        )["_class_name"]
        if pages.is_pipeline:
            _write_json(folder / "model_index.json", _index(pages, kind))
        else:
            write_text(folder / "use.py", usage_program(_parts(pages, kind, both, scaled)))
        said = prove(folder, pages.autoencoder, both)
    runs = "diffusers.LDMPipeline" if pages.is_pipeline else f"python {out / 'use.py'}"
    say(f"largest relative differences as diffusers runs it: {said}; `{runs}` draws from it")


def _write_weights(folder: Path, both: BothStages) -> None:
    """The U-Net's, and the table of classes: in it where that is added to the time, else beside it."""
    tensors, names = to_foreign_unet(both.model.unet, UNET_DIFFUSERS), {}
    if both.told is not None:
        table, names = both.model.state_dict()[TABLE], {CLASS_NAMES: json.dumps(both.told.names)}
        if both.told.attended:
            _save(folder / CLASS_FILE, {CLASS_TABLE: table}, names)
        else:
            tensors[UNET_DIFFUSERS.class_table] = table
    _save(folder / "unet" / WEIGHTS_FILES[0], tensors, names)


def _described(both: BothStages) -> Described:
    """The whitening as one factor where it is one, else moved into the autoencoder where that is exact."""
    scaled = with_one_scale(both.autoencoder, both.facts.whitening)
    if scaled is not None:
        return Described(scaled.autoencoder, {"scaling_factor": scaled.factor})
    say("a codebook's latents cannot be scaled by channel inside: use.py does it before decoding")
    mean, std = both.facts.whitening.mean, both.facts.whitening.std
    scaling = {"scaling_factor": 1.0, "latents_mean": list(mean), "latents_std": list(std)}
    return Described(both.autoencoder, scaling)


def _pages(both: BothStages, scaled: Described) -> Folder:
    _, height, width = both.facts.latent_shape
    scheduler = schedule_page(both.model.config)
    is_pipeline = (
        scheduler["_class_name"] == DDIM
        and both.told is None
        and height == width
        and "latents_std" not in scaled.scaling
    )
    unet = unet_page(both.model.unet, (height, width))
    if both.told is not None and not both.told.attended:
        unet["num_class_embeds"] = len(both.told.names) + 1
    quantised = scaled.model.codebook is not None
    return Folder(
        unet=unet,
        scheduler=scheduler,
        autoencoder="vqvae" if is_pipeline or quantised else "vae",  # the pipeline's only name
        is_pipeline=is_pipeline,
    )


def _index(pages: Folder, autoencoder: str) -> dict[str, Any]:
    return {
        "_class_name": "LDMPipeline",
        "scheduler": ["diffusers", pages.scheduler["_class_name"]],
        "unet": ["diffusers", pages.unet["_class_name"]],
        pages.autoencoder: ["diffusers", autoencoder],
    }


def _parts(pages: Folder, kind: str, both: BothStages, scaled: Described) -> Parts:
    return Parts(
        unet=pages.unet["_class_name"],
        autoencoder=kind,
        scheduler=pages.scheduler["_class_name"],
        folder=pages.autoencoder,
        latents=both.facts.latent_shape,
        classes=None if both.told is None else both.told.way,
        flow=pages.scheduler["_class_name"] == FLOW,
        by_channel="latents_std" in scaled.scaling,
        image_channels=scaled.model.image_channels,
    )


def _write_json(path: Path, page: dict[str, Any]) -> None:
    write_text(path, json.dumps(page, indent=2) + "\n")


def _save(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    with atomic_file(path) as temporary:
        write_tensors(temporary, tensors, {"format": "pt", **metadata})
