"""The 1x1 convolutions around the latents, brought into the square form that ours have.

Published autoencoders leave them out, or use them to change the number of channels: z in the
networks, e in the latents ("embed_dim"). Ours map e to e. All names here are the same in both
foreign layouts.
"""

import torch
from torch import Tensor

from ldmkit.errors import DataError
from ldmkit.interop.layout import Tensors

QUANT, POST = "quant_conv", "post_quant_conv"
CONV_OUT, CONV_IN = "encoder.conv_out", "decoder.conv_in"
MIN_LOG_VARIANCE = -30.0


def squared(tensors: Tensors, source: str) -> Tensors:
    """The same function with square `quant_conv` and `post_quant_conv`.

    Missing ones become identities, exactly. e > z: zeros fill up, exactly. e < z: they are merged
    into the 3x3 convolutions beside them, up to rounding.

    Raises:
        DataError: e < z and `post_quant_conv` has a bias. Zero padding comes after it, so that no
            3x3 convolution of the latents does the same at the borders.
    """
    result = dict(tensors)
    moments, z = shape(tensors, f"{CONV_OUT}.weight", source)[0], _latents(tensors, source)
    for name, width in ((QUANT, moments), (POST, z)):
        if f"{name}.weight" not in result:
            result |= {f"{name}.weight": _identity(width), f"{name}.bias": torch.zeros(width)}
    if moments not in (z, 2 * z):
        raise DataError(f"{source}: an encoder of {moments} channels does not fit a decoder of {z}")
    e = shape(result, f"{POST}.weight", source)[1]
    if e > z:
        _fill_up(result, e, moments // z)
    elif e < z:
        _merge(result, source)
    return result


def with_certain_noise(tensors: Tensors) -> Tensors:
    """Moments of a bottleneck without noise as a Gaussian's: log-variance at the clamp, std 3e-7."""
    result = dict(tensors)
    z = len(tensors[f"{QUANT}.bias"])
    _pad(result, f"{CONV_OUT}.weight", 0, 2 * z)
    _pad(result, f"{CONV_OUT}.bias", 0, 2 * z)
    _pad(result, f"{QUANT}.weight", 0, 2 * z)
    _pad(result, f"{QUANT}.weight", 1, 2 * z)
    certain = torch.full((z,), MIN_LOG_VARIANCE)
    result[f"{QUANT}.bias"] = torch.cat([tensors[f"{QUANT}.bias"], certain])
    return result


def shape(tensors: Tensors, name: str, source: str) -> torch.Size:
    """The shape of a tensor that every picture autoencoder has.

    Raises:
        DataError: it is missing, or has not the dimensions of a convolution's weight.
    """
    if name not in tensors:
        raise DataError(f"{source} lacks tensor {name}: it holds no autoencoder of this kind")
    found = tensors[name].shape
    if len(found) != 4:
        raise DataError(
            f"{source}: tensor {name} has {len(found)} dimensions; autoencoders of pictures have 4"
        )
    return found


def _latents(tensors: Tensors, source: str) -> int:
    return shape(tensors, f"{CONV_IN}.weight", source)[1]


def _identity(width: int) -> Tensor:
    return torch.eye(width)[:, :, None, None]


def _pad(tensors: Tensors, name: str, axis: int, length: int) -> None:
    old = tensors[name]
    new = old.new_zeros([length if d == axis else n for d, n in enumerate(old.shape)])
    new.narrow(axis, 0, old.shape[axis]).copy_(old)
    tensors[name] = new


def _fill_up(tensors: Tensors, e: int, per_latent: int) -> None:
    for name, axis, length in (
        (f"{CONV_OUT}.weight", 0, per_latent * e),
        (f"{CONV_OUT}.bias", 0, per_latent * e),
        (f"{QUANT}.weight", 1, per_latent * e),
        (f"{POST}.weight", 0, e),
        (f"{POST}.bias", 0, e),
        (f"{CONV_IN}.weight", 1, e),
    ):
        _pad(tensors, name, axis, length)


def _merge(tensors: Tensors, source: str) -> None:
    if tensors[f"{POST}.bias"].any():
        raise DataError(
            f"{source}: its post_quant_conv takes {tensors[f'{POST}.weight'].shape[1]} latent channels "
            f"to {tensors[f'{POST}.weight'].shape[0]} with a bias, which ldmkit's networks cannot do "
            "exactly at the borders"
        )
    quant, post = (tensors[f"{name}.weight"].double()[:, :, 0, 0] for name in (QUANT, POST))
    out, into = tensors[f"{CONV_OUT}.weight"].double(), tensors[f"{CONV_IN}.weight"].double()
    bias = quant @ tensors[f"{CONV_OUT}.bias"].double() + tensors[f"{QUANT}.bias"].double()
    tensors[f"{CONV_OUT}.weight"] = torch.einsum("om,mihw->oihw", quant, out).float()
    tensors[f"{CONV_OUT}.bias"] = bias.float()
    tensors[f"{CONV_IN}.weight"] = torch.einsum("omhw,me->oehw", into, post).float()
    for name, width in ((QUANT, len(quant)), (POST, post.shape[1])):
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = _identity(width), torch.zeros(width)
