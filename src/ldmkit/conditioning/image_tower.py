"""Image towers of open_clip, frozen, with weights that the user gives as a file.

Only the image half is built. Pictures come as they are in [-1, 1], of any size; scaling them to the
tower's size and to its colours is part of the tower.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.conditioning.open_clip_weights import (
    Embeddings,
    FrozenNetwork,
    Weights,
    architecture,
    give_weights,
    published,
    read_weights,
    require_activation,
)
from ldmkit.data.preprocessing import preprocess
from ldmkit.errors import DataError, UsageError

Output = Literal["pooled", "tokens"]
"""The one embedding that the tower was trained to give; or all tokens after its last block, behind its
final norm: the class token first where there is one, then the places row by row."""
Colours = Literal["clip", "inception", "imagenet", "none"]

PREFIXES = ("visual.", "module.visual.", "embedder.model.visual.")
"""Of an image tower in files of open_clip and OpenAI, their training and Stable Diffusion 2 unCLIP."""
COLOUR_CHANNELS = 3


class ColourScale(NamedTuple):
    """Mean and standard deviation that colours in [0, 1] are brought to 0 and 1 from."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


COLOURS: dict[Colours, ColourScale] = {
    "clip": ColourScale((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "inception": ColourScale((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ColourScale((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ColourScale((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""Those that open_clip's weights were trained with. Keep in step with `tower_configs`; a test compares them."""


class FrozenImageTower(FrozenNetwork):
    """An image tower with its weights; calling it embeds pictures.

    Args:
        network: open_clip's `VisionTransformer`, `ModifiedResNet` or `TimmModel`.
        output: which of its numbers to give.
        colours: that its weights were trained with.
        size: side of the pictures that it takes, pixels.
    """

    def __init__(self, network: Any, output: Output, colours: Colours, size: int) -> None:  # noqa: ANN401
        super().__init__(network)
        self.output: Output = output
        self.colours: Colours = colours
        self.size = size

    @torch.no_grad()
    def __call__(self, pictures: Float[Tensor, "batch channels _h _w"]) -> Embeddings:
        """Pictures in [-1, 1], grey or RGB, to tokens `[batch, count, width]`, float32, on the tower's device."""
        scale = COLOURS[self.colours]
        fitted = torch.stack([fitted_to(picture, self.size) for picture in pictures])
        colours = (fitted.to(self.device).expand(-1, COLOUR_CHANNELS, -1, -1) + 1.0) / 2.0
        mean, std = (colours.new_tensor(values).view(-1, 1, 1) for values in scale)
        seen = (colours - mean) / std
        return (self._tokens(seen) if self.output == "tokens" else self._pooled(seen)).float()

    def _pooled(self, seen: Tensor) -> Tensor:
        found = self.network(seen)
        return (found[0] if isinstance(found, tuple) else found)[:, None]  # CoCa's adds its tokens

    def _tokens(self, seen: Tensor) -> Tensor:
        found = self.network.forward_intermediates(
            seen,
            indices=1,
            normalize_intermediates=True,
            intermediates_only=True,
            output_extra_tokens=_has_class_token(self.network),
        )
        places = rearrange(found["image_intermediates"][-1], "b c y x -> b (y x) c")
        first = found.get("image_intermediates_prefix")
        return places if first is None else torch.cat([first[-1], places], dim=1)


def fitted_to(picture: Float[Tensor, "channels _h _w"], size: int) -> Tensor:
    """A picture of that side: the shorter one fits (bicubic, anti-aliased), the longer one is cut."""
    return preprocess(picture, PreprocessingConfig(size=size, crop="center"), None)


def load_image_tower(
    name: str, weights: Path | None, output: Output, *, option: str, colours: Colours | None = None
) -> FrozenImageTower:
    """The image tower of an open_clip architecture, on the CPU, float32.

    Args:
        name: of the architecture, such as ViT-H-14.
        weights: its file, safetensors or a checkpoint, of open_clip, OpenAI or Stable Diffusion 2 unCLIP;
            what it holds beside the image tower is left out.
        output: which of its numbers to give.
        option: how the user gives the file, for errors: `--image-weights`.
        colours: that the weights were trained with; None for what open_clip says of those published.

    Raises:
        UsageError: no weights are given, the architecture is unknown or gives no such output, or its
            published weights differ in their colours.
        DataError: the file is missing or damaged, or holds other weights.
    """
    config = architecture(name)
    colours = colours or _colours_of(name)
    path, tensors = read_weights(Weights(name, weights, option), config)
    prefix = next((p for p in PREFIXES if any(n.startswith(p) for n in tensors)), None)
    if prefix is None:
        raise DataError(
            f"{path} holds no image tower by open_clip's names: none of its {len(tensors)} tensors "
            f"begins with {PREFIXES[0]}"
        )
    require_activation(path, name, tensors, config.get("quick_gelu", False))
    own = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
    network = _fresh_tower(config)
    if output == "tokens" and getattr(network, "attn_pool", None) is not None:
        raise UsageError(
            f"{name} gives no tokens that stand for places: take --image-output pooled"
        )
    own = {n: x.float() if x.is_floating_point() else x for n, x in own.items()}
    give_weights(network, own, path, name)
    return FrozenImageTower(network, output, colours, max(_pair(config["vision_cfg"])))


def _fresh_tower(config: dict[str, Any]) -> Any:  # noqa: ANN401 - one of open_clip's three kinds
    """The tower with numbers to be replaced; what it computes itself (tables of places) is there already."""
    from open_clip.model import _build_vision_tower

    vision = {**config["vision_cfg"], "timm_model_pretrained": False}
    with torch.random.fork_rng(devices=[]):
        return _build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))  # pyright: ignore[reportArgumentType]


def _has_class_token(network: Any) -> bool:  # noqa: ANN401
    trunk = getattr(network, "trunk", None)
    if trunk is not None:
        return getattr(trunk, "num_prefix_tokens", 0) > 0
    return hasattr(network, "class_embedding")


def _pair(vision: dict[str, Any]) -> tuple[int, int]:
    size = vision.get("image_size", 224)  # open_clip's own default
    return (size, size) if isinstance(size, int) else tuple(size)


def _colours_of(name: str) -> Colours:
    """The colours of all published weights of an architecture; CLIP's, as in open_clip, where there are none."""
    stated = {
        ColourScale(tuple(entry["mean"]), tuple(entry["std"]))
        for entry in published(name)
        if entry.get("mean") and entry.get("std")
    }
    known: list[Colours] = [colours for colours, scale in COLOURS.items() if scale in stated]
    if len(known) > 1:
        raise UsageError(
            f"weights of {name} were published for several scales of colours: say which yours have with "
            f"--image-colours {' or '.join(known)}"
        )
    return known[0] if known else "clip"


def embed_pictures(
    tower: FrozenImageTower, pictures: Float[Tensor, "pictures channels _h _w"], batch: int
) -> Float[Tensor, "pictures count width"]:
    """Embeddings of pictures in [-1, 1], float32 on the CPU; of none, too.

    Args:
        tower: what embeds.
        pictures: grey or RGB.
        batch: how many at a time. Results agree for any number up to rounding, and for the same pictures
            in the same batches exactly.
    """
    if not len(pictures):
        return tower(torch.zeros(1, COLOUR_CHANNELS, tower.size, tower.size))[:0].cpu()
    return torch.cat([tower(part).cpu() for part in pictures.split(batch)])
