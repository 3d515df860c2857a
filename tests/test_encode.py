import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import ldmkit
from conftest import SIZE, ae_config, diffusion_config
from ldmkit.configs import STREAM
from ldmkit.container import read_header, read_messages
from ldmkit.data.images import read_images
from ldmkit.data.latent_set import LatentSet
from ldmkit.data.sources import open_source
from ldmkit.data_configs import EncodeConfig, SourceConfig
from ldmkit.decode_configs import DecodeConfig
from ldmkit.errors import DataError
from ldmkit.generation_configs import SampleConfig
from ldmkit.manifest import read_manifest


@pytest.fixture
def config(pipeline, tmp_path):
    return EncodeConfig(
        data=pipeline.data, ae=pipeline.ae, out=tmp_path / "latents", shard_size=5, batch_size=4
    )


def contents(directory):
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def test_latents_are_the_posterior_of_the_pictures(pipeline, config):
    latents = LatentSet(pipeline.latents)
    items = open_source(SourceConfig(data=pipeline.data)).items
    model = ldmkit.load_autoencoder(pipeline.ae)
    preprocessing = ae_config(pipeline.data, pipeline.data).preprocessing
    posterior = model.encode(read_images(items, preprocessing.model_copy(update={"flip": False})))
    assert list(latents.texts("key")) == [item.key for item in items]
    order = [11, 0, 7, 5]
    batch = latents.read(order)
    assert batch.mean.shape == (4, 4, SIZE // 4, SIZE // 4)
    assert posterior.std is not None
    pairs = [(batch.mean.float(), posterior.mean[order]), (batch.std.float(), posterior.std[order])]
    assert all((found - right).norm() <= 0.01 * right.norm() for found, right in pairs)
    ldmkit.encode(config.model_copy(update={"precision": "fp32", "dtype": "float32"}))
    batch = LatentSet(config.out).read(order)
    assert torch.allclose(batch.mean, posterior.mean[order], rtol=1e-4, atol=1e-5)
    assert torch.allclose(batch.std, posterior.std[order], rtol=1e-4, atol=1e-5)
    assert latents.labels[order].tolist() == [items[index].label for index in order]


def test_whitening_is_that_of_the_whole_set(pipeline):
    latents = LatentSet(pipeline.latents)
    batch = latents.read(range(len(latents)))
    whitening = latents.manifest.whitening
    assert np.allclose(whitening.mean, batch.mean.double().mean((0, 2, 3)), atol=1e-6)
    variance = batch.mean.double().var(
        (0, 2, 3), unbiased=False
    ) + batch.std.double().square().mean((0, 2, 3))
    assert np.allclose(whitening.std, variance.sqrt(), rtol=1e-6)


def test_encoding_again_keeps_whole_shards_and_mends_the_rest(config):
    out = ldmkit.encode(config)
    assert out is not None
    whole = contents(out)
    assert list(whole) == [
        "00000.safetensors",
        "00001.safetensors",
        "00002.safetensors",
        "manifest.json",
    ]
    assert ldmkit.encode(config) == out  # nothing to do
    (out / "manifest.json").unlink()
    damaged = bytearray(whole["00001.safetensors"])
    damaged[-1] ^= 1
    (out / "00001.safetensors").write_bytes(damaged)
    (out / "00002.safetensors").unlink()
    (out / "00002.safetensors.tmp-12345678").write_bytes(b"half")
    kept = (out / "00000.safetensors").stat().st_mtime_ns
    ldmkit.encode(config)
    assert contents(out) == whole
    assert (out / "00000.safetensors").stat().st_mtime_ns == kept


def test_a_set_made_differently_is_refused_unless_forced(config, pictures, tmp_path):
    ldmkit.encode(config)
    other = config.model_copy(update={"dtype": "float32"})
    with pytest.raises(DataError, match=r"another dtype \(float16, now float32\)"):
        ldmkit.encode(other)
    (config.out / "manifest.json").unlink()  # an unfinished one too
    with pytest.raises(DataError, match="another dtype"):
        ldmkit.encode(other)
    out = ldmkit.encode(other.model_copy(update={"force": True}))
    assert out is not None
    assert read_header(out / "00000.safetensors").tensors["mean"].dtype == "F32"

    more = tmp_path / "more"
    shutil.copytree(pictures, more)
    shutil.copy(more / "circle/0.png", more / "circle/9.png")
    with pytest.raises(DataError, match=r"lacks 1 of the pictures in DATA, .* circle/9.png"):
        ldmkit.encode(other.model_copy(update={"data": str(more)}))
    (more / "circle/1.png").write_bytes((more / "square/1.png").read_bytes() + b" ")
    with pytest.raises(DataError, match=r"00000.safetensors .* have changed"):
        ldmkit.encode(other.model_copy(update={"data": str(more)}))


def test_streamed_shards_are_the_files(config):
    out = ldmkit.encode(config)
    assert out is not None
    stream = io.BytesIO()
    assert ldmkit.encode(config.model_copy(update={"out": STREAM}), stream) is None
    stream.seek(0)
    messages = list(read_messages(stream, "stream"))
    assert [header.kind for header, _ in messages] == ["latents"] * 3 + ["manifest"]
    files = [(out / f"{number:05d}.safetensors").read_bytes() for number in range(3)]
    assert [block for _, block in messages[:3]] == files
    assert messages[-1][0].facts["count"] == 12


def test_latents_through_a_pipe_train_as_those_on_disk(config, pipeline, tmp_path):
    stream = io.BytesIO()
    ldmkit.encode(config.model_copy(update={"out": STREAM}), stream)
    piped = diffusion_config(STREAM, tmp_path / "piped")
    model = ldmkit.train_diffusion(piped, io.BytesIO(stream.getvalue()))
    assert contents(piped.out / "latents") == contents(pipeline.latents)
    stored = ldmkit.train_diffusion(diffusion_config(pipeline.latents, tmp_path / "stored"))
    assert model.read_bytes() == stored.read_bytes()
    other = diffusion_config(STREAM, tmp_path / "cut")
    stream.seek(0)
    shards = b"".join(
        block for header, block in read_messages(stream, "") if header.kind == "latents"
    )
    for cut, words in ((shards, "before its manifest"), (shards[:-1], "middle"), (b"", "empty")):
        with pytest.raises(DataError, match=words):
            ldmkit.train_diffusion(other, io.BytesIO(cut))


def test_unreadable_pictures_stop_or_are_listed(config, pictures, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    (data / "circle/2.png").write_text("not a picture")
    config = config.model_copy(update={"data": str(data)})
    with pytest.raises(DataError, match=r"circle/2.png is not a picture"):
        ldmkit.encode(config)
    with pytest.raises(DataError, match="not a picture"):  # 1 of 12 is more than 5 %
        ldmkit.encode(config.model_copy(update={"max_bad": 0.05}))
    out = ldmkit.encode(config.model_copy(update={"max_bad": 0.1}))
    assert out is not None
    manifest = read_manifest(out)
    assert manifest.count == 11
    assert [key for key, _ in manifest.skipped] == ["circle/2.png"]
    assert "circle/2.png" not in LatentSet(out).texts("key")


def test_a_set_that_is_not_whole_is_not_opened(config):
    out = ldmkit.encode(config)
    assert out is not None
    whole = (out / "00001.safetensors").read_bytes()
    (out / "00001.safetensors").write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"00001.safetensors is damaged"):
        LatentSet(out)
    (out / "00001.safetensors").unlink()
    with pytest.raises(DataError, match=r"00001.safetensors is missing"):
        LatentSet(out)
    (out / "00001.safetensors").write_bytes(whole)
    LatentSet(out)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["digest"]  # which would not hold after the change
    outside = json.dumps(manifest).replace("00001.safetensors", "../00001.safetensors")
    (out / "manifest.json").write_text(outside)
    with pytest.raises(DataError, match=r"shards.1.name"):
        LatentSet(out)
    (out / "manifest.json").write_text(json.dumps(manifest | {"more": 1}))
    with pytest.raises(DataError, match="more"):
        LatentSet(out)
    (out / "manifest.json").unlink()
    with pytest.raises(DataError, match="unfinished"):
        LatentSet(out)


def test_a_size_that_does_not_fit_is_refused(config):
    with pytest.raises(DataError, match="multiple"):
        ldmkit.encode(config.model_copy(update={"size": 30}))
    out = ldmkit.encode(config.model_copy(update={"size": 16}))
    assert out is not None
    assert read_manifest(out).latent_shape == (4, 4, 4)


def test_one_channel_of_sixteen_bits_goes_through_both_stages(tmp_path):
    data = tmp_path / "grey"
    data.mkdir()
    values = np.random.default_rng(0).integers(0, 65536, (4, SIZE, SIZE), dtype=np.uint16)
    for number, array in enumerate(values):
        Image.fromarray(array).save(data / f"{number}.png")
    changes = {"preprocessing": {"size": SIZE, "channels": 1}, "steps": 1}
    ae = ldmkit.train_ae(ae_config(data, tmp_path / "ae", **changes))
    latents = ldmkit.encode(EncodeConfig(data=data, ae=ae, out=tmp_path / "latents"))
    assert latents is not None
    ldm = ldmkit.train_diffusion(diffusion_config(latents, tmp_path / "ldm", steps=1))
    samples = ldmkit.sample(SampleConfig(model=ldm, num=2, steps=2, out=tmp_path / "s.safetensors"))
    assert samples is not None
    pictures = ldmkit.decode(DecodeConfig(samples=samples, ae=ae, out=tmp_path / "pictures"))
    assert pictures is not None
    with Image.open(pictures / "000001.png") as image:
        assert image.mode == "I;16"


def test_latents_too_large_for_float16_are_not_written(config, monkeypatch):
    import ldmkit.recipes.encode as recipe

    load = recipe.load_autoencoder

    def load_huge(*arguments):
        model = load(*arguments)
        encode = model.encode

        def huge(images):
            posterior = encode(images)
            posterior.mean = posterior.mean + 1e5
            return posterior

        model.encode = huge
        return model

    monkeypatch.setattr(recipe, "load_autoencoder", load_huge)
    with pytest.raises(DataError, match=r"not finite as torch.float16; try --dtype float32"):
        ldmkit.encode(config)
    assert not list(config.out.glob("*.safetensors"))
    assert ldmkit.encode(config.model_copy(update={"dtype": "float32"})) == config.out
