"""How close reconstructions are to pictures."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ldmkit.tensors import Images

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = (0.01 * 2.0) ** 2, (0.03 * 2.0) ** 2
"""(K L)^2 with the paper's K1 = 0.01, K2 = 0.03 and the range L = 2 of values in [-1, 1]."""


def psnr(images: Images, reconstructions: Images) -> Float[Tensor, " batch"]:
    """Peak signal-to-noise ratio of each pair, dB: 10 log10(range^2 / mean squared error).

    Both are in [-1, 1] (range 2); reconstructions are clipped to it first. Identical pairs give
    100 dB, the error being taken as at least 4e-10.
    """
    error = (images - reconstructions.clamp(-1.0, 1.0)).square().mean(dim=(1, 2, 3))
    return 10.0 * (4.0 / error.clamp_min(4e-10)).log10()


def ssim(images: Images, reconstructions: Images) -> Float[Tensor, " batch"]:
    """Structural similarity of each pair, 1 for equals (Wang et al. 2004, Eq. 13).

    Gaussian window of 11 x 11 pixels and sigma 1.5, at the positions where it fits into the picture;
    means over positions and channels. Both are in [-1, 1]; reconstructions are clipped to it first.

    Raises:
        ValueError: a side has fewer than 11 pixels.
    """
    if min(images.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs sides of {SSIM_WINDOW} pixels or more")
    # variances are small differences of squares: float64 where the device has it
    wide = torch.float32 if images.device.type == "mps" else torch.float64
    x, y = images.to(wide), reconstructions.clamp(-1.0, 1.0).to(wide)
    mean_x, mean_y = _windowed(x), _windowed(y)
    variance_x = _windowed(x * x) - mean_x.square()
    variance_y = _windowed(y * y) - mean_y.square()
    covariance = _windowed(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x.square() + mean_y.square() + SSIM_C1)
    structure = (2 * covariance + SSIM_C2) / (variance_x + variance_y + SSIM_C2)
    return (luminance * structure).mean(dim=(1, 2, 3)).float()


def _windowed(maps: Tensor) -> Tensor:
    """Gaussian mean around each position where the window fits."""
    half = SSIM_WINDOW // 2
    offsets = torch.arange(-half, half + 1, dtype=maps.dtype, device=maps.device)
    weights = torch.exp(-0.5 * (offsets / SSIM_SIGMA).square())
    weights = weights / weights.sum()
    flat = maps.flatten(0, 1)[:, None]
    flat = F.conv2d(F.conv2d(flat, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return flat.unflatten(0, maps.shape[:2])[:, :, 0]
