"""Every preset: its size as published, and a step of training at a small size."""

import pytest
import torch

import ldmkit
from ldmkit.assembly import build_autoencoder
from ldmkit.configs import PresetsConfig, TrainAEConfig
from ldmkit.named_settings import PRESETS
from ldmkit.options import resolve
from ldmkit.recipes.presets import as_text

AUTOENCODERS = PRESETS["train-ae"]
PUBLISHED = {"kl-f4": 55.3e6, "kl-f8": 83.65e6, "vq-f4": 55.3e6, "sd-f8": 83.65e6}
"""As counted on the released weights."""


def config_of(name, **typed):
    return resolve("train-ae", TrainAEConfig, name, None, {"data": "x", **typed})


def parameters(name):
    config = config_of(name)
    with torch.device("meta"):
        model = build_autoencoder(config.autoencoder, config.preprocessing)
    return sum(parameter.numel() for parameter in model.parameters())


def peer(config, diffusers):
    """The same network by diffusers: its parameters beside attention of the levels."""
    levels = [config.channels * multiplier for multiplier in config.multipliers]
    attended = [2**level in config.attention_factors for level in range(len(levels))]
    down = ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attended]
    up = ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attended)]
    settings = {
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": levels,
        "layers_per_block": config.residual_blocks,
        "latent_channels": config.latent_channels,
        "mid_block_add_attention": config.middle_attention,
    }
    with torch.device("meta"):
        if config.bottleneck == "vq":
            return diffusers.VQModel(**settings, num_vq_embeddings=config.codebook.size)
        return diffusers.AutoencoderKL(**settings)


@pytest.mark.parametrize("name", [name for name in AUTOENCODERS if name != "identity"])
def test_parameters_equal_those_of_the_same_network_by_diffusers(name, diffusers):
    other = peer(config_of(name).autoencoder, diffusers)
    assert parameters(name) == sum(p.numel() for p in other.parameters())


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_parameters_are_the_published_ones(name, count):
    assert parameters(name) == pytest.approx(count, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "learning_rate", "disc"),
    [
        ("kl-f4", 4.5e-5, ("50001", 0.5, 3)),
        ("vq-f4", 3.6e-5, ("0", 0.75, 3)),
        ("vq-f4-noattn", 3.6e-5, ("11", 0.75, 3)),
        ("vq-f8", 4.5e-5, ("1", 0.6, 2)),
        ("vq-f8-n256", 4.5e-5, ("250001", 0.75, 3)),
        ("vq-f16", 6.3e-5, ("250001", 0.75, 2)),
    ],
)
def test_training_is_the_published_one(name, learning_rate, disc):
    config = config_of(name)
    assert config.lr == pytest.approx(learning_rate)
    assert (config.disc.start, config.disc.weight, config.disc.layers) == disc
    assert config.betas == (0.5, 0.9)
    assert not config.autoencoder.codebook.legacy_commitment


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_each_preset_trains_a_step_at_a_small_size(name, pictures, tmp_path):
    factor = config_of(name).autoencoder.factor
    config = config_of(
        name,
        data=pictures,
        out=tmp_path / "run",
        steps=1,
        batch_size=2,
        holdout=0,
        precision="fp32",
        preprocessing={"size": max(32, 2 * factor)},
        autoencoder={"channels": 16, "norm_groups": 4, "codebook": {"size": 16}},
        loss={"perceptual": "vgg16"},
        disc={"channels": 8, "start": "0", "warmup": 0, "ramp": 0},
    )
    path = ldmkit.train_ae(config)
    model = ldmkit.load_autoencoder(path)
    images = torch.rand(1, 3, config.preprocessing.size, config.preprocessing.size) * 2 - 1
    latents = model.encode(images).mean
    assert latents.shape[2] == config.preprocessing.size // factor
    assert model.decode(latents).shape == images.shape
    if name != "identity":
        assert "disc_loss" in (tmp_path / "run/metrics.jsonl").read_text()


def test_the_list_has_all_of_them_with_source(run):
    report = ldmkit.presets(PresetsConfig())
    assert {(p["command"], p["name"]) for p in report["presets"]} == {
        (command, name) for command, named in PRESETS.items() for name in named
    }
    assert all(preset["source"] for preset in report["presets"])
    text = as_text(ldmkit.presets(PresetsConfig(command="train-ae")))
    assert "train-diffusion" not in text
    done = run("presets", "train-ae")
    assert (done.returncode, done.stdout.decode()) == (0, text + "\n")
