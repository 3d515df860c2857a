"""Proof that an exported diffusion model is the same function: diffusers runs what was written."""

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch

from ldmkit.condition_configs import ClassCondition
from ldmkit.errors import DataError, UsageError
from ldmkit.interop.class_tables import values_of_classes
from ldmkit.interop.diffusers_import import CLASS_FILE, CLASS_TABLE, SCHEDULER
from ldmkit.interop.diffusers_scheduler import FLOW
from ldmkit.interop.reading import CONFIG, read_page
from ldmkit.interop.whole_export import BothStages
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.tensors import Images, Latents, Sigmas
from ldmkit.torchvision_import import import_torchvision

TOLERANCE = 1e-4
"""Largest difference allowed, as a share of the largest value."""


class Denoised(NamedTuple):
    """What one step of theirs to the end made of noise."""

    clean: Latents
    sigma: Sigmas
    """The level that the noise was taken for."""


def import_diffusers() -> Any:  # noqa: ANN401 - a module
    """The package.

    Raises:
        UsageError: it is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own; nothing a user of ours could act on
        try:
            import_torchvision()
            return import_module("diffusers")
        except (ImportError, RuntimeError) as error:
            raise UsageError(
                "a diffusion model's export is proved by running it: pip install "
                "'ldmkit[diffusers]'"
            ) from error


@torch.no_grad()
def prove(folder: Path, autoencoder_name: str, both: BothStages) -> str:
    """Compare one denoising and one decoding of fixed numbers there and here.

    Args:
        folder: what was written.
        autoencoder_name: of the autoencoder's folder in it.
        both: what it was written from.

    Returns:
        The largest differences, as shares of the largest value, in words.

    Raises:
        DataError: they are not within 1e-4.
    """
    model, autoencoder, shape = both.model, both.autoencoder, both.facts.latent_shape
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = _denoised_there(folder, both.told, noise)
        raw = model.unwhiten(noise)
        if autoencoder.codebook is not None:  # on codes: none is nearest to two by rounding
            raw = autoencoder.codebook.quantize(raw)
        decoded = _decoded_there(folder / autoencoder_name, model.whiten(raw))
    differences = {
        "denoise": _relative(found.clean, _denoised_here(model, found.sigma, noise)),
        "decode": _relative(decoded, autoencoder.decode(raw)),
    }
    said = ", ".join(f"{name} {value:.2g}" for name, value in differences.items())
    if not all(value <= TOLERANCE for value in differences.values()):  # NaN is not
        raise DataError(
            f"the folder as diffusers runs it differs from the model ({said}; allowed "
            f"{TOLERANCE:g}): nothing was written"
        )
    return said


def _denoised_there(folder: Path, told: ClassCondition | None, noise: Latents) -> Denoised:
    """One step from the middle of the schedule to clean latents."""
    unet, scheduler = _loaded(folder / "unet", CONFIG), _loaded(folder / "scheduler", SCHEDULER)
    if type(scheduler).__name__ == FLOW:
        scheduler.set_timesteps(sigmas=[0.5])
        t, s = scheduler.timesteps[0], scheduler.sigmas[:1]
        sigma = s / (1.0 - s)
    else:
        scheduler.set_timesteps(1)
        t = torch.tensor(scheduler.config.num_train_timesteps // 2)
        alpha_bar = scheduler.alphas_cumprod[t]
        sigma = ((1.0 - alpha_bar) / alpha_bar).sqrt()[None]
    classes: dict[str, Any] = {}
    if told is not None and told.attended:
        table = safetensors.torch.load_file(folder / CLASS_FILE)[CLASS_TABLE]
        classes["encoder_hidden_states"] = table[None, :1]
    elif told is not None:
        classes["class_labels"] = torch.zeros(1, dtype=torch.int64)
    prediction = unet(noise, t, **classes).sample
    return Denoised(scheduler.step(prediction, t, noise).prev_sample, sigma)


def _denoised_here(model: LatentDiffusion, sigma: Sigmas, noise: Latents) -> Latents:
    scale = model.parameterization(sigma).c_in
    first = torch.zeros(1, dtype=torch.int64)
    told = model.condition(values_of_classes(model, first))
    return model.denoise(noise / scale.view(-1, 1, 1, 1), sigma, told)


def _decoded_there(folder: Path, whitened: Latents) -> Images:
    autoencoder = _loaded(folder, CONFIG)
    scale = autoencoder.config
    latents = whitened / scale.scaling_factor
    if "latents_std" in scale and scale["latents_std"] is not None:
        mean, std = (torch.tensor(scale[f"latents_{name}"]) for name in ("mean", "std"))
        latents = latents * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    return autoencoder.decode(latents).sample


def _loaded(folder: Path, page: str) -> Any:  # noqa: ANN401 - of the class that the page names
    kind = getattr(import_diffusers(), read_page(folder / page)["_class_name"])
    if page == SCHEDULER:
        return kind.from_pretrained(folder)
    return kind.from_pretrained(folder, low_cpu_mem_usage=False).eval()


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()
