"""What `train-ae` offers beside the loss: parts, averages, starts, resolutions, gaps."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ldmkit
from conftest import SIZE, ae_config
from ldmkit import terminal
from ldmkit.assembly import autoencoder_facts, load_autoencoder
from ldmkit.autoencoder.training_step import batch_of, divided
from ldmkit.autoencoder_configs import (
    AutoencoderConfig,
    AutoencoderLossConfig,
    CodebookConfig,
    DiscriminatorConfig,
    PreprocessingConfig,
)
from ldmkit.decode_configs import DecodeConfig
from ldmkit.errors import DataError
from ldmkit.generation_configs import SampleConfig
from ldmkit.modelfile import load
from ldmkit.recipes import train_ae as recipe
from ldmkit.training.checkpoint import saved_checkpoints
from ldmkit.training.optimization import clip_gradients

ALONE = DiscriminatorConfig(weight=0)


def tensors_of(path, kind="autoencoder"):
    return load(path, kind=kind)[1]


def state_of(run):
    newest = saved_checkpoints(run / "checkpoints")[-1]
    return tensors_of(newest / "state.safetensors", "checkpoint")


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("bottleneck", ["kl", "deterministic"])
def test_a_batch_in_parts_gives_the_step_of_the_whole_batch(bottleneck, pictures, tmp_path):
    network = AutoencoderConfig(
        bottleneck=bottleneck, channels=8, multipliers=(1, 2), residual_blocks=1, norm_groups=2
    )
    found = []
    for parts in (1, 2, 4):  # without an adversary, whose adaptive weight is each part's own
        changes = {"accumulate": parts, "autoencoder": network, "disc": ALONE, "steps": 1}
        found.append(
            tensors_of(ldmkit.train_ae(ae_config(pictures, tmp_path / str(parts), **changes)))
        )
    for other in found[1:]:
        # Adam's first step is the sign of the gradient: tiny ones may differ in it, few do
        far = [((other[n] - x).abs() > 1e-5).float().mean().item() for n, x in found[0].items()]
        assert np.mean(far) < 0.02


def test_parts_lose_nothing(generator):
    model = ldmkit.assembly.build_autoencoder(
        AutoencoderConfig(channels=8, multipliers=(1, 2), residual_blocks=1, norm_groups=2),
        PreprocessingConfig(),
    )
    images = torch.rand(4, 3, 8, 8, generator=generator)
    valid = images[:, :1] > 0.5
    batch = batch_of(images, valid, model, torch.ones_like)
    assert batch.noise.shape == (4, 4, 4, 4)
    parts = divided(batch, [5, 6])
    assert [part.seed for part in parts] == [5, 6]
    assert torch.equal(torch.cat([part.images for part in parts]), images)
    assert torch.equal(torch.cat([part.noise for part in parts]), batch.noise)
    assert torch.equal(torch.cat([p.valid for p in parts if p.valid is not None]), valid)
    assert [part.valid for part in divided(batch._replace(valid=None), range(4))] == [None] * 4


def test_recomputed_activations_change_no_byte(pictures, tmp_path):
    plain = ldmkit.train_ae(ae_config(pictures, tmp_path / "a"))
    again = ldmkit.train_ae(ae_config(pictures, tmp_path / "b", checkpointing=True))
    assert again.read_bytes() == plain.read_bytes()


def test_the_average_is_what_is_saved(pictures, tmp_path):
    path = ldmkit.train_ae(ae_config(pictures, tmp_path / "run", ema_decay=0.9))
    state, saved = state_of(tmp_path / "run"), tensors_of(path)
    name = "decoder.conv_out.weight"
    assert torch.equal(saved[name], state[f"average.{name}"])
    assert not torch.equal(saved[name], state[f"autoencoder.{name}"])


def test_gradients_are_clipped_together():
    weights = [torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(weights, 1.0)
    for norm, expected in ((0.0, [3.0, 4.0]), (10.0, [3.0, 4.0]), (1.0, [0.6, 0.8])):
        for weight, gradient in zip(weights, (3.0, 4.0), strict=True):
            weight.grad = torch.tensor([gradient])
        clip_gradients(optimizer, norm)
        found = [weight.grad.item() for weight in weights if weight.grad is not None]
        assert found == pytest.approx(expected, rel=1e-5)


def test_init_loads_what_fits_and_lists_the_rest(pipeline, tmp_path, capsys):
    wider = {
        "autoencoder": AutoencoderConfig(
            channels=8, multipliers=(1, 2, 2), residual_blocks=1, norm_groups=2, latent_channels=6
        )
    }
    terminal.be_quiet(False)
    config = ae_config(pipeline.data, tmp_path / "run", init=pipeline.ae, lr=1e-12, **wider)
    found = tensors_of(ldmkit.train_ae(config))
    said = capsys.readouterr().err
    source = tensors_of(pipeline.ae)
    missing = {name for name, x in found.items() if x.shape != source[name].shape}
    assert missing == {
        *("decoder.conv_in.weight", "encoder.conv_out.weight", "encoder.conv_out.bias"),
        *("to_moments.weight", "to_moments.bias", "from_latents.weight", "from_latents.bias"),
    }
    assert f"{len(missing)} tensors not loaded" in said
    assert all(name in said for name in missing)
    kept = found["encoder.conv_in.weight"]
    assert torch.allclose(kept, source["encoder.conv_in.weight"], atol=1e-6)


def test_init_takes_an_autoencoder_only(pipeline, tmp_path):
    with pytest.raises(DataError, match="holds diffusion; autoencoder is needed"):
        ldmkit.train_ae(ae_config(pipeline.data, tmp_path / "run", init=pipeline.ldm))


def test_decoder_only_keeps_the_latents_and_their_models(pipeline, tmp_path):
    config = ae_config(pipeline.data, tmp_path / "run", init=pipeline.ae, decoder_only=True)
    path = ldmkit.train_ae(config)
    before, after = tensors_of(pipeline.ae), tensors_of(path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(("decoder.", "from_latents.")) for name in changed)
    former = autoencoder_facts(pipeline.ae).fingerprint
    assert autoencoder_facts(path).decodes == (former,)
    samples = ldmkit.sample(SampleConfig(model=pipeline.ldm, out=tmp_path / "s", num=2, steps=2))
    assert samples is not None
    ldmkit.decode(DecodeConfig(samples=samples, ae=path, out=tmp_path / "pictures"))
    unrelated = ldmkit.train_ae(ae_config(pipeline.data, tmp_path / "other", seed=9))
    with pytest.raises(DataError, match="another autoencoder"):
        ldmkit.decode(DecodeConfig(samples=samples, ae=unrelated, out=tmp_path / "no"))


def test_decoder_only_needs_an_init(pictures, tmp_path):
    with pytest.raises(ValueError, match="needs --init"):
        ae_config(pictures, tmp_path, decoder_only=True)


def test_resolutions_change_from_step_to_step_the_largest_first(pictures, tmp_path, monkeypatch):
    seen = []
    original = recipe.batch_of

    def noted(images, *rest):
        seen.append(images.shape[2])
        return original(images, *rest)

    monkeypatch.setattr(recipe, "batch_of", noted)
    changes = {"multi_resolution": (24, 32, 40), "steps": 30, "disc": ALONE, "sample_every": 100}
    changes["loss"] = AutoencoderLossConfig(perceptual="none")
    network = AutoencoderConfig(channels=8, multipliers=(1, 2), residual_blocks=1, norm_groups=2)
    ldmkit.train_ae(ae_config(pictures, tmp_path / "run", autoencoder=network, **changes))
    assert seen[:10] == [40] * 10
    assert set(seen[10:]) == {24, 32, 40}
    with pytest.raises(ValueError, match="multi-resolution 30 is not a multiple of 4"):
        ae_config(pictures, tmp_path, multi_resolution=(30,))


def test_sizes_that_are_no_powers_of_two(pictures, tmp_path):
    config = ae_config(pictures, tmp_path / "run", preprocessing=PreprocessingConfig(size=36))
    model = ldmkit.load_autoencoder(ldmkit.train_ae(config))
    assert model.encode(torch.zeros(1, 3, 36, 52)).mean.shape == (1, 4, 9, 13)


@pytest.mark.parametrize(
    "codebook",
    [
        CodebookConfig(size=16),
        CodebookConfig(size=16, ema_decay=0.9, restart_after=1),
        CodebookConfig(size=16, kmeans_start=False, restart_after=2),
    ],
)
def test_a_codebook_trains_is_logged_and_resumes_to_the_same_bytes(codebook, pictures, tmp_path):
    network = AutoencoderConfig(
        bottleneck="vq",
        channels=8,
        multipliers=(1, 2),
        residual_blocks=1,
        norm_groups=2,
        codebook=codebook,
    )
    config = ae_config(pictures, tmp_path / "whole", autoencoder=network, steps=6)
    whole = ldmkit.train_ae(config)
    halves = config.model_copy(update={"out": tmp_path / "halves"})
    for steps in (2, 3, 6):
        ldmkit.train_ae(halves.model_copy(update={"steps": steps}))
    assert (tmp_path / "halves/autoencoder.safetensors").read_bytes() == whole.read_bytes()
    first = lines_of(tmp_path / "whole")[0]
    assert 0 < first["usage"] <= 1
    assert 1 <= first["perplexity"] <= 16
    names = {name for name in tensors_of(whole) if "codebook" in name}
    assert names == {"codebook.codes"}  # what training needs beside it is no part of the model
    latents = ldmkit.encode(ldmkit.EncodeConfig(data=pictures, ae=whole, out=tmp_path / "latents"))
    assert latents is not None
    page = json.loads((latents / "manifest.json").read_text())
    assert "std" not in page["columns"]
    assert "mean" in page["columns"]


def test_the_precision_may_be_bfloat16_and_stays_finite(pictures, tmp_path):
    found = []
    for precision in ("fp32", "bf16"):
        config = ae_config(pictures, tmp_path / precision, precision=precision)
        ldmkit.train_ae(config)
        found.append(lines_of(tmp_path / precision))
        assert {x.dtype for x in state_of(tmp_path / precision).values()} <= {
            *(torch.float32, torch.int64, torch.bool),
        }
    for name in ("pixel", "perceptual", "regularization"):
        assert found[1][0][name] == pytest.approx(found[0][0][name], rel=0.03), name


def test_gaps_in_training_pictures_reach_no_weight(tmp_path):
    """Whatever stands under a mask, training ends with the same bytes."""
    generator = np.random.default_rng(0)
    values = generator.random((4, SIZE, SIZE, 2)).astype(np.float32)
    hole = generator.random((4, SIZE, SIZE)) < 0.3
    ends = []
    for filling in (np.nan, np.inf):
        root = tmp_path / str(filling)
        root.mkdir()
        for number in range(4):
            picture = values[number].copy()
            picture[hole[number]] = filling
            np.save(root / f"{number}.npy", picture)
        preprocessing = PreprocessingConfig(size=SIZE, channels=2, range=(0.0, 1.0))
        config = ae_config(root, tmp_path / f"run{filling}", preprocessing=preprocessing)
        ends.append(ldmkit.train_ae(config).read_bytes())
    assert ends[0] == ends[1]


@given(st.integers(1, 4), st.integers(1, 4))
def test_accumulate_must_divide_the_batch(parts, per_part):
    config = ae_config(
        Path("data"), Path("out"), batch_size=parts * per_part, accumulate=parts, disc=ALONE
    )
    assert config.samples_per_step // config.accumulate == per_part
    if parts > 1:
        with pytest.raises(ValueError, match="does not divide"):
            ae_config(
                Path("data"),
                Path("out"),
                batch_size=parts * per_part + 1,
                accumulate=parts,
                disc=ALONE,
            )


def test_batch_normalisation_of_single_pictures_is_refused(pictures, tmp_path):
    with pytest.raises(ValueError, match="take group or act"):
        ae_config(pictures, tmp_path, batch_size=4, accumulate=4)
    ae_config(pictures, tmp_path, batch_size=1, disc=DiscriminatorConfig(norm="group"))


def test_the_identity_is_written_at_once(pictures, tmp_path):
    network = AutoencoderConfig(bottleneck="identity")
    config = ae_config(pictures, tmp_path / "run", autoencoder=network)
    path = ldmkit.train_ae(config)
    assert load_autoencoder(path).config.bottleneck == "identity"
    assert autoencoder_facts(path).latent_channels == 3
    latents = ldmkit.encode(ldmkit.EncodeConfig(data=pictures, ae=path, out=tmp_path / "latents"))
    assert latents is not None
    assert ldmkit.train_ae(config) == path
