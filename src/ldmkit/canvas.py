"""From the options of `sample` to the area of its pictures, and how the model works on it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from ldmkit.assembly import autoencoder_facts, require_same_autoencoder
from ldmkit.canvas_configs import CanvasConfig
from ldmkit.diffusion.tiles import Tiling
from ldmkit.errors import UsageError
from ldmkit.facts import DiffusionFacts, Manifest
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.networks.seamless import AXES, Axes, wrap_convolutions


class Canvas(NamedTuple):
    """The area of the samples."""

    shape: tuple[int, int, int]
    """z, height, width of the latents."""
    tiling: Tiling | None
    """None: denoised as a whole."""
    seamless: Axes


def canvas_of(config: CanvasConfig, model: LatentDiffusion, facts: DiffusionFacts) -> Canvas:
    """The area that the options ask for.

    Args:
        config: of the command.
        model: that draws.
        facts: of its file.

    Raises:
        UsageError: the sides do not fit the autoencoder and the network, or the tiles not the picture or
            what the model is told.
        DataError: the autoencoder is not the model's.
    """
    shape, wraps = facts.latent_shape, AXES[config.seamless]
    if config.size is None and config.tile in (None, "auto") and config.tile_overlap is None:
        factor = 1  # nothing is said in pixels
    else:
        factor = _factor(config, facts)
    halved = 2 ** (len(model.config.unet.multipliers) - 1)
    if config.size is not None:
        width, _, height = config.size.partition("x")
        pixels = int(width), int(height or width)
        _require_multiples(f"--size {config.size}", pixels, factor * halved)
        shape = (shape[0], pixels[1] // factor, pixels[0] // factor)
    if config.tile is None:
        return Canvas(shape, None, wraps)
    if any(condition.kind == "layout" for condition in model.config.conditions):
        raise UsageError(
            "--tile: the model is told boxes in shares of the whole picture, which a window does not see; "
            "leave out --tile"
        )
    sides = facts.latent_shape[1], facts.latent_shape[2]
    if config.tile != "auto":
        _require_multiples(f"--tile {config.tile}", (config.tile,), factor * halved)
        sides = config.tile // factor, config.tile // factor
    overlap = min(sides) // 2
    if config.tile_overlap is not None:
        _require_multiples(f"--tile-overlap {config.tile_overlap}", (config.tile_overlap,), factor)
        overlap = config.tile_overlap // factor
    if not 0 < overlap < min(sides):
        raise UsageError(
            f"--tile-overlap {overlap * factor}: windows of {min(sides) * factor} pixels can share "
            f"{factor} to {(min(sides) - 1) * factor}"
        )
    return Canvas(shape, Tiling(sides, overlap, wraps), wraps)


def make_seamless(model: LatentDiffusion, canvas: Canvas) -> None:
    """From here on a model works on the canvas as one that continues at its opposite borders.

    Where windows go around the border, each of them is denoised as a picture with borders.
    """
    around = canvas.seamless
    if canvas.tiling is not None:
        lengths = zip(around, canvas.shape[1:], canvas.tiling.sides, strict=True)
        y, x = (wraps and length <= side for wraps, length, side in lengths)
        around = y, x
    wrap_convolutions(model.unet, around)


def pixels_of_a_latent(manifest: Manifest) -> int | None:
    """How many pixels a latent of a set stands for along each side; None where the set does not say.

    In a set of several shapes all have about the area of the square that they are named after.
    """
    size = manifest.recipe.get("preprocessing", {}).get("size")
    _, height, width = manifest.latent_shape
    return None if size is None else 2 ** round(math.log2(size / math.sqrt(height * width)))


def _factor(config: CanvasConfig, facts: DiffusionFacts) -> int:
    if facts.factor is not None:
        return facts.factor
    if config.ae is None:
        raise UsageError(
            "the model's file does not say how many pixels a latent stands for: give --ae, its autoencoder"
        )
    require_same_autoencoder(facts.autoencoder, config.ae, "the latents of the model")
    return autoencoder_facts(config.ae).factor


def _require_multiples(option: str, pixels: Sequence[int], unit: int) -> None:
    if not any(side % unit for side in pixels):
        return
    below = "x".join(str(max(unit, side // unit * unit)) for side in pixels)
    above = "x".join(str(-(-side // unit) * unit) for side in pixels)
    nearest = below if below == above else f"{below} or {above}"
    raise UsageError(
        f"{option}: sides are multiples of {unit} pixels for this model; take {nearest}"
    )
