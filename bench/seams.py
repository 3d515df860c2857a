"""Whether pictures larger than the training's show where windows, or their own opposite borders, meet.

python bench/seams.py MODEL --ae AE [--num 64] [--steps 20] [--scale 2] [--picture OUT.png]

Draws the same seeds in several ways at SCALE times the size the model was trained on, decodes them, and
prints a table. The figure is a ratio: the mean absolute difference of neighbouring pixels across a border,
over that across like places. Like places lie one whole stride of the U-Net to either side of the border:
decoder and U-Net draw other edges where their cells begin than inside of them (places at half a stride have a
fifth more on the demo), and near places have about the same content, so that it matters little where in
a picture its objects lie. "Same places, whole" is that ratio where the same seeds are drawn as a whole: what
the content itself gives there. Borders are

    windows    where a window begins or ends
    wrap       from the last pixel to the first

and numbers behind +- are standard errors over samples (jackknife). Two rows are controls that have to fail:
pictures pasted together of latents of the training's size, and the wrap of pictures that do not tile.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

import ldmkit
from ldmkit.assembly import autoencoder_facts, diffusion_facts, load_autoencoder, load_diffusion
from ldmkit.diffusion.tiles import Tiling, windows_of
from ldmkit.generation_configs import SampleConfig
from ldmkit.modelfile import load
from ldmkit.networks.seamless import AXES, wrap_convolutions
from ldmkit.pixels import grid, save_png, to_pixels
from ldmkit.terminal import say
from ldmkit.training.runtime import pick_device

ASIDE = (-1, 1)
"""Like places, strides of the U-Net from a border."""
PASTED = "(n rows columns) z y x -> n z (rows y) (columns x)"
SHOWN = 4
"""Pictures of each way in the sheet."""


class Way(NamedTuple):
    """A way to draw."""

    name: str
    options: dict[str, object]


WAYS = (
    Way("whole", {}),
    Way("windows", {"tile": "auto"}),
    Way("pasted", {}),
    Way("whole, seamless", {"seamless": "both"}),
    Way("windows, seamless", {"tile": "auto", "seamless": "both"}),
)


def drawn(way: Way, arguments: argparse.Namespace, size: str) -> Tensor:
    """Pictures `[n, c, y, x]` in [-1, 1]."""
    pasted = way.name == "pasted"
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "model": arguments.model,
            "ae": arguments.ae,
            "out": Path(folder) / "samples.safetensors",
            "num": arguments.num * (arguments.scale**2 if pasted else 1),
            "steps": arguments.steps,
            "size": None if pasted else size,
        }
        ldmkit.sample(SampleConfig.model_validate(config | way.options))
        latents = load(Path(folder) / "samples.safetensors", kind="samples")[1]["latents"]
    if pasted:
        sides = {"rows": arguments.scale, "columns": arguments.scale}
        latents = rearrange(latents, PASTED, **sides)
    model = load_autoencoder(arguments.ae, pick_device("auto"))
    wrap_convolutions(model.decoder, AXES["both" if "seamless" in way.options else "none"])
    with torch.inference_mode():
        parts = [model.decode(part.to(pick_device("auto"))).cpu() for part in latents.split(2)]
    return torch.cat(parts).clamp(-1.0, 1.0)


def profiles(images: Tensor) -> Tensor:
    """`[n, 2, side]`: mean absolute difference across the border before each column, and each row."""
    across = (images - images.roll(1, 3)).abs().mean((1, 2))
    down = (images - images.roll(1, 2)).abs().mean((1, 3))
    return torch.stack([across, down], 1).double()


def places_of(tiling: Tiling, cells: int) -> dict[str, list[int]]:
    """Borders along one axis, in cells; without the picture's own."""
    spans = {
        (int(window.columns.cells[0]), int(window.columns.cells[0]) + len(window.columns.cells))
        for window in windows_of(cells, cells, tiling)
    }
    edges = {edge % cells for span in spans for edge in span} - {0}
    return {"windows": sorted(edges)}


def ratio(profile: Tensor, borders: Sequence[int], factor: int, stride: int) -> tuple[float, float]:
    """Across the borders over beside them, and its standard error over samples (jackknife).

    Args:
        profile: as `profiles` gives it.
        borders: in cells.
        factor: pixels of a cell.
        stride: of the U-Net, cells.
    """
    side = profile.shape[2]
    beside = [(border + step * stride) * factor % side for border in borders for step in ASIDE]
    at = profile[:, :, [border * factor % side for border in borders]].mean((1, 2))
    like = profile[:, :, beside].mean((1, 2))
    count = len(profile)
    without = (at.sum() - at) / (like.sum() - like)
    error = ((count - 1) * (without - without.mean()).square().mean()).sqrt()
    return float(at.sum() / like.sum()), float(error)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--ae", type=Path, required=True)
    parser.add_argument("--num", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=int, default=2)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()

    factor = autoencoder_facts(arguments.ae).factor
    trained = diffusion_facts(arguments.model).latent_shape[1:]
    if trained[0] != trained[1]:
        raise SystemExit("this script takes models of square pictures")
    side = trained[0]
    stride = 2 ** (len(load_diffusion(arguments.model).config.unet.multipliers) - 1)
    cells = side * arguments.scale
    size = str(cells * factor)
    found = {way.name: drawn(way, arguments, size) for way in WAYS}
    measured = {name: profiles(images) for name, images in found.items()}

    plain = places_of(Tiling((side, side), side // 2), cells)
    around = places_of(Tiling((side, side), side // 2, (True, True)), cells)
    wrap = {"wrap": [0]}
    rows = [
        ("windows", plain, "whole"),
        ("pasted", {"windows": list(range(side, cells, side))}, "whole"),
        ("whole", wrap, None),
        ("whole, seamless", wrap, None),
        ("windows, seamless", around | wrap, "whole, seamless"),
    ]
    say(
        f"{arguments.num} samples of {size} x {size} pixels, {arguments.steps} calls, trained on {side * factor}"
    )
    say("| drawn | border | ratio | same places, whole |\n|---|---|---|---|")
    for name, borders, control in rows:
        for border, places in borders.items():
            own = "{:.3f} +- {:.3f}".format(*ratio(measured[name], places, factor, stride))
            usual = ""
            if control is not None:
                usual = "{:.3f} +- {:.3f}".format(*ratio(measured[control], places, factor, stride))
            say(f"| {name} | {border} | {own} | {usual} |")
    if arguments.picture is not None:
        half = cells * factor // 2  # opposite borders of pictures that tile meet in the middle
        shown = [
            (images.roll((half, half), (2, 3)) if "seamless" in name else images)[:SHOWN]
            for name, images in found.items()
            if name != "pasted"
        ]
        save_png(arguments.picture, grid(to_pixels(torch.cat(shown)), SHOWN))


if __name__ == "__main__":
    main()
