import hashlib

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from ldmkit import terminal
from ldmkit.assembly import build_autoencoder, build_diffusion
from ldmkit.autoencoder_configs import AutoencoderConfig, PreprocessingConfig
from ldmkit.condition_configs import ClassCondition
from ldmkit.conditioning.classes import ClassConditioner
from ldmkit.conditioning.condition import Condition, replaced, stacked
from ldmkit.configs import TrainDiffusionConfig
from ldmkit.diffusion_configs import DiffusionConfig, ScheduleConfig, UNetConfig
from ldmkit.facts import Whitening
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.named_settings import PRESETS
from ldmkit.networks import blocks
from ldmkit.networks.blocks import Norm, ResidualBlock, SpatialAttention, timestep_embedding
from ldmkit.networks.transformer import Attention
from ldmkit.networks.unet import UNet

TINY = UNetConfig(
    channels=16,
    multipliers=(1, 2),
    residual_blocks=1,
    attention_factors=(2,),
    head_channels=8,
    norm_groups=4,
    context_channels=12,
)


def unet(config=TINY, **changes):
    torch.manual_seed(0)
    settings = {"in_channels": 4, "out_channels": 4, "use_tokens": True} | changes
    return awake(UNet(config, **settings))


@torch.no_grad()
def awake(model: UNet) -> UNet:
    """The zero-initialised outputs would hide everything."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def changed(**changes) -> UNetConfig:
    return UNetConfig.model_validate(TINY.model_dump() | changes)


@pytest.mark.parametrize(
    ("use_tokens", "names", "first", "spread"),
    [
        (True, "fdad77b8", [-0.07222, -1.71724, -0.77763, -1.15692], 1.2106),
        (False, "4629572b", [-0.52759, 0.31989, -0.52265, -0.52249], 1.3176),
    ],
)
def test_names_and_results_of_the_demo_are_those_of_the_files_that_exist(
    use_tokens, names, first, spread
):
    """Found before the U-Net had options: none of them may change a model that has none."""
    preset = UNetConfig.model_validate(PRESETS["train-diffusion"]["tiny"].settings["unet"])
    torch.manual_seed(0)
    model = UNet(preset, in_channels=4, out_channels=4, use_tokens=use_tokens)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1, generator=generator)
    listed = repr([(name, tuple(x.shape)) for name, x in model.state_dict().items()])
    assert hashlib.sha256(listed.encode()).hexdigest().startswith(names)
    x = torch.randn(2, 4, 16, 16, generator=generator)
    tokens = torch.randn(2, 3, 128, generator=generator) if use_tokens else None
    out = model(x, torch.tensor([3.0, 700.0]), None, tokens)
    assert out[0, 0, 0, :4].tolist() == pytest.approx(first, abs=1e-3)
    assert out.std().item() == pytest.approx(spread, abs=1e-3)


@pytest.mark.parametrize("use_tokens", [True, False])
@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 2, 2)])
def test_shapes(multipliers, use_tokens):
    config = changed(multipliers=multipliers, attention_factors=[2] if len(multipliers) > 1 else [])
    model = UNet(config, in_channels=6, out_channels=4, use_tokens=use_tokens)
    tokens = torch.zeros(2, 3, 12) if use_tokens else None
    out = model(torch.zeros(2, 4, 8, 12), torch.zeros(2), None, tokens, torch.zeros(2, 2, 8, 12))
    assert out.shape == (2, 4, 8, 12)


@pytest.mark.parametrize(
    ("channels", "groups"), [(192, 32), (48, 24), (32, 32), (20, 20), (7, 7), (74, 2)]
)
def test_norms_have_32_groups_or_the_largest_divisor(channels, groups):
    assert Norm(32, 1e-5)(channels).num_groups == groups


def test_no_preset_normalises_channels_one_by_one():
    """It would take colours out of the autoencoder and the time step out of the U-Net."""
    for command, presets in PRESETS.items():
        for preset in presets.values():
            defaults = UNetConfig() if command == "train-diffusion" else AutoencoderConfig()
            network = preset.settings.get("unet", preset.settings.get("autoencoder", {}))
            channels = network.get("channels", defaults.channels)
            groups = network.get("norm_groups", defaults.norm_groups)
            assert channels // Norm(groups, 0.0).groups_of(channels) >= 4


def test_lone_channels_are_warned_of(capsys):
    terminal.be_quiet(False)
    build_autoencoder(AutoencoderConfig(channels=32, multipliers=(1,)), PreprocessingConfig())
    assert "--autoencoder.norm-groups 32" in capsys.readouterr().err
    build_autoencoder(AutoencoderConfig(channels=64, multipliers=(1,)), PreprocessingConfig())
    assert capsys.readouterr().err == ""


def test_it_starts_silent():
    torch.manual_seed(0)
    model = UNet(TINY, in_channels=4, out_channels=4, use_tokens=True)
    assert not model(torch.randn(1, 4, 8, 8), torch.zeros(1), None, torch.randn(1, 1, 12)).any()


def test_every_input_matters_and_samples_do_not_mix(generator):
    model = unet(in_channels=5)
    inputs = {
        "x": torch.randn(2, 4, 8, 8, generator=generator),
        "timesteps": torch.tensor([10.0, 500.0]),
        "vector": torch.randn(2, 64, generator=generator),
        "tokens": torch.randn(2, 3, 12, generator=generator),
        "channels": torch.randn(2, 1, 8, 8, generator=generator),
    }
    base = model(**inputs)
    for name, value in inputs.items():
        changed = value.clone()
        changed[1] += 100.0 if name == "timesteps" else 1.0
        out = model(**(inputs | {name: changed}))
        assert torch.allclose(out[0], base[0], atol=1e-5), name
        assert not torch.allclose(out[1], base[1], atol=1e-3), name


def test_the_order_of_tokens_does_not_matter(generator):
    model = unet()
    x, t = torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([3.0])
    tokens = torch.randn(1, 5, 12, generator=generator)
    shuffled = tokens[:, [3, 1, 4, 0, 2]]
    assert torch.allclose(model(x, t, None, tokens), model(x, t, None, shuffled), atol=1e-5)


def test_timestep_embedding_is_cosines_then_sines():
    found = timestep_embedding(torch.tensor([0.0, 2.0]), 4)
    frequencies = torch.tensor([1.0, 0.01])
    expected = torch.cat([(2 * frequencies).cos(), (2 * frequencies).sin()])
    assert torch.allclose(found[0], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert torch.allclose(found[1], expected)


def test_dropping_replaces_by_the_null_and_trains_it():
    torch.manual_seed(0)
    conditioner = ClassConditioner((3,), 5)
    labels, drop = torch.tensor([[0], [1], [2]]), torch.tensor([False, True, False])
    mixed = conditioner(replaced(labels, conditioner.empty(labels), drop))
    expected = conditioner(torch.tensor([[0], [-1], [2]]))
    assert mixed.tokens is not None
    assert expected.tokens is not None
    assert torch.equal(mixed.tokens, expected.tokens)
    mixed.tokens.sum().backward()
    gradient = conditioner.embedding.weight.grad
    assert gradient is not None
    assert gradient.abs().sum(1).tolist() == [5.0, 0.0, 5.0, 5.0]


def test_stacking_keeps_absent_ways_absent():
    first, second = Condition(vector=torch.zeros(1, 2)), Condition(vector=torch.ones(1, 2))
    both = stacked(first, second)
    assert both.vector is not None
    assert both.vector.tolist() == [[0, 0], [1, 1]]
    assert both.tokens is both.channels is None


def test_whitening_and_back(generator):
    config = DiffusionConfig(
        unet=TINY, schedule=ScheduleConfig(), parameterization="v", latent_channels=2, conditions=()
    )
    model = LatentDiffusion(config)
    raw = (
        torch.randn(500, 2, 4, 4, generator=generator) * torch.tensor([3.0, 0.1]).view(2, 1, 1)
        + 7.0
    )
    model.set_whitening(Whitening(mean=(7.0, 7.0), std=(3.0, 0.1)))
    white = model.whiten(raw)
    assert white.std((0, 2, 3)).tolist() == pytest.approx([1.0, 1.0], rel=0.03)
    assert white.mean((0, 2, 3)).tolist() == pytest.approx([0.0, 0.0], abs=0.03)
    assert torch.allclose(model.unwhiten(white), raw, atol=1e-5)


def test_one_batch_overfits(generator):
    torch.manual_seed(0)
    config = DiffusionConfig(
        unet=TINY,
        schedule=ScheduleConfig(),
        parameterization="epsilon",
        latent_channels=2,
        conditions=(ClassCondition(names=("a", "b")),),
    )
    model = LatentDiffusion(config)
    clean = torch.randn(4, 2, 8, 8, generator=generator)
    noise = torch.randn(4, 2, 8, 8, generator=generator)
    sigma = torch.tensor([0.3, 1.0, 3.0, 10.0])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    falling = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=60)
    losses = []
    for _ in range(60):
        noisy = clean + sigma.view(-1, 1, 1, 1) * noise
        found = model.denoise(
            noisy, sigma, model.condition({"class": torch.tensor([[0], [1], [0], [-1]])})
        )
        loss = ((found - clean) / sigma.view(-1, 1, 1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(noise.square().mean().item(), rel=1e-3)  # it starts silent
    assert losses[-1] < 0.01 * losses[0]


def test_attention_over_many_pixels_takes_another_kernel_to_the_same_result(monkeypatch):
    torch.manual_seed(0)
    attention = SpatialAttention(16, heads=2, norm=Norm(4, 1e-6), zero_init=False)
    x = torch.randn(2, 16, 8, 12)
    few = attention(x)
    monkeypatch.setattr(blocks, "MANY_PIXELS", 96)
    assert torch.allclose(attention(x), few, atol=1e-6)


# Options ---------------------------------------------------------------------------------------

OPTIONS = {
    "heads": {"heads": 2, "head_channels": None},
    "scale_shift": {"scale_shift": True},
    "residual_updown": {"residual_updown": True},
    "transformer_depth": {"transformer_depth": (1, 2)},
    "no middle": {"middle_attention": False},
    "qk_norm": {"qk_norm": True},
    "rms": {"norm": "rms"},
    "self_conditioning": {"self_conditioning": True},
    "dropout": {"dropout": 0.5},
}


@pytest.mark.parametrize("use_tokens", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_starts_silent_trains_all_weights_and_changes_the_result(options, use_tokens):
    if use_tokens is False and "transformer_depth" in options:
        options = {"qk_norm": True, "norm": "rms", "scale_shift": True, "residual_updown": True}
    config = changed(**options)
    torch.manual_seed(0)
    model = UNet(config, in_channels=4, out_channels=4, use_tokens=use_tokens)
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3.0, 500.0])
    tokens = torch.randn(2, 3, 12, generator=generator) if use_tokens else None
    assert not model(x, t, None, tokens).any()
    out = awake(model)(x, t, None, tokens)
    assert out.shape == x.shape
    out.square().mean().backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert not silent
    plain = unet(use_tokens=use_tokens)(x, t, None, tokens)
    assert not torch.allclose(out, plain, atol=1e-3)


def test_heads_by_count_and_by_width_agree():
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([3.0])
    tokens = torch.randn(1, 3, 12)
    by_width, by_count = unet(), unet(changed(heads=4, head_channels=None))
    assert torch.equal(by_width(x, t, None, tokens), by_count(x, t, None, tokens))


def test_attention_is_where_the_factors_say():
    config = changed(multipliers=(1, 2, 2), attention_factors=(1, 4), transformer_depth=(1, 2, 3))
    model = unet(config)
    depths = {
        name.rpartition(".attention.blocks.")[0]: int(
            name.split(".attention.blocks.")[1].split(".")[0]
        )
        for name, _ in model.named_parameters()
        if ".attention.blocks." in name
    }
    assert depths == {
        "down.0.stages.0": 0,
        "down.2.stages.0": 2,
        "middle_in": 2,
        **{f"up.0.stages.{n}": 2 for n in range(2)},
        **{f"up.2.stages.{n}": 0 for n in range(2)},
    }
    names = unet(changed(middle_attention=False)).state_dict()
    assert not any(name.startswith("middle_in.attention") for name in names)


def test_scale_and_shift_by_zero_leave_the_norm_alone():
    block = ResidualBlock(8, 8, embedding=4, norm=Norm(2, 1e-5), scale_shift=True)
    assert block.embed is not None
    torch.nn.init.zeros_(block.embed.weight)
    with torch.no_grad():
        block.embed.bias.copy_(torch.cat([torch.full((8,), 1.0), torch.full((8,), 0.5)]))
    x = torch.randn(2, 8, 4, 4)
    torch.nn.init.normal_(block.conv2.weight)
    h = block.conv1(F.silu(block.norm1(x)))
    expected = x + block.conv2(F.silu(2.0 * block.norm2(h) + 0.5))  # (1 + scale) norm + shift
    torch.testing.assert_close(block(x, torch.zeros(2, 4)), expected)


@pytest.mark.parametrize(("resample", "side"), [("up", 8), ("down", 2)])
def test_residual_blocks_halve_by_means_and_double_by_copies(resample, side):
    block = ResidualBlock(8, 8, embedding=4, norm=Norm(2, 1e-5), resample=resample)
    x = torch.randn(2, 8, 4, 4)
    found = block(x, torch.zeros(2, 4))  # silent, so that the skip is left
    assert found.shape == (2, 8, side, side)
    if resample == "up":
        assert torch.equal(found[:, :, ::2, 1::2], x)
    else:
        assert torch.allclose(found[:, :, 0, 0], x[:, :, :2, :2].mean((2, 3)))


def test_rms_norm_has_each_pixel_on_its_own():
    norm = Norm(4, 1e-6, "rms")(6)
    x = torch.randn(2, 6, 3, 3)
    assert torch.allclose(norm(x).square().mean(1), torch.ones(2, 3, 3), atol=1e-3)
    assert torch.allclose(norm(x)[:, :, :2, :1], norm(x[:, :, :2, :1]))


@pytest.mark.parametrize("qk_norm", [True, False])
def test_qk_norm_bounds_what_large_weights_do_to_attention(qk_norm):
    torch.manual_seed(0)
    attention = Attention(16, 16, 2, qk_norm=qk_norm)
    tokens = torch.randn(1, 5, 16)
    before = attention(tokens, tokens)
    with torch.no_grad():
        attention.to_q.weight.mul_(100.0)
    assert torch.allclose(attention(tokens, tokens), before, atol=1e-4) == qk_norm


def test_self_conditioning_sees_the_earlier_estimate_and_zeros_without_one():
    model = unet(changed(self_conditioning=True), out_channels=3, in_channels=5)
    x, t, tokens = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 9.0]), torch.randn(2, 3, 12)
    channels, previous = torch.randn(2, 1, 8, 8), torch.randn(2, 3, 8, 8)
    none = model(x, t, None, tokens, channels)
    zeros = model(x, t, None, tokens, channels, torch.zeros(2, 3, 8, 8))
    assert torch.equal(none, zeros)
    assert not torch.allclose(none, model(x, t, None, tokens, channels, previous), atol=1e-3)
    with pytest.raises(ValueError, match="self_conditioning"):
        unet()(x, t, None, tokens, None, previous)


def test_tokens_are_needed_if_and_only_if_the_network_is_built_for_them():
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([3.0])
    with pytest.raises(ValueError, match="use_tokens=False"):
        unet()(x, t)
    with pytest.raises(ValueError, match="use_tokens=True"):
        unet(use_tokens=False)(x, t, None, torch.randn(1, 3, 12))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 3, "head_channels": None}, "3 attention heads do not divide a level of 16"),
        ({"head_channels": 12}, "heads of 12 channels do not divide a level of 16"),
        ({"heads": 2}, "--unet.heads 2 and --unet.head-channels 8: give one"),
        ({"transformer_depth": (1, 2, 3)}, "3 numbers for 2 levels"),
        ({"transformer_depth": ()}, "0 numbers for 2 levels"),
        ({"multipliers": (), "attention_factors": ()}, "--unet.multipliers is empty"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_numbers(changes, words):
    with pytest.raises(ValidationError, match=words):
        changed(**changes)


def test_attention_at_factors_that_no_level_has_is_refused_in_training_and_read_from_files():
    with pytest.raises(
        ValidationError, match="16: no level has that factor; the 2 levels have 1, 2"
    ):
        TrainDiffusionConfig.model_validate(
            {"latents": "x", "unet": TINY.model_dump() | {"attention_factors": (2, 16)}}
        )
    config, plain = changed(attention_factors=(2, 16)), unet()
    assert unet(config).state_dict().keys() == plain.state_dict().keys()


def test_files_from_before_depths_by_level_say_one_number():
    assert changed(transformer_depth=2).transformer_depth == (2,)
    assert changed(transformer_depth=2) == changed(transformer_depth=(2,))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_factors": ()}, "only the middle, at factor 2, has attention"),
        ({"attention_factors": (8, 16)}, "the levels have factors 1, 2"),
        ({"attention_factors": (), "middle_attention": False}, "nothing has attention"),
        ({}, None),
        ({"norm": "rms", "norm_groups": 16}, None),
        ({"norm_groups": 16}, "--unet.norm-groups 16"),
    ],
)
def test_networks_that_may_be_a_mistake_are_warned_of(changes, words, capsys):
    terminal.be_quiet(False)
    config = DiffusionConfig(
        unet=changed(**changes),
        schedule=ScheduleConfig(),
        parameterization="epsilon",
        latent_channels=4,
        conditions=(),
    )
    build_diffusion(config)
    said = capsys.readouterr().err
    assert words in said if words else said == ""
