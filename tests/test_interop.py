"""Autoencoders of other projects, in and out: the same numbers as theirs, and sentences for the rest."""

import json
import os
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ldmkit
from ldmkit import terminal
from ldmkit.assembly import autoencoder_facts, build_autoencoder, load_autoencoder, save_autoencoder
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder.posterior import GaussianPosterior
from ldmkit.autoencoder_configs import AutoencoderConfig, CodebookConfig, PreprocessingConfig
from ldmkit.container import read_header
from ldmkit.data_configs import EncodeConfig
from ldmkit.errors import DataError, UsageError
from ldmkit.interop import diffusers_layout, ldm_layout
from ldmkit.interop.bottleneck import squared
from ldmkit.interop.diffusers_layout import DIFFUSERS, config_page, to_diffusers
from ldmkit.interop.layout import to_foreign, to_model
from ldmkit.interop.ldm_layout import LDM, from_ldm, to_ldm
from ldmkit.interop.parity import Difference, require_parity
from ldmkit.interop.reading import WEIGHTS_FILES
from ldmkit.manifest import read_manifest
from ldmkit.torchvision_import import import_torchvision

SIZE = 32
PREPROCESSING = PreprocessingConfig(size=SIZE)
SMALL = AutoencoderConfig(
    channels=32, multipliers=(1, 2), residual_blocks=1, codebook=CodebookConfig(size=64)
)
KL, VQ = SMALL, SMALL.model_copy(update={"bottleneck": "vq"})
DETERMINISTIC = SMALL.model_copy(update={"bottleneck": "deterministic"})
FOREIGN = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "latent_channels": 4,
}
WITH_ATTENTION = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
}


@pytest.fixture(scope="module")
def diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations
        import_torchvision()
        import diffusers

        yield diffusers


def write_ours(folder: Path, **changes) -> Path:
    """An autoencoder file with random weights, biases and norms included."""
    torch.manual_seed(0)
    model = build_autoencoder(SMALL.model_copy(update=changes), PREPROCESSING)
    disturb(model)
    save_autoencoder(folder / "ae.safetensors", model, PREPROCESSING, {})
    return folder / "ae.safetensors"


@torch.no_grad()
def disturb(model: nn.Module) -> None:
    """Give zeros and ones of a fresh network other values, so that none can be confused."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        elif "embedding" in name or "codes" in name:
            parameter.normal_()


def pickled(value: Any, path: Path, *, as_zip: bool = True) -> Path:
    """A file as torch writes them, in its present or (not `as_zip`) its oldest container."""
    torch.save(value, path, _use_new_zipfile_serialization=as_zip)  # noqa: TID251 - not ldmkit's
    return path


def bring_in(source: Path, folder: Path, **options) -> Path:
    out = folder / "imported.safetensors"
    return ldmkit.import_(ldmkit.ImportConfig(source=source, out=out, **options))


def send_out(ae: Path, to: str, folder: Path, **options) -> Path:
    out = folder / ("theirs.safetensors" if to == "ldm" else "theirs")
    return ldmkit.export(
        ldmkit.ExportConfig.model_validate({"model": ae, "to": to, "out": out} | options)
    )


def foreign_vq(diffusers, **changes):
    return diffusers.VQModel(**FOREIGN | {"num_vq_embeddings": 64} | changes)


def images() -> torch.Tensor:
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def assert_same_function(ours: Autoencoder, theirs: Any) -> None:
    """Encode and decode within 1e-5, in float32."""
    posterior, x = ours.encode(images()), images()
    if ours.codebook is None:
        dist = theirs.encode(x).latent_dist
        torch.testing.assert_close(posterior.mean, dist.mean, rtol=0, atol=1e-5)
        if isinstance(posterior, GaussianPosterior):
            torch.testing.assert_close(posterior.log_variance, dist.logvar, rtol=0, atol=1e-5)
    else:
        torch.testing.assert_close(posterior.mean, theirs.encode(x).latents, rtol=0, atol=1e-5)
    decoded = theirs.decode(posterior.mean).sample
    torch.testing.assert_close(ours.decode(posterior.mean), decoded, rtol=0, atol=1e-5)


# Parity with diffusers -------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [{}, WITH_ATTENTION], ids=["plain", "attention"])
@pytest.mark.parametrize("middle", [True, False])
@pytest.mark.parametrize("bottleneck", ["kl", "vq"])
def test_their_models_come_in_and_compute_the_same(
    diffusers, tmp_path, attention, middle, bottleneck
):
    torch.manual_seed(0)
    changes = attention | {"mid_block_add_attention": middle}
    if bottleneck == "kl":
        theirs = diffusers.AutoencoderKL(**FOREIGN | changes)
    else:
        theirs = foreign_vq(diffusers, **changes)
    disturb(theirs)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = load_autoencoder(bring_in(tmp_path / "theirs", tmp_path))
    assert ours.config.bottleneck == bottleneck
    assert ours.config.attention_factors == ((2,) if attention else ())
    assert ours.config.middle_attention == middle
    assert ours.config.norm_groups == 8
    assert_same_function(ours, theirs)


@pytest.mark.parametrize("factors", [(), (2,)])
@pytest.mark.parametrize("middle", [True, False])
@pytest.mark.parametrize("bottleneck", ["kl", "vq", "deterministic"])
def test_our_models_go_out_and_from_pretrained_loads_them(
    diffusers, tmp_path, factors, middle, bottleneck
):
    ae = write_ours(
        tmp_path,
        bottleneck=bottleneck,
        attention_factors=factors,
        middle_attention=middle,
        norm_groups=16,
    )
    folder = send_out(ae, "diffusers", tmp_path)
    kind = diffusers.VQModel if bottleneck == "vq" else diffusers.AutoencoderKL
    theirs, report = kind.from_pretrained(folder, low_cpu_mem_usage=False, output_loading_info=True)
    assert not any(report.values())
    assert_same_function(load_autoencoder(ae), theirs.eval())


def test_in_double_precision_nothing_but_rounding_is_left(diffusers, tmp_path):
    """What differs in float32 is the order of sums, and no detail of a layer."""
    ae = write_ours(tmp_path, attention_factors=(2,), norm_groups=16)
    folder = send_out(ae, "diffusers", tmp_path)
    theirs = diffusers.AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False)
    ours, theirs = load_autoencoder(ae).double(), theirs.double().eval()
    latents = torch.randn(1, 4, SIZE // 2, SIZE // 2, dtype=torch.float64)
    with torch.no_grad():
        for half, x in (("encoder", images().double()), ("decoder", latents)):
            mine, other = getattr(ours, half)(x), getattr(theirs, half)(x)
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16},
        {"layers_per_block": 1, "block_out_channels": (32, 32)},
        {"in_channels": 1, "out_channels": 1},
    ],
    ids=["without quant convs", "narrow", "grey"],
)
def test_variants_of_kl(diffusers, tmp_path, changes):
    theirs = diffusers.AutoencoderKL(**FOREIGN | changes).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_autoencoder(bring_in(tmp_path / "theirs", tmp_path))
    assert ours.image_channels == changes.get("in_channels", 3)
    x = images()[:, : ours.image_channels]
    posterior = ours.encode(x)
    assert isinstance(posterior, GaussianPosterior)
    with torch.no_grad():
        torch.testing.assert_close(
            posterior.mean, theirs.encode(x).latent_dist.mean, rtol=0, atol=1e-5
        )
        decoded = theirs.decode(posterior.mean).sample
        torch.testing.assert_close(ours.decode(posterior.mean), decoded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [2, 6])
def test_a_vq_model_with_another_width_of_codes(diffusers, tmp_path, width):
    torch.manual_seed(0)
    theirs = foreign_vq(diffusers, vq_embed_dim=width)
    disturb(theirs)
    torch.nn.init.zeros_(theirs.post_quant_conv.bias)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = load_autoencoder(bring_in(tmp_path / "theirs", tmp_path))
    assert ours.latent_channels == width
    assert_same_function(ours, theirs)


def test_a_picture_pipeline_of_another_age(diffusers, tmp_path):
    """`vae/` in a folder, attention as 1x1 convolutions with the old names, half precision, pickled."""
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(**FOREIGN).half().float()
    folder = tmp_path / "pipeline" / "vae"
    theirs.save_pretrained(folder)
    (folder / WEIGHTS_FILES[0]).unlink()
    old = {}
    for name, tensor in theirs.half().state_dict().items():
        for new, former in zip(
            ("to_q.", "to_k.", "to_v.", "to_out.0."),
            ("query.", "key.", "value.", "proj_attn."),
            strict=True,
        ):
            name = name.replace(new, former)
        old[name] = tensor
    pickled(old, folder / "diffusion_pytorch_model.bin")
    ours = load_autoencoder(bring_in(tmp_path / "pipeline", tmp_path))
    assert_same_function(ours, theirs.float().eval())


def test_their_own_converter_reads_our_ldm_file(diffusers, tmp_path):
    """Someone else's reading of the original layout, and the same pictures out of it."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    ae = write_ours(tmp_path, multipliers=(1, 2, 2))
    config = load_autoencoder(ae).config
    file = send_out(ae, "ldm", tmp_path)
    page = config_page(config, PREPROCESSING, {})
    theirs = diffusers.AutoencoderKL(
        **{key: value for key, value in page.items() if not key.startswith("_")}
    )
    theirs.load_state_dict(convert_ldm_vae_checkpoint(safetensors.torch.load_file(file), page))
    assert_same_function(load_autoencoder(ae), theirs.eval())


# The original layout ---------------------------------------------------------------------------


def published_names() -> set[str]:
    """The tensors of kl-f8, as its published file has them, written down level by level."""
    modules = ["quant_conv", "post_quant_conv"]
    blocks = {
        "encoder": [f"down.{i}.block.{j}" for i in range(4) for j in range(2)],
        "decoder": [f"up.{i}.block.{j}" for i in range(4) for j in range(3)],
    }
    further = {
        "encoder": [
            *("down.1.block.0.nin_shortcut", "down.2.block.0.nin_shortcut"),
            *("down.0.downsample.conv", "down.1.downsample.conv", "down.2.downsample.conv"),
        ],
        "decoder": [
            *("up.0.block.0.nin_shortcut", "up.1.block.0.nin_shortcut"),
            *("up.1.upsample.conv", "up.2.upsample.conv", "up.3.upsample.conv"),
        ],
    }
    for half in ("encoder", "decoder"):
        residual = [*blocks[half], "mid.block_1", "mid.block_2"]
        modules += [
            f"{half}.{b}.{p}" for b in residual for p in ("norm1", "conv1", "norm2", "conv2")
        ]
        modules += [f"{half}.mid.attn_1.{part}" for part in ("norm", "q", "k", "v", "proj_out")]
        modules += [
            f"{half}.{name}" for name in (*further[half], "conv_in", "norm_out", "conv_out")
        ]
    return {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}


def test_kl_f8_has_the_published_names_and_shapes():
    with torch.device("meta"):
        model = Autoencoder(AutoencoderConfig(), 3)
    theirs = to_ldm(model.state_dict(), model.config)
    assert theirs.keys() == published_names()
    assert len(theirs) == 248
    assert theirs["encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert theirs["decoder.up.0.block.0.nin_shortcut.weight"].shape == (128, 256, 1, 1)
    assert theirs["quant_conv.weight"].shape == (8, 8, 1, 1)


@pytest.mark.parametrize("to", ["ldm", "diffusers"])
@pytest.mark.parametrize("bottleneck", ["kl", "vq"])
@pytest.mark.parametrize(
    "changes",
    [
        {"multipliers": (1,), "residual_blocks": 1},
        {"multipliers": (1, 2), "residual_blocks": 2},
        {"multipliers": (1, 2, 2), "residual_blocks": 1, "attention_factors": (2, 4)},
        {"middle_attention": False},
    ],
    ids=["one level", "two blocks", "attention", "no attention"],
)
def test_round_trips_are_exact_to_the_bit(diffusers, tmp_path, to, bottleneck, changes):
    codebook = CodebookConfig(size=64 if bottleneck == "vq" else 8192)
    ae = write_ours(tmp_path, bottleneck=bottleneck, codebook=codebook, **changes)
    back = bring_in(send_out(ae, to, tmp_path), tmp_path)
    assert read_header(back).config == read_header(ae).config
    assert autoencoder_facts(back).fingerprint == autoencoder_facts(ae).fingerprint
    assert autoencoder_facts(back).preprocessing == PREPROCESSING


configs = st.builds(
    AutoencoderConfig,
    bottleneck=st.sampled_from(["kl", "vq", "deterministic"]),
    channels=st.integers(1, 3),
    multipliers=st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple),
    residual_blocks=st.integers(1, 2),
    attention_factors=st.sets(st.sampled_from([1, 2, 4, 8])).map(tuple),
    middle_attention=st.booleans(),
    latent_channels=st.integers(1, 4),
    codebook=st.just(CodebookConfig(size=5)),
)


@settings(max_examples=25)
@given(config=configs, layout=st.sampled_from([LDM, DIFFUSERS]))
def test_names_there_and_back(config, layout):
    model = Autoencoder(config, 3)
    ours = model.state_dict()
    theirs = to_foreign(ours, config, layout)
    assert sum(t.numel() for t in theirs.values()) == sum(t.numel() for t in ours.values())
    back = to_model(theirs, config, 3, layout, "here").state_dict()
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.items())


def test_a_whole_diffusion_checkpoint_gives_its_autoencoder(tmp_path, monkeypatch, capfd):
    """Prefix, leftovers of training, pickled by a framework whose classes are not here."""
    ae = write_ours(tmp_path)
    own = to_ldm(load_autoencoder(ae).state_dict(), KL)
    state = {f"first_stage_model.{name}": tensor for name, tensor in own.items()}
    state |= {
        "first_stage_model.loss.logvar": torch.zeros(()),
        "model.diffusion_model.out.0.weight": torch.zeros(3),
        "model_ema.decay": torch.zeros(()),
        "cond_stage_model.encoder.conv_in.weight": torch.zeros(1, 1, 3, 3),
        "scale_factor": torch.tensor(0.25),
    }
    module = types.ModuleType("pytorch_lightning")
    callback = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning"})
    module.ModelCheckpoint = callback  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "pytorch_lightning", module)
    beside = {"epoch": 3, "callbacks": {callback: {"best": np.float64(1.5), "it": callback()}}}
    pickled(beside | {"state_dict": state, "optimizer_states": [{}]}, tmp_path / "a.ckpt")
    terminal.be_quiet(False)
    back = bring_in(tmp_path / "a.ckpt", tmp_path, size=64)
    facts = autoencoder_facts(back)
    assert facts.fingerprint == autoencoder_facts(ae).fingerprint
    assert facts.trained["scaling_factor"] == 0.25
    assert facts.trained["imported_from"] == str(tmp_path / "a.ckpt")
    assert facts.preprocessing == PreprocessingConfig(size=64)
    said = capfd.readouterr().err
    assert "5 tensors are not the autoencoder's and left out: cond_stage_model.encoder, " in said
    assert "first_stage_model.loss, model.diffusion_model, model_ema.decay, scale_factor" in said


@pytest.mark.parametrize("prefix", ["vae.", ""])
def test_other_prefixes(tmp_path, prefix):
    ae = write_ours(tmp_path, bottleneck="vq")
    own = to_ldm(load_autoencoder(ae).state_dict(), VQ)
    state = {f"{prefix}{name}": tensor for name, tensor in own.items()}
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    model = load_autoencoder(bring_in(tmp_path / "x.safetensors", tmp_path))
    assert model.config.codebook.legacy_commitment  # the published code trained it that way
    assert torch.equal(model.state_dict()["codebook.codes"], own["quantize.embedding.weight"])


@pytest.mark.parametrize(("e", "z"), [(6, 4), (3, 4), (1, 8)])
@pytest.mark.parametrize("noisy", [True, False])
def test_quant_convs_that_change_the_number_of_channels(e, z, noisy):
    """Against the networks with those convolutions run one after the other."""
    torch.manual_seed(0)
    base = KL if noisy else DETERMINISTIC
    networks = Autoencoder(base.model_copy(update={"latent_channels": z}), 3)
    disturb(networks)
    per_latent = 2 if noisy else 1
    quant, post = nn.Conv2d(per_latent * z, per_latent * e, 1), nn.Conv2d(e, z, 1, bias=e > z)
    theirs = to_ldm_without_noise(networks)
    for name, module in (("quant_conv", quant), ("post_quant_conv", post)):
        theirs[f"{name}.weight"] = module.weight.detach()
        bias = torch.zeros(len(module.weight)) if module.bias is None else module.bias.detach()
        theirs[f"{name}.bias"] = bias
    ours = from_ldm(theirs, "here").model
    assert ours.latent_channels == e
    with torch.no_grad():
        moments = quant(networks.encoder(images()))
        found = ours.to_moments(ours.encoder(images()))
        torch.testing.assert_close(found, moments, rtol=0, atol=1e-5)
        latents = torch.randn(1, e, 8, 8)
        expected = networks.decoder(post(latents))
        torch.testing.assert_close(ours.decode(latents), expected, rtol=0, atol=1e-5)


def to_ldm_without_noise(model: Autoencoder) -> dict[str, torch.Tensor]:
    return to_foreign(model.state_dict(), model.config, LDM)


def test_a_bias_that_cannot_be_merged_is_refused():
    theirs = to_ldm(Autoencoder(KL, 3).state_dict(), KL)
    theirs["post_quant_conv.weight"] = torch.ones(4, 2, 1, 1)
    theirs["post_quant_conv.bias"] = torch.ones(4)
    with pytest.raises(DataError, match="2 latent channels to 4 with a bias"):
        squared(theirs, "here")


def test_missing_quant_convs_become_exact_identities():
    theirs = to_ldm(Autoencoder(KL, 3).state_dict(), KL)
    for name in ("quant_conv", "post_quant_conv"):
        del theirs[f"{name}.weight"], theirs[f"{name}.bias"]
    model = from_ldm(theirs, "here").model
    x = torch.randn(1, 8, 5, 5)
    assert torch.equal(model.to_moments(x), x)
    assert torch.equal(model.from_latents(x[:, :4]), x[:, :4])


# Scale -------------------------------------------------------------------------------------------


def test_an_imported_autoencoder_goes_straight_into_encode_and_its_latents_scale_the_export(
    diffusers, pictures, tmp_path
):
    diffusers.AutoencoderKL(**FOREIGN, sample_size=SIZE).save_pretrained(tmp_path / "sd")
    ae = bring_in(tmp_path / "sd", tmp_path)
    assert autoencoder_facts(ae).trained["scaling_factor"] == 0.18215
    latents = ldmkit.encode(EncodeConfig(data=pictures, ae=ae, out=tmp_path / "latents"))
    assert latents is not None
    manifest = read_manifest(latents)
    assert manifest.count == 12
    assert manifest.latent_shape == (4, SIZE // 2, SIZE // 2)

    folder = send_out(ae, "diffusers", tmp_path, latents=latents)
    page = json.loads((folder / "config.json").read_text())
    values = torch.cat(
        [safetensors.torch.load_file(file)["mean"] for file in latents.glob("*.safetensors")]
    )
    stds = torch.cat(
        [safetensors.torch.load_file(file)["std"] for file in latents.glob("*.safetensors")]
    )
    variance = values.double().var(correction=0) + stds.double().square().mean()
    assert page["shift_factor"] == pytest.approx(values.double().mean().item(), abs=1e-4)
    assert page["scaling_factor"] == pytest.approx(variance.item() ** -0.5, rel=1e-3)

    by_channel = send_out(
        ae, "diffusers", tmp_path, latents=latents, scale="channel", out=tmp_path / "by-channel"
    )
    page = json.loads((by_channel / "config.json").read_text())
    assert page["latents_mean"] == list(manifest.whitening.mean)
    assert page["latents_std"] == list(manifest.whitening.std)
    assert page["scaling_factor"] == 1.0
    with pytest.raises(UsageError, match="--scale channel"):
        send_out(ae, "ldm", tmp_path, latents=latents, scale="channel")

    other = write_ours(tmp_path)
    with pytest.raises(DataError, match="another autoencoder"):
        send_out(other, "diffusers", tmp_path, latents=latents, out=tmp_path / "mixed")


@pytest.mark.parametrize("to", ["ldm", "diffusers"])
def test_the_scale_of_quantised_latents(diffusers, pictures, tmp_path, to):
    ae = write_ours(tmp_path, bottleneck="vq")
    latents = ldmkit.encode(EncodeConfig(data=pictures, ae=ae, out=tmp_path / "latents"))
    assert latents is not None
    whitening = read_manifest(latents).whitening
    mean, std = torch.tensor(whitening.mean), torch.tensor(whitening.std)
    expected = (mean.var(correction=0) + std.square().mean()).item() ** -0.5
    out = send_out(ae, to, tmp_path, latents=latents)
    if to == "diffusers":
        page = json.loads((out / "config.json").read_text())
        assert page["scaling_factor"] == pytest.approx(expected, rel=1e-5)
        assert "shift_factor" not in page
        with pytest.raises(UsageError, match="one scaling_factor only"):
            send_out(ae, to, tmp_path, latents=latents, scale="channel", out=tmp_path / "x")
    else:
        line = out.with_suffix(".yaml").read_text().splitlines()[-1]
        assert line.startswith("# scale_factor")
        assert float(line.split()[-1]) == pytest.approx(expected, rel=1e-4)


def test_without_latents_the_scale_is_one_and_said(diffusers, tmp_path, capfd):
    terminal.be_quiet(False)
    folder = send_out(write_ours(tmp_path), "diffusers", tmp_path)
    assert json.loads((folder / "config.json").read_text())["scaling_factor"] == 1.0
    said = capfd.readouterr().err
    assert "scaling_factor is written as 1.0" in said
    assert "as it is read back: encode 0, decode 0" in said
    assert "as diffusers runs it: encode " in said


def test_without_diffusers_its_reading_is_not_tried(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    terminal.be_quiet(False)
    assert send_out(write_ours(tmp_path), "diffusers", tmp_path).is_dir()
    assert "diffusers is not installed" in capfd.readouterr().err


# What is refused, and what is left then -----------------------------------------------------------


class Malice:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("name", ["new.ckpt", "old.pth"])
def test_a_pickle_with_code_in_it_is_refused(tmp_path, run, name):
    state = {"encoder.conv_in.weight": torch.zeros(1), "x": Malice(tmp_path / "ran")}
    pickled({"state_dict": state}, tmp_path / name, as_zip=name == "new.ckpt")
    done = run("import", tmp_path / name, "--out", tmp_path / "out.safetensors")
    assert done.returncode == 3
    assert b"asks for posix.system, which could run code" in done.stderr
    assert b"Traceback" not in done.stderr
    assert done.stdout == b""
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out.safetensors").exists()


def damaged(name: str) -> Any:
    """A file of the ldm layout with one thing wrong."""
    state = to_ldm(Autoencoder(KL, 3).state_dict(), KL)
    if name == "missing":
        del state["decoder.norm_out.bias"]
    elif name == "unknown":
        state["encoder.temporal.weight"] = torch.zeros(1)
    elif name == "shape":
        state["decoder.mid.block_1.conv1.weight"] = torch.zeros(64, 64, 1, 1)
    elif name == "nan":
        state["encoder.conv_in.bias"][0] = float("nan")
    elif name == "video":
        state["encoder.conv_in.weight"] = torch.zeros(32, 3, 3, 3, 3)
    elif name == "channels":
        state["encoder.conv_in.weight"] = torch.zeros(32, 5, 3, 3)
    elif name == "groups":
        state["encoder.conv_in.weight"] = torch.zeros(24, 3, 3, 3)
    elif name == "gumbel":
        state["quantize.embed.weight"] = torch.zeros(1)
    elif name == "none":
        state = {"weight": torch.zeros(1)}
    return state


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "lacks tensor decoder.norm_out.bias"),
        ("unknown", "unknown tensor encoder.temporal.weight"),
        ("shape", "decoder.mid.block_1.conv1.weight has shape"),
        ("nan", "encoder.conv_in.bias holds values that are not finite"),
        ("video", "has 5 dimensions"),
        ("channels", "pictures of 5 channels"),
        ("groups", "32 groups"),
        ("gumbel", "quantize.embed.weight: a quantiser other"),
        ("none", "holds no autoencoder"),
    ],
)
def test_single_files_that_do_not_fit(tmp_path, name, words):
    safetensors.torch.save_file(damaged(name), tmp_path / "x.safetensors")
    with pytest.raises(DataError, match=words):
        bring_in(tmp_path / "x.safetensors", tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.safetensors", b"\x00" * 40),
        ("x.safetensors", b""),
        ("x.ckpt", b"not a pickle"),
        ("x.pt", b"PK\x03\x04 cut off"),
    ],
)
def test_damaged_files(tmp_path, run, name, content):
    (tmp_path / name).write_bytes(content)
    done = run("import", tmp_path / name, "--out", tmp_path / "out.safetensors")
    assert done.returncode == 3
    assert done.stderr.startswith(b"error: ")
    assert b"cannot be read" in done.stderr


def test_missing_files(tmp_path, run):
    for name in ("x.ckpt", "x.safetensors", "folder"):
        done = run("import", tmp_path / name, "--out", tmp_path / "out.safetensors")
        assert done.returncode == 3, done.stderr
        assert name.encode() in done.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "AutoencoderTiny"}, "holds AutoencoderTiny"),
        ({"act_fn": "gelu"}, "act_fn"),
        ({"norm_type": "spatial"}, "norm_type"),
        (
            {"down_block_types": ["DownEncoderBlock2D", "CrossAttnDownBlock2D"]},
            "down_block_types.1",
        ),
        ({"down_block_types": ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]}, "differ in more"),
        ({"in_channels": 4}, "in_channels 4"),
        ({"block_out_channels": [32, 48]}, "not all are multiples"),
        ({"norm_num_groups": 24}, "does not divide"),
        ({"temporal_layers": 3}, "temporal_layers"),
        ({"scaling_factor": float("nan")}, "scaling_factor"),
        ({"layers_per_block": 3}, "lacks tensor"),
        ({"latent_channels": "four"}, "latent_channels"),
    ],
)
def test_folders_that_do_not_fit(tmp_path, changes, words):
    config = SMALL.model_copy(update={"norm_groups": 8})
    page = config_page(config, PREPROCESSING, {}) | changes
    (tmp_path / "config.json").write_text(json.dumps(page))
    tensors = to_diffusers(Autoencoder(config, 3).state_dict(), config)
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS_FILES[0])
    with pytest.raises(DataError, match=words):
        bring_in(tmp_path, tmp_path)


def test_folders_without_what_they_promise(tmp_path):
    page = config_page(KL, PREPROCESSING, {})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        bring_in(tmp_path, tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(DataError, match="no table"):
        bring_in(tmp_path, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(page))
    with pytest.raises(DataError, match="has none of"):
        bring_in(tmp_path, tmp_path)
    tensors = to_diffusers(Autoencoder(KL, 3).state_dict(), KL)
    del tensors["quant_conv.weight"]
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS_FILES[0])
    with pytest.raises(DataError, match=r"lacks tensor quant_conv\.weight, which"):
        bring_in(tmp_path, tmp_path)
    with pytest.raises(DataError, match="give its folder"):
        bring_in(tmp_path / WEIGHTS_FILES[0], tmp_path)


@pytest.mark.parametrize(
    ("changes", "to", "words"),
    [
        ({"norm_groups": 8}, "ldm", "32 groups; this autoencoder in 8"),
        ({"attention_factors": (2,), "middle_attention": False}, "ldm", "at the coarsest level"),
        ({"multipliers": (2, 2)}, "diffusers", "as wide as the first level"),
        ({"channels": 24, "norm_groups": 16}, "diffusers", "16 gives 12, 16 in levels"),
    ],
)
def test_what_a_layout_cannot_say_is_named(tmp_path, changes, to, words):
    with pytest.raises(DataError, match=words):
        send_out(write_ours(tmp_path, **changes), to, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ae.safetensors"]


def test_pixels_have_no_autoencoder_to_export(tmp_path):
    with pytest.raises(DataError, match="identity"):
        send_out(write_ours(tmp_path, bottleneck="identity"), "ldm", tmp_path)


@pytest.mark.parametrize("to", ["ldm", "diffusers"])
def test_an_export_that_differs_leaves_nothing(tmp_path, monkeypatch, to):
    ae = write_ours(tmp_path)

    def wrong(tensors, config):
        result = (to_ldm if to == "ldm" else to_diffusers)(tensors, config)
        result["encoder.conv_in.bias"] = result["encoder.conv_in.bias"] + 0.01
        return result

    monkeypatch.setattr((diffusers_layout if to == "diffusers" else ldm_layout), f"to_{to}", wrong)
    with pytest.raises(DataError, match="nothing was written"):
        send_out(ae, to, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ae.safetensors"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2e-4])
def test_parity_is_required_of_both_ways(bad):
    require_parity(Difference(1e-4, 1e-4), "it")
    for difference in (Difference(bad, 0.0), Difference(0.0, bad)):
        with pytest.raises(DataError, match="it differs from the autoencoder"):
            require_parity(difference, "it")


def test_outputs_are_not_replaced_and_sizes_must_fit(tmp_path):
    ae = write_ours(tmp_path)
    file = send_out(ae, "ldm", tmp_path)
    with pytest.raises(UsageError, match="exists"):
        send_out(ae, "ldm", tmp_path)
    with pytest.raises(UsageError, match="exists"):
        ldmkit.import_(ldmkit.ImportConfig(source=file, out=ae))
    with pytest.raises(UsageError, match="--size 33"):
        bring_in(file, tmp_path, size=33)
    with pytest.raises(UsageError, match=r"\*\.safetensors"):
        send_out(ae, "ldm", tmp_path, out=tmp_path / "vae.ckpt")
    with pytest.raises(DataError, match="is a file of ldmkit already"):
        bring_in(ae, tmp_path)


def test_the_commands(tmp_path, run):
    """Paths on standard output; a file of the ldm layout has its config beside it."""
    ae = write_ours(tmp_path, attention_factors=(2,), bottleneck="vq")
    out = tmp_path / "vae.safetensors"
    done = run("export", ae, "--to", "ldm", "--out", out)
    assert (done.returncode, done.stdout) == (0, f"{out}\n".encode()), done.stderr
    page = (tmp_path / "vae.yaml").read_text()
    for line in ("ch_mult: [1, 2]", "attn_resolutions: [16]", "n_embed: 64", "double_z: false"):
        assert f" {line}\n" in page
    back = tmp_path / "back.safetensors"
    done = run("import", out, "--out", back)
    assert (done.returncode, done.stdout) == (0, f"{back}\n".encode()), done.stderr
    assert load_autoencoder(back).config == load_autoencoder(ae).config
