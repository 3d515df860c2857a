import importlib.util
import json
import resource
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ldmkit
from conftest import diffusion_config
from ldmkit.container import read_header
from ldmkit.data import latent_set
from ldmkit.data.latent_batches import samples_of_step, training_buckets
from ldmkit.data.latent_set import LatentSet
from ldmkit.data.order import is_held_back
from ldmkit.data.sources import open_source
from ldmkit.data_configs import EncodeConfig, SourceConfig
from ldmkit.digests import file_digest
from ldmkit.errors import DataError
from ldmkit.facts import Manifest, ShardEntry, Whitening
from ldmkit.manifest import write_manifest
from ldmkit.modelfile import save
from ldmkit.recipes.plan import plan

ROOT = Path(__file__).parent.parent
SHAPE = (2, 3, 4)


def ragged(name, texts):
    encoded = [text.encode() for text in texts]
    return {
        f"{name}.bytes": torch.tensor(list(b"".join(encoded)), dtype=torch.uint8),
        f"{name}.offsets": torch.tensor(np.cumsum([0, *map(len, encoded)])),
    }


def write_set(root, means, *, stds=None, class_names=(), labels=None, groups=None):
    """A latent set with one shard for each tensor of `means`; keys are the numbers of the samples."""
    root.mkdir(exist_ok=True)
    entries, start = [], 0
    for number, mean in enumerate(means):
        path = root / f"{number:05d}.safetensors"
        count = len(mean)
        keys = [str(i) for i in range(start, start + count)]
        label = torch.full((count,), -1) if labels is None else labels[start : start + count]
        std = {} if stds is None else {"std": stds[number]}
        tensors = {"mean": mean, **std, "label": label} | (
            ragged("key", keys) | ragged("group", groups or [""] * count) if count else {}
        )
        save(path, tensors, kind="latents", config={}, facts={"fingerprint": ""})
        entry = ShardEntry(
            name=path.name,
            start=start,
            stop=start + count,
            count=count,
            bytes=path.stat().st_size,
            sha256=file_digest(path),
            shape=tuple(mean.shape[1:]) if mean.shape[1:] != means[0].shape[1:] else None,
        )
        entries.append(entry)
        start += count
    manifest = Manifest(
        format="ldmkit.latents/1",
        recipe={"autoencoder": "0" * 64},
        items="",
        count=start,
        latent_shape=tuple(means[0].shape[1:]),
        columns=("mean", "key", "label"),
        class_names=class_names,
        whitening=Whitening(mean=(0.0,) * means[0].shape[1], std=(1.0,) * means[0].shape[1]),
        shards=tuple(entries),
        skipped=(),
        converted={},
        versions={},
    )
    write_manifest(root, manifest)
    return root


def numbered(counts, shape=SHAPE, dtype=torch.float32):
    """Tensors whose values tell the samples apart."""
    total = sum(counts)
    values = torch.randn(total, *shape, generator=torch.Generator().manual_seed(total)).to(dtype)
    return list(values.split(list(counts)))


@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    noisy=st.booleans(),
    data=st.data(),
)
def test_any_samples_in_any_order_are_those_that_were_stored(
    tmp_path_factory, counts, dtype, noisy, data
):
    total = sum(counts)
    # before a set is open: its thread is checked by beartype, which takes from the global random numbers
    wanted = data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=20))
    means = numbered(counts, dtype=dtype)
    stds = [mean.abs() / 2 for mean in means] if noisy else None
    labels = torch.arange(total) % 3
    root = write_set(
        tmp_path_factory.mktemp("set"), means, stds=stds, labels=labels, class_names=("a", "b", "c")
    )
    latents = LatentSet(root)
    assert len(latents) == total
    batch = latents.read(wanted)
    whole = torch.cat(means)
    assert batch.mean.dtype == batch.std.dtype == dtype
    assert torch.equal(batch.mean, whole[wanted])
    expected = whole[wanted].abs() / 2 if noisy else torch.zeros_like(whole[wanted])
    assert torch.equal(batch.std, expected)
    assert np.array_equal(latents.labels[wanted], labels[wanted])
    if 0 not in counts:
        assert list(latents.texts("key")) == [str(number) for number in range(total)]
    latents.wait_until_verified()  # so that no thread lives on into the next example


def test_what_is_not_there_is_refused(tmp_path):
    latents = LatentSet(write_set(tmp_path, numbered([3, 2])))
    for indices in ([5], [-1], [0, 99]):
        with pytest.raises(IndexError, match="0 to 4"):
            latents.read(indices)
    with pytest.raises(ValueError, match="no sample"):
        latents.read([])
    with pytest.raises(DataError, match="no column caption"):
        list(latents.texts("caption"))


def test_a_batch_belongs_to_its_reader(tmp_path):
    latents = LatentSet(write_set(tmp_path, numbered([4])))
    first = latents.read([0, 1])
    before = first.mean.clone()
    latents.read([2, 3]).mean.zero_()
    assert torch.equal(first.mean, before)
    first.mean.zero_()
    assert torch.equal(latents.read([0, 1]).mean, before)
    latents.wait_until_verified()


def test_held_back_samples_are_those_of_the_hash(tmp_path):
    latents = LatentSet(write_set(tmp_path, numbered([30, 30])))
    kept = [number for number in range(60) if not is_held_back(str(number), 0.5)]
    assert latents.training_indices(0.5).tolist() == kept
    assert 0 < len(kept) < 60
    assert latents.training_indices(0.0).tolist() == list(range(60))
    with pytest.raises(DataError, match="leaves none of the 60"):
        latents.training_indices(1.0 - 1e-12)


def test_a_group_is_held_back_as_a_whole(tmp_path):
    groups = [f"patient {number // 3}" for number in range(30)]
    latents = LatentSet(write_set(tmp_path, numbered([30]), groups=groups))
    kept = [number for number in range(30) if not is_held_back(groups[number], 0.5)]
    assert latents.training_indices(0.5).tolist() == kept
    assert 0 < len(kept) < 30


def flip_a_bit(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_one_flipped_bit_is_found(tmp_path, shard):
    root = write_set(tmp_path, numbered([4, 4, 4]))
    path = root / f"{shard:05d}.safetensors"
    header = read_header(path)
    flip_a_bit(path, header.payload_start + header.tensors["mean"].stop - 1)
    latents = LatentSet(root)
    with pytest.raises(DataError, match=rf"{shard:05d}.safetensors is damaged"):
        latents.wait_until_verified()
    with pytest.raises(DataError, match="is damaged"):
        latents.read([0])


def test_opening_and_reading_do_not_wait_for_the_digests(tmp_path, monkeypatch):
    root = write_set(tmp_path, numbered([4, 4]))
    may_go_on = threading.Event()
    seen = []

    def slow(directory, entry):
        assert may_go_on.wait(10)
        seen.append(entry.name)
        if entry.name.startswith("00001"):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(latent_set, "verify_shard", slow)
    latents = LatentSet(root)
    assert len(latents.read([0, 7]).mean) == 2
    assert not seen
    may_go_on.set()
    with pytest.raises(ldmkit.errors.StorageError, match="Input/output error"):
        latents.wait_until_verified()
    assert seen == ["00000.safetensors", "00001.safetensors"]


def test_nobody_hashes_for_a_set_that_is_gone(tmp_path, monkeypatch):
    root = write_set(tmp_path, numbered([1, 1, 1]))
    seen, first, go_on = [], threading.Event(), threading.Event()

    def slow(directory, entry):
        seen.append(entry.name)
        first.set()
        assert go_on.wait(10)

    monkeypatch.setattr(latent_set, "verify_shard", slow)
    latents = LatentSet(root)
    thread = latents._verification._thread
    assert first.wait(10)
    del latents
    go_on.set()
    thread.join(10)
    assert seen == ["00000.safetensors"]


def test_training_keeps_nothing_learnt_from_damaged_latents(pipeline, tmp_path):
    root = tmp_path / "latents"
    root.mkdir()
    for file in pipeline.latents.iterdir():
        (root / file.name).write_bytes(file.read_bytes())
    header = read_header(root / "00001.safetensors")
    flip_a_bit(root / "00001.safetensors", header.payload_start + header.tensors["mean"].start + 2)
    out = tmp_path / "ldm"
    with pytest.raises(DataError, match=r"00001.safetensors is damaged"):
        ldmkit.train_diffusion(diffusion_config(root, out))
    assert not list(out.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 3}, "counts wrong"),
        ({"latent_shape": [2, 4, 3]}, "does not hold what the manifest says"),
        ({"class_names": ["a"]}, "labels beyond its 1 classes"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, change, message):
    labels = torch.tensor([0, 1, 0, -1])
    root = write_set(tmp_path, numbered([2, 2]), labels=labels, class_names=("a", "b"))
    LatentSet(root)
    page = json.loads((root / "manifest.json").read_text())
    del page["digest"]  # which would not hold after the change
    (root / "manifest.json").write_text(json.dumps(page | change))
    with pytest.raises(DataError, match=message):
        LatentSet(root)


def test_shards_of_several_number_formats_are_no_set(tmp_path):
    means = [numbered([2])[0], numbered([2], dtype=torch.float16)[0]]
    with pytest.raises(DataError, match="differ in number format"):
        LatentSet(write_set(tmp_path, means))


def test_shapes_divide_a_set_and_a_batch_has_one(tmp_path):
    wide, high = (2, 2, 6), (2, 6, 2)
    parts = [numbered([n], shape)[0] for n, shape in ((3, wide), (2, high), (2, wide))]
    latents = LatentSet(write_set(tmp_path, parts))
    assert {shape: indices.tolist() for shape, indices in latents.shapes.items()} == {
        wide: [0, 1, 2, 5, 6],
        high: [3, 4],
    }
    assert torch.equal(latents.read([6, 0]).mean, torch.stack([parts[2][1], parts[0][0]]))
    assert torch.equal(latents.read([4]).mean, parts[1][1:])
    with pytest.raises(ValueError, match="one shape"):
        latents.read([2, 3])


def test_training_on_several_shapes_sees_all_and_resumes(tmp_path):
    parts = [numbered([n], shape)[0] for n, shape in ((5, (4, 4, 8)), (3, (4, 8, 4)))]
    root = write_set(tmp_path / "latents", parts)
    latents = LatentSet(root)
    config = diffusion_config(root, tmp_path / "a", batch_size=2)
    assert "a batch is [2, 4, 4, 8]" in plan(config) or "a batch is [2, 4, 8, 4]" in plan(config)
    buckets = training_buckets(latents, 0.0)
    seen = [set(samples_of_step(step, buckets, batch_size=2, seed=0).tolist()) for step in range(5)]
    assert set().union(*seen) == set(range(8))
    whole = ldmkit.train_diffusion(config)
    ldmkit.train_diffusion(diffusion_config(root, tmp_path / "b", batch_size=2, steps=2))
    resumed = ldmkit.train_diffusion(diffusion_config(root, tmp_path / "b", batch_size=2))
    assert read_header(resumed).fingerprint == read_header(whole).fingerprint


def test_bfloat16_latents_are_stored_and_read(pipeline, tmp_path):
    def encoded(dtype):
        config = EncodeConfig(data=pipeline.data, ae=pipeline.ae, out=tmp_path / dtype, dtype=dtype)
        out = ldmkit.encode(config)
        assert out is not None
        return LatentSet(out).read(range(12))

    half, full = encoded("bfloat16"), encoded("float32")
    assert half.mean.dtype == torch.bfloat16
    assert torch.equal(half.mean, full.mean.bfloat16())
    assert torch.equal(half.std, full.std.bfloat16())
    model = ldmkit.train_diffusion(diffusion_config(tmp_path / "bfloat16", tmp_path / "ldm"))
    assert model.is_file()


def test_a_large_set_opens_fast_with_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr("ldmkit.durable.os.fsync", lambda _: None)
    root = write_set(tmp_path, numbered([256] * 400, (1, 2, 2), torch.float16))
    start = time.perf_counter()
    latents = LatentSet(root)
    took = time.perf_counter() - start
    assert took < 2.0
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    assert open_files < min(200, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    latents.wait_until_verified()


def test_the_benchmark_measures_what_it_says(tmp_path):
    spec = importlib.util.spec_from_file_location("bench_data", ROOT / "bench/data.py")
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    root = bench.write_latents(tmp_path / "latents", 2, 64, (4, 32, 32), noisy=True)
    assert bench.latent_rate(root, 1) > 0
    seconds, _ = bench.opening(root)
    assert 0 < seconds < 2
    for place in bench.write_pictures(tmp_path, 3).values():
        items = open_source(SourceConfig(data=place)).items
        decoder, read, to_float, resized = bench.rates(items, 1)
        assert decoder > to_float > resized
        assert read > resized


def test_results_do_not_depend_on_how_fast_latents_are_read(pipeline, tmp_path):
    """What a step computes from a batch: float32, as when the reader converted."""
    batch = LatentSet(pipeline.latents).read([3, 8])
    noise = torch.randn(batch.mean.shape, generator=torch.Generator().manual_seed(0))
    now = batch.mean.float() + batch.std.float() * noise
    former = batch.mean.numpy().astype(np.float32) + (
        batch.std.numpy().astype(np.float32) * noise.numpy()
    )
    assert now.numpy().tobytes() == former.tobytes()
