"""Every preset of the second stage: its size as published, and a step of training at an eighth of it."""

import numpy as np
import pytest
import torch
from torch import nn

import ldmkit
from ldmkit.assembly import build_diffusion
from ldmkit.configs import PresetsConfig, TrainDiffusionConfig
from ldmkit.data.latent_set import LatentBatch
from ldmkit.diffusion_configs import DiffusionConfig
from ldmkit.diffusion_presets import DIFFUSION_MODELS
from ldmkit.diffusion_step import draw_batch, learner_of, take_step
from ldmkit.facts import Whitening
from ldmkit.named_settings import PRESETS
from ldmkit.networks.blocks import Norm, SpatialAttention
from ldmkit.options import resolve
from ldmkit.recipes.plan import operations

DIFFUSION = PRESETS["train-diffusion"]
OWN = {"tiny", "s", "b", "l"}
PAPER = {
    *("ldm-4-celeba", "ldm-4-ffhq", "ldm-4-bedrooms", "ldm-8-churches", "ldm-8-imagenet"),
    *("ldm-4-imagenet", "txt2img-1p4b", "text2img-256", "layout-openimages", "layout-coco"),
    *("semantic-256", "bsr-sr", "inpainting-big", "sd-v1"),
}
EXACT = {
    "ldm-4-celeba": 274_056_163,
    "ldm-4-imagenet": 400_920_579,
    "sd-v1": 859_520_964,
    "inpainting-big": 387_245_827,
}
"""As counted on the released weights."""
TRAINING = {  # batch, steps, rate, first and last variance; by the paper's tables and the configs
    "ldm-4-celeba": (48, 410_000, 48 * 2e-6, 0.0015, 0.0195),
    "ldm-4-ffhq": (42, 635_000, 42 * 2e-6, 0.0015, 0.0195),
    "ldm-4-bedrooms": (48, 1_900_000, 48 * 2e-6, 0.0015, 0.0195),
    "ldm-8-churches": (96, 500_000, 5e-5, 0.0015, 0.0155),
    "ldm-8-imagenet": (64, 2_900_000, 64 * 1e-6, 0.0015, 0.0195),
    "ldm-4-imagenet": (1200, 178_000, 1e-4, 0.0015, 0.0195),
    "txt2img-1p4b": (680, 390_000, 1e-4, 0.00085, 0.012),
    "text2img-256": (28, 100_000, 28 * 2e-6, 0.0015, 0.0195),
    "layout-openimages": (24, 4_400_000, 24 * 2e-6, 0.0015, 0.0205),
    "layout-coco": (48, 170_000, 4.8e-5, 0.0015, 0.0205),
    "semantic-256": (48, 360_000, 48 * 1e-6, 0.0015, 0.0205),
    "bsr-sr": (64, 860_000, 64 * 1e-6, 0.0015, 0.0155),
    "inpainting-big": (128, 360_000, 1e-6, 0.0015, 0.0205),
    "sd-v1": (2048, 431_000, 1e-4, 0.00085, 0.012),
}


def config_of(name) -> TrainDiffusionConfig:
    return resolve("train-diffusion", TrainDiffusionConfig, name, None, {"latents": "x"})


def box_model(layers, width=512, vocabulary=8192, length=92) -> int:
    """Parameters of the transformer that reads tokens: 8 heads of 64, four times as wide inside."""
    attention = 4 * width * 512 + width
    inside = 8 * width * width + 5 * width
    norms = (2 * layers + 1) * 2 * width
    tables = (vocabulary + length) * width + (width + 1) * vocabulary
    return layers * (attention + inside) + norms + tables


@pytest.fixture(scope="module")
def listed():
    report = ldmkit.presets(PresetsConfig(command="train-diffusion"))
    return {preset["name"]: preset for preset in report["presets"]}


def test_they_are_the_papers_and_three_sizes(listed):
    assert set(listed) == set(DIFFUSION) == PAPER | OWN
    assert {n for n, preset in listed.items() if preset["published"] is None} == OWN | {
        "text2img-256"
    }
    sizes = [listed[name]["parameters"] for name in ("tiny", "s", "b", "l")]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("name", sorted(PAPER - {"text2img-256"}))
def test_parameters_are_the_published_ones(name, listed):
    preset = listed[name]
    assert preset["parameters"] + preset["beside"] == pytest.approx(preset["published"], rel=5e-3)
    assert preset["parameters"] == EXACT.get(name, preset["parameters"])


def test_what_is_counted_outside_the_u_net(listed):
    assert listed["layout-openimages"]["beside"] == box_model(16)
    assert listed["layout-coco"]["beside"] == box_model(8)
    assert listed["txt2img-1p4b"]["beside"] == box_model(32, 1280, 30_522, 77)
    assert listed["ldm-4-imagenet"]["beside"] == 1001 * 512
    assert listed["semantic-256"]["beside"] == 182 * 3
    first_stage = ldmkit.presets(PresetsConfig(command="train-ae"))["presets"]
    assert {"name": "vq-f4", "parameters": listed["bsr-sr"]["beside"]}.items() <= next(
        preset for preset in first_stage if preset["name"] == "vq-f4"
    ).items()


@pytest.mark.parametrize("name", TRAINING)
def test_training_is_the_published_one(name):
    config = config_of(name)
    found = (config.batch_size, config.steps, config.lr)
    schedule = config.schedule
    assert (*found, schedule.beta_start, schedule.beta_end) == pytest.approx(TRAINING[name])
    assert config.parameterization == "epsilon"
    assert schedule.timesteps == 1000


def narrowed(name) -> TrainDiffusionConfig:
    """A preset with an eighth of its channels, as `train-diffusion` gets it."""
    config = config_of(name)
    unet = config.unet
    narrow = {
        "channels": unet.channels // 8,
        "head_channels": unet.head_channels and unet.head_channels // 8,
        "context_channels": unet.context_channels // 8,
        "norm_groups": 4,
        "heads": unet.heads and unet.heads // 2,
    }
    changes = {"unet": unet.model_dump() | narrow, "batch_size": 2, "precision": "fp32"}
    return TrainDiffusionConfig.model_validate(config.model_dump() | changes)


def told(kind, z, side) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """A condition of that kind, small, and what two samples of `side` latents are told."""
    ids = torch.arange(14).view(2, 7)
    small = {"depth": 1, "heads": 1, "head_width": 8}
    kinds = {
        "none": ([], None),
        "class": ({"names": ("a", "b", "c")}, torch.tensor([[0], [1]])),
        "text": ({**small, "length": 7, "merges": ()}, ids),
        "embedded-text": (
            {
                "encoder": "",
                "output": "last",
                "pad_with_end": True,
                "fingerprint": "",
                "count": 7,
                "width": 5,
            },
            torch.rand(2, 7, 5),
        ),
        "embedded-image": (
            {
                "encoder": "",
                "output": "tokens",
                "colours": "clip",
                "fingerprint": "",
                "count": 7,
                "width": 5,
                "image_channels": 3,
                "size": 8,
            },
            torch.rand(2, 7, 5),
        ),
        "layout": ({**small, "objects": 1, "vocabulary": 40, "names": ("a",)}, ids[:, :5]),
        "labelmap": (
            {"classes": 3, "stages": 2, "mapped": 3},
            torch.arange(3).expand(2, 4 * side, 3).repeat_interleave(4 * side, 2)[..., : 4 * side],
        ),
        "lowres": ({"image_channels": 3, "ratio": 4, "factor": 4}, torch.rand(2, 4, side, side)),
        "mask": ({"latent_channels": z, "convention": "ldm"}, torch.rand(2, z + 1, side, side)),
    }
    settings, values = kinds[kind]
    return ([{"kind": kind, **settings}], {kind: values}) if values is not None else ([], {})


@pytest.mark.parametrize("name", DIFFUSION)
def test_each_preset_trains_a_step_as_the_command_does(name):
    config, use = narrowed(name), DIFFUSION[name].use
    assert use is not None
    z, side = use.latents[0], 2 ** (len(config.unet.multipliers) - 1)
    (kind,) = config.condition
    conditions, values = told("class" if kind == "auto" else kind, z, side)
    chosen = config.model_dump(include={"unet", "schedule", "parameterization"})
    model_config = DiffusionConfig.model_validate(
        chosen | {"latent_channels": z, "conditions": conditions}
    )
    assert sum(condition.channels for condition in model_config.conditions) == use.concatenated
    assert any(condition.attended for condition in model_config.conditions) == bool(use.tokens)
    whitening = Whitening(mean=(0.5,) * z, std=(2.0,) * z)
    torch.manual_seed(0)
    model = build_diffusion(model_config)
    model.set_whitening(whitening)
    learner = learner_of(model, config, torch.device("cpu"))
    before = [weight.clone() for weight in learner.model.parameters()]
    generator = torch.Generator().manual_seed(0)
    mean = 0.5 + 2.0 * torch.randn(2, z, side, side, generator=generator)
    read = LatentBatch(mean, torch.full_like(mean, 0.1))
    losses = []
    for step in range(2):  # the same samples, noise and noise levels twice
        batch = draw_batch(learner.model, read, values, torch.Generator().manual_seed(1), config)
        added = take_step(learner, config, step, np.arange(2), batch, rate=1e-2)
        assert float(added["loss"].number) == 1.0  # the update was made
        losses.append(float(added["loss"].total))
    assert losses[1] < losses[0] < 4.0
    moved = [
        not torch.equal(*pair) for pair in zip(before, learner.model.parameters(), strict=True)
    ]
    assert sum(moved) > 0.8 * len(moved)  # layers behind a silent output stay until it speaks
    averaged = zip(before, learner.average.parameters(), strict=True)
    assert any(not torch.equal(*pair) for pair in averaged)


def test_operations_are_those_of_the_formulas():
    with torch.device("meta"):
        convolution = nn.Conv2d(3, 8, 3, padding=1)
        attention = SpatialAttention(8, heads=2, norm=Norm(2, 1e-5), zero_init=True)
        picture, map_ = torch.empty(1, 3, 16, 12), torch.empty(1, 8, 16, 12)
    pixels = 16 * 12
    assert operations(lambda: convolution(picture)) == 2 * 3 * 8 * 9 * pixels
    projections, pairs = 2 * 4 * 8 * 8 * pixels, 2 * 2 * pixels**2 * 8
    assert operations(lambda: attention(map_)) == projections + pairs


def test_the_dry_run_of_a_preset_says_what_it_costs(run, pipeline, tmp_path):
    command = ("train-diffusion", pipeline.latents, "--preset", "ldm-4-imagenet")
    done = run(*command, "--condition", "none", "--out", tmp_path / "run", "--dry-run")
    said = done.stderr.decode() + done.stdout.decode()
    assert done.returncode == 0
    assert "parameters: " in said
    assert "GFLOPs for each image and model call" in said
    assert not (tmp_path / "run").exists()


def test_the_losses_are_those_of_the_published_configs():
    absolute = {
        name
        for name, preset in DIFFUSION_MODELS.items()
        if preset.settings.get("objective", {}).get("loss") == "l1"
    }
    assert absolute == {
        *("ldm-8-churches", "layout-openimages", "layout-coco", "semantic-256", "inpainting-big")
    }
