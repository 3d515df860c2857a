"""Whole latent diffusion models of the original code: one file, to our two stages.

`model.*` is the U-Net, `model_ema.*` its average, `first_stage_model.*` the autoencoder,
`cond_stage_model.*` what makes conditions; beside them lie the schedule's tables and the scale.
"""

import json
from typing import NamedTuple

import torch
from torch import Tensor

from ldmkit.diffusion.schedule import DiscreteSchedule
from ldmkit.diffusion_configs import DiffusionConfig
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import Facts, validated
from ldmkit.interchange_configs import ImportConfig
from ldmkit.interop.layout import Imported, Tensors
from ldmkit.interop.ldm_layout import FIRST, PREFIXES
from ldmkit.interop.ldm_schedule import schedule_buffers, schedule_of
from ldmkit.interop.ldm_unet import (
    UNetShape,
    published_scale,
    published_side,
    unet_shape,
    with_heads,
)
from ldmkit.interop.reading import autoencoder_in
from ldmkit.interop.unet_layout import LDM_PREFIX, UNET_LDM, load_foreign_unet
from ldmkit.latent_diffusion import LatentDiffusion

EMA_PREFIX, EMA_BESIDE = "model_ema.", ("model_ema.decay", "model_ema.num_updates")
CONDITION_PREFIXES = ("cond_stage_model.", "conditioner.")
CLASS_TABLE = "cond_stage_model.embedding.weight"
LABEL = "label.embedding.weight"
SCALE = "scale_factor"
NULL_LAST = {1000: False, 1001: True}
"""Rows of the published tables of ImageNet's classes: whether the last one is the null."""
DESCRIPTION_KEY = "ldmkit_export"
"""In the metadata of files that ldmkit exports: a JSON table of what the layout has no place for."""


class Checkpoint(NamedTuple):
    """A whole model of the original code, as ours."""

    model: LatentDiffusion
    first_stage: Imported | None
    """Its autoencoder; None where the file has none."""
    class_names: tuple[str, ...]
    side: int | None
    """Side of the latents that it was published for, in cells."""
    trained: Facts
    left_out: tuple[str, ...]
    """Names of tensors that were used for nothing."""


def is_whole_model(tensors: Tensors) -> bool:
    """Whether a file holds a U-Net of the original code beside whatever else."""
    return any(name.startswith(LDM_PREFIX) for name in tensors)


def read_checkpoint(tensors: Tensors, metadata: dict[str, str], config: ImportConfig) -> Checkpoint:
    """A whole model of the original code.

    Args:
        tensors: of the file, all of them.
        metadata: of the file; a file that `export` wrote says there what the layout has no place for.
        config: what the file does not say; what is typed goes before what is known.

    Raises:
        DataError: something is missing, or ours cannot express it; the message names it.
        UsageError: an option contradicts the file.
    """
    source, said = str(config.source), _description(metadata)
    plain, unet = _weights(tensors, config.weights, source)
    shape = unet_shape(unet, source)
    _require_supported(tensors, shape, unet, source)
    heads, width = config.heads, config.head_channels
    if not (heads or width):
        heads, width = said.get("heads"), said.get("head_channels")
    table, names = _classes(tensors, config.null_class, said, shape, source)
    first_stage = _first_stage(tensors, metadata, source)
    settings = {
        "unet": with_heads(shape, heads, width, source),
        "schedule": schedule_of(tensors, source),
        "parameterization": config.parameterization or said.get("parameterization", "epsilon"),
        "latent_channels": shape.out_channels,
        "classes": len(names),
    }
    scale = _scale(tensors, config.scaling_factor, first_stage, shape, source)
    model = _build(validated(DiffusionConfig, settings, source), unet, table, scale, source)
    trained: Facts = {
        "imported_from": source,
        "weights": "plain" if plain else "ema",
        "scaling_factor": scale,
    }
    if not plain and EMA_BESIDE[1] in tensors:
        trained["ema_updates"] = int(tensors[EMA_BESIDE[1]].item())
    if table is not None:
        trained["null_class"] = "none" if len(tensors[CLASS_TABLE]) == len(names) else "last"
    left_out = _left_out(tensors, first_stage, model)
    return Checkpoint(model, first_stage, names, published_side(shape), trained, left_out)


def ema_name(name: str) -> str:
    """What the averages call a tensor of the U-Net: its whole name but the dots, behind a prefix."""
    return EMA_PREFIX + f"{LDM_PREFIX.removeprefix('model.')}{name}".replace(".", "")


def _description(metadata: dict[str, str]) -> Facts:
    try:
        said = json.loads(metadata.get(DESCRIPTION_KEY, "{}"))
    except (ValueError, RecursionError):
        said = {}
    return said if isinstance(said, dict) else {}


def _weights(tensors: Tensors, wanted: str, source: str) -> tuple[bool, Tensors]:
    """Whether the weights are the plain ones, and they, without prefix.

    Raises:
        DataError: averages are asked for and there are none, or they are not those of this network.
    """
    names = [name for name in tensors if name.startswith(LDM_PREFIX)]
    plain = {name.removeprefix(LDM_PREFIX): tensors[name] for name in names}
    averaged = {n for n in tensors if n.startswith(EMA_PREFIX) and n not in EMA_BESIDE}
    if wanted == "ema" and not averaged:
        raise DataError(
            f"--weights ema: {source} holds no averages ({EMA_PREFIX}*); where it was published as "
            "averages only, its plain weights are they: --weights plain"
        )
    if wanted == "plain" or not averaged:
        return True, plain
    keys = {ema_name(name): name for name in plain}
    if len(keys) < len(plain):
        raise DataError(f"{source}: the names of two averages are the same: --weights plain")
    for key in sorted(averaged ^ keys.keys()):
        state = "lacks" if key in keys else "has the unknown"
        raise DataError(f"{source} {state} tensor {key} among its averages: --weights plain")
    return False, {name: tensors[key] for key, name in keys.items()}


def _require_supported(tensors: Tensors, shape: UNetShape, unet: Tensors, source: str) -> None:
    """Refuse conditions that the model cannot be given here, by name."""
    alone = "its autoencoder alone comes with --out FILE.safetensors"
    found = sorted(name for name in tensors if name.startswith(CONDITION_PREFIXES))
    foreign = [name for name in found if name != CLASS_TABLE]
    if foreign:
        raise DataError(
            f"{source} is conditioned through {foreign[0]}: of whole models, those without condition and "
            f"those with a table of classes can be imported, text, boxes and pictures not yet; {alone}"
        )
    if any(name.startswith("label_emb.") for name in unet):
        raise DataError(
            f"{source} adds classes to the time (label_emb), which cannot be imported yet; {alone}"
        )
    if shape.in_channels != shape.out_channels:
        raise DataError(
            f"{source}: its U-Net takes {shape.in_channels} channels and gives {shape.out_channels}: "
            f"conditions beside the latents cannot be imported yet; {alone}"
        )
    if shape.use_tokens != bool(found):
        has = "attends to tokens, and the file does not say what makes them"
        has_not = f"attends to no tokens, and the file has {CLASS_TABLE}"
        raise DataError(f"{source}: its U-Net {has if shape.use_tokens else has_not}; {alone}")


def _classes(
    tensors: Tensors, typed: str, said: Facts, shape: UNetShape, source: str
) -> tuple[Tensor | None, tuple[str, ...]]:
    """The table of classes with the null as its last row, and their names: numbers, unless said."""
    table = tensors.get(CLASS_TABLE)
    if table is None:
        return None, ()
    if table.ndim != 2 or table.shape[1] != shape.config.context_channels or len(table) < 2:
        raise DataError(
            f"{source}: tensor {CLASS_TABLE} has shape {list(table.shape)}; the U-Net attends to "
            f"tokens of {shape.config.context_channels}"
        )
    names = said.get("class_names")
    if typed != "auto":
        last = typed == "last"
    elif names is not None or len(table) in NULL_LAST:
        last = True if names is not None else NULL_LAST[len(table)]
    else:
        raise DataError(
            f"{source}: {CLASS_TABLE} has {len(table)} rows, and nothing says whether the last one is "
            "the null of classifier-free guidance: give --null-class last or --null-class none"
        )
    count = len(table) - last
    if not last:  # nothing was ever trained as the null: a token of zeros, which says nothing
        table = torch.cat([table, table.new_zeros(1, table.shape[1])])
    if isinstance(names, list) and len(names) == count:
        return table, tuple(map(str, names))
    return table, tuple(map(str, range(count)))


def _first_stage(tensors: Tensors, metadata: dict[str, str], source: str) -> Imported | None:
    """The autoencoder in the file, where there is one."""
    prefix = _first_stage_prefix(tensors)
    if prefix is None:
        return None
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return autoencoder_in(own, metadata, source)


def _first_stage_prefix(tensors: Tensors) -> str | None:
    return next((p for p in PREFIXES if p and f"{p}{FIRST}" in tensors), None)


def _scale(
    tensors: Tensors,
    typed: float | None,
    first_stage: Imported | None,
    shape: UNetShape,
    source: str,
) -> float:
    """The number that raw latents were multiplied by.

    Raises:
        DataError: the file does not say, and no published config does.
        UsageError: another one is typed than the file says.
    """
    stored = tensors.get(SCALE)
    if stored is not None:
        value = stored.double().item() if stored.numel() == 1 else float("nan")
        if not 0.0 < value < float("inf"):
            raise DataError(f"{source}: tensor {SCALE} is no positive number")
        if typed is not None and abs(typed - value) > 1e-3 * value:
            raise UsageError(f"--scaling-factor {typed}: {source} says {value:.6g}; leave it out")
        return value
    if typed is not None:
        return typed
    known = published_scale(shape)
    if known is None and first_stage is not None and first_stage.model.config.bottleneck == "vq":
        known = 1.0  # that of every published model on codes
    if known is None:
        raise DataError(
            f"{source} has no {SCALE}: give --scaling-factor, as in the config it was trained with (1.0 "
            "where that has none)"
        )
    return known


def _build(
    config: DiffusionConfig, unet: Tensors, table: Tensor | None, scale: float, source: str
) -> LatentDiffusion:
    with torch.device("meta"):
        model = LatentDiffusion(config)
    load_foreign_unet(model.unet, unet, UNET_LDM, source)
    z = config.latent_channels
    rest = {"latent_mean": torch.zeros(z), "latent_std": torch.full((z,), 1.0 / scale)}
    if table is not None:
        if not table.float().isfinite().all():
            raise DataError(f"{source}: tensor {CLASS_TABLE} holds values that are not finite")
        rest[LABEL] = table.float().clone()
    model.load_state_dict(rest, strict=False, assign=True)
    return model.eval().requires_grad_(False)


def _left_out(
    tensors: Tensors, first_stage: Imported | None, model: LatentDiffusion
) -> tuple[str, ...]:
    """What is neither used nor a copy of it: losses, optimizers, further models."""
    known = {SCALE, CLASS_TABLE, *EMA_BESIDE}
    if isinstance(model.schedule, DiscreteSchedule):
        known |= schedule_buffers(model.schedule).keys()
    first = _first_stage_prefix(tensors)
    prefixes = (LDM_PREFIX, EMA_PREFIX, *([first] if first else []))
    rest = {name for name in tensors if not name.startswith(prefixes)} - known
    return tuple(sorted(rest | set(first_stage.dropped if first_stage else ())))
