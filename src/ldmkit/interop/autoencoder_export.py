"""An autoencoder of ours in another project's layout, proved by running both."""

from pathlib import Path
from typing import Any

from ldmkit.assembly import autoencoder_facts, load_autoencoder, require_same_autoencoder
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.durable import atomic_directory, atomic_file
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import Whitening
from ldmkit.interchange_configs import ExportConfig
from ldmkit.interop import ldm_layout
from ldmkit.interop.autoencoder_writing import save_foreign, write_autoencoder_folder
from ldmkit.interop.parity import compare, diffusers_model, ours, require_parity
from ldmkit.interop.reading import read_autoencoder
from ldmkit.manifest import read_manifest
from ldmkit.terminal import say


def export_autoencoder_folder(config: ExportConfig) -> None:
    """Write a folder for diffusers, read back by our code, and by diffusers where that is installed.

    Raises:
        DataError: the layout cannot express this autoencoder, or what was written differs.
        UsageError: an option does not go with it.
    """
    if config.scale == "channel" and config.latents is None:
        raise UsageError("--scale channel needs --latents, whose statistics to write")
    model, preprocessing = _loaded(config.model)
    scaling = _scaling(config, _statistics(config), quantised=model.codebook is not None)
    with atomic_directory(config.out) as folder:
        page = write_autoencoder_folder(folder, model, preprocessing, scaling)
        _check(model, folder, config.out)
        runner = diffusers_model(folder, page["_class_name"])
        if runner is None:
            say("diffusers is not installed: its own reading was not tried")
            return
        difference = compare(model, runner)
        require_parity(difference, f"{config.out} as diffusers runs it")
        say(f"largest differences as diffusers runs it: {difference}")


def export_autoencoder_file(config: ExportConfig) -> None:
    """Write one file of the original layout and a `.yaml` beside it, read back by our code.

    Raises:
        DataError: the layout cannot express this autoencoder, or what was written differs.
        UsageError: an option does not go with it.
    """
    out = config.out
    if config.scale == "channel":
        raise UsageError("--scale channel: the ldm layout has one scale_factor only")
    model, preprocessing = _loaded(config.model)
    statistics = _statistics(config)
    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out}: the ldm layout is one file, name it *.safetensors")
    tensors = ldm_layout.to_ldm(model.state_dict(), model.config)
    page = ldm_layout.config_page(model.config, preprocessing)
    if statistics is not None:
        page += f"# scale_factor of the diffusion model: {1.0 / _overall(statistics)[1]:.6g}\n"
    with atomic_file(out.with_suffix(".yaml")) as beside, atomic_file(out) as temporary:
        save_foreign(temporary, tensors, model, preprocessing)
        _check(model, temporary, out)
        beside.write_text(page, encoding="utf-8")
    say(f"{out.with_suffix('.yaml')} beside it has the config; tensor names have no prefix")


def _loaded(path: Path) -> tuple[Autoencoder, PreprocessingConfig]:
    model = load_autoencoder(path)
    if model.config.bottleneck == "identity":
        raise DataError(f"{path} has no networks (bottleneck identity): nothing to export")
    if model.config.bottleneck == "deterministic":
        say("no layout has latents without noise: written as KL with a standard deviation of 3e-7")
    return model, autoencoder_facts(path).preprocessing


def _statistics(config: ExportConfig) -> Whitening | None:
    """Those of the latent set that is given."""
    if config.latents is None:
        return None
    manifest = read_manifest(config.latents)
    wanted = str(manifest.recipe.get("autoencoder"))
    require_same_autoencoder(wanted, config.model, f"the latents in {config.latents}")
    return manifest.whitening


def _check(model: Autoencoder, written: Path, out: Path) -> None:
    difference = compare(model, ours(read_autoencoder(written).model))
    require_parity(difference, f"{out} as it is read back")
    say(f"largest differences as it is read back: {difference}")


def _scaling(
    config: ExportConfig, statistics: Whitening | None, *, quantised: bool
) -> dict[str, Any]:
    """What `config.json` says of the scale of latents; without it diffusers would take 0.18215."""
    if statistics is None:
        if not quantised:
            say(
                "warning: without --latents the scaling_factor is written as 1.0; a diffusion model "
                "trained by others wants latents of variance 1"
            )
        return {"scaling_factor": 1.0}
    mean, std = _overall(statistics)
    if quantised:
        if config.scale == "channel":
            raise UsageError("--scale channel: diffusers' VQModel has one scaling_factor only")
        say(f"diffusers' VQModel cannot shift its latents; their mean is {mean:.3g}")
        return {"scaling_factor": 1.0 / std}
    if config.scale == "channel":
        return {
            "latents_mean": list(statistics.mean),
            "latents_std": list(statistics.std),
            "scaling_factor": 1.0,
        }
    return {"scaling_factor": 1.0 / std, "shift_factor": mean}


def _overall(statistics: Whitening) -> tuple[float, float]:
    """Mean and standard deviation over all channels together."""
    count = len(statistics.mean)
    mean = sum(statistics.mean) / count
    squares = sum(m * m + s * s for m, s in zip(statistics.mean, statistics.std, strict=True))
    return mean, (squares / count - mean * mean) ** 0.5
