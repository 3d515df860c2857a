"""`ldmkit export`: a model file of ours in, one that other projects read out."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch

from ldmkit.assembly import autoencoder_facts, load_autoencoder, require_same_autoencoder
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.container import read_header
from ldmkit.durable import atomic_directory, atomic_file
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import Whitening
from ldmkit.interchange_configs import ExportConfig
from ldmkit.interop import diffusers_layout, ldm_layout
from ldmkit.interop.layout import Tensors
from ldmkit.interop.ldm_export import export_whole_model
from ldmkit.interop.parity import compare, diffusers_model, ours, require_parity
from ldmkit.interop.reading import LEGACY_KEY, RESOLUTION_KEY, WEIGHTS_FILES, read_autoencoder
from ldmkit.manifest import read_manifest
from ldmkit.terminal import say


def export(config: ExportConfig) -> Path:
    """Write an autoencoder, or a whole model, in another project's layout, and prove it by running both.

    What was written is read back by `ldmkit import`'s code, and by diffusers where that is
    installed; encoding and decoding one random picture must agree within 1e-4, or nothing is left.

    Args:
        config: what to write, in which layout, to where.

    Returns:
        The folder, or the file.

    Raises:
        DataError: the layout cannot express this autoencoder, or what was written differs.
        UsageError: the output exists, or an option does not go with the layout.
    """
    if config.scale == "channel" and config.to == "ldm":
        raise UsageError("--scale channel: the ldm layout has one scale_factor only")
    if config.scale == "channel" and config.latents is None:
        raise UsageError("--scale channel needs --latents, whose statistics to write")
    if config.out.exists():
        raise UsageError(f"{config.out} exists: give another --out, or remove it first")
    if read_header(config.model).kind == "diffusion":
        return _export_diffusion(config)
    if config.ae is not None:
        raise UsageError(f"--ae goes with a diffusion model; {config.model} is none")
    facts = autoencoder_facts(config.model)
    model = load_autoencoder(config.model)
    bottleneck = model.config.bottleneck
    if bottleneck == "identity":
        raise DataError(f"{config.model} has no networks (bottleneck identity): nothing to export")
    if bottleneck == "deterministic":
        say("no layout has latents without noise: written as KL with a standard deviation of 3e-7")
    statistics = None
    if config.latents is not None:
        manifest = read_manifest(config.latents)
        wanted = str(manifest.recipe.get("autoencoder"))
        require_same_autoencoder(wanted, config.model, f"the latents in {config.latents}")
        statistics = manifest.whitening
    if config.to == "diffusers":
        scaling = _scaling(config, statistics, quantised=bottleneck == "vq")
        _write_diffusers(config.out, model, facts.preprocessing, scaling)
    else:
        _write_ldm(config.out, model, facts.preprocessing, statistics)
    return config.out


def _export_diffusion(config: ExportConfig) -> Path:
    if config.latents is not None or config.scale != "scalar":
        raise UsageError("--latents and --scale: a diffusion model has its own whitening")
    if config.to != "ldm":
        raise UsageError(f"--to {config.to}: a diffusion model goes to ldm")
    return export_whole_model(config.model, config.ae, config.out)


def _write_diffusers(
    out: Path, model: Autoencoder, preprocessing: PreprocessingConfig, scaling: dict[str, Any]
) -> None:
    page = diffusers_layout.config_page(model.config, preprocessing, scaling)
    tensors = diffusers_layout.to_diffusers(model.state_dict(), model.config)
    with atomic_directory(out) as folder:
        with atomic_file(folder / WEIGHTS_FILES[0]) as temporary:
            _save(temporary, tensors, model, preprocessing)
        with atomic_file(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(page, indent=2) + "\n", encoding="utf-8")
        _check(model, folder, out)
        runner = diffusers_model(folder, page["_class_name"])
        if runner is None:
            say("diffusers is not installed: its own reading was not tried")
            return
        difference = compare(model, runner)
        require_parity(difference, f"{out} as diffusers runs it")
        say(f"largest differences as diffusers runs it: {difference}")


def _write_ldm(
    out: Path,
    model: Autoencoder,
    preprocessing: PreprocessingConfig,
    statistics: Whitening | None,
) -> None:
    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out}: the ldm layout is one file, name it *.safetensors")
    tensors = ldm_layout.to_ldm(model.state_dict(), model.config)
    page = ldm_layout.config_page(model.config, preprocessing)
    if statistics is not None:
        page += f"# scale_factor of the diffusion model: {1.0 / _overall(statistics)[1]:.6g}\n"
    with atomic_file(out.with_suffix(".yaml")) as beside, atomic_file(out) as temporary:
        _save(temporary, tensors, model, preprocessing)
        _check(model, temporary, out)
        beside.write_text(page, encoding="utf-8")
    say(f"{out.with_suffix('.yaml')} beside it has the config; tensor names have no prefix")


def _save(
    path: Path, tensors: Tensors, model: Autoencoder, preprocessing: PreprocessingConfig
) -> None:
    legacy = model.config.codebook.legacy_commitment
    metadata = {
        "format": "pt",  # other readers insist on it
        LEGACY_KEY: "true" if legacy else "false",
        RESOLUTION_KEY: str(preprocessing.size),
    }
    safetensors.torch.save_file(tensors, path, metadata)


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
