"""The single-file layout of the code published with latent diffusion models, and of its descendants.

Stable Diffusion's, FLUX's and VQGAN's autoencoders come in it. It stores no config: everything is
read off names and shapes. Norms have 32 groups, always.
"""

from ldmkit.autoencoder_configs import AutoencoderConfig, PreprocessingConfig
from ldmkit.errors import DataError
from ldmkit.facts import validated
from ldmkit.interop.bottleneck import shape, squared, with_certain_noise
from ldmkit.interop.layout import Imported, Layout, Tensors, to_foreign, to_model
from ldmkit.networks.blocks import Norm

LDM = Layout(
    block="{half}.{way}.{level}.block.{number}",
    attention="{half}.{way}.{level}.attn.{number}",
    resample="{half}.{way}.{level}.{way}sample.conv",
    middle_block="{half}.mid.block_{nth}",
    middle_attention="{half}.mid.attn_1",
    block_parts={"skip": "nin_shortcut"},
    attention_parts={"qkv": ("q", "k", "v"), "out": ("proj_out",)},
    outside={
        "to_moments": "quant_conv",
        "from_latents": "post_quant_conv",
        "codebook.codes": "quantize.embedding.weight",
    },
    linear_attention=False,
)
GROUPS = 32
CODEBOOK = "quantize.embedding.weight"
FIRST = "encoder.conv_in.weight"
PREFIXES = ("first_stage_model.", "vae.", "")
"""In this order: a whole latent diffusion model may hold a second autoencoder as its conditioner."""
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", CODEBOOK)


def from_ldm(tensors: Tensors, source: str, *, legacy_commitment: bool = True) -> Imported:
    """The autoencoder in a file of this layout; what else the file holds is left out.

    Args:
        tensors: all of the file's.
        source: how to name it in errors.
        legacy_commitment: how its codebook was trained; the published code did it the legacy way.

    Raises:
        DataError: there is no such autoencoder in it, or one that ours cannot express.
    """
    prefix, own = _own_tensors(tensors, source)
    dropped = tuple(sorted(tensors.keys() - {f"{prefix}{name}" for name in own}))
    mine = squared(own, source)
    config = _config_of(mine, source, legacy_commitment)
    model = to_model(mine, config, shape(mine, FIRST, source)[1], LDM, source)
    scale = tensors.get("scale_factor")
    scaling = {} if scale is None or scale.numel() != 1 else {"scaling_factor": scale.item()}
    return Imported(model, None, scaling, dropped)


def to_ldm(tensors: Tensors, config: AutoencoderConfig) -> Tensors:
    """Our tensors in this layout, without prefix.

    Raises:
        DataError: the layout has no place for something in the config; it is named.
    """
    _require_expressible(config)
    theirs = to_foreign(tensors, config, LDM)
    return with_certain_noise(theirs) if config.bottleneck == "deterministic" else theirs


def config_page(config: AutoencoderConfig, preprocessing: PreprocessingConfig) -> str:
    """What the published code needs beside the tensors, as the YAML that it reads."""
    vq, size = config.bottleneck == "vq", preprocessing.size
    attention = [size // factor for factor in sorted(config.attention_factors, reverse=True)]
    return "\n".join(
        [
            "model:",
            f"  target: ldm.models.autoencoder.{'VQModel' if vq else 'AutoencoderKL'}",
            "  params:",
            f"    embed_dim: {config.latent_channels}",
            *([f"    n_embed: {config.codebook.size}"] if vq else []),
            "    ddconfig:",
            f"      double_z: {'false' if vq else 'true'}",
            f"      z_channels: {config.latent_channels}",
            f"      resolution: {size}",
            f"      in_channels: {preprocessing.channels}",
            f"      out_ch: {preprocessing.channels}",
            f"      ch: {config.channels}",
            f"      ch_mult: {list(config.multipliers)}",
            f"      num_res_blocks: {config.residual_blocks}",
            f"      attn_resolutions: {attention}",
            *([] if config.middle_attention else ["      attn_type: none"]),
            f"      dropout: {config.dropout}",
            "    lossconfig:",
            "      target: torch.nn.Identity",
            "",
        ]
    )


def _own_tensors(tensors: Tensors, source: str) -> tuple[str, Tensors]:
    """The prefix of the autoencoder's tensors, and they without it."""
    prefix = next((p for p in PREFIXES if f"{p}{FIRST}" in tensors), None)
    if prefix is None:
        raise DataError(
            f"{source} holds no autoencoder: none of its {len(tensors)} tensors is called "
            f"{FIRST}, with or without {' or '.join(repr(p) for p in PREFIXES if p)} before it"
        )
    if f"{prefix}encoder.down_blocks.0.resnets.0.conv1.weight" in tensors:
        raise DataError(f"{source} has diffusers' names: give its folder, with config.json in it")
    own = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    if CODEBOOK not in own and (other := next((n for n in own if n.startswith("quantize.")), "")):
        raise DataError(f"{source} has tensor {other}: a quantiser other than the nearest code")
    return prefix, {name: tensor for name, tensor in own.items() if name.startswith(PARTS)}


def _config_of(tensors: Tensors, source: str, legacy: bool) -> AutoencoderConfig:
    """Read an architecture off names and shapes; what does not fit it shows when they are compared."""
    channels, image_channels = shape(tensors, FIRST, source)[:2]
    widths: list[int] = []
    while (name := f"encoder.down.{len(widths)}.block.0.conv1.weight") in tensors:
        widths.append(shape(tensors, name, source)[0])
    if not (channels and widths) or any(w % channels or w % GROUPS for w in (channels, *widths)):
        raise DataError(
            f"{source}: levels of {widths or 'no'} channels; such files have multiples of the first "
            f"convolution's {channels}, in {GROUPS} groups"
        )
    if image_channels not in (1, 3):
        raise DataError(f"{source} is for pictures of {image_channels} channels; ldmkit has 1 or 3")
    blocks = sum(f"encoder.down.0.block.{n}.conv1.weight" in tensors for n in range(len(tensors)))
    z = shape(tensors, "decoder.conv_in.weight", source)[1]
    noisy = shape(tensors, "encoder.conv_out.weight", source)[0] == 2 * z
    codes = tensors.get(CODEBOOK)
    codebook = None if codes is None else {"size": len(codes), "legacy_commitment": legacy}
    settings = {
        "bottleneck": "vq" if codebook else "kl" if noisy else "deterministic",
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "residual_blocks": blocks,
        "attention_factors": [
            2**level
            for level in range(len(widths))
            if f"encoder.down.{level}.attn.0.norm.weight" in tensors
        ],
        "middle_attention": "encoder.mid.attn_1.norm.weight" in tensors,
        "norm_groups": GROUPS,
        "latent_channels": z,
        "codebook": codebook or {},
    }
    return validated(AutoencoderConfig, settings, source)


def _require_expressible(config: AutoencoderConfig) -> None:
    widths = [config.channels * multiplier for multiplier in (1, *config.multipliers)]
    norm = Norm(config.norm_groups, 0.0)
    if (groups := {norm.groups_of(width) for width in widths}) != {GROUPS}:
        raise DataError(
            f"the ldm layout normalises in {GROUPS} groups; this autoencoder in "
            f"{', '.join(map(str, sorted(groups)))}: --to diffusers can say so"
        )
    if config.attention_factors and not config.middle_attention:
        raise DataError(
            "the ldm layout has attention at the coarsest level wherever it has any; this "
            "autoencoder has it elsewhere only: --to diffusers can say so"
        )
