"""The peers' networks, of the same architecture as ours where they can express it.

Each package is imported where its network is built: extra `bench`.
"""

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from workloads import Sizes

from ldmkit.torchvision_import import import_torchvision

AE_EPS = 1e-6


class Autoencoding(NamedTuple):
    """An autoencoder as two functions."""

    module: nn.Module
    encode: Callable[[Tensor], Tensor]
    """Pictures -> means and log-variances of the latents, one after the other."""
    decode: Callable[[Tensor], Tensor]
    last_layer: Tensor
    """Weight of the decoder's last convolution."""
    same: bool = True
    """Whether it has exactly the architecture, and so the parameters, of the others."""


class Predicting(NamedTuple):
    """A U-Net as a function."""

    module: nn.Module
    predict: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """Noisy latents, time steps, tokens -> the noise."""
    same: bool = True


def diffusers_autoencoder(sizes: Sizes) -> Autoencoding:
    """`AutoencoderKL`."""
    levels = len(sizes.multipliers)
    module = _diffusers().AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=_widths(sizes.ae_channels, sizes),
        layers_per_block=sizes.blocks,
        latent_channels=sizes.latent_channels,
        norm_num_groups=sizes.groups,
    )
    return Autoencoding(
        module,
        lambda images: module.encode(images).latent_dist.parameters,
        lambda latents: module.decode(latents).sample,
        module.decoder.conv_out.weight,
    )


def monai_autoencoder(sizes: Sizes) -> Autoencoding:
    """`AutoencoderKL`, its decoder built anew with one residual block more a level, as the others have.

    Its means and log-variances come from a convolution each, so it has fewer parameters.
    """
    nets = _imported("monai.networks.nets.autoencoderkl")
    levels = len(sizes.multipliers)
    shared: dict[str, Any] = {
        "spatial_dims": 2,
        "channels": _widths(sizes.ae_channels, sizes),
        "norm_num_groups": sizes.groups,
        "norm_eps": AE_EPS,
        "attention_levels": (False,) * levels,
        "out_channels": 3,
    }
    module = nets.AutoencoderKL(
        in_channels=3,
        latent_channels=sizes.latent_channels,
        num_res_blocks=(sizes.blocks,) * levels,
        **shared,
    )
    module.decoder = nets.Decoder(
        in_channels=sizes.latent_channels, num_res_blocks=(sizes.blocks + 1,) * levels, **shared
    )

    def encode(images: Tensor) -> Tensor:
        features = module.encoder(images)
        return torch.cat(
            [module.quant_conv_mu(features), module.quant_conv_log_sigma(features)], dim=1
        )

    last = [part for part in module.decoder.modules() if isinstance(part, nn.Conv2d)][-1]
    return Autoencoding(module, encode, module.decode, last.weight, same=False)


def diffusers_unet(sizes: Sizes, *, attends: bool) -> Predicting:
    """`UNet2DConditionModel`, or `UNet2DModel` where nothing is attended to but the latents."""
    widths, levels = _widths(sizes.unet_channels, sizes), len(sizes.multipliers)
    shared: dict[str, Any] = {
        "in_channels": sizes.latent_channels,
        "out_channels": sizes.latent_channels,
        "block_out_channels": widths,
        "layers_per_block": sizes.blocks,
        "norm_num_groups": sizes.groups,
    }
    package = _diffusers()
    if not attends:
        plain = package.UNet2DModel(
            down_block_types=("AttnDownBlock2D",) * levels,
            up_block_types=("AttnUpBlock2D",) * levels,
            attention_head_dim=sizes.head,
            norm_eps=1e-5,
            **shared,
        )
        return Predicting(plain, lambda x, t, _: plain(x, t, return_dict=False)[0])
    module = package.UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=sizes.context,
        attention_head_dim=tuple(
            width // sizes.head for width in widths
        ),  # heads, despite its name
        **shared,
    )
    return Predicting(module, lambda x, t, tokens: module(x, t, tokens, return_dict=False)[0])


def monai_unet(sizes: Sizes, *, attends: bool) -> Predicting:
    """`DiffusionModelUNet`."""
    levels = len(sizes.multipliers)
    module = _imported("monai.networks.nets").DiffusionModelUNet(
        spatial_dims=2,
        in_channels=sizes.latent_channels,
        out_channels=sizes.latent_channels,
        channels=_widths(sizes.unet_channels, sizes),
        num_res_blocks=(sizes.blocks,) * levels,
        attention_levels=(True,) * levels,
        norm_num_groups=sizes.groups,
        num_head_channels=(sizes.head,) * levels,
        with_conditioning=attends,
        cross_attention_dim=sizes.context if attends else None,
        transformer_num_layers=1,
    )
    return Predicting(module, lambda x, t, tokens: module(x, t, context=tokens))


def ddpm_unet(sizes: Sizes, *, attends: bool) -> Predicting:
    """denoising-diffusion-pytorch's `Unet`: another architecture, a third of the size, never told anything."""
    del attends
    module = _imported("denoising_diffusion_pytorch").Unet(
        dim=sizes.unet_channels,
        dim_mults=sizes.multipliers,
        channels=sizes.latent_channels,
        flash_attn=False,
    )
    return Predicting(module, lambda x, t, _: module(x, t), same=False)


def lpips_distance() -> nn.Module:
    """The lpips package's VGG16, frozen, with random weights: what it costs does not depend on them."""
    package = _imported("lpips")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, about torchvision
        module = package.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    return module.eval().requires_grad_(False)


def _diffusers() -> Any:  # noqa: ANN401 - a module
    """The package, which would say of each `.to()` that it is one."""
    package = _imported("diffusers")
    package.utils.logging.set_verbosity_error()
    return package


def _imported(name: str) -> Any:  # noqa: ANN401 - a module
    import_torchvision()  # most of them import it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # their own; nothing to act on here
            return import_module(name)
    except ImportError as error:
        raise SystemExit(f"{name} is not installed: pip install 'ldmkit[bench]'") from error


def _widths(channels: int, sizes: Sizes) -> tuple[int, ...]:
    return tuple(channels * multiplier for multiplier in sizes.multipliers)


AUTOENCODERS: dict[str, Callable[[Sizes], Autoencoding]] = {
    "diffusers": diffusers_autoencoder,
    "monai": monai_autoencoder,
}
UNETS: dict[str, Callable[..., Predicting]] = {
    "diffusers": diffusers_unet,
    "monai": monai_unet,
    "denoising-diffusion-pytorch": ddpm_unet,
}
