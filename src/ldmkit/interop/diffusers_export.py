"""A diffusion model of ours and its autoencoder as a folder that diffusers runs.

`LDMPipeline` takes the folder where it fits (no condition, a discrete schedule, square latents);
elsewhere a short program, `use.py`, lies in it. What was written is run by diffusers against ours
before the folder gets its name.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch

from ldmkit.assembly import (
    autoencoder_facts,
    diffusion_facts,
    load_autoencoder,
    load_diffusion,
    require_same_autoencoder,
)
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.durable import atomic_directory, atomic_file, write_text
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import DiffusionFacts, Whitening
from ldmkit.interop.autoencoder_writing import write_autoencoder_folder
from ldmkit.interop.diffusers_import import (
    CLASS_FILE,
    CLASS_NAMES,
    CLASS_TABLE,
    CONFIG,
    SCHEDULER,
)
from ldmkit.interop.diffusers_proof import import_diffusers, prove
from ldmkit.interop.diffusers_scheduler import DDIM, FLOW, schedule_page
from ldmkit.interop.diffusers_unet import unet_page
from ldmkit.interop.diffusers_usage import Parts, usage_program
from ldmkit.interop.latent_scale import folded, folds, is_uniform
from ldmkit.interop.layout import Tensors
from ldmkit.interop.reading import WEIGHTS_FILES
from ldmkit.interop.unet_layout import UNET_DIFFUSERS, to_foreign_unet
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.terminal import say

PARTS_OF_MODEL = {"unet", "label", "latent_mean", "latent_std"}


class Scaled(NamedTuple):
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


def export_diffusion(path: Path, ae: Path | None, out: Path) -> Path:
    """Write a diffusion model and its autoencoder as a folder for diffusers, whole or not at all.

    One step of denoising and one decoding by diffusers must agree with ours within 1e-4 of the
    largest value.

    Args:
        path: the diffusion model's file.
        ae: the autoencoder's.
        out: the folder.

    Returns:
        The folder.

    Raises:
        DataError: diffusers cannot express something, the files do not belong together, or what
            was written differs from ours.
        UsageError: no autoencoder is given, the output exists, or diffusers is not installed.
    """
    if ae is None:
        raise UsageError(f"{path} is a diffusion model: give the autoencoder of its latents (--ae)")
    if out.exists():
        raise UsageError(f"{out} exists: give another --out, or remove it first")
    facts = diffusion_facts(path)
    require_same_autoencoder(facts.autoencoder, ae, f"the latents of {path}")
    model, autoencoder = load_diffusion(path), load_autoencoder(ae)
    if autoencoder.config.bottleneck == "identity":
        raise DataError(f"{ae} has no networks (bottleneck identity): diffusers has no such part")
    _require_plain(model, path)
    import_diffusers()  # before anything is written: the folder is proved by running it
    scaled = _scaled(autoencoder, model)
    pages = _pages(model, facts, scaled)
    with atomic_directory(out) as folder:
        for name in ("unet", "scheduler", pages.autoencoder):
            (folder / name).mkdir()
        _write_json(folder / "unet" / CONFIG, pages.unet)
        _save(folder / "unet" / WEIGHTS_FILES[0], to_foreign_unet(model.unet, UNET_DIFFUSERS), {})
        _write_json(folder / "scheduler" / SCHEDULER, pages.scheduler)
        preprocessing = autoencoder_facts(ae).preprocessing
        kind = write_autoencoder_folder(
            folder / pages.autoencoder, scaled.model, preprocessing, scaled.scaling
        )["_class_name"]
        if model.label is not None:
            table = {CLASS_TABLE: model.label.embedding.weight.detach()}
            _save(folder / CLASS_FILE, table, {CLASS_NAMES: json.dumps(facts.class_names)})
        if pages.is_pipeline:
            _write_json(folder / "model_index.json", _index(pages, kind))
        else:
            write_text(folder / "use.py", usage_program(_parts(pages, kind, facts, scaled, model)))
        said = prove(folder, pages.autoencoder, model, autoencoder, facts.latent_shape)
    runs = "diffusers.LDMPipeline" if pages.is_pipeline else f"python {out / 'use.py'}"
    say(f"largest relative differences as diffusers runs it: {said}; `{runs}` draws from it")
    return out


def _require_plain(model: LatentDiffusion, path: Path) -> None:
    """Refuse conditions for which diffusers has no place beside the U-Net."""
    others = {name.split(".")[0] for name in model.state_dict()} - PARTS_OF_MODEL
    if others:
        raise DataError(
            f"{path}: diffusers' folder has no place for its {', '.join(sorted(others))}"
        )
    z = model.config.latent_channels
    if model.unet.conv_in.in_channels != z:
        raise DataError(f"{path} takes channels beside its latents, which this export cannot say")
    if model.label is not None and not model.unet.use_tokens:
        raise DataError(
            f"{path} is told its class otherwise than by attention, which this export cannot say"
        )


def _scaled(autoencoder: Autoencoder, model: LatentDiffusion) -> Scaled:
    """The whitening as one factor where it is one, else moved into the autoencoder where that is exact."""
    mean, std = model.latent_mean.tolist(), model.latent_std.tolist()
    whitening = Whitening(mean=tuple(mean), std=tuple(std))
    if is_uniform(whitening) and not any(mean):
        return Scaled(autoencoder, {"scaling_factor": 1.0 / std[0]})
    if folds(autoencoder, whitening):
        return Scaled(folded(autoencoder, whitening), {"scaling_factor": 1.0})
    say("a codebook's latents cannot be scaled by channel inside: use.py does it before decoding")
    return Scaled(autoencoder, {"scaling_factor": 1.0, "latents_mean": mean, "latents_std": std})


def _pages(model: LatentDiffusion, facts: DiffusionFacts, scaled: Scaled) -> Folder:
    _, height, width = facts.latent_shape
    scheduler = schedule_page(model.config)
    is_pipeline = (
        scheduler["_class_name"] == DDIM
        and not model.unet.use_tokens
        and height == width
        and "latents_std" not in scaled.scaling
    )
    quantised = scaled.model.codebook is not None
    return Folder(
        unet=unet_page(model.unet, (height, width)),
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


def _parts(
    pages: Folder, kind: str, facts: DiffusionFacts, scaled: Scaled, model: LatentDiffusion
) -> Parts:
    return Parts(
        unet=pages.unet["_class_name"],
        autoencoder=kind,
        scheduler=pages.scheduler["_class_name"],
        folder=pages.autoencoder,
        latents=facts.latent_shape,
        classes=model.label is not None,
        flow=pages.scheduler["_class_name"] == FLOW,
        by_channel="latents_std" in scaled.scaling,
        image_channels=scaled.model.image_channels,
    )


def _write_json(path: Path, page: dict[str, Any]) -> None:
    write_text(path, json.dumps(page, indent=2) + "\n")


def _save(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    with atomic_file(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, {"format": "pt", **metadata})
