import pytest
import torch

from ldmkit import terminal
from ldmkit.assembly import build_autoencoder
from ldmkit.autoencoder_configs import AutoencoderConfig, PreprocessingConfig
from ldmkit.conditioning.condition import Condition, dropped, stacked
from ldmkit.conditioning.label import LabelConditioner
from ldmkit.configs import TrainDiffusionConfig
from ldmkit.diffusion_configs import DiffusionConfig, ScheduleConfig, UNetConfig
from ldmkit.facts import Whitening
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.named_settings import PRESETS
from ldmkit.networks import blocks
from ldmkit.networks.blocks import Norm, SpatialAttention, timestep_embedding
from ldmkit.networks.unet import UNet
from ldmkit.options import resolve

TINY = UNetConfig(
    channels=16,
    multipliers=(1, 2),
    residual_blocks=1,
    attention_factors=(2,),
    head_channels=8,
    norm_groups=4,
    context_channels=12,
)


def unet(**changes):
    torch.manual_seed(0)
    settings = {"in_channels": 4, "out_channels": 4, "use_tokens": True} | changes
    model = UNet(TINY, **settings)
    for parameter in model.parameters():  # the zero-initialised outputs would hide everything
        if not parameter.abs().sum():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_the_imagenet_preset_has_the_published_number_of_parameters():
    config = resolve(
        "train-diffusion", TrainDiffusionConfig, "ldm-4-imagenet", None, {"latents": "x"}
    )
    with torch.device("meta"):
        model = UNet(config.unet, in_channels=3, out_channels=3, use_tokens=True)
    assert (
        sum(p.numel() for p in model.parameters()) == 400_920_579
    )  # the published 400M checkpoint's


def test_the_unconditional_celeba_model_has_the_published_number_of_parameters():
    config = UNetConfig(channels=224, multipliers=(1, 2, 3, 4), head_channels=32)
    with torch.device("meta"):
        model = UNet(config, in_channels=3, out_channels=3, use_tokens=False)
    assert sum(p.numel() for p in model.parameters()) == 274_056_163


@pytest.mark.parametrize("use_tokens", [True, False])
@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 2, 2)])
def test_shapes(multipliers, use_tokens):
    config = TINY.model_copy(update={"multipliers": multipliers})
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


def test_label_conditioner_null_equals_a_missing_label():
    torch.manual_seed(0)
    conditioner = LabelConditioner(3, 5)
    tokens = conditioner(torch.tensor([0, 2, -1])).tokens
    assert tokens is not None
    assert tokens.shape == (3, 1, 5)
    null = conditioner.null(1).tokens
    assert null is not None
    assert torch.equal(tokens[2], null[0])
    assert len({row.sum().item() for row in tokens}) == 3


def test_dropping_replaces_by_the_null_and_trains_it():
    torch.manual_seed(0)
    conditioner = LabelConditioner(3, 5)
    labels, drop = torch.tensor([0, 1, 2]), torch.tensor([False, True, False])
    mixed = dropped(conditioner(labels), conditioner.null(3), drop)
    expected = conditioner(torch.tensor([0, -1, 2]))
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
        unet=TINY, schedule=ScheduleConfig(), parameterization="v", latent_channels=2, classes=0
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
        classes=2,
    )
    model = LatentDiffusion(config)
    clean = torch.randn(4, 2, 8, 8, generator=generator)
    noise = torch.randn(4, 2, 8, 8, generator=generator)
    sigma = torch.tensor([0.3, 1.0, 3.0, 10.0])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(100):
        noisy = clean + sigma.view(-1, 1, 1, 1) * noise
        found = model.denoise(noisy, sigma, model.condition(torch.tensor([0, 1, 0, -1])))
        loss = ((found - clean) / sigma.view(-1, 1, 1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(noise.square().mean().item(), rel=1e-3)  # it starts silent
    assert losses[-1] < 0.2 * losses[0]


def test_attention_over_many_pixels_takes_another_kernel_to_the_same_result(monkeypatch):
    torch.manual_seed(0)
    attention = SpatialAttention(16, heads=2, norm=Norm(4, 1e-6), zero_init=False)
    x = torch.randn(2, 16, 8, 12)
    few = attention(x)
    monkeypatch.setattr(blocks, "MANY_PIXELS", 96)
    assert torch.allclose(attention(x), few, atol=1e-6)
