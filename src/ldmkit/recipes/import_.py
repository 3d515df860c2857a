"""`ldmkit import`: models of another project in, files of ours out."""

from collections.abc import Callable
from pathlib import Path

from ldmkit.assembly import save_autoencoder
from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.errors import UsageError
from ldmkit.interchange_configs import ImportConfig
from ldmkit.interop.diffusers_import import read_folder
from ldmkit.interop.ldm_model import read_checkpoint
from ldmkit.interop.sources import Source, autoencoder_of, open_source
from ldmkit.interop.stated import require_unused
from ldmkit.interop.whole_import import DEFAULT_SIZE, WholeModel, say_left_out, write_whole_model
from ldmkit.terminal import say

DEFAULT_OUT, DEFAULT_FOLDER = Path("runs/ae/autoencoder.safetensors"), Path("runs/imported")
OF_WHOLE_MODELS = (
    "ae",
    "weights",
    "parameterization",
    "heads",
    "head_channels",
    "scaling_factor",
    "null_class",
)
READERS: dict[str, Callable[[Source, ImportConfig], WholeModel]] = {
    "file": read_checkpoint,
    "folder": read_folder,
}
"""Form of a source -> what reads a whole model in it."""


def import_(config: ImportConfig) -> Path:
    """Read a file of the ldm layout or a folder of diffusers, and write the same as files of ours.

    The underscore is there because `import` is a word of Python's.

    Args:
        config: what to read, and where to write.

    Returns:
        The autoencoder's file; of a whole model the folder with its files.

    Raises:
        DataError: the source cannot be read, or ours cannot express it; the message names what.
        UsageError: the output exists, or an option does not fit the source.
    """
    if config.out is not None:
        _require_absent(config.out)
    source = open_source(config.source)
    one_file = config.out is not None and config.out.suffix == ".safetensors"
    if source.is_whole and not one_file:
        out = config.out or DEFAULT_FOLDER
        _require_absent(out)
        return write_whole_model(READERS[source.form](source, config), config, out)
    without = f"{config.source} holds no whole model"
    alone = f"--out {config.out} names one file, which takes the autoencoder alone"
    require_unused(config, OF_WHOLE_MODELS, alone if source.is_whole else without)
    out = config.out or DEFAULT_OUT
    _require_absent(out)
    _import_autoencoder(source, config, out)
    return out


def _import_autoencoder(source: Source, config: ImportConfig, out: Path) -> None:
    imported = autoencoder_of(source)
    model = imported.model
    say_left_out(imported.dropped, "not the autoencoder's and left out")
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


def _require_absent(out: Path) -> None:
    if out.exists():
        raise UsageError(f"{out} exists: give another --out, or remove it first")


def _size(typed: int | None, stated: int | None, factor: int) -> int:
    """The picture size: as typed, or what the source says, rounded down to whole latents."""
    if typed is not None and typed % factor:
        raise UsageError(f"--size {typed} is not a multiple of the autoencoder's factor {factor}")
    size = typed or stated or DEFAULT_SIZE
    return max(size - size % factor, factor)
