"""Whole latent diffusion models of the original code: one file, to our two stages.

`model.*` is the U-Net, `model_ema.*` its average, `first_stage_model.*` the autoencoder,
`cond_stage_model.*` what makes conditions; beside them lie the schedule's tables and the scale.
"""

import json

import torch

from ldmkit.diffusion.schedule import DiscreteSchedule
from ldmkit.diffusion_configs import DiffusionConfig
from ldmkit.errors import DataError
from ldmkit.facts import Facts, validated
from ldmkit.interchange_configs import ImportConfig
from ldmkit.interop.class_tables import ClassTable, Found, load_beside, read_table
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
from ldmkit.interop.sources import Source, autoencoder_of
from ldmkit.interop.stated import agreed, require_unused
from ldmkit.interop.unet_layout import LDM_PREFIX, UNET_LDM, load_foreign_unet
from ldmkit.interop.whole_import import UsualScale, WholeModel
from ldmkit.latent_diffusion import LatentDiffusion

EMA_PREFIX, EMA_BESIDE = "model_ema.", ("model_ema.decay", "model_ema.num_updates")
CLASS_TABLE = "cond_stage_model.embedding.weight"
SCALE = "scale_factor"
ENCODERS = {
    "cond_stage_model.transformer.token_emb.": "a transformer of its own, whose tokenizer (WordPiece for"
    " text) is not here",
    "cond_stage_model.transformer.text_model.": "CLIP's text model, which is not here",
    "cond_stage_model.": "an encoder that is not here",
    "conditioner.": "encoders that are not here",
}
"""What makes conditions that cannot be imported; the first prefix that fits counts."""
DESCRIPTION_KEY = "ldmkit_export"
"""In the metadata of files that ldmkit exports: a JSON table of what the layout has no place for."""


def read_checkpoint(source: Source, config: ImportConfig) -> WholeModel:
    """A whole model of the original code.

    Args:
        source: the file; one that `export` wrote says what the layout has no place for.
        config: what the file does not say.

    Raises:
        DataError: something is missing, or ours cannot express it; the message names it.
        UsageError: an option contradicts the file, or means nothing for it.
    """
    tensors, where, said = source.tensors, str(source.path), _description(source.metadata)
    plain, unet = _weights(tensors, config.weights, where)
    shape = unet_shape(unet, where)
    label = unet.pop(UNET_LDM.class_table, None)
    _require_supported(tensors, shape, has_label=label is not None, source=where)
    heads, width = (
        agreed(getattr(config, name), said.get(name), f"--{name.replace('_', '-')}", where)
        for name in ("heads", "head_channels")
    )
    predicted = agreed(
        config.parameterization, said.get("parameterization"), "--parameterization", where
    )
    table = _classes(_found_table(tensors, label, said, where), shape, config, where)
    first_stage = _first_stage(source)
    settings = {
        "unet": with_heads(shape, heads, width, where),
        "schedule": schedule_of(tensors, where),
        "parameterization": predicted or "epsilon",
        "latent_channels": shape.out_channels,
        "conditions": (table.condition,) if table else (),
    }
    model = _build(validated(DiffusionConfig, settings, where), unet, table, where)
    trained: Facts = {"weights": "plain" if plain else "ema"}
    if not plain and EMA_BESIDE[1] in tensors:
        trained["ema_updates"] = int(tensors[EMA_BESIDE[1]].item())
    if table is not None:
        trained["null_class"] = table.null_class
    return WholeModel(
        model=model,
        first_stage=first_stage,
        scaling=_scaling(tensors, where),
        usual_scale=_usual_scale(first_stage, shape),
        latent_size=_latent_size(first_stage, shape),
        trained=trained,
        left_out=_left_out(tensors, first_stage, model),
    )


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


def _require_supported(tensors: Tensors, shape: UNetShape, *, has_label: bool, source: str) -> None:
    """Refuse conditions that the model cannot be given here, by name."""
    alone = "its autoencoder alone comes with --out FILE.safetensors"
    for prefix, what in ENCODERS.items():
        found = next((n for n in tensors if n.startswith(prefix) and n != CLASS_TABLE), None)
        if found is not None:
            raise DataError(
                f"{source} is conditioned through {found}, {what}: of whole models, those without "
                "condition and those with a table of classes can be imported, text, boxes and pictures "
                f"not yet; {alone}"
            )
    if shape.in_channels != shape.out_channels:
        raise DataError(
            f"{source}: its U-Net takes {shape.in_channels} channels and gives {shape.out_channels}: "
            f"conditions beside the latents cannot be imported yet; {alone}"
        )
    has_table = CLASS_TABLE in tensors
    if shape.use_tokens != has_table:
        has = "attends to tokens, and the file does not say what makes them"
        has_not = f"attends to no tokens, and the file has {CLASS_TABLE}"
        raise DataError(f"{source}: its U-Net {has if shape.use_tokens else has_not}; {alone}")
    if has_table and has_label:
        raise DataError(
            f"{source} is told classes in two ways, {CLASS_TABLE} and label_emb; {alone}"
        )


def _found_table(
    tensors: Tensors, label: torch.Tensor | None, said: Facts, source: str
) -> Found | None:
    """The table of classes, which is attended to or added to the time."""
    names = said.get("class_names")
    null = None if names is None else "last"
    where = f"{source}: tensor "
    if CLASS_TABLE in tensors:
        return Found(tensors[CLASS_TABLE], "tokens", names, null, where + CLASS_TABLE)
    if label is not None:
        name = LDM_PREFIX + UNET_LDM.class_table
        return Found(label, "vector", names, null, where + name)
    return None


def _classes(
    found: Found | None, shape: UNetShape, config: ImportConfig, source: str
) -> ClassTable | None:
    if found is None:
        require_unused(config, ["null_class"], f"{source} has no table of classes")
        return None
    width = shape.config.context_channels if shape.use_tokens else shape.config.embedding_width
    return read_table(found, width, config)


def _first_stage(source: Source) -> Imported | None:
    """The autoencoder in the file, where there is one."""
    prefix = _first_stage_prefix(source.tensors)
    if prefix is None:
        return None
    own = {name: tensor for name, tensor in source.tensors.items() if name.startswith(prefix)}
    return autoencoder_of(source._replace(tensors=own))


def _first_stage_prefix(tensors: Tensors) -> str | None:
    return next((p for p in PREFIXES if p and f"{p}{FIRST}" in tensors), None)


def _scaling(tensors: Tensors, source: str) -> dict[str, float]:
    """The number that raw latents were multiplied by, where the file holds it."""
    stored = tensors.get(SCALE)
    if stored is None:
        return {}
    value = stored.double().item() if stored.numel() == 1 else float("nan")
    if not 0.0 < value < float("inf"):
        raise DataError(f"{source}: tensor {SCALE} is no positive number")
    return {"scaling_factor": value}


def _usual_scale(first_stage: Imported | None, shape: UNetShape) -> UsualScale | None:
    published = published_scale(shape)
    if published is not None:
        return UsualScale(published, "as in the published config of this very shape")
    if first_stage is not None and first_stage.model.config.bottleneck == "vq":
        return UsualScale(1.0, "as of every published model on codes")
    return None


def _latent_size(first_stage: Imported | None, shape: UNetShape) -> tuple[int, int] | None:
    """As an exported file says, else as published."""
    if first_stage is not None and first_stage.size is not None:
        side = first_stage.size // first_stage.model.config.factor
    else:
        side = published_side(shape)
    return None if side is None else (side, side)


def _build(
    config: DiffusionConfig, unet: Tensors, table: ClassTable | None, source: str
) -> LatentDiffusion:
    """The model with its weights; whitening is not set."""
    with torch.device("meta"):
        model = LatentDiffusion(config)
    load_foreign_unet(model.unet, unet, UNET_LDM, source)
    load_beside(model, table)
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
