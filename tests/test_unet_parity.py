"""The U-Net against diffusers' and against the original code's layout: the same numbers, both ways."""

import pytest
import torch
import torch.nn.functional as F

from ldmkit.diffusion_configs import UNetConfig
from ldmkit.errors import DataError
from ldmkit.interop.unet_layout import (
    LDM_PREFIX,
    UNET_DIFFUSERS,
    UNET_LDM,
    load_foreign_unet,
    require_expressible,
    to_foreign_unet,
    unet_names,
)
from ldmkit.named_settings import PRESETS
from ldmkit.networks.unet import UNet

BASE = UNetConfig(
    channels=32,  # the original code's 32 groups want no less
    multipliers=(1, 2),
    residual_blocks=1,
    attention_factors=(2,),
    norm_groups=8,
    context_channels=24,
)
THREE = {"multipliers": (1, 2, 2), "attention_factors": (1, 4)}
PLAIN = {
    "one-head": {},
    "head-width": {"head_channels": 8},
    "no-attention-but-the-middle": {"attention_factors": ()},
    "attention-everywhere-but-the-middle": {"attention_factors": (1, 2), "middle_attention": False},
    "scale-shift": {"scale_shift": True, "head_channels": 8},
    "residual-updown": {"residual_updown": True, "head_channels": 16},
    "both-three-levels": THREE
    | {"residual_blocks": 2, "scale_shift": True, "residual_updown": True},
}
CROSS = {
    "depth-1-heads": {"heads": 4},
    "depth-2-head-width": {"transformer_depth": (2,), "head_channels": 16},
    "depth-3-three-levels": THREE | {"transformer_depth": (3,), "heads": 2},
    "depth-by-level": THREE | {"transformer_depth": (2, 1, 3), "head_channels": 8},
    "scale-shift-with-tokens": {"scale_shift": True, "heads": 2},
}
CASES = [(changes, False) for changes in PLAIN.values()] + [(c, True) for c in CROSS.values()]
NAMES = [*PLAIN, *CROSS]


def configured(changes, **more) -> UNetConfig:
    return UNetConfig.model_validate(BASE.model_dump() | changes | more)


def ours(config, use_tokens, *, in_channels=5, out_channels=3) -> UNet:
    torch.manual_seed(0)
    model = UNet(
        config, in_channels=in_channels, out_channels=out_channels, use_tokens=use_tokens
    ).eval()
    disturb(model)
    return model


@torch.no_grad()
def disturb(model) -> None:
    """Give zeros and ones of a fresh network other values, so that nothing hides or is confused."""
    for parameter in model.parameters():
        if not parameter.any() or parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


def theirs(diffusers, config, use_tokens, **more):
    """The same network, built by diffusers from its own words."""
    attends = [factor in config.attention_factors for factor in config.factors]
    settings = {
        "in_channels": 5,
        "out_channels": 3,
        "block_out_channels": config.widths,
        "layers_per_block": config.residual_blocks,
        "norm_num_groups": config.norm_groups,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
    }
    if use_tokens:
        down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
        kind = diffusers.UNet2DConditionModel
        settings["attention_head_dim"] = tuple(config.heads_of(width) for width in config.widths)
        settings["cross_attention_dim"] = config.context_channels
        depths = tuple(config.depth_of(level) for level in range(len(config.widths)))
        settings["transformer_layers_per_block"] = depths
    else:
        resample = "resnet" if config.residual_updown else "conv"
        stem = "ResnetDownsampleBlock2D" if config.residual_updown else "DownBlock2D"
        down = (stem, "AttnDownBlock2D")
        up = (stem.replace("Down", "Up").replace("down", "up"), "AttnUpBlock2D")
        kind = diffusers.UNet2DModel
        settings |= {
            "attention_head_dim": config.head_channels,
            "downsample_type": resample,
            "upsample_type": resample,
            "add_attention": config.middle_attention,
            "attn_norm_num_groups": config.norm_groups,
        }
    settings["down_block_types"] = tuple(down[a] for a in attends)
    settings["up_block_types"] = tuple(up[a] for a in reversed(attends))
    return kind(**settings | more).eval()


def inputs(use_tokens):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 8, 12, generator=generator)
    tokens = torch.randn(2, 3, BASE.context_channels, generator=generator) if use_tokens else None
    return x, torch.tensor([3.0, 700.0]), tokens


def run_theirs(model, x, times, tokens, **more):
    extra = () if tokens is None else (tokens,)
    return model(x, times, *extra, **more).sample


def assert_same(mine, other, use_tokens):
    """Outputs within 1e-5, gradients of all weights within 1e-4."""
    x, times, tokens = inputs(use_tokens)
    found, wanted = mine(x, times, None, tokens), run_theirs(other, x, times, tokens)
    assert wanted.std() > 0.1  # else everything would agree
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    target = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    F.mse_loss(found, target).backward()
    F.mse_loss(wanted, target).backward()
    gradients = {name: parameter.grad for name, parameter in other.named_parameters()}
    assert max(gradient.abs().max().item() for gradient in gradients.values()) > 0.01
    for name, parameter in mine.named_parameters():
        keys = unet_names(name, mine, UNET_DIFFUSERS)
        gradient = torch.cat([gradients.pop(key) for key in keys])
        torch.testing.assert_close(
            parameter.grad, gradient.reshape(parameter.shape), rtol=0, atol=1e-4, msg=name
        )
    assert not gradients


# Parity with diffusers -------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "use_tokens"), CASES, ids=NAMES)
def test_our_weights_in_diffusers_compute_the_same(diffusers, changes, use_tokens):
    config = configured(changes)
    mine, other = ours(config, use_tokens), theirs(diffusers, config, use_tokens)
    other.load_state_dict(to_foreign_unet(mine, UNET_DIFFUSERS))
    assert_same(mine, other, use_tokens)


@pytest.mark.parametrize(("changes", "use_tokens"), CASES, ids=NAMES)
def test_their_weights_here_compute_the_same(diffusers, changes, use_tokens):
    config = configured(changes)
    torch.manual_seed(3)
    other = theirs(diffusers, config, use_tokens)
    disturb(other)
    mine = ours(config, use_tokens)
    load_foreign_unet(mine, other.state_dict(), UNET_DIFFUSERS, "theirs")
    assert_same(mine, other, use_tokens)


def test_linear_projections_are_one_by_one_convolutions(diffusers):
    config = configured({"heads": 2})
    other = theirs(diffusers, config, True, use_linear_projection=True)
    mine = ours(config, True)
    load_foreign_unet(mine, other.state_dict(), UNET_DIFFUSERS, "theirs")
    x, times, tokens = inputs(True)
    torch.testing.assert_close(
        mine(x, times, None, tokens), run_theirs(other, x, times, tokens), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("use_tokens", [True, False])
def test_an_embedding_of_classes_is_added_to_that_of_time(diffusers, use_tokens):
    config = configured({"head_channels": 8})
    other = theirs(diffusers, config, use_tokens, num_class_embeds=7)
    disturb(other)
    tensors = other.state_dict()
    table, labels = tensors.pop(UNET_DIFFUSERS.class_table), torch.tensor([6, 2])
    mine = ours(config, use_tokens)
    load_foreign_unet(mine, tensors, UNET_DIFFUSERS, "theirs")
    x, times, tokens = inputs(use_tokens)
    torch.testing.assert_close(
        mine(x, times, table[labels], tokens),
        run_theirs(other, x, times, tokens, class_labels=labels),
        rtol=0,
        atol=1e-5,
    )


# The original code's layout --------------------------------------------------------------------


def expressible_by_ldm(changes):
    return configured(changes, norm_groups=32, transformer_depth=(2,), middle_attention=True)


@pytest.mark.parametrize("layout", [UNET_DIFFUSERS, UNET_LDM], ids=["diffusers", "ldm"])
@pytest.mark.parametrize(
    ("changes", "use_tokens"),
    [
        (PLAIN["head-width"], False),
        (PLAIN["both-three-levels"], False),
        (CROSS["depth-2-head-width"], True),
        (CROSS["scale-shift-with-tokens"], True),
    ],
)
def test_there_and_back_is_the_same_bytes(changes, use_tokens, layout):
    config = expressible_by_ldm(changes)
    model = ours(config, use_tokens)
    away = to_foreign_unet(model, layout)
    with torch.device("meta"):
        back = UNet(config, in_channels=5, out_channels=3, use_tokens=use_tokens)
    load_foreign_unet(back, away, layout, "away")
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize("changes", [CROSS["depth-1-heads"], THREE | {"heads": 2}])
def test_diffusers_own_converter_agrees_on_every_name(diffusers, changes):
    """Theirs turns the original code's names into diffusers' by other rules than ours."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = expressible_by_ldm(changes)
    model = ours(config, True)
    original = {LDM_PREFIX + name: x for name, x in to_foreign_unet(model, UNET_LDM).items()}
    converted = convert_ldm_unet_checkpoint(original, {"layers_per_block": config.residual_blocks})
    expected = to_foreign_unet(model, UNET_DIFFUSERS)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("heads", [1, 4])
def test_plain_attention_has_the_original_codes_order_of_rows(heads):
    """Rows of its `qkv` are sorted by head, then by query, key and value."""
    model = ours(configured({"heads": heads, "norm_groups": 32, "channels": 32}), False)
    tensors = to_foreign_unet(model, UNET_LDM)
    block = model.get_submodule("middle_in.attention")
    x = torch.randn(2, 64, 3, 2, generator=torch.Generator().manual_seed(4))
    normed = F.group_norm(
        x, 32, tensors["middle_block.1.norm.weight"], tensors["middle_block.1.norm.bias"]
    ).flatten(2)
    weight, bias = tensors["middle_block.1.qkv.weight"], tensors["middle_block.1.qkv.bias"]
    assert weight.shape == (192, 64, 1)
    rows = F.conv1d(normed, weight, bias).unflatten(1, (heads, 3, 64 // heads))
    q, k, v = rows.unbind(2)
    pairs = torch.softmax(q.transpose(-1, -2) @ k / (64 // heads) ** 0.5, dim=-1)
    mixed = (v @ pairs.transpose(-1, -2)).flatten(1, 2)
    out = F.conv1d(
        mixed, tensors["middle_block.1.proj_out.weight"], tensors["middle_block.1.proj_out.bias"]
    )
    torch.testing.assert_close(block(x), x + out.view(x.shape), rtol=0, atol=1e-5)


def whole(preset) -> UNet:
    use = PRESETS["train-diffusion"][preset].use
    assert use is not None
    with torch.device("meta"):
        return UNet(
            UNetConfig.model_validate(PRESETS["train-diffusion"][preset].settings["unet"]),
            in_channels=use.latents[0] + use.concatenated,
            out_channels=use.latents[0],
            use_tokens=bool(use.tokens),
        )


@pytest.mark.parametrize("layout", [UNET_DIFFUSERS, UNET_LDM], ids=["diffusers", "ldm"])
@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("sd-v1", 859_520_964),
        ("ldm-4-imagenet", 400_920_579),
        ("ldm-4-celeba", 274_056_163),
        ("ldm-8-churches", 294_966_916),
        ("inpainting-big", 387_245_827),
    ],
)
def test_the_names_of_whole_models_are_a_bijection(preset, count, layout):
    model = whole(preset)
    own = model.state_dict()
    names = [key for name in own for key in unet_names(name, model, layout)]
    assert len(set(names)) == len(names)
    away = to_foreign_unet(model, layout)
    assert away.keys() == set(names)
    assert sum(tensor.numel() for tensor in away.values()) == count
    assert sum(tensor.numel() for tensor in own.values()) == count


def test_sd_v1_has_the_names_and_shapes_of_the_published_files(diffusers):
    with torch.device("meta"):
        other = diffusers.UNet2DConditionModel(cross_attention_dim=768)  # its defaults are SD's
    shapes = {name: tensor.shape for name, tensor in other.state_dict().items()}
    mine = to_foreign_unet(whole("sd-v1"), UNET_DIFFUSERS)
    assert {name: tensor.shape for name, tensor in mine.items()} == shapes
    ldm = to_foreign_unet(whole("sd-v1"), UNET_LDM)
    assert len(ldm) == 686
    for name, shape in (  # of sd-v1-4.ckpt
        ("input_blocks.4.0.skip_connection.weight", (640, 320, 1, 1)),
        ("input_blocks.3.0.op.weight", (320, 320, 3, 3)),
        ("middle_block.1.transformer_blocks.0.attn2.to_k.weight", (1280, 768)),
        ("output_blocks.2.1.conv.weight", (1280, 1280, 3, 3)),
        ("output_blocks.5.2.conv.weight", (1280, 1280, 3, 3)),
        ("output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight", (2560, 320)),
        ("time_embed.0.weight", (1280, 320)),
        ("out.2.weight", (4, 320, 3, 3)),
    ):
        assert tuple(ldm[name].shape) == shape, name


# What has no word there ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "layout", "word"),
    [
        ({"qk_norm": True}, UNET_DIFFUSERS, "qk_norm"),
        ({"norm": "rms"}, UNET_LDM, "norm rms"),
        ({"self_conditioning": True}, UNET_DIFFUSERS, "self_conditioning"),
        ({"multipliers": (2, 4)}, UNET_LDM, "first multiplier of 2"),
        ({"middle_attention": False}, UNET_LDM, "middle_attention off"),
        ({"transformer_depth": (2, 1), "attention_factors": (1, 2)}, UNET_LDM, "that varies"),
        ({}, UNET_LDM, "in 32 groups everywhere; this U-Net in 8"),
        ({"channels": 24, "norm_groups": 16}, UNET_DIFFUSERS, "this U-Net in 12, 16"),
    ],
)
def test_what_has_no_word_there_is_refused_by_name(changes, layout, word):
    model = ours(configured(changes), True)
    with pytest.raises(DataError, match=word):
        require_expressible(model, layout)
    with pytest.raises(DataError, match=word):
        to_foreign_unet(model, layout)


def test_tensors_that_do_not_fit_are_named():
    model = ours(configured({"heads": 2}), False)
    tensors = to_foreign_unet(model, UNET_DIFFUSERS)
    name = "mid_block.attentions.0.to_k.weight"
    for broken in (
        {key: tensor for key, tensor in tensors.items() if key != name},
        tensors | {name: tensors[name][:, :8]},
        tensors | {name: tensors[name] * float("nan")},
    ):
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            load_foreign_unet(model, broken, UNET_DIFFUSERS, "theirs")
    with pytest.raises(DataError, match="surplus"):
        extra = tensors | {"surplus": tensors[name]}
        load_foreign_unet(model, extra, UNET_DIFFUSERS, "theirs")
