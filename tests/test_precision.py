"""`--precision` of commands whose networks learn nothing any more."""

import pytest
import torch
from pydantic import ValidationError

import ldmkit
from ldmkit.assembly import autoencoder_facts, load_autoencoder, load_diffusion, precision_for
from ldmkit.data.latent_set import LatentSet
from ldmkit.data_configs import EncodeConfig
from ldmkit.decode_configs import DecodeConfig
from ldmkit.errors import DataError
from ldmkit.generation_configs import SampleConfig
from ldmkit.manifest import read_manifest
from ldmkit.modelfile import load
from ldmkit.training import runtime
from ldmkit.training.runtime import settled

CPU = torch.device("cpu")


@pytest.mark.parametrize(("fast", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_takes_what_the_hardware_is_fast_at(fast, expected, monkeypatch):
    monkeypatch.setattr(runtime, "_fast_bfloat16", lambda device: fast)
    assert settled("auto", CPU) == expected
    assert (settled("fp32", CPU), settled("bf16", CPU)) == ("fp32", "bf16")


def test_pictures_of_more_than_8_bits_are_computed_in_float32(pipeline):
    facts = autoencoder_facts(pipeline.ae)
    assert precision_for(facts, "auto") == "auto"
    deep = facts.model_copy(update={"depth": "uint16"})
    assert (precision_for(deep, "auto"), precision_for(deep, "bf16")) == ("fp32", "bf16")


@torch.no_grad()
def test_in_and_out_stay_float32(pipeline):
    low, full = (load_autoencoder(pipeline.ae, precision=one) for one in ("bf16", "fp32"))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found, right = low.decode(latents), full.decode(latents)
    assert found.dtype == torch.float32
    assert 0.0 < (found - right).norm() < 0.02 * right.norm()
    low, full = (load_diffusion(pipeline.ldm, precision=one) for one in ("bf16", "fp32"))
    values = low.received({"class": torch.zeros(2, 1, dtype=torch.int64)})
    level = full.schedule.steps(2)[:1].expand(2)
    found, right = (one.denoise(latents, level, one.condition(values)) for one in (low, full))
    assert found.dtype == torch.float32
    assert 0.0 < (found - right).norm() < 0.03 * right.norm()


def drawn(pipeline, out, precision):
    given = {"num": 3, "steps": 4, "precision": precision, "model": pipeline.ldm, "device": "cpu"}
    ldmkit.sample(SampleConfig(out=out, **given))
    header, tensors = load(out, kind="samples")
    return header.facts["manner"]["precision"], tensors["latents"]


def test_samples_say_how_precisely_they_were_drawn_and_are_drawn_anew_in_another(
    pipeline, tmp_path
):
    out = tmp_path / "samples.safetensors"
    low, full = drawn(pipeline, out, "bf16"), drawn(pipeline, out, "fp32")
    assert (low[0], full[0]) == ("bf16", "fp32")
    assert 0.0 < (low[1] - full[1]).norm() < 0.05 * full[1].norm()
    assert drawn(pipeline, out, "auto")[0] == settled("auto", CPU)


def test_a_latent_set_is_of_one_precision(pipeline, tmp_path):
    given = {"data": pipeline.data, "ae": pipeline.ae, "out": tmp_path / "latents", "shard_size": 5}
    ldmkit.encode(EncodeConfig(precision="bf16", **given))
    assert read_manifest(given["out"]).recipe["precision"] == "bf16"
    assert torch.isfinite(LatentSet(given["out"]).read([0, 1]).mean.float()).all()
    with pytest.raises(DataError, match="precision"):
        ldmkit.encode(EncodeConfig(precision="fp32", **given))


@pytest.mark.parametrize(("config", "needed"), [(EncodeConfig, {"data": "x"}), (DecodeConfig, {})])
def test_tiles_are_computed_in_float32(config, needed):
    with pytest.raises(ValidationError, match="--tile computes in float32"):
        config.model_validate({**needed, "tile": 64, "precision": "bf16"})
