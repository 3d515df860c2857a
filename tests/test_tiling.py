import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ldmkit
from conftest import SIZE
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder.tiling import compute_in_tiles, reach
from ldmkit.autoencoder_configs import AutoencoderConfig
from ldmkit.data.latent_set import LatentSet
from ldmkit.data_configs import EncodeConfig
from ldmkit.decode_configs import DecodeConfig
from ldmkit.errors import DataError, UsageError
from ldmkit.generation_configs import SampleConfig
from ldmkit.networks.blocks import ResidualBlock, SpatialAttention

TINY = AutoencoderConfig(channels=8, multipliers=(1, 2, 2), residual_blocks=1, norm_groups=2)
CONFIGS = [
    TINY,
    TINY.model_copy(update={"multipliers": (1, 2, 3, 2), "residual_blocks": 2, "norm_groups": 32}),
    TINY.model_copy(update={"multipliers": (2, 1), "attention_factors": (1, 2)}),
]
LOCAL = TINY.model_copy(update={"middle_attention": False})
"""With its norms taken out, a network of convolutions alone."""
EXACT, LOCAL_ONLY = 1e-4, 1e-5


class Copy(nn.Module):
    """In the place of a norm: a block uses the memory of what a norm gives again."""

    def forward(self, x):
        return x.clone()


def build(config, *, norms=True):
    torch.manual_seed(0)
    model = Autoencoder(config, 3).eval().requires_grad_(False)
    for module in model.modules():
        if not norms and isinstance(module, ResidualBlock):
            module.norm1 = module.norm2 = Copy()  # pyright: ignore[reportAttributeAccessIssue]
    if not norms:
        model.encoder.norm_out = model.decoder.norm_out = Copy()  # pyright: ignore[reportAttributeAccessIssue]
    else:  # a norm that only divides would not notice a wrong scale or shift
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model


def tiled(model, tile, **changes):
    model = copy.deepcopy(model)
    compute_in_tiles(model, tile, **changes)
    return model


def differences(model, other, height, width):
    """The largest differences of means, standard deviations and pictures."""
    draw = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, height, width, generator=draw) * 2 - 1
    whole, parts = model.encode(images), other.encode(images)
    pictures = (model.decode(whole.mean), other.decode(whole.mean))
    pairs = ((whole.mean, parts.mean), (whole.std, parts.std), pictures)
    assert all(a.shape == b.shape for a, b in pairs)
    return [float((a - b).abs().max()) for a, b in pairs]


@pytest.mark.parametrize("config", CONFIGS, ids=["f4", "f8", "f2"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 56), (8, 72)])
@pytest.mark.parametrize("cells", [1, 3, 5])
def test_exact_tiles_are_the_whole_picture(config, height, width, cells):
    model = build(config)
    other = tiled(model, cells * config.factor)
    assert max(differences(model, other, height, width)) < EXACT


def test_feature_maps_in_files_change_nothing_and_leave_nothing(tmp_path):
    model = build(TINY)
    in_memory = tiled(model, 16)
    in_files = tiled(model, 16, scratch=tmp_path / "scratch")
    assert differences(in_memory, in_files, 40, 24) == [0.0, 0.0, 0.0]
    assert not list((tmp_path / "scratch").iterdir())


def measured_reach(network, channels, factor, *, encodes):
    """As `reach`, from the gradients of one latent's output in the middle of a wide strip."""
    length, middle = 96, 48
    x = torch.randn(1, channels, factor, length * factor if encodes else length)
    out = network(x.requires_grad_())
    cell_out, cell_in = (1, factor) if encodes else (factor, 1)
    out[..., middle * cell_out : (middle + 1) * cell_out].sum().backward()
    assert x.grad is not None
    touched = x.grad.abs().sum((0, 1, 2)).nonzero().flatten()
    return middle * cell_in - int(touched[0]), int(touched[-1]) + 1 - (middle + 1) * cell_in


@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 2, 2), (1, 1, 2, 2)])
@pytest.mark.parametrize("residual_blocks", [1, 2])
def test_the_receptive_field_is_the_one_that_gradients_show(multipliers, residual_blocks):
    changes = {"multipliers": multipliers, "residual_blocks": residual_blocks}
    config = LOCAL.model_copy(update=changes)
    model = build(config, norms=False).double()
    torch.set_default_dtype(torch.float64)
    try:
        encoder = measured_reach(model.encoder, 3, config.factor, encodes=True)
        decoder = measured_reach(model.decoder, 4, config.factor, encodes=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert encoder == reach(model.encoder)
    assert decoder == reach(model.decoder)


def test_the_receptive_fields_of_the_published_networks():
    """The numbers of docs/architecture.md: 108 pixels for kl-f8's encoder, 18 latents = 144 pixels."""
    with torch.device("meta"):
        model = Autoencoder(AutoencoderConfig(), 3)
    assert (reach(model.encoder), reach(model.decoder)) == ((101, 108), (18, 18))


@pytest.mark.parametrize(
    ("multipliers", "height", "width", "tile"),
    [
        ((1, 2), 104, 104, 20),
        ((1, 2), 40, 120, 8),
        ((1, 2), 30, 122, 48),
        ((1, 2, 2), 184, 56, 64),
    ],
)
def test_independent_tiles_of_a_local_network_are_the_whole_picture(
    multipliers, height, width, tile
):
    model = build(LOCAL.model_copy(update={"multipliers": multipliers}), norms=False)
    halo = max(reach(model.encoder))
    assert tile + 2 * halo < max(height, width)  # else one window would hold the picture
    assert max(differences(model, tiled(model, tile, exact=False), height, width)) < LOCAL_ONLY


def test_independent_tiles_see_only_their_own_norms_and_attention():
    """The stated limit of the independent way: it is near the whole picture, and is not it."""
    for config in (TINY, LOCAL):
        model = build(config)
        worst = max(differences(model, tiled(model, 64, exact=False), 176, 176))
        assert EXACT < worst < 1.0
    attention_only = build(TINY, norms=False)
    assert any(isinstance(module, SpatialAttention) for module in attention_only.modules())
    worst = max(differences(attention_only, tiled(attention_only, 64, exact=False), 176, 176))
    assert worst > LOCAL_ONLY


@settings(max_examples=25)
@given(
    rows=st.integers(1, 14),
    columns=st.integers(1, 14),
    cells=st.integers(1, 9),
    exact=st.booleans(),
)
def test_any_picture_in_any_tiles(rows, columns, cells, exact):
    config = LOCAL.model_copy(update={"channels": 4, "multipliers": (1, 2)})
    model = build(config, norms=exact)
    other = tiled(model, cells * config.factor, exact=exact)
    assert max(differences(model, other, 2 * rows, 2 * columns)) < EXACT


def test_a_memory_map_is_read_tile_by_tile(tmp_path):
    model = build(TINY)
    stored = np.memmap(tmp_path / "picture", np.float32, mode="w+", shape=(1, 3, 64, 32))
    stored[:] = np.random.default_rng(0).random(stored.shape)
    images = torch.from_numpy(stored)
    found = tiled(model, 16).encode(images).mean
    assert torch.allclose(found, model.encode(images).mean, atol=EXACT)


@pytest.mark.gpu
@pytest.mark.parametrize("exact", [True, False])
def test_tiles_on_a_gpu(exact):
    """Weights and tiles on the device, feature maps and decoded pictures in main memory."""
    model = build(TINY if exact else LOCAL, norms=exact)
    other = tiled(model.cuda(), 64, exact=exact)
    images = torch.rand(1, 3, 192, 128, device="cuda") * 2 - 1
    means = other.encode(images).mean
    pictures = other.decode(means)
    assert (means.device.type, pictures.device.type) == ("cuda", "cpu")
    assert torch.allclose(means, model.encode(images).mean, atol=1e-3)
    assert torch.allclose(pictures, model.decode(means).cpu(), atol=1e-3)


def test_tiles_and_pictures_that_do_not_fit_the_factor_are_refused():
    model = build(TINY)
    with pytest.raises(UsageError, match=r"--tile 18 is not a multiple of .* factor 4"):
        compute_in_tiles(model, 18)
    for exact in (True, False):
        with pytest.raises(DataError, match=r"30 x 64 pixels .* multiples of 4"):
            tiled(model, 16, exact=exact).encode(torch.zeros(1, 3, 64, 30))


MEASURE = """
import re, sys, torch
from pathlib import Path
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder.tiling import compute_in_tiles
from ldmkit.configs import AutoencoderConfig
way, side = sys.argv[1], int(sys.argv[2])
config = AutoencoderConfig(channels=32, multipliers=(1, 2), residual_blocks=1, middle_attention=False)
model = Autoencoder(config, 3).eval().requires_grad_(False)
if way != "whole":
    compute_in_tiles(model, 64, exact=way == "exact")
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
model.decode(torch.zeros(1, 4, 16, 16))
before = peak()
model.decode(torch.zeros(1, 4, side // 2, side // 2))
print((peak() - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory():
    """As in docs/log.md, for a smaller picture: 512 px, whose finest map takes 32 MB (of 2^20)."""

    def peak(way):
        command = [sys.executable, "-c", MEASURE, way, "512"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(done.stdout)

    whole, exact, independent = (peak(way) for way in ("whole", "exact", "independent"))
    assert exact < 0.8 * whole
    assert independent < 0.5 * whole


def test_encode_in_tiles(pipeline, tmp_path):
    def latents(**changes):
        out = tmp_path / "-".join(map(str, changes.values()))
        config = EncodeConfig(
            data=pipeline.data,
            ae=pipeline.ae,
            out=out,
            size=5 * SIZE,
            dtype="float32",
            precision="fp32",
        )
        made = ldmkit.encode(config.model_copy(update=changes))
        assert made is not None
        batch = LatentSet(made).read(range(12))
        return torch.cat([batch.mean, batch.std])

    whole = latents(tile=0)
    assert whole.shape[2:] == (40, 40)
    assert torch.allclose(latents(tile=40), whole, atol=EXACT, rtol=0)
    apart = latents(tile=40, tiling="independent")
    assert EXACT < (apart - whole).abs().max() < 1.0


def test_sets_of_independent_tiles_are_not_mixed_with_others(pipeline, tmp_path):
    given = {"data": pipeline.data, "ae": pipeline.ae, "out": tmp_path, "precision": "fp32"}
    config = EncodeConfig.model_validate(given | {"tile": 16})
    ldmkit.encode(config)
    assert ldmkit.encode(config.model_copy(update={"tile": 0})) == tmp_path  # exact: the same set
    independent = config.model_copy(update={"tiling": "independent"})
    with pytest.raises(DataError, match=r"another tile \(None, now 16\)"):
        ldmkit.encode(independent)
    ldmkit.encode(independent.model_copy(update={"force": True}))
    for other in ({"tile": 8}, {"tile": 0}, {"tiling": "exact"}):
        with pytest.raises(DataError, match="another tile"):
            ldmkit.encode(independent.model_copy(update=other))


def test_decode_in_tiles(pipeline, tmp_path, run):
    samples = tmp_path / "samples.safetensors"
    ldmkit.sample(SampleConfig(model=pipeline.ldm, out=samples, num=3, steps=1))

    def pictures(*options):
        out = tmp_path / "-".join(("out", *options))
        exact = ("--precision", "fp32")
        done = run("decode", samples, "--ae", pipeline.ae, "-o", out, *exact, *options)
        assert done.returncode == 0, done.stderr
        return {file.name: file.read_bytes() for file in out.glob("*.png")}

    assert DecodeConfig().tile == 0
    whole = pictures()
    assert len(whole) == 4
    assert pictures("--tile", "16").keys() == whole.keys()
    assert pictures("--tile", "16", "--scratch", str(tmp_path / "s")) == pictures("--tile", "16")
    done = run("decode", samples, "--ae", pipeline.ae, "-o", tmp_path / "no", "--tile", "10")
    assert done.returncode == 2
    assert b"--tile 10 is not a multiple of the autoencoder's factor 4" in done.stderr
