"""The vocabulary of shapes and units: one name per space, used in every signature.

jaxtyping checks them at run time in the tests (`pytest --jaxtyping-packages=...`) and costs nothing
outside.
"""

from collections.abc import Callable
from typing import TypeAlias

from jaxtyping import Bool, Float, Int
from torch import Tensor

Images: TypeAlias = Float[Tensor, "batch channels height width"]
"""Pictures as networks see them: values in [-1, 1], -1 is black. As read from files, NaN in all
channels marks a pixel that does not count; `data.gaps.fill_gaps` removes it before any network."""

Latents: TypeAlias = Float[Tensor, "batch z y x"]
"""The autoencoder's own space where "raw" is said; unit variance per channel in `diffusion`."""

Sigmas: TypeAlias = Float[Tensor, " batch"]
"""Standard deviation of the noise in units of whitened latents: noisy = latents + sigma * noise."""

Scalar: TypeAlias = Float[Tensor, ""]
"""One number that carries a gradient."""

Labels: TypeAlias = Int[Tensor, " batch"]
"""Class indices; -1 where a picture has none."""

Mask: TypeAlias = Bool[Tensor, " batch"]
"""One truth value for each sample of a batch."""

Noise: TypeAlias = Callable[[Tensor], Tensor]
"""Like `torch.randn_like`, but from a source that the caller controls."""
