"""From a folder of diffusers with a whole diffusion model to ours.

The folder holds `unet/`, `scheduler/` and mostly `vae/` or `vqvae/`; a U-Net's own folder with the
scheduler beside it will do where the autoencoder is a file of ours already.
"""

import json
from pathlib import Path
from typing import Any

import torch

from ldmkit.diffusion_configs import DiffusionConfig, ParameterizationName, ScheduleConfig
from ldmkit.errors import DataError
from ldmkit.facts import validated
from ldmkit.interchange_configs import ImportConfig
from ldmkit.interop.class_tables import ClassTable, Found, load_beside, read_table
from ldmkit.interop.diffusers_layout import new_name
from ldmkit.interop.diffusers_scheduler import FLOW, clips, read_schedule
from ldmkit.interop.diffusers_unet import ReadUNet, read_unet
from ldmkit.interop.layout import Imported, Tensors
from ldmkit.interop.reading import CONFIG, read_autoencoder, read_page, read_tensors, weights_of
from ldmkit.interop.sources import Source
from ldmkit.interop.stated import agreed, require_unused
from ldmkit.interop.unet_layout import UNET_DIFFUSERS, load_foreign_unet
from ldmkit.interop.whole_import import UsualScale, WholeModel
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.terminal import say

SCHEDULER = "scheduler_config.json"
CLASS_FILE, CLASS_TABLE, CLASS_NAMES = "class_embedding.safetensors", "weight", "class_names"
"""The table of classes that are attended to, beside the networks; its last row stands for none."""
AUTOENCODERS = ("vae", "vqvae", "movq")
USUAL_SCALE = UsualScale(0.18215, "as diffusers takes it")


def read_folder(source: Source, config: ImportConfig) -> WholeModel:
    """A whole model in a folder of diffusers.

    Args:
        source: the folder, which has a U-Net.
        config: what the folder does not say.

    Raises:
        DataError: something cannot be read, or ours cannot express it; the message names what.
        UsageError: an option contradicts the folder, or means nothing for it.
    """
    root, unet = source.path, source.unet
    assert unet is not None  # noqa: S101 - what makes the source a whole model
    stands = f"{root} is a folder of diffusers, whose config.json says it"
    require_unused(config, ["heads", "head_channels"], stands)
    require_unused(config, ["weights"], f"{root} is a folder of diffusers, with one set of weights")
    read = read_unet(read_page(unet / CONFIG), str(unet / CONFIG))
    schedule, parameterization = _schedule(root, unet, config)
    weights = weights_of(unet)
    found, metadata = read_tensors(weights)
    tensors = {new_name(name): tensor for name, tensor in found.items()}
    table = _classes(root, read, _found_in_unet(read, tensors, metadata, weights), config)
    settings = {
        "unet": read.config,
        "schedule": schedule,
        "parameterization": parameterization,
        "latent_channels": read.channels,
        "conditions": (table.condition,) if table else (),
    }
    with torch.device("meta"):
        model = LatentDiffusion(validated(DiffusionConfig, settings, str(root)))
    load_foreign_unet(model.unet, tensors, UNET_DIFFUSERS, str(weights))
    load_beside(model, table)
    first_stage = _first_stage(root)
    return WholeModel(
        model=model.eval().requires_grad_(False),
        first_stage=first_stage,
        scaling=first_stage.scaling if first_stage else {},
        usual_scale=USUAL_SCALE if first_stage else None,
        latent_size=read.size,
        trained={"null_class": table.null_class} if table else {},
        left_out=first_stage.dropped if first_stage else (),
    )


def _schedule(
    root: Path, unet: Path, config: ImportConfig
) -> tuple[ScheduleConfig, ParameterizationName]:
    """Of the scheduler of a whole model; of a bare U-Net that in its folder, or beside it."""
    places = (root / "scheduler", unet, unet.parent / "scheduler")
    path = next((place / SCHEDULER for place in places if (place / SCHEDULER).is_file()), None)
    if path is None:
        raise DataError(
            f"{root} has no scheduler/{SCHEDULER}, which says what the network was trained on: put "
            "the model's own there"
        )
    page = read_page(path)
    schedule, parameterization = read_schedule(page, str(path))
    if clips(page):
        say(f"{path}: its sampler clips predicted latents; ldmkit's samplers never do")
    if page["_class_name"] == FLOW or "prediction_type" in page:
        agreed(config.parameterization, parameterization, "--parameterization", str(path))
        return schedule, parameterization
    return schedule, config.parameterization or parameterization


def _found_in_unet(
    read: ReadUNet, tensors: Tensors, metadata: dict[str, str], weights: Path
) -> Found | None:
    """The table that is added to the time embedding, taken out of the U-Net's tensors."""
    if not read.has_classes:
        return None
    name = UNET_DIFFUSERS.class_table
    if name not in tensors:
        raise DataError(f"{weights} lacks tensor {name}, which its config.json promises")
    names = _names(metadata, weights)
    null = None if names is None else "last"
    return Found(tensors.pop(name), "vector", names, null, f"{weights}: tensor {name}")


def _classes(
    root: Path, read: ReadUNet, found: Found | None, config: ImportConfig
) -> ClassTable | None:
    """The table of classes, in the U-Net or, where it attends to tokens, beside it."""
    if read.use_tokens:
        tensors, metadata = read_tensors(_class_file(root))
        path = root / CLASS_FILE
        if CLASS_TABLE not in tensors:
            raise DataError(f"{path} has no tensor {CLASS_TABLE}")
        names, where = _names(metadata, path), f"{path}: tensor {CLASS_TABLE}"
        found = Found(tensors[CLASS_TABLE], "tokens", names, "last", where)
    if found is None:
        require_unused(config, ["null_class"], f"{root} has no table of classes")
        return None
    unet = read.config
    return read_table(
        found, unet.context_channels if read.use_tokens else unet.embedding_width, config
    )


def _class_file(root: Path) -> Path:
    path = root / CLASS_FILE
    if path.is_file():
        return path
    encoder = next((name for name in ("text_encoder", "bert") if (root / name).is_dir()), None)
    stages = [root / name for name in AUTOENCODERS if (root / name).is_dir()]
    hint = f"; `ldmkit import {stages[0]}` takes its autoencoder" if stages else ""
    raise DataError(
        f"{root}: its network attends to tokens of {encoder or 'an encoder'}, which cannot be "
        f"imported, and there is no {CLASS_FILE} with classes{hint}"
    )


def _names(metadata: dict[str, str], path: Path) -> Any:  # noqa: ANN401 - whatever was written
    stated = metadata.get(CLASS_NAMES)
    try:
        return None if stated is None else json.loads(stated)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: its {CLASS_NAMES} are not JSON: {error}") from error


def _first_stage(root: Path) -> Imported | None:
    """The folder's own autoencoder, where it has one."""
    folder = next((root / name for name in AUTOENCODERS if (root / name / CONFIG).is_file()), None)
    return None if folder is None else read_autoencoder(folder)
