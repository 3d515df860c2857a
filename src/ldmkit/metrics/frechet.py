"""Fréchet distances between sets of pictures: of Gaussians fitted to a network's features.

`rfid` is the FID of Inception features as published (Heusel et al. 2017) through torch-fidelity's network, between
reconstructions and originals; `rfd_effnet` is the same distance in features of EfficientNet-Lite0 and
comparable with itself only.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from ldmkit.errors import DataError, UsageError
from ldmkit.pixels import to_pixels
from ldmkit.tensors import Images
from ldmkit.torchvision_import import import_torchvision
from ldmkit.unpickling import read_tensors

Features = Callable[[Images], Float[Tensor, "batch features"]]
INCEPTION_FEATURES = "2048"


class FeatureStatistics:
    """Mean and covariance of features, gathered batch by batch in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sum: Tensor | None = None
        self.products: Tensor | None = None

    def add(self, features: Float[Tensor, "batch features"]) -> None:
        """Take in one batch."""
        values = features.detach().cpu().double()
        self.count += len(values)
        total, products = values.sum(0), values.T @ values
        self.sum = total if self.sum is None else self.sum + total
        self.products = products if self.products is None else self.products + products

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean `[f]` and unbiased covariance `[f, f]` of two or more samples."""
        assert self.sum is not None  # noqa: S101 - callers look at `count` first
        assert self.products is not None  # noqa: S101
        mean = self.sum / self.count
        spread = self.products - self.count * torch.outer(mean, mean)
        return mean, spread / (self.count - 1)


class Frechet(NamedTuple):
    """A distance between originals and reconstructions, and what it is measured against."""

    distance: float
    floor: float | None
    """The same distance between two random halves of the originals; None below four pictures."""
    pictures: int


class FrechetComparison:
    """Fréchet distance of reconstructions to originals in the features of one network.

    Pictures are rounded to 8 bits first, as they would be in files. Every second original belongs to
    one half for the floor, so the pictures must come in random order.

    Args:
        features: maps images in [-1, 1] to `[b, f]`.
    """

    def __init__(self, features: Features) -> None:
        self.features = features
        self.halves = (FeatureStatistics(), FeatureStatistics())
        self.originals, self.reconstructions = FeatureStatistics(), FeatureStatistics()

    def add(self, images: Images, reconstructions: Images) -> None:
        """Take in one batch of pairs."""
        found = self.features(_rounded(images))
        first = self.originals.count % 2
        for offset, half in enumerate(self.halves):
            half.add(found[(offset + first) % 2 :: 2])
        self.originals.add(found)
        self.reconstructions.add(self.features(_rounded(reconstructions)))

    def result(self) -> Frechet | None:
        """The distance and its floor; None before two pictures."""
        count = self.originals.count
        if count < 2:
            return None
        distance = frechet_distance(self.originals.moments(), self.reconstructions.moments())
        halves = [half.moments() for half in self.halves] if count >= 4 else None
        return Frechet(distance, frechet_distance(*halves) if halves else None, count)


def frechet_distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017, Eq. 6).

    The root's trace is that of (C_a^(1/2) C_b C_a^(1/2))^(1/2), which is symmetric, so that rank-deficient
    covariances (fewer pictures than features) give no complex numbers.

    Args:
        a: mean `[f]` and covariance `[f, f]`, float64.
        b: the same of the other set.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    root = covariance_root(cov_a)
    product = root @ cov_b @ root
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0.0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2.0 * trace
    return max(0.0, distance.item())


def covariance_root(covariance: Float[Tensor, "f f"]) -> Float[Tensor, "f f"]:
    """The symmetric root of a covariance, which may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0.0).sqrt()) @ vectors.T


def inception(
    path: Path | None,
    layers: Sequence[str] = (INCEPTION_FEATURES,),
    *,
    option: str = "--rfid",
) -> nn.Module:
    """Inception v3 of the published FID; maps 8-bit RGB pixels to a tuple of its layers' values.

    Args:
        path: torch-fidelity's weights, pickled or as safetensors; None looks into torch's cache.
        layers: torch-fidelity's names; "2048" are the pooled features.
        option: what asked for it, for errors.

    Raises:
        UsageError: torch-fidelity is not installed.
        DataError: the weights are not to be had; the message names what to get.
    """
    if find_spec("torch_fidelity") is None:
        raise UsageError(f"{option} needs torch-fidelity: pip install 'ldmkit[eval]'")
    import_torchvision()
    from torch_fidelity import feature_extractor_inceptionv3 as module

    name = module.URL_INCEPTION_V3.rsplit("/", 1)[1]
    file = path or Path(torch.hub.get_dir()) / "checkpoints" / name
    if path is None and not file.is_file():
        raise DataError(
            f"{option} needs the Inception weights of FID, and {file} is not there: get "
            f"{module.URL_INCEPTION_V3} and pass it with --inception FILE (--effnet FILE measures "
            "without them)"
        )
    tensors = read_tensors(file)
    # the class fetches and unpickles its weights when it is built: hand it these instead
    with mock.patch.object(module, "load_state_dict_from_url", return_value=tensors):
        try:
            network = module.FeatureExtractorInceptionV3("inception-v3-compat", list(layers))
        except RuntimeError as error:
            raise DataError(
                f"{file} does not hold torch-fidelity's Inception network ({str(error).split(':')[0]})"
            ) from error
    return network


def inception_features(network: nn.Module) -> Features:
    """The 2,048 pooled features of `inception` for images in [-1, 1]."""

    def features(images: Images) -> Tensor:
        device = next(network.parameters()).device
        return network(rgb_pixels(images).to(device))[0]

    return features


def rgb_pixels(images: Images) -> UInt8[Tensor, "batch _rgb height width"]:
    """8-bit RGB of images with one or three channels.

    Raises:
        DataError: they have another number of channels.
    """
    if images.shape[1] not in (1, 3):
        raise DataError(
            f"Fréchet features are those of RGB pictures; these have {images.shape[1]} channels"
        )
    return to_pixels(images).expand(-1, 3, -1, -1)


def _rounded(images: Images) -> Float[Tensor, "batch _rgb height width"]:
    """Images as an 8-bit file would give them back."""
    return rgb_pixels(images).to(images.device).float() / 127.5 - 1.0
