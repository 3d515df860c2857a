"""How close reconstructions are to pictures."""

from jaxtyping import Float
from torch import Tensor

from ldmkit.tensors import Images


def psnr(images: Images, reconstructions: Images) -> Float[Tensor, " batch"]:
    """Peak signal-to-noise ratio of each pair, dB: 10 log10(range^2 / mean squared error).

    Both are in [-1, 1] (range 2); reconstructions are clipped to it first. Identical pairs give
    100 dB, the error being taken as at least 4e-10.
    """
    error = (images - reconstructions.clamp(-1.0, 1.0)).square().mean(dim=(1, 2, 3))
    return 10.0 * (4.0 / error.clamp_min(4e-10)).log10()
