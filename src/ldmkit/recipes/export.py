"""`ldmkit export`: a model file of ours in, one that other projects read out."""

from collections.abc import Callable
from pathlib import Path

from ldmkit.container import read_header
from ldmkit.errors import UsageError
from ldmkit.interchange_configs import ExportConfig
from ldmkit.interop.autoencoder_export import export_autoencoder_file, export_autoencoder_folder
from ldmkit.interop.diffusers_export import export_folder
from ldmkit.interop.ldm_export import export_checkpoint
from ldmkit.interop.whole_export import BothStages, load_both

AUTOENCODER_WRITERS: dict[str, Callable[[ExportConfig], None]] = {
    "diffusers": export_autoencoder_folder,
    "ldm": export_autoencoder_file,
}
WHOLE_WRITERS: dict[str, Callable[[BothStages, Path], None]] = {
    "diffusers": export_folder,
    "ldm": export_checkpoint,
}


def export(config: ExportConfig) -> Path:
    """Write an autoencoder, or a whole model, in another project's layout, and prove it by running both.

    What was written is read back by `ldmkit import`'s code or by diffusers itself; it must agree with
    ours within 1e-4, or nothing is left.

    Args:
        config: what to write, in which layout, to where.

    Returns:
        The folder, or the file.

    Raises:
        DataError: the layout cannot express this model, or what was written differs.
        UsageError: the output exists, or an option does not go with the model or the layout.
    """
    if config.out.exists():
        raise UsageError(f"{config.out} exists: give another --out, or remove it first")
    if read_header(config.model).kind == "diffusion":
        if config.latents is not None or config.scale != "scalar":
            raise UsageError("--latents and --scale: a diffusion model has its own whitening")
        WHOLE_WRITERS[config.to](load_both(config.model, config.ae), config.out)
        return config.out
    if config.ae is not None:
        raise UsageError(f"--ae goes with a diffusion model; {config.model} is an autoencoder")
    AUTOENCODER_WRITERS[config.to](config)
    return config.out
