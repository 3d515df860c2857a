"""From a folder of diffusers with a whole diffusion model to two files of ours.

The folder holds `unet/`, `scheduler/` and mostly `vae/` or `vqvae/`; a U-Net's own folder with the
scheduler beside it will do where the autoencoder is a file of ours already.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldmkit.assembly import autoencoder_facts, save_autoencoder, save_diffusion
from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.diffusion_configs import DiffusionConfig
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import DiffusionFacts, Whitening, validated
from ldmkit.interchange_configs import ImportConfig
from ldmkit.interop.diffusers_layout import new_name
from ldmkit.interop.diffusers_scheduler import clips, read_schedule
from ldmkit.interop.diffusers_unet import DOWN_BLOCKS, ReadUNet, read_unet
from ldmkit.interop.latent_scale import whitening_of
from ldmkit.interop.layout import Imported
from ldmkit.interop.reading import read_autoencoder, read_page, read_tensors, weights_of
from ldmkit.interop.unet_layout import UNET_DIFFUSERS, load_foreign_unet
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.modelfile import versions
from ldmkit.terminal import say

CONFIG, SCHEDULER = "config.json", "scheduler_config.json"
CLASS_FILE, CLASS_TABLE, CLASS_NAMES = "class_embedding.safetensors", "weight", "class_names"
"""The table of classes beside the networks: one row for each, and the row of no class."""
DEFAULT_OUT = Path("runs/ldm/diffusion.safetensors")
AUTOENCODERS = ("vae", "vqvae", "movq")
SCALES = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
DEFAULT_SCALE = 0.18215
"""What diffusers takes where a `config.json` states no `scaling_factor`."""


class Classes(NamedTuple):
    """The classes of a model that attends to them."""

    table: Tensor
    names: tuple[str, ...]


class FirstStage(NamedTuple):
    """The autoencoder whose latents the model makes."""

    imported: Imported | None
    """None for a file of ours."""
    channels: int
    """Of the latents."""
    factor: int
    size: int | None
    """Of its pictures, pixels."""
    scaling: dict[str, Any]
    """What is stated or was recorded of the scale of latents; empty if nothing."""


def unet_folder(source: Path) -> Path | None:
    """Where a folder of diffusers has its U-Net: in `unet`, or itself; None if it has none."""
    if (source / "unet" / CONFIG).is_file():
        return source / "unet"
    bare = source / CONFIG
    if bare.is_file() and read_page(bare).get("_class_name") in DOWN_BLOCKS:
        return source
    return None


def import_diffusion(config: ImportConfig, unet: Path) -> Path:
    """Write the diffusion model of a folder, and its autoencoder beside it, as files of ours.

    Args:
        config: what to read, and where to write.
        unet: the folder of the U-Net in it, from `unet_folder`.

    Returns:
        The diffusion model's file.

    Raises:
        DataError: the source cannot be read, or ours cannot express it; the message names what.
        UsageError: an output exists, or an option is missing or does not fit.
    """
    out, beside = _outputs(config)
    root = config.source
    read = read_unet(read_page(unet / CONFIG), str(unet / CONFIG))
    classes = _classes(root, read)
    model = _model(read, classes, root, unet)
    first = _given_stage(config.ae) if config.ae else _imported_stage(root)
    if first.channels != read.channels:
        raise DataError(
            f"{unet} denoises {read.channels} channels and the autoencoder has {first.channels}: "
            "they do not belong together"
        )
    whitening, size = _whitening(config, first), _size(config, first, read)
    model.set_whitening(whitening)
    if first.imported is not None:
        _save_first_stage(beside, first.imported, min(size) * first.factor, root)
    facts = DiffusionFacts(
        fingerprint="",
        autoencoder=autoencoder_facts(config.ae or beside).fingerprint,
        latent_shape=(read.channels, *size),
        whitening=whitening,
        class_names=classes.names if classes else (),
        trained={"imported_from": str(root)},
        versions=versions(),
    )
    save_diffusion(out, model, facts)
    return out


def _outputs(config: ImportConfig) -> tuple[Path, Path]:
    """Where the model goes, and its autoencoder; neither may exist."""
    out = config.out or DEFAULT_OUT
    beside = out.with_name("autoencoder.safetensors")
    if config.ae is None and beside == out:
        raise UsageError(f"--out {out}: that name is the autoencoder's, name the model otherwise")
    for path in (out, *([] if config.ae else [beside])):
        if path.exists():
            raise UsageError(f"{path} exists: give another --out, or remove it first")
    return out, beside


def _save_first_stage(path: Path, imported: Imported, size: int, root: Path) -> None:
    preprocessing = PreprocessingConfig.model_validate(
        {"size": size, "channels": imported.model.image_channels}
    )
    trained = {"imported_from": str(root), **imported.scaling}
    save_autoencoder(path, imported.model, preprocessing, trained)
    say(f"its autoencoder: {path}")


def _scheduler_page(root: Path, unet: Path) -> Path:
    """The scheduler of a whole model; of a bare U-Net in its folder, or beside it."""
    places = (root / "scheduler", unet, unet.parent / "scheduler")
    found = next((place / SCHEDULER for place in places if (place / SCHEDULER).is_file()), None)
    if found is None:
        raise DataError(
            f"{root} has no scheduler/{SCHEDULER}, which says what the network was trained on: put "
            "the model's own there"
        )
    return found


def _classes(root: Path, read: ReadUNet) -> Classes | None:
    """The table of classes, where the network attends to tokens."""
    path = root / CLASS_FILE
    if not read.use_tokens:
        return None
    if not path.is_file():
        encoder = next((name for name in ("text_encoder", "bert") if (root / name).is_dir()), None)
        hint = next(
            (
                f"; `ldmkit import {root / n}` takes its autoencoder"
                for n in AUTOENCODERS
                if (root / n).is_dir()
            ),
            "",
        )
        raise DataError(
            f"{root}: its network attends to tokens of {encoder or 'an encoder'}, which cannot be "
            f"imported, and there is no {CLASS_FILE} with classes{hint}"
        )
    tensors, metadata = read_tensors(path)
    table = tensors.get(CLASS_TABLE)
    width = read.config.context_channels
    if table is None or table.ndim != 2 or table.shape[1] != width or len(table) < 2:
        raise DataError(f"{path} has no tensor {CLASS_TABLE} of 2 or more rows of {width} numbers")
    return Classes(table.float(), _names(metadata.get(CLASS_NAMES), len(table) - 1, path))


def _names(stated: str | None, count: int, path: Path) -> tuple[str, ...]:
    if stated is None:
        return tuple(str(number) for number in range(count))
    try:
        names = json.loads(stated)
    except ValueError as error:
        raise DataError(f"{path}: its {CLASS_NAMES} are not JSON: {error}") from error
    if not isinstance(names, list) or len(names) != count:
        raise DataError(f"{path}: its {CLASS_NAMES} are no list of {count}")
    return tuple(str(name) for name in names)


def _model(read: ReadUNet, classes: Classes | None, root: Path, unet: Path) -> LatentDiffusion:
    """The folder's network on its schedule; whitening is not set."""
    page_path = _scheduler_page(root, unet)
    page = read_page(page_path)
    schedule, parameterization = read_schedule(page, str(page_path))
    if clips(page):
        say(f"{page_path}: its sampler clips predicted latents; ldmkit's samplers never do")
    settings = {
        "unet": read.config,
        "schedule": schedule,
        "parameterization": parameterization,
        "latent_channels": read.channels,
        "classes": len(classes.table) - 1 if classes else 0,
    }
    config = validated(DiffusionConfig, settings, str(root))
    weights = weights_of(unet)
    tensors, _ = read_tensors(weights)
    with torch.device("meta"):
        model = LatentDiffusion(config)
    tensors = {new_name(name): tensor for name, tensor in tensors.items()}
    load_foreign_unet(model.unet, tensors, UNET_DIFFUSERS, str(weights))
    rest = {
        name: torch.empty_like(tensor, device="cpu")
        for name, tensor in model.state_dict().items()
        if tensor.is_meta
    }
    if classes is not None:
        rest["label.embedding.weight"] = classes.table
    model.load_state_dict(rest, strict=False, assign=True)
    return model.eval().requires_grad_(False)


def _imported_stage(root: Path) -> FirstStage:
    """The folder's own autoencoder."""
    folder = next((root / name for name in AUTOENCODERS if (root / name / CONFIG).is_file()), None)
    if folder is None:
        raise UsageError(
            f"{root} has no autoencoder ({', '.join(AUTOENCODERS)}): give the file of the one that "
            "its latents are of with --ae"
        )
    imported = read_autoencoder(folder)
    model, scaling = imported.model, imported.scaling
    if "scaling_factor" not in scaling:
        say(f"{folder} states no scaling_factor: {DEFAULT_SCALE}, as diffusers takes it")
        scaling = {"scaling_factor": DEFAULT_SCALE, **scaling}
    return FirstStage(imported, model.latent_channels, model.config.factor, imported.size, scaling)


def _given_stage(path: Path) -> FirstStage:
    """An autoencoder file of ours; what was recorded at its own import says how latents are scaled."""
    facts = autoencoder_facts(path)
    scaling = {key: facts.trained[key] for key in SCALES if key in facts.trained}
    size = facts.preprocessing.size
    return FirstStage(None, facts.latent_channels, facts.factor, size, scaling)


def _whitening(config: ImportConfig, first: FirstStage) -> Whitening:
    """From the factor typed, or from what the first stage says."""
    typed = config.scaling_factor
    scaling = first.scaling if typed is None else {"scaling_factor": typed}
    if not scaling:
        raise UsageError(
            f"{config.ae} does not say by which factor this model's latents are scaled: give "
            "--scaling-factor (0.18215 for Stable Diffusion 1, 1 for codebooks)"
        )
    return whitening_of(scaling, first.channels, str(config.source))


def _size(config: ImportConfig, first: FirstStage, read: ReadUNet) -> tuple[int, int]:
    """Height and width of latents: as typed, as the U-Net says, or as its pictures give."""
    if config.size is not None and config.size % first.factor:
        raise UsageError(
            f"--size {config.size} is not a multiple of the autoencoder's factor {first.factor}"
        )
    if config.size is None and read.size is not None:
        return read.size
    pictures = config.size or first.size
    if pictures is None:
        raise UsageError(f"{config.source} states no picture size: give --size")
    side = pictures // first.factor
    return side, side
