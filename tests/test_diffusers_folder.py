"""Whole diffusion models as folders of diffusers, in and out: the same pictures on both sides."""

import copy
import json
import runpy
import sys
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

import ldmkit
from ldmkit.assembly import (
    autoencoder_facts,
    build_autoencoder,
    diffusion_facts,
    load_autoencoder,
    load_diffusion,
    save_autoencoder,
    save_diffusion,
)
from ldmkit.autoencoder_configs import AutoencoderConfig, CodebookConfig, PreprocessingConfig
from ldmkit.condition_configs import ClassCondition
from ldmkit.diffusion.samplers import sample_ddim
from ldmkit.diffusion.schedule import DiscreteSchedule
from ldmkit.diffusion_configs import (
    DiffusionConfig,
    ParameterizationName,
    ScheduleConfig,
    UNetConfig,
)
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import DiffusionFacts, Whitening
from ldmkit.interop import diffusers_proof
from ldmkit.interop.diffusers_scheduler import read_schedule, schedule_page
from ldmkit.interop.diffusers_unet import read_unet, unet_page
from ldmkit.interop.latent_scale import folded, folds
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.networks.unet import UNet

CLASSES = ("cat", "dog", "newt")
SCALAR = Whitening(mean=(0.0,) * 3, std=(1.6,) * 3)
SHIFTED = Whitening(mean=(0.7, 0.2, -0.4), std=(1.6,) * 3)
BY_CHANNEL = Whitening(mean=(0.7, 0.2, -0.4), std=(0.5, 1.6, 3.1))
BOTTLENECKS = ("kl", "vq", "deterministic")
STEPS = 5
SMALL_UNET = {
    "channels": 16,
    "multipliers": (1, 2),
    "residual_blocks": 1,
    "attention_factors": (2,),
    "norm_groups": 4,
    "context_channels": 12,
}


class Pair(NamedTuple):
    """A model file and its autoencoder's."""

    model: Path
    ae: Path


@torch.no_grad()
def disturb(model) -> None:
    """Give zeros and ones of a fresh network other values, so that nothing hides or is confused."""
    for parameter in model.parameters():
        if not parameter.any() or parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


def classes_of(count: int, way="tokens") -> tuple[ClassCondition, ...]:
    names = CLASSES[:count]
    return (ClassCondition.model_validate({"names": names, "way": way}),) if count else ()


def condition(model: LatentDiffusion, labels: torch.Tensor):
    return model.condition({"class": labels[:, None]})


def write_pair(
    folder: Path,
    *,
    bottleneck="kl",
    whitening=SCALAR,
    classes=0,
    way="tokens",
    parameterization="epsilon",
    schedule: dict[str, Any] | None = None,
    unet: dict[str, Any] | None = None,
    shape=(3, 8, 8),
) -> Pair:
    torch.manual_seed(0)
    settings = {
        "bottleneck": bottleneck,
        "channels": 16,
        "multipliers": (1, 2),
        "residual_blocks": 1,
        "norm_groups": 4,
        "latent_channels": 3,
        "codebook": CodebookConfig(size=32),
    }
    preprocessing = PreprocessingConfig(size=2 * shape[1])
    autoencoder = build_autoencoder(AutoencoderConfig.model_validate(settings), preprocessing)
    disturb(autoencoder)
    if autoencoder.codebook is not None:
        autoencoder.codebook.codes.data.normal_()
    pair = Pair(folder / "model.safetensors", folder / "ae.safetensors")
    save_autoencoder(pair.ae, autoencoder, preprocessing, {})
    config = DiffusionConfig(
        unet=UNetConfig.model_validate(SMALL_UNET | (unet or {})),
        schedule=ScheduleConfig.model_validate(schedule or {}),
        parameterization=cast(ParameterizationName, parameterization),
        latent_channels=3,
        conditions=classes_of(classes, way),
    )
    model = LatentDiffusion(config)
    disturb(model)
    model.set_whitening(whitening)
    facts = DiffusionFacts(
        fingerprint="",
        autoencoder=autoencoder_facts(pair.ae).fingerprint,
        latent_shape=shape,
        whitening=whitening,
        trained={},
        versions={},
    )
    save_diffusion(pair.model, model, facts)
    return pair


def send_out(pair: Pair, folder: Path, **changes) -> Path:
    config = {"model": pair.model, "ae": pair.ae, "out": folder / "theirs"} | changes
    return ldmkit.export(ldmkit.ExportConfig.model_validate(config))


def bring_in(source: Path, folder: Path, **changes) -> Pair:
    config = {"source": source, "out": folder / "back"} | changes
    out = ldmkit.import_(ldmkit.ImportConfig.model_validate(config))
    return Pair(out / "diffusion.safetensors", changes.get("ae") or out / "autoencoder.safetensors")


def noise(count=2, shape=(3, 8, 8)):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def drawn(pair: Pair, labels=None, guidance=1.0, steps=STEPS, start=None):
    """Pictures by our sampler, from unit noise."""
    model, start = load_diffusion(pair.model), noise() if start is None else start
    labels = torch.full((len(start),), -1) if labels is None else labels
    told, nothing = condition(model, labels), condition(model, torch.full_like(labels, -1))

    def denoise(x, sigma):
        conditional = model.denoise(x, sigma, told)
        if guidance == 1.0:
            return conditional
        free = model.denoise(x, sigma, nothing)
        return free + guidance * (conditional - free)

    sigmas = model.schedule.steps(steps)
    x = model.schedule.initial(start, float(sigmas[0]))
    clean = sample_ddim(denoise, x, sigmas, noise=torch.randn_like)
    return load_autoencoder(pair.ae).decode(model.unwhiten(clean))


def precisely_decoded(model, raw):
    """In float64, so that what differs is the rounding of the weights that were written."""
    latents = raw if model.codebook is None else model.codebook.quantize(raw)
    model = copy.deepcopy(model).double()
    return model.decoder(model.from_latents(latents.double()))


def assert_close(found, wanted, share):
    """Within a share of the largest value."""
    assert wanted.std() > 0.01  # else everything would agree
    assert ((found - wanted).abs().max() / wanted.abs().max()).item() < share


# Out and in again ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bottleneck", "classes", "parameterization", "whitening"),
    [
        ("kl", 0, "epsilon", SCALAR),
        ("kl", 0, "v", BY_CHANNEL),
        ("kl", 3, "epsilon", BY_CHANNEL),
        ("kl", 3, "v", SCALAR),
        ("kl", -3, "epsilon", BY_CHANNEL),
        ("vq", 0, "v", SHIFTED),
        ("vq", 3, "epsilon", BY_CHANNEL),
        ("deterministic", 0, "epsilon", BY_CHANNEL),
    ],
)
@torch.no_grad()
def test_out_and_in_again_is_the_same_function(
    tmp_path, bottleneck, classes, parameterization, whitening
):
    way, classes = "tokens" if classes > 0 else "vector", abs(classes)
    pair = write_pair(
        tmp_path,
        whitening=whitening,
        bottleneck=bottleneck,
        classes=classes,
        way=way,
        parameterization=parameterization,
    )
    back = bring_in(send_out(pair, tmp_path), tmp_path)
    mine, again = load_diffusion(pair.model), load_diffusion(back.model)
    facts = diffusion_facts(back.model)
    assert again.config.conditions == mine.config.conditions == classes_of(classes, way)
    assert facts.latent_shape == (3, 8, 8)
    assert facts.autoencoder == autoencoder_facts(back.ae).fingerprint
    x, sigma = noise(), torch.tensor([0.3, 4.0])
    labels = torch.tensor([min(classes, 1), -1])
    wanted = mine.denoise(x, sigma, condition(mine, labels))
    torch.testing.assert_close(
        again.denoise(x, sigma, condition(again, labels)), wanted, rtol=0, atol=1e-6
    )
    decoded = precisely_decoded(load_autoencoder(pair.ae), mine.unwhiten(x))
    assert_close(precisely_decoded(load_autoencoder(back.ae), again.unwhiten(x)), decoded, 1e-6)


def test_a_factor_alone_leaves_the_autoencoder_as_it_is(tmp_path):
    pair = write_pair(tmp_path)
    folder = send_out(pair, tmp_path)
    page = json.loads((folder / "vqvae/config.json").read_text())
    assert page["scaling_factor"] == pytest.approx(1 / 1.6)
    back = bring_in(folder, tmp_path)
    assert autoencoder_facts(back.ae).fingerprint == autoencoder_facts(pair.ae).fingerprint
    assert diffusion_facts(back.model).whitening.std == pytest.approx(SCALAR.std, rel=1e-7)


@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
@torch.no_grad()
def test_folding_moves_the_whitening_into_the_convolutions(tmp_path, bottleneck):
    whitening = SHIFTED if bottleneck == "vq" else BY_CHANNEL
    model = load_autoencoder(write_pair(tmp_path, bottleneck=bottleneck).ae)
    mean, std = torch.tensor([whitening.mean, whitening.std]).view(2, -1, 1, 1)
    inside = folded(model, whitening)
    pictures = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5)) * 2 - 1
    mine, other = model.encode(pictures), inside.encode(pictures)
    assert_close(other.mean, (mine.mean - mean) / std, 1e-5)
    if mine.std is not None and other.std is not None:
        assert_close(other.std, mine.std / std, 1e-5)
    whitened = (mine.mean - mean) / std
    wanted = precisely_decoded(model, mine.mean)
    assert_close(precisely_decoded(inside, whitened), wanted, 1e-6)


def test_a_codebook_is_scaled_by_one_factor_only(tmp_path):
    model = load_autoencoder(write_pair(tmp_path, bottleneck="vq").ae)
    assert folds(model, SHIFTED)
    assert not folds(model, BY_CHANNEL)
    with pytest.raises(ValueError, match="one factor"):
        folded(model, BY_CHANNEL)


# What diffusers draws --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bottleneck", "whitening", "changes"),
    [
        ("kl", BY_CHANNEL, {}),
        ("vq", SHIFTED, {"parameterization": "v", "schedule": {"zero_terminal_snr": True}}),
        ("kl", SCALAR, {"parameterization": "x0", "schedule": {"kind": "cosine"}}),
        ("deterministic", BY_CHANNEL, {"schedule": {"kind": "sigmoid-beta"}}),
        (
            "vq",
            SCALAR,
            {
                "schedule": {"kind": "linear", "timesteps": 100},
                "unet": {"scale_shift": True, "residual_updown": True, "head_channels": 8},
            },
        ),
    ],
    ids=["kl", "v", "x0", "sigmoid", "all-options"],
)
def test_the_pipeline_of_diffusers_draws_the_same(
    diffusers, tmp_path, bottleneck, whitening, changes
):
    pair = write_pair(tmp_path, bottleneck=bottleneck, whitening=whitening, **changes)
    folder = send_out(pair, tmp_path)
    assert not (folder / "use.py").exists()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    assert type(pipeline).__name__ == "LDMPipeline"
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(
        batch_size=2,
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=STEPS,
        output_type="np",
    ).images
    wanted = (drawn(pair) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert ((wanted > 0) & (wanted < 1)).float().mean() > 0.3  # else clamping would hide much
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": 3, "whitening": BY_CHANNEL, "unet": {"heads": 2, "transformer_depth": (1, 2)}},
        {"classes": 3, "bottleneck": "vq", "whitening": BY_CHANNEL, "parameterization": "v"},
        {"parameterization": "flow", "schedule": {"shift": 3.0}, "whitening": SHIFTED},
        {"classes": 2, "parameterization": "flow", "unet": {"head_channels": 4}},
        {"classes": 3, "way": "vector"},
        {"shape": (3, 8, 16)},
    ],
    ids=["classes", "codebook", "flow", "flow-classes", "added-classes", "oblong"],
)
def test_the_program_in_the_folder_draws_the_same(diffusers, tmp_path, changes):
    pair = write_pair(tmp_path, **changes)
    folder = send_out(pair, tmp_path)
    assert not (folder / "model_index.json").exists()
    start = noise(shape=changes.get("shape", (3, 8, 8)))
    draw = runpy.run_path(str(folder / "use.py"))["draw"]
    if "classes" in changes:
        labels, guidance = torch.tensor([1, -1]), 1.0 if changes["classes"] == 2 else 2.5
        assert_close(draw(start, labels, STEPS, guidance), drawn(pair, labels, guidance), 1e-4)
    else:
        assert_close(draw(start, STEPS), drawn(pair, start=start), 1e-4)


def test_the_program_runs_from_a_shell_and_writes_pictures(diffusers, tmp_path, monkeypatch):
    folder = send_out(write_pair(tmp_path, classes=3), tmp_path)
    arguments = ["--num", "2", "--steps", "2", "--label", "1", "--guidance", "2", "--out"]
    monkeypatch.setattr(sys, "argv", ["use.py", *arguments, str(tmp_path / "drawn")])
    runpy.run_path(str(folder / "use.py"), run_name="__main__")
    assert sorted(file.name for file in (tmp_path / "drawn").iterdir()) == ["0000.png", "0001.png"]


@pytest.mark.parametrize("name", ["linear", "scaled-linear", "cosine", "sigmoid", "sigmoid-beta"])
@pytest.mark.parametrize("stretched", [False, True])
def test_their_scheduler_has_our_noise_levels(diffusers, name, stretched):
    config = DiffusionConfig(
        unet=UNetConfig.model_validate(SMALL_UNET),
        schedule=ScheduleConfig(kind=name, zero_terminal_snr=stretched, timesteps=200),
        parameterization="v",
        latent_channels=3,
        conditions=(),
    )
    page = schedule_page(config)
    scheduler = diffusers.DDIMScheduler.from_config(page)
    ours = LatentDiffusion(config).schedule
    assert isinstance(ours, DiscreteSchedule)
    np.testing.assert_allclose(scheduler.alphas_cumprod, ours.alpha_bar, rtol=0, atol=2e-6)
    if "trained_betas" not in page:
        schedule, parameterization = read_schedule(page, "theirs")
        assert parameterization == "v"
        assert schedule == config.schedule


# Folders of others -----------------------------------------------------------------------------


def foreign(diffusers, folder: Path, scheduler=None, vae=None, **unet) -> Path:
    """A folder as diffusers itself saves it."""
    torch.manual_seed(1)
    network = diffusers.UNet2DModel(
        **{
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "sample_size": 8,
        }
        | unet
    )
    disturb(network)
    network.save_pretrained(folder / "unet")
    (scheduler or diffusers.DDPMScheduler(beta_schedule="sigmoid")).save_pretrained(
        folder / "scheduler"
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    if vae is not None:
        model = diffusers.VQModel(
            **blocks, block_out_channels=(16,), norm_num_groups=4, num_vq_embeddings=9, **vae
        )
        disturb(model)
        model.save_pretrained(folder / "vqvae")
    return folder


@torch.no_grad()
def test_a_folder_that_diffusers_saved_denoises_the_same_here(diffusers, tmp_path):
    folder = foreign(diffusers, tmp_path / "f", vae={"scaling_factor": 0.5})
    pair = bring_in(folder, tmp_path)
    mine, facts = load_diffusion(pair.model), diffusion_facts(pair.model)
    assert facts.whitening == Whitening(mean=(0.0,) * 3, std=(2.0,) * 3)
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")
    theirs = diffusers.UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
    t, x = 400, noise()
    step = scheduler.step(theirs(x, t).sample, t, x).pred_original_sample
    alpha_bar = scheduler.alphas_cumprod[t]
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    clean = mine.denoise(x / alpha_bar.sqrt(), sigma.expand(2), mine.condition({}))
    torch.testing.assert_close(clean.clamp(-1, 1), step, rtol=0, atol=1e-5)
    assert (clean.abs() < 1).float().mean() > 0.2


def test_a_scaling_factor_that_is_not_stated_is_diffusers_own(diffusers, tmp_path, capfd):
    folder = foreign(diffusers, tmp_path / "f", vae={})
    page = json.loads((folder / "vqvae/config.json").read_text())
    del page["scaling_factor"]
    (folder / "vqvae/config.json").write_text(json.dumps(page))
    ldmkit.terminal.be_quiet(False)
    pair = bring_in(folder, tmp_path)
    assert diffusion_facts(pair.model).whitening.std == pytest.approx((1 / 0.18215,) * 3)
    said = capfd.readouterr().err
    assert "states no scaling_factor: 0.18215" in said
    assert "its sampler clips predicted latents" in said


def test_a_bare_unet_takes_the_autoencoder_that_is_given(diffusers, tmp_path):
    folder = foreign(diffusers, tmp_path / "f")
    pair = write_pair(tmp_path)
    for source in (folder, folder / "unet"):
        with pytest.raises(UsageError, match=r"by which factor .* --scaling-factor"):
            bring_in(source, tmp_path, ae=pair.ae)
    with pytest.raises(UsageError, match="holds no autoencoder"):
        bring_in(folder / "unet", tmp_path)
    back = bring_in(folder / "unet", tmp_path, ae=pair.ae, scaling_factor=0.25)
    facts = diffusion_facts(back.model)
    assert facts.autoencoder == autoencoder_facts(pair.ae).fingerprint
    assert facts.whitening.std == (4.0,) * 3
    assert not back.model.with_name("autoencoder.safetensors").exists()


def test_what_was_recorded_of_an_autoencoder_is_its_scale(diffusers, tmp_path):
    folder = foreign(diffusers, tmp_path / "f", vae={"scaling_factor": 0.5})
    ae = tmp_path / "ae.safetensors"
    ldmkit.import_(ldmkit.ImportConfig(source=folder / "vqvae", out=ae))
    back = bring_in(folder / "unet", tmp_path, ae=ae, size=16)
    facts = diffusion_facts(back.model)
    assert facts.whitening.std == (2.0,) * 3
    assert facts.latent_shape == (3, 16, 16)


def test_old_names_of_attention_are_known(diffusers, tmp_path):
    folder = foreign(diffusers, tmp_path / "f", vae={"scaling_factor": 1.0})
    new = bring_in(folder, tmp_path)
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    renamed = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    for there, old in renamed.items():
        tensors = {name.replace(there, old): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, path)
    again = bring_in(folder, tmp_path, out=tmp_path / "old")
    assert diffusion_facts(again.model).fingerprint == diffusion_facts(new.model).fingerprint


# What is refused -------------------------------------------------------------------------------


def refuse_unet(page, changes, words):
    with pytest.raises(DataError, match=words):
        read_unet(page | changes, "there")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep' has no counterpart"),
        ({"freq_shift": 1}, "freq_shift 1 has no counterpart here, where it is 0"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos False"),
        ({"norm_eps": 1e-6}, "norm_eps"),
        ({"downsample_padding": 0}, "downsample_padding 0"),
        ({"mid_block_type": None}, "mid_block_type None"),
        ({"out_channels": 6}, "in_channels 3 and out_channels 6 differ"),
        ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "more than direction"),
        ({"down_block_types": ["SkipDownBlock2D"] * 2}, "a block SkipDownBlock2D of UNet2DModel"),
        ({"block_out_channels": [16, 24]}, "not all multiples of the first"),
        ({"norm_num_groups": 5}, "norm_num_groups 5 does not divide"),
        ({"attn_norm_num_groups": 8}, "attn_norm_num_groups 8 with norm_num_groups 4"),
        (
            {"attn_norm_num_groups": None, "resnet_time_scale_shift": "scale_shift"},
            "attn_norm_num_groups None",
        ),
        ({"time_embedding_dim": 32}, "time_embedding_dim 32 is not 4 x 16"),
        ({"layers_per_block": [1, 2]}, "layers_per_block .* varies by level"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"_class_name": "UNet3DConditionModel"}, "holds UNet3DConditionModel"),
    ],
)
def test_settings_without_counterpart_are_named(changes, words):
    model = UNet(
        UNetConfig.model_validate(SMALL_UNET), in_channels=3, out_channels=3, use_tokens=False
    )
    page = unet_page(model, (8, 8))
    read_unet(page, "there")  # as it is, it comes in
    refuse_unet(page, changes, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"addition_embed_type": "text_time"}, "addition_embed_type 'text_time'"),
        ({"encoder_hid_dim": 64}, "encoder_hid_dim 64"),
        ({"attention_head_dim": [3, 4, 5]}, "attention_head_dim .* does not give each level"),
        ({"attention_head_dim": 5}, "attention_head_dim 5 does not divide 16 channels"),
        ({"attention_head_dim": None}, "attention_head_dim 0 does not divide"),
        ({"attention_head_dim": [2, 8]}, "neither one number of heads nor one width"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type UNetMidBlock2D"),
        ({"num_class_embeds": 10}, "num_class_embeds 10 beside tokens"),
        ({"cross_attention_dim": [12, 24]}, "cross_attention_dim .* varies by level"),
    ],
)
def test_settings_of_attending_networks_are_named(changes, words):
    config = UNetConfig.model_validate(SMALL_UNET | {"attention_factors": (1, 2), "heads": 2})
    model = UNet(config, in_channels=3, out_channels=3, use_tokens=True)
    page = unet_page(model, (8, 8))
    assert read_unet(page, "there").config == config
    assert read_unet(page | {"attention_head_dim": [2, 4]}, "there").config.head_channels == 8
    refuse_unet(page, changes, words)


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ({"_class_name": "UniPCMultistepScheduler"}, "holds UniPCMultistepScheduler"),
        ({"_class_name": "DDIMScheduler", "trained_betas": [0.1]}, "trained_betas is a list"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "laplace"}, "beta_schedule 'laplace'"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"},
            "prediction_type 'flow_prediction'",
        ),
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
            "timestep_type is 'continuous'",
        ),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
            "use_dynamic_shifting is True",
        ),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 100},
            "num_train_timesteps 100",
        ),
        ({"_class_name": "DDIMScheduler", "beta_end": 2}, "beta_end"),
    ],
)
def test_schedulers_without_counterpart_are_named(page, words):
    with pytest.raises(DataError, match=words):
        read_schedule(page, "there")


def test_a_text_model_names_what_it_attends_to(diffusers, tmp_path):
    folder = send_out(write_pair(tmp_path, classes=3), tmp_path)
    (folder / "class_embedding.safetensors").unlink()
    (folder / "text_encoder").mkdir()
    with pytest.raises(DataError, match=r"tokens of text_encoder, .*import .*/vae. takes its auto"):
        bring_in(folder, tmp_path)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parameterization": "edm"}, "parameterization edm on schedule edm"),
        ({"parameterization": "v", "schedule": {"kind": "flow"}}, "v on schedule flow"),
        ({"unet": {"qk_norm": True}}, "no word for qk_norm"),
        ({"unet": {"heads": 2, "attention_factors": (1, 2)}}, "one width of attention heads"),
        ({"unet": {"residual_updown": True}, "classes": 2}, "no word for residual_updown"),
        ({"unet": {"middle_attention": False}, "classes": 2}, "no word for middle_attention off"),
    ],
)
def test_what_diffusers_has_no_word_for_is_named_and_nothing_left(
    diffusers, tmp_path, changes, words
):
    pair = write_pair(tmp_path, **changes)
    with pytest.raises(DataError, match=words):
        send_out(pair, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"model.safetensors", "ae.safetensors"}


@pytest.mark.parametrize("broken", ["_denoised_here", "_decoded_there"])
def test_an_export_that_differs_leaves_nothing(diffusers, tmp_path, monkeypatch, broken):
    pair = write_pair(tmp_path, classes=3)
    original = getattr(diffusers_proof, broken)
    monkeypatch.setattr(diffusers_proof, broken, lambda *a: original(*a) * 1.001)
    with pytest.raises(DataError, match=r"differs from the model .* nothing was written"):
        send_out(pair, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"model.safetensors", "ae.safetensors"}


def test_files_and_options_that_do_not_go_together(diffusers, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    pair, other = write_pair(tmp_path), write_pair(tmp_path / "other", bottleneck="vq")
    with pytest.raises(DataError, match="another autoencoder"):
        send_out(pair, tmp_path, ae=other.ae)
    with pytest.raises(UsageError, match="give the autoencoder"):
        send_out(pair, tmp_path, ae=None)
    with pytest.raises(UsageError, match="has its own whitening"):
        send_out(pair, tmp_path, scale="channel")
    with pytest.raises(UsageError, match="is an autoencoder"):
        send_out(pair._replace(model=pair.ae), tmp_path)
    folder = send_out(pair, tmp_path)
    with pytest.raises(UsageError, match="exists"):
        send_out(pair, tmp_path)
    with pytest.raises(UsageError, match="exists"):
        bring_in(folder, tmp_path, out=pair.model)
    with pytest.raises(UsageError, match="exists"):
        bring_in(folder, tmp_path, out=tmp_path / "other")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UsageError, match=r"ldmkit\[diffusers\]"):
        send_out(pair, tmp_path, out=tmp_path / "without")


def test_options_that_mean_nothing_for_a_folder_are_refused(diffusers, tmp_path):
    pair = write_pair(tmp_path)
    folder = send_out(pair, tmp_path)
    for changes, words in (
        ({"heads": 2}, "--heads means nothing here: .* config.json says it"),
        ({"head_channels": 8}, "--head-channels means nothing here"),
        ({"weights": "ema"}, "--weights means nothing here: .* one set of weights"),
        ({"null_class": "last"}, "--null-class means nothing here: .* no table of classes"),
        ({"parameterization": "v"}, "--parameterization v: .* says epsilon; leave it out"),
        ({"scaling_factor": 0.5}, "--scaling-factor 0.5: .* says 0.625; leave it out"),
        ({"size": 18}, "--size 18 is not a multiple of 4"),
        ({"out": tmp_path / "a.safetensors", "ae": pair.ae}, "names one file"),
    ):
        with pytest.raises(UsageError, match=words):
            bring_in(folder, tmp_path, **changes)
    with pytest.raises(UsageError, match="holds no whole model"):
        bring_in(folder / "vqvae", tmp_path, scaling_factor=1.0)
    assert not (tmp_path / "back").exists()
    same = bring_in(folder, tmp_path, scaling_factor=0.625, parameterization="epsilon", ae=pair.ae)
    assert [file.name for file in (tmp_path / "back").iterdir()] == [same.model.name]
    alone = ldmkit.import_(ldmkit.ImportConfig(source=folder, out=tmp_path / "a.safetensors"))
    assert autoencoder_facts(alone).fingerprint == autoencoder_facts(pair.ae).fingerprint


@torch.no_grad()
def test_a_table_that_is_added_to_the_time_comes_in(diffusers, tmp_path):
    folder = foreign(diffusers, tmp_path / "f", vae={"scaling_factor": 0.5}, num_class_embeds=5)
    with pytest.raises(DataError, match="give --null-class last or --null-class none"):
        bring_in(folder, tmp_path)
    theirs = diffusers.UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
    x, t = noise(), torch.tensor([400.0, 7.0])
    for null_class, count in (("last", 4), ("none", 5)):
        back = bring_in(folder, tmp_path, out=tmp_path / null_class, null_class=null_class)
        model = load_diffusion(back.model)
        names = tuple(map(str, range(count)))
        assert model.config.conditions == (ClassCondition(way="vector", names=names),)
        labels = torch.tensor([3, -1 if null_class == "last" else 4])
        found = model.unet(x, t, *condition(model, labels))
        wanted = theirs(x, t, class_labels=torch.tensor([3, 4])).sample
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_the_class_table_says_its_names_and_is_checked(diffusers, tmp_path):
    folder = send_out(write_pair(tmp_path, classes=3), tmp_path)
    path = folder / "class_embedding.safetensors"
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["class_names"]) == list(CLASSES)
        table = file.get_tensor("weight")
    assert table.shape == (4, 12)
    safetensors.torch.save_file({"weight": table}, path)
    model = load_diffusion(bring_in(folder, tmp_path).model)
    assert model.config.conditions == (ClassCondition(names=("0", "1", "2")),)
    for tensors, metadata, words in (
        ({"weight": table[:, :5].contiguous()}, {}, "rows of 12 numbers"),
        ({"weight": table}, {"class_names": "["}, "not JSON"),
        ({"weight": table}, {"class_names": '["a"]'}, "no list of 3"),
    ):
        safetensors.torch.save_file(tensors, path, metadata)
        with pytest.raises(DataError, match=words):
            bring_in(folder, tmp_path, out=tmp_path / "again")
