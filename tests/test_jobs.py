"""Many samples by several calls: jobs, stopped ones, batches, what is kept on the way and how it is shown."""

import io
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ldmkit
from ldmkit.assembly import load_autoencoder, load_diffusion
from ldmkit.conditioning.text import TextConditioner
from ldmkit.container import read_headers
from ldmkit.data.latents import unragged
from ldmkit.decode_configs import DecodeConfig
from ldmkit.diffusion.guidance import (
    BothConditions,
    Branches,
    Guidance,
    autoguided,
    classifier_free,
)
from ldmkit.drawing import Manner, draw_latents, guide_together, seeded_noise
from ldmkit.encodings import Encodings
from ldmkit.errors import DataError, InterruptedRun, OutOfMemoryError, StorageError, UsageError
from ldmkit.generation_configs import SampleConfig
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.modelfile import load, load_messages, save
from ldmkit.output.animation import animation, frames_of
from ldmkit.recipes import sample as recipe
from ldmkit.sample_memory import batch_with_room, largest_batch
from ldmkit.sample_parts import Part, missing, parts_of
from test_sample import CLASS, SHAPE, TEXT, built, values_for

COUNT = 7


@pytest.fixture(scope="module")
def ldm(tmp_path_factory):
    """Told classes and texts."""
    return built(tmp_path_factory.mktemp("ldm") / "diffusion.safetensors", CLASS, TEXT)


@pytest.fixture
def draw(ldm, tmp_path):
    """Draw samples to a file of that name; returns its bytes."""

    def call(name="s", **settings) -> bytes:
        config = {"model": ldm, "out": tmp_path / name, "num": COUNT, "steps": 3, "device": "cpu"}
        config |= {"prompt": ("a", "b", "c"), "batch_size": 2}
        out = tmp_path / name
        assert ldmkit.sample(SampleConfig.model_validate(config | settings)) == out
        return out.read_bytes() if out.is_file() else b""

    return call


@pytest.fixture
def streamed(ldm):
    def call(**settings) -> bytes:
        config = {"model": ldm, "num": COUNT, "steps": 3, "device": "cpu", "batch_size": 2}
        stream = io.BytesIO()
        assert ldmkit.sample(SampleConfig.model_validate(config | settings), stream) is None
        return stream.getvalue()

    return call


@pytest.fixture
def groups(monkeypatch):
    """Counts groups of samples that are drawn; `at` calls what happens when so many are."""
    real, at, seen = recipe.draw_latents, {}, []

    def counted(*arguments):
        seen.append(len(arguments[1]["class"]))
        if len(seen) in at:
            at[len(seen)]()
        return real(*arguments)

    monkeypatch.setattr(recipe, "draw_latents", counted)
    return seen, at


def pictures(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_batches_and_jobs_change_no_byte_of_the_pictures(pipeline, tmp_path):
    found = {}
    for batch in (1, 4, 16):
        for jobs in (1, 2):
            stream = io.BytesIO()
            for job in range(jobs, 0, -1):  # in any order
                config = {"model": pipeline.ldm, "num": 5, "steps": 3, "device": "cpu"}
                config |= {"jobs": f"{job}/{jobs}", "batch_size": batch}
                ldmkit.sample(SampleConfig.model_validate(config), stream)
            stream.seek(0)
            out = tmp_path / f"{batch}-{jobs}"
            ldmkit.decode(DecodeConfig(ae=pipeline.ae, out=out, device="cpu"), stream)
            found[batch, jobs] = pictures(out)
    whole = found[1, 1]
    assert len(whole) == 7  # and the sheet, and the list
    for (batch, jobs), files in found.items():
        assert files.keys() == whole.keys()
        same = [name for name in whole if files[name] == whole[name]]
        assert set(whole) - set(same) <= ({"grid.png"} if jobs == 2 else set()), (batch, jobs)


def test_jobs_of_one_file_make_the_file_of_one_call(draw, tmp_path):
    whole = draw("whole")
    assert draw("parts", jobs="2/3", batch_size=1) == b""
    assert draw("parts", jobs="3/3", batch_size=16) == b""
    assert parts_of(tmp_path / "parts").is_dir()
    assert draw("parts", jobs="1/3") == whole
    assert draw("batch", batch_size=16) == whole
    assert not list(tmp_path.glob("*.parts"))
    header, tensors = load(tmp_path / "parts", kind="samples")  # which checks the fingerprint
    assert tensors["seed"].tolist() == list(range(COUNT))
    assert tensors["latents"].shape == (COUNT, *SHAPE)
    assert header.facts["total"] == COUNT
    lines = unragged(tensors["told.bytes"].numpy(), tensors["told.offsets"].numpy())
    assert [line[-3] for line in lines] == list("abcabca")


def test_processes_of_torchrun_are_jobs(draw, monkeypatch):
    whole = draw("whole")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        last = draw("parts")
    assert last == whole


def test_a_file_equals_the_stream_of_the_same_samples(draw, streamed, tmp_path):
    draw("whole", prompt=())
    (tmp_path / "stream").write_bytes(streamed())
    assert len(list(read_headers(tmp_path / "stream"))) == 4
    stream = io.BytesIO(streamed())
    blocks = [tensors for _, tensors in messages(stream)]
    latents = torch.cat([tensors["latents"] for tensors in blocks])
    assert torch.equal(latents, load(tmp_path / "whole", kind="samples")[1]["latents"])


def messages(stream):
    return load_messages(stream, "stream", kind="samples")


def test_streams_are_joined_by_cat_and_gaps_in_them_are_noticed(streamed, pipeline, tmp_path, run):
    parts = [streamed(model=pipeline.ldm, jobs=f"{n}/2") for n in (1, 2)]
    other = streamed(model=pipeline.ldm, seed=50, num=2)
    joined = tmp_path / "joined.safetensors"
    joined.write_bytes(parts[1] + parts[0] + other)
    report = run("inspect", "-", "--json", stdin=joined.read_bytes())
    assert report.returncode == 0, report.stderr
    options = ("--ae", pipeline.ae, "--device", "cpu")
    for name, source in (("file", joined), ("pipe", "-")):
        stdin = joined.read_bytes() if source == "-" else b""
        done = run("decode", source, *options, "--out", tmp_path / name, stdin=stdin)
        assert done.returncode == 0, done.stderr
    assert pictures(tmp_path / "file") == pictures(tmp_path / "pipe")
    assert len(list((tmp_path / "pipe").glob("0*.png"))) == COUNT + 2
    halves = [
        run("decode", joined, *options, "--out", tmp_path / "two", "--jobs", n)
        for n in ("1/2", "2/2")
    ]
    assert [done.returncode for done in halves] == [0, 0]
    for name, data in pictures(tmp_path / "file").items():
        if name.startswith("0"):
            assert (tmp_path / "two" / name).read_bytes() == data

    first = next(read_headers(joined))
    length = first.payload_start + first.payload_bytes
    lacking = {"ended after 2 of 4": parts[1][:length] + parts[0], "lacks": parts[1][length:]}
    for words, data in lacking.items():
        done = run("decode", "-", *options, "--out", tmp_path / "x", stdin=data)
        assert done.returncode == 3
        assert words.encode() in done.stderr
        assert run("inspect", "-", stdin=data).returncode == 3


def test_a_job_without_samples_is_refused(draw):
    with pytest.raises(UsageError, match="no more than 2 parts"):
        draw("s", num=2, jobs="1/3")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_command_goes_on_and_ends_with_the_same_bytes(number, draw, groups, tmp_path):
    seen, at = groups
    whole = draw("whole", batch_size=4, precision="fp32")  # whose groups are pairs
    assert len(seen) == 4
    at[4 + 3] = lambda: os.kill(
        os.getpid(), number
    )  # in the second batch, of which one group is kept
    with pytest.raises(InterruptedRun, match="run the same command again"):
        draw("s", batch_size=4, precision="fp32")
    assert not (tmp_path / "s").exists()
    assert len(seen) == 4 + 3
    assert draw("s", batch_size=16, precision="fp32") == whole
    assert len(seen) == 4 + 3 + 1
    assert draw("s", precision="fp32") == whole
    assert len(seen) == 4 + 3 + 1, "what is complete is drawn again"


def test_a_signal_ends_the_command_with_75_and_a_failure_keeps_what_is_drawn(
    ldm, groups, tmp_path, run, monkeypatch
):
    seen, at = groups
    at[1] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    call = ("sample", ldm, "--num", 6, "--steps", 2, "--batch-size", 2, "--out", tmp_path / "s")
    assert run(*call).returncode == 75
    real, saved = recipe.save, []

    def full(path, **block):
        saved.append(path)
        if len(saved) == 2:
            raise StorageError("the disk is full")
        real(path, **block)

    monkeypatch.setattr(recipe, "save", full)
    assert run(*call).returncode == 4
    assert len(seen) == 3
    done = run(*call)
    assert done.stdout.decode().strip() == str(tmp_path / "s")
    assert len(seen) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_damaged_parts_are_drawn_again_and_those_of_another_command_refused(
    draw, groups, tmp_path, ldm
):
    seen, _ = groups
    whole = draw("whole")
    draw("s", jobs="1/2")
    drawn = len(seen)
    damaged = sorted(parts_of(tmp_path / "s").glob("*.safetensors"))[0]
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    for other in ({"seed": 1}, {"steps": 2}, {"prompt": ("a",)}, {"num": 8}, {"sampler": "ddim"}):
        with pytest.raises(DataError, match="unfinished samples of another command"):
            draw("s", **other)
        assert len(seen) == drawn
        damaged.write_bytes(data)  # it was removed
    assert draw("s") == whole
    assert len(seen) == drawn + 3  # one of the first job's two, and the second job's two


def test_a_file_of_other_samples_is_replaced(draw):
    first = draw("s")
    assert draw("s", seed=1) != first
    assert draw("s") == first


def test_what_no_part_holds():
    parts = [Part(Path(), *ends) for ends in ((2, 4), (3, 5), (7, 9))]
    assert missing(parts, range(10)) == [range(2), range(5, 7), range(9, 10)]
    assert missing(parts, range(3, 8)) == [range(5, 7)]
    assert missing(parts, range(2, 5)) == []
    assert missing([], range(3)) == [range(3)]


def test_an_encoding_is_made_once_and_has_the_same_bytes(ldm, monkeypatch):
    model = load_diffusion(ldm)
    encode, calls = Encodings(), []
    real = TextConditioner.forward

    def counted(self, values):
        calls.append(len(values))
        return real(self, values)

    monkeypatch.setattr(TextConditioner, "forward", counted)
    manner = Manner(2, guide_together(model.config.conditions, 3.0))
    values = values_for(model, 3)
    for rows in ([0, 1], [1, 0], [2, 2], [0, 2]):
        told = {kind: value[rows] for kind, value in values.items()}
        drawn = [
            draw_latents(model, told, (2, *SHAPE), seeded_noise(rows), manner, encode=by)
            for by in (LatentDiffusion.condition, encode)
        ]
        assert torch.equal(*drawn)
    by_hand = 3 * 4  # told outside of the interval, told within, and the null, in each group
    assert calls.count(2) == by_hand + 3  # two prompts, the empty one, and the third
    assert set(calls) == {2}


def test_a_weight_of_1_asks_no_null():
    asked = []

    def denoise(x, sigma, condition):
        asked.append((len(x), condition))
        return x * condition

    pair, both = Branches(2.0, torch.ones(6, 1, 1, 1)), BothConditions(2.0, 5.0)
    x, sigma = torch.ones(2, 1, 1, 1), torch.ones(2)
    for guidance in (Guidance((1.0,)), Guidance((1.0, 1.0), "nested")):
        assert torch.equal(classifier_free(denoise, guidance)(x, sigma, pair), 2 * x)
    assert torch.equal(autoguided(denoise, denoise, Guidance((1.0,)))(x, sigma, both), 2 * x)
    assert asked == [(2, 2.0)] * 3
    classifier_free(denoise, Guidance((1.0, 1.0)))(
        x, sigma, pair
    )  # composed: not as it was trained
    assert asked[-1][0] == 6


def test_estimates_are_kept_evenly_and_samples_stay_as_they_are(draw, tmp_path):
    draw("plain", steps=6)
    plain = load(tmp_path / "plain", kind="samples")[1]["latents"]
    found = {}
    for count in (1, 3, 6):
        draw(str(count), steps=6, keep_path=count, batch_size=count)
        tensors = load(tmp_path / str(count), kind="samples")[1]
        found[count] = tensors["path"]
        assert torch.equal(tensors["latents"], plain)
        assert tensors["path"].shape == (COUNT, count, *SHAPE)
    assert torch.equal(found[3], found[6][:, [0, 2, 4]])
    assert torch.equal(found[1], found[6][:, :1])
    # DDIM without new noise ends where its last call said
    assert torch.allclose(found[6][:, -1], plain, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="--keep-path 7: there are 6 calls"):
        draw("s", steps=6, keep_path=7)


@pytest.mark.parametrize("form", ["webp", "gif"])
def test_animations_show_the_way_and_are_resumed(form, pipeline, streamed, tmp_path):
    samples = tmp_path / "s.safetensors"
    stream = io.BytesIO(streamed(model=pipeline.ldm, num=3, steps=4, keep_path=3, batch_size=3))
    [(header, tensors)] = messages(stream)
    torch.manual_seed(0)
    tensors["path"] = torch.randn(
        tensors["path"].shape
    )  # else frames of so small a model are equal
    save(samples, tensors, kind="samples", config={}, facts=header.facts)

    def decode(out, **settings):
        config = {"samples": samples, "ae": pipeline.ae, "out": tmp_path / out, "device": "cpu"}
        config |= {"animate": form, "quality": 100, "precision": "fp32"}
        ldmkit.decode(DecodeConfig.model_validate(config | settings))
        return pictures(tmp_path / out)

    whole = decode("whole")
    moving = [name for name in whole if name.endswith(f".denoising.{form}")]
    assert len(moving) == 4
    assert f"grid.denoising.{form}" in moving
    name = next(name for name in moving if name.startswith("000001"))
    with Image.open(tmp_path / "whole" / name) as image:
        assert getattr(image, "n_frames", 1) == 4
        assert image.info["loop"] == 0
    frames = frames_of(whole[name])
    still = np.asarray(Image.open(tmp_path / "whole" / name.replace(f"denoising.{form}", "png")))
    if form == "webp":
        assert np.array_equal(frames[-1], still)
        latents, model = tensors["path"][1, [0, 1]], load_autoencoder(pipeline.ae)
        first = ((model.decode(latents)[0] + 1) * 127.5).round().clamp(0, 255)
        assert np.array_equal(frames[0], first.to(torch.uint8).movedim(0, 2).numpy())
    assert np.abs(frames[-1].astype(int) - still).mean() < 12

    decode("half")
    (tmp_path / "half" / name).unlink()
    (tmp_path / "half" / next(n for n in whole if n.startswith("000002"))).unlink()
    assert decode("half", resume=True) == whole
    tar = tmp_path / "t.tar"
    (tmp_path / "tar").mkdir()
    assert decode("tar", tar=tar) == {}
    assert whole[name] in tar.read_bytes()
    assert (tmp_path / f"t.grid.denoising.{form}").read_bytes() == whole[f"grid.denoising.{form}"]


def test_animations_without_a_way_are_refused(pipeline, streamed, tmp_path):
    bare = streamed(model=pipeline.ldm, num=2)
    config = DecodeConfig(ae=pipeline.ae, out=tmp_path / "out", animate="gif", device="cpu")
    with pytest.raises(UsageError, match="--keep-path"):
        ldmkit.decode(config, io.BytesIO(bare))
    with_path = streamed(model=pipeline.ldm, num=2, seed=9, keep_path=1)
    with pytest.raises(DataError, match="drawn without --keep-path"):
        ldmkit.decode(config, io.BytesIO(with_path + bare))


def test_grey_pictures_move_too():
    frames = [np.full((8, 9, 1), value, dtype=np.uint8) for value in (0, 100, 255)]
    found = frames_of(animation(frames, "gif", 95))
    assert [int(frame.mean()) for frame in found] == [0, 100, 255]
    assert found[0].shape == (8, 9, 3)


def test_batches_of_auto(draw):
    assert largest_batch(lambda n: 10_000_000 + n * 10_000_000, [1, 2, 4, 8, 64], 100_000_000) == 8
    with pytest.raises(OutOfMemoryError, match="two samples take"):
        largest_batch(lambda n: n << 30, [1, 2], 100)
    assert batch_with_room(lambda _: 1 / 0, 1000, torch.device("cpu")) == 16
    with pytest.raises(UsageError, match="not on mps"):
        batch_with_room(lambda _: None, 1000, torch.device("mps"))
    assert draw("auto", batch_size="auto") == draw("two")
