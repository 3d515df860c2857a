"""Denoising in overlapping windows: a `Denoise` of windows becomes one of larger latents.

Each window is denoised by itself, and where windows overlap, the clean latents that they expect are
averaged (Bar-Tal et al. 2023, "MultiDiffusion", Eq. 5, in units of clean latents), with weights that
fall smoothly to the windows' borders (Jimenez 2023, "Mixture of Diffusers", whose are Gaussian). The
average is a weighted one of all windows, so a denoiser that looks at single cells gives the same in
windows as without. No state, no random numbers.
"""

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ldmkit.diffusion.denoiser import Denoise
from ldmkit.tensors import Latents, Sigmas


class Tiling(NamedTuple):
    """Overlapping windows; lengths in cells of latents."""

    sides: tuple[int, int]
    """Height and width of a window, at most those of the latents."""
    overlap: int
    """That neighbours share at least; 1 to less than a side."""
    wraps: tuple[bool, bool] = (False, False)
    """Along y and x: windows go on at the opposite border."""


class Span(NamedTuple):
    """A window along one axis."""

    cells: Int[Tensor, " side"]
    """Which, in order."""
    weights: Float[Tensor, " side"]
    """Of the window's estimate there; over all windows that have a cell they sum to 1. float64."""


class Window(NamedTuple):
    """A window: a span of rows and one of columns."""

    rows: Span
    columns: Span

    def of(self, x: Float[Tensor, "batch channels _y _x"]) -> Float[Tensor, "batch channels y x"]:
        """What of latents or a map of their size lies in it."""
        return x[:, :, self.rows.cells[:, None], self.columns.cells]


Crop = Callable[[Any, Window], Any]
"""A condition and a window -> the condition of the window."""


def windows_of(height: int, width: int, tiling: Tiling) -> list[Window]:
    """The windows that cover latents of that height and width, row by row.

    Raises:
        ValueError: the overlap is not smaller than a window.
    """
    axes = zip((height, width), tiling.sides, tiling.wraps, strict=True)
    rows, columns = (_spans(length, side, tiling.overlap, wraps) for length, side, wraps in axes)
    return [Window(*pair) for pair in product(rows, columns)]


def tiled(denoise: Denoise, tiling: Tiling, crop: Crop) -> Denoise:
    """Denoise in windows, one call of `denoise` for each, and average what they expect.

    With one window that covers all, the result is that of `denoise`, bit for bit.

    Args:
        denoise: of latents as small as a window.
        tiling: sides and overlap of the windows.
        crop: gives each window its part of the condition.

    The result raises ValueError where the overlap is not smaller than a window.
    """

    def denoise_windows(x: Latents, sigma: Sigmas, condition: Any) -> Latents:  # noqa: ANN401
        total = torch.zeros_like(x)
        for window in windows_of(x.shape[2], x.shape[3], tiling):
            clean = denoise(window.of(x), sigma, crop(condition, window))
            rows, columns = window
            weights = (rows.weights[:, None] * columns.weights).to(x)
            total[:, :, rows.cells[:, None], columns.cells] += weights * clean
        return total

    return denoise_windows


def _spans(length: int, side: int, overlap: int, wraps: bool) -> list[Span]:
    """As few windows as the overlap allows, spread evenly; beyond the end they go on at the start."""
    side = min(side, length)
    if side == length:
        starts = [0]
    elif not 0 < overlap < side:
        raise ValueError(f"windows of {side} cells cannot share {overlap}: 1 to {side - 1} can be")
    elif wraps:
        count = -(-length // (side - overlap))
        starts = [number * length // count for number in range(count)]
    else:
        count = -(-(length - overlap) // (side - overlap))
        starts = [number * (length - side) // (count - 1) for number in range(count)]
    cells = [(start + torch.arange(side)) % length for start in starts]
    weight = _bump(side)
    total = torch.zeros(length, dtype=torch.float64)
    for those in cells:
        total[those] += weight
    return [Span(those, weight / total[those]) for those in cells]


def _bump(side: int) -> Float[Tensor, " side"]:
    """A squared sine, from almost 0 at the borders to 1 in the middle.

    It changes over the whole overlap. The Gaussian of Mixture of Diffusers (variance 0.01 in units of
    the side) hands over from 9 : 1 to 1 : 9 within a tenth of the side: one or two cells of small windows.
    """
    places = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    return torch.sin(torch.pi * places).square()
