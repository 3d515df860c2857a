"""`ldmkit import`: models of another project in, files of ours out."""

from pathlib import Path

from ldmkit.assembly import save_autoencoder
from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.errors import UsageError
from ldmkit.interchange_configs import ImportConfig
from ldmkit.interop.ldm_import import import_whole_model, wants_whole_model
from ldmkit.interop.reading import autoencoder_in, read_autoencoder, read_tensors
from ldmkit.terminal import say

DEFAULT_OUT = Path("runs/ae/autoencoder.safetensors")
DEFAULT_SIZE = 256
MAX_NAMED = 8


def import_(config: ImportConfig) -> Path:
    """Read a file of the ldm layout or a folder of diffusers, and write the same as files of ours.

    The underscore is there because `import` is a word of Python's.

    Args:
        config: what to read, and where to write.

    Returns:
        The autoencoder's file; of a whole model the folder with its files.

    Raises:
        DataError: the source cannot be read, or ours cannot express it; the message names what.
        UsageError: the output exists, or the picture size does not fit.
    """
    out = config.out or DEFAULT_OUT
    if config.out is not None:
        _require_absent(config.out)
    tensors, metadata = ({}, {}) if config.source.is_dir() else read_tensors(config.source)
    if wants_whole_model(config, tensors):
        return import_whole_model(config, tensors, metadata)
    _require_absent(out)
    if config.source.is_dir():
        imported = read_autoencoder(config.source)
    else:
        imported = autoencoder_in(tensors, metadata, str(config.source))
    model = imported.model
    if imported.dropped:
        kinds = sorted({".".join(name.split(".")[:2]) for name in imported.dropped})
        named = ", ".join(kinds[:MAX_NAMED]) + (" ..." if len(kinds) > MAX_NAMED else "")
        say(f"{len(imported.dropped)} tensors are not the autoencoder's and left out: {named}")
    size = _size(config.size, imported.size, model.config.factor)
    preprocessing = PreprocessingConfig.model_validate(
        {"size": size, "channels": model.image_channels}
    )
    trained = {"imported_from": str(config.source), **imported.scaling}
    if imported.scaling:
        said = ", ".join(f"{name} {value}" for name, value in imported.scaling.items())
        say(f"{said}: recorded, and applied nowhere (latents on disk are raw)")
    save_autoencoder(out, model, preprocessing, trained)
    say(
        f"{model.config.bottleneck} autoencoder: {model.image_channels} x {size} x {size} "
        f"pictures, factor {model.config.factor}, {model.latent_channels} latent channels"
    )
    return out


def _require_absent(out: Path) -> None:
    if out.exists():
        raise UsageError(f"{out} exists: give another --out, or remove it first")


def _size(typed: int | None, stated: int | None, factor: int) -> int:
    """The picture size: as typed, or what the source says, rounded down to whole latents."""
    if typed is not None and typed % factor:
        raise UsageError(f"--size {typed} is not a multiple of the autoencoder's factor {factor}")
    size = typed or stated or DEFAULT_SIZE
    return max(size - size % factor, factor)
