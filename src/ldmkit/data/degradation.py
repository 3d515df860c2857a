"""How pictures become small and worse: the inputs that super-resolution is trained on.

`bicubic` only makes them smaller. `bsr` is the light variant of the BSRGAN degradation that the
paper's super-resolution model was trained on (Zhang et al. 2021, "Designing a practical degradation
model for deep blind image super-resolution"; lighter settings in the code of Rombach et al. 2022):
blur, resizing by a random factor, resizing to the final size, noise and JPEG in random order, then
JPEG once more. All that is random comes from a NumPy generator, and no sum depends on the number of
threads, so that the same draw gives the same bytes in any process.

Where this differs from the published code: kernels have odd sizes (the even ones there move the
picture by half a pixel), sides need not be equal, and any number of channels is taken. JPEG needs
8-bit pictures of one or three channels; others skip that step and keep their precision.
"""

import io
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image

from ldmkit.data.pictures import Picture
from ldmkit.data.preprocessing import resize
from ldmkit.data_configs import DegradationName
from ldmkit.facts import Depth

Shares = Float[np.ndarray, "channels _height _width"]
"""A picture with black as 0 and white as 1."""

HALVE_FIRST = 0.25
"""Probability of halving before all else, at ratio 4."""
JPEG_ON_THE_WAY = 0.9
RANDOM_FACTOR = 0.8
"""Probability that the first resizing is by a random factor, not by a blur and every n-th pixel."""
QUALITIES = (80, 95)
NOISE_LEVELS = (1, 2)
"""Standard deviation of the noise, least and most, in steps of 8 bits."""
SAMPLING_KERNEL = 25
STEPS = ("blur", "shrink", "fit", "noise", "jpeg")
"""`shrink` and `fit` change places where `fit` was drawn first: the final size comes after."""


def degraded(
    picture: Picture,
    ratio: int,
    name: DegradationName,
    draw: np.random.Generator,
    *,
    depth: Depth = "uint8",
) -> Picture:
    """The small, worse version of a picture.

    Args:
        picture: `[c, h, w]` in [-1, 1], without NaN (`gaps.fill_gaps` before).
        ratio: how many times smaller, in height and in width.
        name: a key of `DEGRADATIONS`.
        draw: decides all that is random.
        depth: number format that the picture came in; only uint8 goes through JPEG.

    Returns:
        `[c, h / ratio, w / ratio]` in [-1, 1], float32.

    Raises:
        ValueError: the ratio does not divide the sides.
    """
    height, width = picture.shape[1:]
    if ratio < 1 or height % ratio or width % ratio:
        raise ValueError(
            f"a picture of {width} x {height} pixels cannot become {ratio} times smaller: give a "
            "ratio that divides both sides"
        )
    return DEGRADATIONS[name](picture, ratio, draw, depth)


def bicubic(picture: Picture, ratio: int, draw: np.random.Generator, depth: Depth) -> Picture:
    """Anti-aliased bicubic resizing, as Pillow's; nothing is random."""
    size = (picture.shape[1] // ratio, picture.shape[2] // ratio)
    return resize(picture[None].contiguous(), size, "bicubic")[0]


def bsr_light(picture: Picture, ratio: int, draw: np.random.Generator, depth: Depth) -> Picture:
    """The light BSR degradation; see the head of this file."""
    size = (picture.shape[1] // ratio, picture.shape[2] // ratio)
    image = ((picture + 1.0) / 2.0).clamp(0.0, 1.0).numpy().astype(np.float32)
    if ratio == 4 and draw.random() < HALVE_FIRST:
        ratio, half = 2, (image.shape[1] // 2, image.shape[2] // 2)
        image = _resized(image, half, draw) if draw.random() < 0.5 else _antialiased(image, half)
    for step in _order(draw):
        if step == "blur":
            image = _blurred(image, ratio, draw)
        elif step == "shrink":
            image = _shrunk(image, ratio, draw)
        elif step == "fit":
            image = _resized(image, size, draw)
        elif step == "noise":
            image = _noised(image, draw)
        elif draw.random() < JPEG_ON_THE_WAY:
            image = _through_jpeg(image, draw, depth)
    image = _through_jpeg(image, draw, depth)
    return torch.from_numpy(image).mul(2.0).sub(1.0)


def _order(draw: np.random.Generator) -> list[str]:
    order = [STEPS[index] for index in draw.permutation(len(STEPS))]
    first, second = order.index("shrink"), order.index("fit")
    if second < first:
        order[first], order[second] = order[second], order[first]
    return order


def _blurred(image: Shares, ratio: int, draw: np.random.Generator) -> Shares:
    """A Gaussian blur, in half of the cases another one along each of two axes."""
    if draw.random() < 0.5:
        variances = (4.0 + ratio) / 4.0 * draw.random(2)
        angle = math.pi * draw.random()
        return _filtered(image, gaussian(5 + 2 * int(draw.integers(5)), variances, angle))
    sigma = (2.0 + 0.2 * ratio) / 4.0 * draw.random()
    return _filtered(image, gaussian(5 + 2 * int(draw.integers(2)), (sigma**2, sigma**2)))


def _shrunk(image: Shares, ratio: int, draw: np.random.Generator) -> Shares:
    """To 1 ... 1 / (2 ratio) of its size, or a blur of which every `ratio`-th pixel is kept."""
    if draw.random() < RANDOM_FACTOR:
        factor = draw.uniform(1.0, 2.0 * ratio)
        height, width = (max(1, int(side / factor)) for side in image.shape[1:])
        return _resized(image, (height, width), draw)
    variance = draw.uniform(0.1, 0.6 * ratio) ** 2
    # the kernel looks at the middle of the pixels that one pixel comes to stand for
    kernel = gaussian(SAMPLING_KERNEL, (variance, variance), centre=(ratio - 1) / 2)
    return _filtered(image, kernel, every=ratio)


def _noised(image: Shares, draw: np.random.Generator) -> Shares:
    """Gaussian noise: of each channel, the same in all, or correlated between them."""
    channels, height, width = image.shape
    sigma = float(draw.integers(NOISE_LEVELS[0], NOISE_LEVELS[1] + 1)) / 255.0
    kind = draw.random()
    if kind > 0.6:
        noise = draw.normal(0.0, sigma, image.shape)
    elif kind < 0.4:
        noise = draw.normal(0.0, sigma, (1, height, width))
    else:
        mixing = channel_mixing(channels, draw) * (NOISE_LEVELS[1] / 255.0)
        noise = np.einsum("cd,dyx->cyx", mixing, draw.normal(size=image.shape))
    return (image + noise.astype(np.float32)).clip(0.0, 1.0)


def channel_mixing(channels: int, draw: np.random.Generator) -> Float[np.ndarray, "n n"]:
    """A matrix that makes white noise one of random correlation between channels, variance <= 1.

    The covariance is |U^T D U| by elements, D diagonal and uniform in 0 .. 1, U orthogonal (BSRGAN's
    code). Above three channels it may miss being one, and then its negative part is left out.
    """
    variances = np.diag(draw.random(channels))
    basis = np.linalg.svd(draw.random((channels, channels)))[0]
    values, vectors = np.linalg.eigh(np.abs(basis.T @ variances @ basis))
    return vectors * np.sqrt(values.clip(min=0.0))


def _through_jpeg(image: Shares, draw: np.random.Generator, depth: Depth) -> Shares:
    """What is left after JPEG; the picture itself where JPEG has no such pictures."""
    if depth != "uint8" or len(image) not in (1, 3):
        return image
    pixels = np.moveaxis((image * 255.0).round().astype(np.uint8), 0, 2)
    file = io.BytesIO()
    quality = int(draw.integers(QUALITIES[0], QUALITIES[1] + 1))
    Image.fromarray(pixels[:, :, 0] if len(image) == 1 else pixels).save(
        file, "JPEG", quality=quality
    )
    with Image.open(file, formats=["JPEG"]) as decoded:
        pixels = np.atleast_3d(np.asarray(decoded))
    return np.moveaxis(pixels, 2, 0).astype(np.float32) / np.float32(255.0)


def gaussian(
    size: int,
    variances: tuple[float, float] | Float[np.ndarray, "2"],
    angle: float = 0.0,
    centre: float = 0.0,
) -> Float[np.ndarray, "size size"]:
    """A Gaussian kernel whose weights sum to 1.

    Args:
        size: taps in each direction; odd.
        variances: along its two axes, square pixels; 0 = one pixel.
        angle: of the first axis, radians.
        centre: of the kernel, pixels right of and below its middle tap.
    """
    turned = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    precision = turned @ np.diag(1.0 / np.maximum(variances, 1e-4)) @ turned.T
    at = np.arange(size) - (size - 1) / 2 - centre
    distance = (
        precision[0, 0] * at[None, :] ** 2
        + 2.0 * precision[0, 1] * at[None, :] * at[:, None]
        + precision[1, 1] * at[:, None] ** 2
    )
    weights = np.exp(-0.5 * (distance - distance.min()))
    return weights / weights.sum()


def _filtered(image: Shares, kernel: Float[np.ndarray, "n n"], every: int = 1) -> Shares:
    """The weighted sum around every n-th pixel, mirrored at the edges; no sum across threads."""
    reach = len(kernel) // 2
    height, width = image.shape[1:]
    padded = np.pad(image, ((0, 0), (reach, reach), (reach, reach)), mode="reflect")
    result = np.zeros_like(image[:, ::every, ::every])
    for (y, x), weight in np.ndenumerate(kernel.astype(np.float32)):
        if weight > 1e-7:
            result += weight * padded[:, y : y + height : every, x : x + width : every]
    return result.clip(0.0, 1.0)


def _resized(image: Shares, size: tuple[int, int], draw: np.random.Generator) -> Shares:
    """By a random one of three methods, two of which alias, as those of OpenCV do."""
    mode = ("bilinear", "bicubic", "area")[int(draw.integers(3))]
    if mode == "area" and (size[0] > image.shape[1] or size[1] > image.shape[2]):
        mode = "bilinear"  # as OpenCV does: an area smaller than a pixel has no average
    pixels = torch.from_numpy(image)[None]
    corners = None if mode == "area" else False
    return F.interpolate(pixels, size, mode=mode, align_corners=corners)[0].clamp(0, 1).numpy()


def _antialiased(image: Shares, size: tuple[int, int]) -> Shares:
    return resize(torch.from_numpy(image)[None], size, "bicubic")[0].clamp(0.0, 1.0).numpy()


DEGRADATIONS: dict[
    DegradationName, Callable[[Picture, int, np.random.Generator, Depth], Picture]
] = {"bicubic": bicubic, "bsr": bsr_light}
"""What makes pictures small: (picture, ratio, draw, depth) -> the small one."""
