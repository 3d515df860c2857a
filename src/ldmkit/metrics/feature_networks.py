"""The networks whose features generated pictures are compared in, each with a name for its distances."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldmkit.metrics.frechet import INCEPTION_FEATURES, inception
from ldmkit.modelfile import fingerprint
from ldmkit.networks.efficientnet import INPUT_SIZE, load_efficientnet_lite0
from ldmkit.pixels import Pixels

UNBIASED_LOGITS = "logits_unbiased"
"""What torch-fidelity's Inception score is made of: the classifier without its bias."""


class Side(NamedTuple):
    """A set of pictures in the features of one network."""

    features: Tensor
    """`[n, f]` on the CPU."""
    logits: Tensor | None = None
    """`[n, classes]`, of a network whose Inception score is one."""


class FeatureNetwork(NamedTuple):
    """A network, and what tells its numbers from those of others."""

    name: str
    """`effnet` or `inception`."""
    weights: str
    """Fingerprint of its tensors."""
    resize: str
    """How it brings pictures to its own size."""
    extract: Callable[[Pixels], Side]
    """Features of 8-bit RGB pixels `[b, 3, h, w]`."""


def effnet_network(path: Path, device: torch.device) -> FeatureNetwork:
    """EfficientNet-Lite0 with the weights of a file.

    Raises:
        DataError: the file cannot be read, or holds another network.
    """
    network = load_efficientnet_lite0(path).to(device)

    def extract(pixels: Pixels) -> Side:
        return Side(network.pooled(pixels.to(device).float() / 127.5 - 1.0).cpu())

    resize = f"{INPUT_SIZE} pixels, bicubic, anti-aliased"
    return FeatureNetwork("effnet", _weights_of(network), resize, extract)


def inception_network(path: Path | None, device: torch.device) -> FeatureNetwork:
    """Inception v3 of the published FID through torch-fidelity.

    Raises:
        UsageError: torch-fidelity is not installed.
        DataError: the weights are not to be had; the message names what to get.
    """
    network = inception(path, (INCEPTION_FEATURES, UNBIASED_LOGITS), option="--fid").to(device)

    def extract(pixels: Pixels) -> Side:
        features, logits = network(pixels.to(device))
        return Side(features.cpu(), logits.cpu())

    resize = "299 pixels, bilinear as in TensorFlow 1"
    return FeatureNetwork("inception", _weights_of(network), resize, extract)


@torch.no_grad()
def features_of(
    network: FeatureNetwork, batches: Iterable[Pixels], said: Callable[[int], None]
) -> Side:
    """The features of pictures that come in batches; `said` hears the size of each."""
    found = []
    for pixels in batches:
        found.append(network.extract(pixels))
        said(len(pixels))
    logits = [side.logits for side in found if side.logits is not None]
    return Side(torch.cat([side.features for side in found]), torch.cat(logits) if logits else None)


def _weights_of(network: nn.Module) -> str:
    return fingerprint(network.state_dict())
