"""From a whole model of the original code to two files of ours that name each other."""

from pathlib import Path

from ldmkit.assembly import (
    autoencoder_facts,
    require_same_autoencoder,
    save_autoencoder,
    save_diffusion,
)
from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.durable import atomic_directory
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import AutoencoderFacts, DiffusionFacts, Whitening
from ldmkit.interchange_configs import ImportConfig
from ldmkit.interop.layout import Imported, Tensors
from ldmkit.interop.ldm_model import Checkpoint, is_whole_model, read_checkpoint
from ldmkit.modelfile import fingerprint, versions
from ldmkit.terminal import say

DEFAULT_FOLDER = Path("runs/imported")
AUTOENCODER, DIFFUSION = "autoencoder.safetensors", "diffusion.safetensors"
DEFAULT_SIZE = 256
MAX_NAMED = 8
OF_WHOLE_MODELS = (
    "ae",
    "weights",
    "parameterization",
    "heads",
    "head_channels",
    "scaling_factor",
    "null_class",
)


def wants_whole_model(config: ImportConfig, tensors: Tensors) -> bool:
    """Whether a file is to be read as a whole model: it is one, and OUT does not name one file.

    Raises:
        UsageError: it is not, and an option of whole models is given.
    """
    if is_whole_model(tensors) and (config.out is None or config.out.suffix != ".safetensors"):
        return True
    defaults = type(config).model_fields
    given = [n for n in OF_WHOLE_MODELS if getattr(config, n) != defaults[n].default]
    if given:
        why = "--out names one file" if is_whole_model(tensors) else f"{config.source} holds none"
        raise UsageError(f"--{given[0].replace('_', '-')} is for whole models, and {why}")
    return False


def import_whole_model(config: ImportConfig, tensors: Tensors, metadata: dict[str, str]) -> Path:
    """Write a whole model's autoencoder and diffusion model, and say what was taken from where.

    Args:
        config: what to read, what it does not say, and where to write.
        tensors: of the file.
        metadata: of the file.

    Returns:
        The folder; the autoencoder is in it unless `config.ae` gives it.

    Raises:
        DataError: the source cannot be expressed, or is not of the autoencoder given.
        UsageError: the output exists, no autoencoder is known, or the picture size does not fit.
    """
    out = config.out or DEFAULT_FOLDER
    if out.exists():
        raise UsageError(f"{out} exists: give another --out, or remove it first")
    checkpoint = read_checkpoint(tensors, metadata, config)
    stage = _first_stage(config, checkpoint)
    size = _size(config, checkpoint, stage)
    with atomic_directory(out) as folder:
        path = config.ae
        if path is None and isinstance(stage, Imported):
            path = folder / AUTOENCODER
            channels = stage.model.image_channels
            page = PreprocessingConfig.model_validate({"size": size, "channels": channels})
            scale = {"scaling_factor": checkpoint.trained["scaling_factor"]}
            trained = {"imported_from": str(config.source), **scale}
            save_autoencoder(path, stage.model, page, trained)
        assert path is not None  # noqa: S101 - what `_first_stage` has seen to
        _save_diffusion(folder / DIFFUSION, checkpoint, autoencoder_facts(path), size)
    _report(checkpoint, size)
    return out


def _first_stage(config: ImportConfig, checkpoint: Checkpoint) -> Imported | AutoencoderFacts:
    """The checkpoint's autoencoder, or the facts of the file that is given in its place."""
    found = checkpoint.first_stage
    if config.ae is not None:
        if found is not None:
            wanted = fingerprint(found.model.state_dict())
            require_same_autoencoder(wanted, config.ae, f"the latents of {config.source}")
        stage = autoencoder_facts(config.ae)
        channels = stage.latent_channels
    elif found is not None:
        stage, channels = found, found.model.latent_channels
    else:
        raise UsageError(f"{config.source} holds no autoencoder: give its file with --ae FILE")
    wanted_channels = checkpoint.model.config.latent_channels
    if channels != wanted_channels:
        raise DataError(
            f"{config.source}: its U-Net is for latents of {wanted_channels} channels, the "
            f"autoencoder makes {channels}"
        )
    return stage


def _size(config: ImportConfig, checkpoint: Checkpoint, stage: Imported | AutoencoderFacts) -> int:
    """The picture size: as typed, as a file says, as published, or 256 rounded to whole latents."""
    if isinstance(stage, Imported):
        factor, stated = stage.model.config.factor, stage.size
    else:
        factor, stated = stage.factor, stage.preprocessing.size
    unit = factor * 2 ** (len(checkpoint.model.config.unet.multipliers) - 1)
    if config.size is not None:
        if config.size % unit:
            raise UsageError(
                f"--size {config.size} is not a multiple of {unit}, which the autoencoder and the "
                "U-Net's levels ask for"
            )
        return config.size
    size = stated or (checkpoint.side or 0) * factor or DEFAULT_SIZE
    return max(size - size % unit, unit)


def _save_diffusion(path: Path, checkpoint: Checkpoint, stage: AutoencoderFacts, size: int) -> None:
    model = checkpoint.model
    side = size // stage.factor
    whitening = Whitening(
        mean=tuple(model.latent_mean.tolist()), std=tuple(model.latent_std.tolist())
    )
    facts = DiffusionFacts(
        fingerprint="",
        autoencoder=stage.fingerprint,
        latent_shape=(model.config.latent_channels, side, side),
        whitening=whitening,
        class_names=checkpoint.class_names,
        trained=checkpoint.trained,
        versions=versions(),
    )
    save_diffusion(path, model, facts)


def _report(checkpoint: Checkpoint, size: int) -> None:
    config, trained = checkpoint.model.config, checkpoint.trained
    if checkpoint.left_out:
        kinds = sorted({".".join(name.split(".")[:2]) for name in checkpoint.left_out})
        named = ", ".join(kinds[:MAX_NAMED]) + (" ..." if len(kinds) > MAX_NAMED else "")
        say(f"{len(checkpoint.left_out)} tensors are no part of the two models: {named}")
    numbers = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    heads = config.unet.heads or f"of {config.unet.head_channels} channels"
    say(
        f"diffusion model: {numbers:,} parameters ({trained['weights']} weights), heads {heads}, "
        f"{config.parameterization}, {config.schedule.kind} schedule of {config.schedule.timesteps} "
        f"steps, latents / {trained['scaling_factor']:.6g}, pictures of {size} px"
    )
    if trained.get("null_class") == "none":
        say("warning: it knows no null class, so sample it with --guidance 1")
