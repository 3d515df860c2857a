"""Encoding in parts: reading processes, jobs, views, buckets, appended pictures, kills."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import ldmkit
from conftest import SIZE, draw_picture
from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.buckets import bucket_shapes, nearest_bucket
from ldmkit.data.encoding import ViewSettings, read_views
from ldmkit.data.items import Box, Item, Span
from ldmkit.data.latents import read_texts
from ldmkit.data.placement import Placement, place, place_boxes
from ldmkit.data_configs import EncodeConfig
from ldmkit.errors import DataError, UsageError
from ldmkit.manifest import read_manifest
from ldmkit.modelfile import load


@pytest.fixture
def config(pipeline, tmp_path):
    return EncodeConfig(
        data=pipeline.data, ae=pipeline.ae, out=tmp_path / "latents", shard_size=5, batch_size=4
    )


def contents(directory):
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def encoded(config, **changes):
    out = ldmkit.encode(EncodeConfig.model_validate(config.model_dump() | changes))
    assert out is not None
    return out


def tensors_of(out, number=0):
    return load(out / f"{number:05d}.safetensors", kind="latents")[1]


@pytest.mark.filterwarnings("ignore:This DataLoader")
def test_reading_processes_do_not_change_a_byte(config, pipeline, tmp_path):
    whole = contents(pipeline.latents)
    for workers in (1, 3):
        assert contents(encoded(config, workers=workers, out=tmp_path / str(workers))) == whole


def test_jobs_share_the_shards_and_the_last_one_commits(config, pipeline):
    whole = contents(pipeline.latents)
    for job in ("3/4", "1/4", "4/4"):  # the fourth has no shard
        out = encoded(config, jobs=job)
        assert "manifest.json" not in contents(out)
    assert len(contents(out)) == 2
    assert contents(encoded(config, jobs="2/4")) == whole
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    encoded(config, jobs="1/4")
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before


def test_jobs_with_other_settings_make_no_set(config):
    encoded(config, jobs="2/3")
    with pytest.raises(DataError, match="another dtype"):
        encoded(config, jobs="1/3", dtype="float32")
    (config.out / "00001.safetensors").rename(config.out / "away")
    encoded(config, jobs="1/3", dtype="float32")
    (config.out / "away").rename(config.out / "00001.safetensors")
    with pytest.raises(DataError, match=r"00001.safetensors was made with another dtype"):
        encoded(config, jobs="3/3", dtype="float32")
    assert not (config.out / "manifest.json").exists()


def test_a_process_of_torchrun_takes_its_part(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    assert list(contents(encoded(config))) == ["00001.safetensors"]
    with pytest.raises(UsageError, match="remove OUT first"):
        encoded(config, force=True)


def test_jobs_are_checked(config):
    for text in ("0/2", "3/2", "a/2", "2"):
        with pytest.raises(ValueError, match="I/N"):
            EncodeConfig.model_validate(config.model_dump() | {"jobs": text})


def test_a_job_leaves_what_another_has_half_written(config):
    config.out.mkdir(parents=True)
    for shard in ("00000", "00001"):
        (config.out / f"{shard}.safetensors.tmp-1").mkdir()
    encoded(config, jobs="1/3")
    assert sorted(contents_names(config.out)) == ["00000.safetensors", "00001.safetensors.tmp-1"]


def contents_names(directory):
    return [path.name for path in directory.iterdir()]


def test_views_are_crops_that_depend_on_key_and_seed_alone(pipeline):
    file = pipeline.data / "circle/0.png"
    item = Item("circle/0.png", Span(str(file), 0, file.stat().st_size))
    preprocessing = PreprocessingConfig(size=16)
    settings = ViewSettings(4, flip=True, zoom=2.0, jitter=0.2, seed=1)
    views, _ = read_views(item, preprocessing, settings, (16, 16))
    again, _ = read_views(item, preprocessing, settings, (16, 16))
    other, _ = read_views(item, preprocessing, settings._replace(seed=2), (16, 16))
    plain, _ = read_views(item, preprocessing, ViewSettings(), (16, 16))
    assert torch.equal(views[0].picture, plain[0].picture)
    assert torch.equal(views[0].picture, other[0].picture)
    for number in range(1, 4):
        assert torch.equal(views[number].picture, again[number].picture)
        assert not torch.equal(views[number].picture, other[number].picture)
        assert not torch.equal(views[number].picture, views[number - 1].picture)
        assert views[number].picture.abs().max() <= 1


def test_views_become_rows(config, tmp_path):
    out = encoded(config, views=3, view_flip=True, shard_size=12)
    tensors = tensors_of(out)
    assert tensors["view"].tolist() == [0, 1, 2] * 12
    keys = read_texts(out / "00000.safetensors", "key")
    assert keys[:4] == ["circle/0.png"] * 3 + ["circle/1.png"]
    plain = tensors_of(encoded(config, out=tmp_path / "plain", shard_size=12))
    assert torch.allclose(tensors["mean"][::3].float(), plain["mean"].float(), atol=2e-3)
    assert read_manifest(out).count == 36
    with pytest.raises(DataError, match=r"another views.per_picture \(3, now 2\)"):
        encoded(config, views=2, view_flip=True, shard_size=12)


def test_new_pictures_are_appended_and_the_old_stay(config, pipeline, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pipeline.data, data)
    out = encoded(config, data=data)
    old = contents(out)
    (data / "a new class").mkdir()
    draw_picture("circle", 9).save(data / "a new class/0.png")
    draw_picture("circle", 8).save(data / "circle/8.png")
    encoded(config, data=data, add=True)
    new = contents(out)
    assert {name: new[name] for name in old if name != "manifest.json"} == {
        name: bytes_ for name, bytes_ in old.items() if name != "manifest.json"
    }
    manifest = read_manifest(out)
    assert manifest.class_names == ("circle", "square", "a new class")
    assert manifest.count == 14
    assert [entry.start for entry in manifest.shards] == [0, 5, 10, 12]
    assert tensors_of(out, 3)["label"].tolist() == [2, 0]
    encoded(config, data=data, add=True)
    encoded(config, data=data)  # the same pictures: complete
    assert contents(out) == new

    only_new = tmp_path / "only new"
    only_new.mkdir()
    draw_picture("square", 3).save(only_new / "more.png")
    encoded(config, data=only_new, add=True)
    assert read_manifest(out).count == 15
    (data / "circle/0.png").unlink()
    with pytest.raises(DataError, match=r"changed or are missing .*circle/0.png"):
        encoded(config, data=data, add=True)
    with pytest.raises(ValueError, match="give one of them"):
        encoded(config, data=data, add=True, force=True)


def test_an_append_that_was_stopped_goes_on(config, pipeline, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pipeline.data, data)
    out = encoded(config, data=data)
    committed = (out / "manifest.json").read_bytes()
    for number in range(10, 20):
        draw_picture("circle", number).save(data / f"circle/{number}.png")
    encoded(config, data=data, add=True)
    whole = contents(out)
    (out / "manifest.json").write_bytes(committed)
    (out / "00004.safetensors").unlink()
    encoded(config, data=data, add=True)
    assert contents(out) == whole


def test_bucket_shapes_have_about_one_area():
    shapes = bucket_shapes(512, 64, 2.0)
    assert (512, 512) in shapes
    assert len(set(shapes)) == len(shapes)
    for height, width in shapes:
        assert height % 64 == 0
        assert width % 64 == 0
        assert max(height, width) / min(height, width) <= 2.0
        assert 0.8 < height * width / 512**2 < 1.2
        assert (width, height) in shapes
    assert nearest_bucket((100, 100), shapes) == (512, 512)
    assert (
        nearest_bucket((300, 900), shapes)
        == max(shapes, key=lambda shape: shape[0] / shape[1])[::-1]
    )
    with pytest.raises(UsageError, match="does not divide"):
        bucket_shapes(500, 64, 2.0)


def test_buckets_keep_shapes_and_one_shard_has_one(config, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    sides = [(64, 32), (32, 64), (32, 32), (60, 31), (64, 32), (33, 63)]  # width, height
    for number, side in enumerate(sides):
        Image.new("RGB", side, (40 * number, 0, 0)).save(data / f"{number}.png")
    changes = {
        "data": data,
        "buckets": True,
        "bucket_step": 8,
        "bucket_ratio": 2.0,
        "shard_size": 2,
    }
    out = encoded(config, **changes)
    manifest = read_manifest(out)
    assert manifest.count == 6
    assert manifest.latent_shape == (4, 8, 8)
    found = {}
    for number, entry in enumerate(manifest.shards):
        mean = tensors_of(out, number)["mean"]
        assert tuple(mean.shape[1:]) == (entry.shape or manifest.latent_shape)
        for key in read_texts(out / entry.name, "key"):
            found[key] = tuple(mean.shape[2:])
    assert found["2.png"] == (8, 8)
    assert found["0.png"] == found["3.png"] == found["4.png"]
    assert found["0.png"][1] > found["0.png"][0]
    assert found["1.png"] == found["5.png"] == found["0.png"][::-1]
    again = contents(out)
    assert contents(encoded(config, **changes, workers=2, out=tmp_path / "two")) == again


def test_what_belongs_to_a_picture_goes_where_it_goes():
    boxes = (Box(1, 0.0, 0.0, 0.5, 1.0), Box(2, 0.9, 0.9, 1.0, 1.0), Box(3, 0.25, 0.25, 0.75, 0.75))
    where = Placement(
        resized=(32, 64), top=0, left=16, size=(32, 32)
    )  # the centre of a wide picture
    placed = place_boxes(boxes, where)
    assert placed == (Box(1, 0.0, 0.0, 0.5, 1.0), Box(3, 0.0, 0.25, 1.0, 0.75))
    mirrored = place_boxes(boxes, where._replace(mirror=True))
    assert mirrored[0] == Box(1, 0.5, 0.0, 1.0, 1.0)
    assert place((40, 80), PreprocessingConfig(size=32), None) == where


def test_pixels_stay_as_they_are_without_resizing_or_cutting():
    native = PreprocessingConfig(size=32, resize="none", crop="random")
    where = place((40, 80), native, torch.Generator().manual_seed(0))
    assert where.resized == (40, 80)
    with pytest.raises(DataError, match=r"x\.png has 80 x 20 pixels, fewer than 32 x 32"):
        place((20, 80), native, None, name="x.png")
    whole = PreprocessingConfig(size=32, crop="none")
    assert place((64, 64), whole, None).resized == (32, 32)
    with pytest.raises(DataError, match="does not cut"):
        place((64, 70), whole, None)


def test_masks_and_low_resolution_become_columns(config, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(3):
        draw_picture("circle", number).save(data / f"{number}.png")
    half = np.zeros((SIZE, SIZE), np.uint8)
    half[:, SIZE // 2 :] = 255
    Image.fromarray(half).save(data / "1.mask.png")
    out = encoded(config, data=data, lowres=4)
    tensors = tensors_of(out)
    assert read_manifest(out).columns[-2:] == ("mask", "lowres")
    assert tensors["mask"].shape == (3, SIZE, SIZE)
    assert tensors["mask"][0].all()
    assert torch.equal(tensors["mask"][1], torch.from_numpy(half // 255))
    assert tensors["lowres"].shape == (3, 3, SIZE // 4, SIZE // 4)
    assert tensors["lowres"].dtype == torch.uint8
    with pytest.raises(UsageError, match="does not divide"):
        encoded(config, data=data, lowres=5, force=True)


KILLER = """
import json, os, random, signal, sys, time
import ldmkit
from ldmkit import terminal
from ldmkit.data_configs import EncodeConfig
ldmkit.encode  # imports torch, which computes nothing here: a fork is safe
config, trials = EncodeConfig.model_validate(json.loads(sys.argv[1])), int(sys.argv[2])
terminal.be_quiet(True)

def start():
    pid = os.fork()
    if pid:
        return pid
    ldmkit.encode(config)
    os._exit(0)

begin = time.monotonic()
assert os.waitpid(start(), 0)[1] == 0
took = time.monotonic() - begin
whole = {file.name: file.read_bytes() for file in config.out.iterdir()}
draw, killed = random.Random(0), 0
for trial in range(trials):
    for file in config.out.iterdir():
        file.unlink()
    pid = start()
    time.sleep(draw.random() * took)
    os.kill(pid, signal.SIGKILL)
    killed += os.waitpid(pid, 0)[1] == signal.SIGKILL
    left = sorted(file.name for file in config.out.iterdir())
    assert os.waitpid(start(), 0)[1] == 0
    assert {file.name: file.read_bytes() for file in config.out.iterdir()} == whole, (trial, left)
print(killed)
"""


@pytest.mark.parametrize("trials", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_encode_ends_with_the_same_bytes(config, trials):
    settings = config.model_copy(update={"shard_size": 2}).model_dump_json()
    done = subprocess.run(
        [sys.executable, "-c", KILLER, settings, str(trials)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= trials // 2
    json.loads((config.out / "manifest.json").read_text())
