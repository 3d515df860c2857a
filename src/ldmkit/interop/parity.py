"""Proof that an exported autoencoder is the same function: by running both on the same picture."""

import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder.posterior import GaussianPosterior, Posterior
from ldmkit.errors import DataError
from ldmkit.tensors import Images, Latents
from ldmkit.torchvision_import import import_torchvision

TOLERANCE = 1e-4
MIN_SIDE = 32


class Runner(NamedTuple):
    """An autoencoder as two functions."""

    moments: Callable[[Images], Latents]
    """Means of the latents, and their log-variances after them where there are any."""
    decode: Callable[[Latents], Images]


class Difference(NamedTuple):
    """Largest absolute differences between two autoencoders."""

    encode: float
    decode: float

    def __str__(self) -> str:
        return f"encode {self.encode:.2g}, decode {self.decode:.2g}"


def ours(model: Autoencoder) -> Runner:
    """An autoencoder of ours."""
    return Runner(lambda images: _moments(model.encode(images)), model.decode)


def diffusers_model(folder: Path, class_name: str) -> Runner | None:
    """The autoencoder of a folder as diffusers itself runs it; None where that is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own; nothing a user of ours could act on
        try:
            import_torchvision()
            kind: Any = getattr(import_module("diffusers"), class_name)
        except (ImportError, RuntimeError):
            return None
        model = kind.from_pretrained(folder, low_cpu_mem_usage=False).eval()

    def moments(images: Images) -> Latents:
        encoded = model.encode(images)
        if class_name == "VQModel":
            return encoded.latents
        return torch.cat([encoded.latent_dist.mean, encoded.latent_dist.logvar], 1)

    return Runner(moments, lambda latents: model.decode(latents).sample)


@torch.no_grad()
def compare(model: Autoencoder, other: Runner) -> Difference:
    """Run both on one random picture and on its latents.

    A codebook's latents are replaced by their codes before decoding: a latent halfway between two
    codes may fall to either by rounding, which says nothing about the weights.
    """
    side = max(MIN_SIDE, 2 * model.config.factor)
    noise = torch.rand(
        1, model.image_channels, side, side, generator=torch.Generator().manual_seed(0)
    )
    images = noise * 2.0 - 1.0
    posterior = model.encode(images)
    theirs = other.moments(images)
    mine = _moments(posterior) if model.is_noisy else posterior.mean
    encode = (mine - theirs[:, : mine.shape[1]]).abs().max().item()
    latents = posterior.mean if model.codebook is None else model.codebook.quantize(posterior.mean)
    decode = (model.decode(latents) - other.decode(latents)).abs().max().item()
    return Difference(encode, decode)


def require_parity(difference: Difference, what: str) -> None:
    """Raise DataError unless both differences are below the tolerance (NaN is not)."""
    if not all(value <= TOLERANCE for value in difference):
        raise DataError(
            f"{what} differs from the autoencoder ({difference}; allowed {TOLERANCE:g}): "
            "nothing was written"
        )


def _moments(posterior: Posterior) -> Latents:
    if isinstance(posterior, GaussianPosterior):
        return torch.cat([posterior.mean, posterior.log_variance], 1)
    return posterior.mean
