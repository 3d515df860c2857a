"""A whole latent diffusion model of another project, whatever its form, as two files of ours."""

from pathlib import Path
from typing import Any, NamedTuple

from ldmkit.assembly import (
    autoencoder_facts,
    require_same_autoencoder,
    save_autoencoder,
    save_diffusion,
)
from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.diffusion.schedule import DiscreteSchedule
from ldmkit.durable import atomic_directory
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import AutoencoderFacts, DiffusionFacts, Facts
from ldmkit.interchange_configs import ImportConfig
from ldmkit.interop.latent_scale import whitening_of
from ldmkit.interop.layout import Imported
from ldmkit.interop.stated import agreed
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.modelfile import fingerprint, versions
from ldmkit.terminal import say

AUTOENCODER, DIFFUSION = "autoencoder.safetensors", "diffusion.safetensors"
DEFAULT_SIZE = 256
MAX_NAMED = 8
SCALES = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""Words for the scale of latents, in what a source states and in facts of imported autoencoders."""


class UsualScale(NamedTuple):
    """The factor that is taken where nothing states one."""

    factor: float
    why: str


class WholeModel(NamedTuple):
    """A whole model that was read."""

    model: LatentDiffusion
    """Its whitening is not set."""
    first_stage: Imported | None
    """Its autoencoder; None where the source has none."""
    scaling: dict[str, Any]
    """What it states of the scale of latents, among `SCALES`."""
    usual_scale: UsualScale | None
    latent_size: tuple[int, int] | None
    """Height and width that it was trained on, in cells, as far as is known."""
    trained: Facts
    left_out: tuple[str, ...]
    """Names of tensors that were used for nothing."""


class FirstStage(NamedTuple):
    """The autoencoder whose latents the model makes: the source's own, or a file of ours."""

    imported: Imported | None
    """None for a file of ours."""
    channels: int
    factor: int
    size: int | None
    """Of its pictures, pixels."""
    recorded: dict[str, Any]
    """What was recorded of the scale of latents at its own import."""


def write_whole_model(found: WholeModel, config: ImportConfig, out: Path) -> Path:
    """Write a whole model's autoencoder and diffusion model, both or neither, and say what they are.

    Args:
        found: what was read.
        config: what it does not say.
        out: the folder.

    Returns:
        The folder; the autoencoder is in it unless `config.ae` gives it.

    Raises:
        DataError: the two stages do not belong together.
        UsageError: no autoencoder or no scale is known, or an option does not fit.
    """
    stage = _first_stage(found, config)
    z = found.model.config.latent_channels
    if stage.channels != z:
        raise DataError(
            f"{config.source}: its U-Net is for latents of {z} channels, the autoencoder makes "
            f"{stage.channels}"
        )
    size = _latent_size(found, config, stage)
    scaling = _scaling(found, config, stage.recorded)
    whitening = whitening_of(scaling, z, str(config.source))
    found.model.set_whitening(whitening)
    with atomic_directory(out) as folder:
        path = config.ae or folder / AUTOENCODER
        if stage.imported is not None:
            _save_first_stage(path, stage.imported, min(size) * stage.factor, config, scaling)
        trained = {"imported_from": str(config.source), **found.trained}
        facts = DiffusionFacts(
            fingerprint="",
            autoencoder=autoencoder_facts(path).fingerprint,
            latent_shape=(z, *size),
            factor=stage.factor,
            whitening=whitening,
            trained=trained,
            versions=versions(),
        )
        save_diffusion(folder / DIFFUSION, found.model, facts)
    _report(found, (size[0] * stage.factor, size[1] * stage.factor))
    return out


def _first_stage(found: WholeModel, config: ImportConfig) -> FirstStage:
    """The source's autoencoder, or the file that is given in its place."""
    imported = found.first_stage
    if config.ae is not None:
        if imported is not None:
            wanted = fingerprint(imported.model.state_dict())
            require_same_autoencoder(wanted, config.ae, f"the latents of {config.source}")
        return _of_file(autoencoder_facts(config.ae))
    if imported is None:
        raise UsageError(
            f"{config.source} holds no autoencoder: give the file of the one that its latents are of "
            "with --ae FILE"
        )
    model = imported.model
    return FirstStage(imported, model.latent_channels, model.config.factor, imported.size, {})


def _of_file(facts: AutoencoderFacts) -> FirstStage:
    recorded = {key: facts.trained[key] for key in SCALES if key in facts.trained}
    size = facts.preprocessing.size
    return FirstStage(None, facts.latent_channels, facts.factor, size, recorded)


def _scaling(found: WholeModel, config: ImportConfig, recorded: dict[str, Any]) -> dict[str, Any]:
    """What is known of the scale of latents: as stated, typed, recorded or usual, in this order."""
    source, stated = str(config.source), found.scaling.get("scaling_factor")
    factor = agreed(config.scaling_factor, stated, "--scaling-factor", source)
    if factor is not None:
        return {**found.scaling, "scaling_factor": factor}
    if recorded:
        return recorded
    if found.usual_scale is None:
        raise UsageError(
            f"{source} does not say by which factor raw latents were scaled: give --scaling-factor, as in "
            "the config it was trained with (0.18215 for Stable Diffusion 1, 1 for codebooks)"
        )
    usual = found.usual_scale
    say(f"{source} states no scaling_factor: {usual.factor:g}, {usual.why}")
    return {**found.scaling, "scaling_factor": usual.factor}


def _latent_size(found: WholeModel, config: ImportConfig, stage: FirstStage) -> tuple[int, int]:
    """Height and width: as typed, as the model says, or as its autoencoder's pictures give them."""
    unit = stage.factor * 2 ** (len(found.model.config.unet.multipliers) - 1)
    if config.size is not None and config.size % unit:
        raise UsageError(
            f"--size {config.size} is not a multiple of {unit}, which the autoencoder and the U-Net's "
            "levels ask for"
        )
    if config.size is None and found.latent_size is not None:
        return found.latent_size
    size = config.size or stage.size or DEFAULT_SIZE
    side = max(size - size % unit, unit) // stage.factor
    return side, side


def _save_first_stage(
    path: Path, imported: Imported, size: int, config: ImportConfig, scaling: dict[str, Any]
) -> None:
    preprocessing = PreprocessingConfig.model_validate(
        {"size": size, "channels": imported.model.image_channels}
    )
    trained = {"imported_from": str(config.source), **scaling}
    save_autoencoder(path, imported.model, preprocessing, trained)


def _report(found: WholeModel, pictures: tuple[int, int]) -> None:
    config = found.model.config
    say_left_out(found.left_out, "no part of the two models")
    numbers = sum(parameter.numel() for parameter in found.model.parameters())
    width = config.unet.head_channels
    heads = f"of {width} channels" if width else str(config.unet.heads or 1)
    weights = found.trained.get("weights")
    discrete = isinstance(found.model.schedule, DiscreteSchedule)
    steps = f" of {config.schedule.timesteps} steps" if discrete else ""
    say(
        f"diffusion model: {numbers:,} parameters{f' ({weights} weights)' if weights else ''}, heads "
        f"{heads}, {config.parameterization}, {config.schedule.kind} schedule{steps}, pictures of "
        f"{' x '.join(map(str, pictures))} px"
    )
    if found.trained.get("null_class") == "none":
        say("warning: it knows no null class, so sample it with --guidance 1")


def say_left_out(names: tuple[str, ...], what: str) -> None:
    """Say how many tensors of a source were used for nothing, and of which kinds they are."""
    if not names:
        return
    kinds = sorted({".".join(name.split(".")[:2]) for name in names})
    named = ", ".join(kinds[:MAX_NAMED]) + (" ..." if len(kinds) > MAX_NAMED else "")
    say(f"{len(names)} tensors are {what}: {named}")
