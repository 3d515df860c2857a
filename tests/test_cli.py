"""The command line as a shell sees it: streams, exit codes, sentences."""

import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import ldmkit
from conftest import ae_config
from ldmkit.configfile import to_toml
from ldmkit.configs import STREAM
from ldmkit.container import read_messages
from ldmkit.errors import NonFiniteError, UsageError

LDMKIT = f"{sys.executable} -m ldmkit"


def shell(command, **variables):
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        timeout=120,
        check=False,
        env=os.environ | {name: str(value) for name, value in variables.items()},
    )


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


def one_sentence(done, code, *words):
    """The exit code, nothing on stdout, one line on stderr that starts with "error:"."""
    assert done.returncode == code, done.stderr.decode()
    assert done.stdout == b""
    lines = [line for line in done.stderr.decode().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()
    for word in words:
        assert word in lines[0]


def test_a_pipeline_of_64_pictures_and_a_grid(pipeline, tmp_path):
    done = shell(
        f"{LDMKIT} sample $LDM --num 64 --steps 2 | {LDMKIT} decode --ae $AE --out $OUT",
        LDM=pipeline.ldm,
        AE=pipeline.ae,
        OUT=tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == f"{tmp_path / 'out'}\n"
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(names) == 66
    assert names[:2] == ["000000-circle.png", "000001-square.png"]
    assert names[-2:] == ["grid.png", "samples.jsonl"]
    assert pixels_of(tmp_path / "out/000000-circle.png").shape == (32, 32, 3)


def test_encode_streams_into_inspect(pipeline):
    done = shell(
        f"{LDMKIT} encode $DATA --ae $AE --shard-size 5 -o - | {LDMKIT} inspect --json -",
        DATA=pipeline.data,
        AE=pipeline.ae,
    )
    assert done.returncode == 0, done.stderr.decode()
    report = json.loads(done.stdout)
    assert report["schema_version"] == 1
    assert report["messages"] == {"latents": 3, "manifest": 1}
    assert report["samples"] == 12


def test_from_python_a_stream_has_to_be_given(pipeline):
    with pytest.raises(UsageError, match="no stream"):
        ldmkit.sample(ldmkit.SampleConfig(model=pipeline.ldm))
    with pytest.raises(UsageError, match="no stream"):
        ldmkit.encode(ldmkit.EncodeConfig(data=pipeline.data, ae=pipeline.ae, out=STREAM))


def test_every_commands_stdout_is_data_and_nothing_else(pipeline, tmp_path, run):
    (tmp_path / "ae.toml").write_text(to_toml(ae_config(pipeline.data, tmp_path / "ae", steps=1)))
    paths = {
        "train-ae": (
            ["train-ae", "--config", tmp_path / "ae.toml"],
            tmp_path / "ae/autoencoder.safetensors",
        ),
        "encode": (
            ["encode", pipeline.data, "--ae", pipeline.ae, "--out", tmp_path / "latents"],
            tmp_path / "latents",
        ),
        "train-diffusion": (
            [
                "train-diffusion",
                pipeline.latents,
                "--steps",
                1,
                "--out",
                tmp_path / "ldm",
                "--unet.channels",
                32,
                "--unet.multipliers",
                "1,2",
                "--unet.attention-factors",
                "2",
                "--batch-size",
                2,
            ],
            tmp_path / "ldm/diffusion.safetensors",
        ),
        "sample": (
            ["sample", pipeline.ldm, "--num", 2, "--steps", 1, "--out", tmp_path / "s.safetensors"],
            tmp_path / "s.safetensors",
        ),
        "decode": (
            [
                "decode",
                tmp_path / "s.safetensors",
                "--ae",
                pipeline.ae,
                "--out",
                tmp_path / "pictures",
            ],
            tmp_path / "pictures",
        ),
    }
    for command, (arguments, path) in paths.items():
        done = run(*arguments)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.decode() == f"{path}\n", command
        assert done.stderr, command
        quiet = run(*arguments, "--quiet")
        assert quiet.stderr == b"", command
    binary = run("sample", pipeline.ldm, "--num", 3, "--steps", 1, "--batch-size", 2)
    blocks = list(read_messages(io.BytesIO(binary.stdout), "stdout"))
    assert [header.kind for header, _ in blocks] == ["samples", "samples"]
    assert sum(len(block) for _, block in blocks) == len(binary.stdout)


def test_a_stray_print_of_a_library_does_not_reach_the_pipe(pipeline, run, monkeypatch):
    from ldmkit.drawing import draw_latents

    def noisy(*arguments):
        print("stray")
        os.write(1, b"stray from C")
        return draw_latents(*arguments)

    monkeypatch.setattr("ldmkit.recipes.sample.draw_latents", noisy)
    done = run("sample", pipeline.ldm, "--num", 1, "--steps", 1)
    assert b"stray" not in done.stdout
    assert b"stray from C" in done.stderr
    assert len(list(read_messages(io.BytesIO(done.stdout), "stdout"))) == 1


def test_batch_size_does_not_change_a_picture(pipeline, tmp_path, run):
    found = {}
    for batch in (1, 16):
        out = tmp_path / str(batch)
        samples = tmp_path / f"{batch}.safetensors"
        options = ["--num", 18, "--steps", 4, "--sampler", "ddim", "--eta", 0.5, "--guidance", 3]
        run("sample", pipeline.ldm, *options, "--batch-size", batch, "--out", samples)
        done = run("decode", samples, "--ae", pipeline.ae, "--batch-size", batch, "--out", out)
        assert done.returncode == 0, done.stderr.decode()
        found[batch] = {path.name: pixels_of(path) for path in out.glob("*.png")}
    assert found[1].keys() == found[16].keys()
    for name, pixels in found[1].items():
        assert np.array_equal(pixels, found[16][name]), name


def test_a_sample_depends_on_its_seed_alone(pipeline, tmp_path, run):
    for seed, num, out in ((3, 4, "a"), (5, 1, "b")):
        command = [
            "sample",
            pipeline.ldm,
            "--seed",
            seed,
            "--num",
            num,
            "--steps",
            2,
            "--label",
            "square",
        ]
        run(*command, "--out", tmp_path / f"{out}.safetensors")
        run("decode", tmp_path / f"{out}.safetensors", "--ae", pipeline.ae, "--out", tmp_path / out)
    same = [(tmp_path / out / "000005-square.png").read_bytes() for out in "ab"]
    assert same[0] == same[1]
    assert same[0] != (tmp_path / "a/000004-square.png").read_bytes()


def test_labels_by_name_index_and_none(pipeline, tmp_path, run):
    command = [
        "sample",
        pipeline.ldm,
        "--num",
        4,
        "--steps",
        1,
        "--out",
        tmp_path / "s.safetensors",
    ]
    done = run(*command, "--label", "SQUARE", "--label", "0", "--label", "none")
    assert done.returncode == 0, done.stderr.decode()
    run("decode", tmp_path / "s.safetensors", "--ae", pipeline.ae, "--out", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "000000-square.png",
        "000001-circle.png",
        "000002.png",
        "000003-square.png",
        "grid.png",
        "samples.jsonl",
    ]
    one_sentence(run(*command, "--label", "triangle"), 2, "'triangle'", "0 circle, 1 square")
    one_sentence(run(*command, "--label", "2"), 2, "is no class")
    one_sentence(run(*command[:3], 1, "--sampler", "ddim", "--steps", 1001), 2, "1 to 1000")


def test_another_autoencoder_is_refused(pipeline, tmp_path, run):
    other = ae_config(pipeline.data, tmp_path / "other", steps=1, seed=1)
    (tmp_path / "other.toml").write_text(to_toml(other))
    ae = run("train-ae", "--config", tmp_path / "other.toml").stdout.decode().strip()
    samples = run("sample", pipeline.ldm, "--num", 1, "--steps", 1).stdout
    done = run("decode", "--ae", ae, "--out", tmp_path / "out", stdin=samples)
    one_sentence(done, 3, "another autoencoder", ae)
    assert list((tmp_path / "out").iterdir()) == []
    done = run("train-diffusion", pipeline.latents, "--ae", ae, "--out", tmp_path / "ldm")
    one_sentence(done, 3, "another autoencoder")


def test_one_flipped_bit_in_a_shard_is_refused(pipeline, tmp_path, run):
    shutil.copytree(pipeline.latents, tmp_path / "latents")
    shard = tmp_path / "latents/00001.safetensors"
    damaged = bytearray(shard.read_bytes())
    damaged[-100] ^= 8
    shard.write_bytes(damaged)
    training = ("train-diffusion", "--preset", "tiny", "--steps", 1, "--out", tmp_path / "ldm")
    for command in (training, ("inspect",)):
        one_sentence(run(*command, tmp_path / "latents"), 3, "00001.safetensors is damaged")
    assert not (tmp_path / "ldm/diffusion.safetensors").exists()


def test_missing_files_are_named(pipeline, tmp_path, run):
    absent = tmp_path / "absent.safetensors"
    for arguments in (
        ["encode", pipeline.data, "--ae", absent],
        ["sample", absent, "--out", tmp_path / "s"],
        ["decode", absent, "--ae", pipeline.ae, "--out", tmp_path / "o"],
        ["inspect", absent],
        ["train-ae", absent, "--out", tmp_path / "ae"],
        ["train-diffusion", absent, "--out", tmp_path / "ldm"],
    ):
        one_sentence(run(*arguments), 3, str(absent))
    assert not (tmp_path / "ae").exists()


def test_an_unknown_setting_is_a_usage_error(tmp_path, run):
    (tmp_path / "run.toml").write_text("[autoencoder]\nchanels = 3\n")
    done = run("train-ae", tmp_path, "--config", tmp_path / "run.toml")
    one_sentence(done, 2, "autoencoder.chanels", "did you mean autoencoder.channels?")
    assert run("train-ae", tmp_path, "--autoencoder.chanels", 3).returncode == 2
    one_sentence(run("train-ae", tmp_path, "--steps", 0), 2, "--steps", "greater than 0")


@pytest.mark.parametrize("command", ["train-ae", "encode"])
def test_a_file_that_is_no_picture_is_named(command, pipeline, tmp_path, run):
    data = tmp_path / "data"
    shutil.copytree(pipeline.data, data)
    (data / "circle/3.png").write_text("hello")
    (tmp_path / "ae.toml").write_text(to_toml(ae_config(data, tmp_path / "ae")))
    arguments = (
        ["--config", tmp_path / "ae.toml"] if command == "train-ae" else [data, "--ae", pipeline.ae]
    )
    arguments += ["--out", tmp_path / "out"]
    one_sentence(run(command, *arguments), 3, "circle/3.png is not a picture")


def test_a_stream_that_ends_early_is_an_error(pipeline, tmp_path, run):
    stream = run("sample", pipeline.ldm, "--num", 4, "--steps", 1, "--batch-size", 2).stdout
    first = next(read_messages(io.BytesIO(stream), "stream"))[1]
    decode = ["decode", "--ae", pipeline.ae, "--out", tmp_path / "out"]
    one_sentence(run(*decode, stdin=first), 3, "ended after 2 of 4 samples")
    one_sentence(run(*decode, stdin=stream[:-1]), 3, "middle of a message")
    one_sentence(run(*decode, stdin=b""), 3, "no samples")
    one_sentence(run("inspect", stdin=b""), 3, "empty")
    one_sentence(run("inspect", stdin=first), 3, "after 2 of 4 samples")
    assert json.loads(run("inspect", "--json", stdin=stream).stdout)["samples"] == 4


def test_a_reader_that_leaves_is_a_broken_pipe(pipeline):
    command = f"{LDMKIT} sample $LDM --num 400 --steps 1 --batch-size 2 | head -c 10 > /dev/null"
    done = shell(f"{command}; echo ${{PIPESTATUS[0]}}", LDM=pipeline.ldm)
    assert done.stdout.decode().strip() == "141"
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


def test_binary_data_never_goes_to_a_terminal(pipeline):
    import pty

    leader, follower = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "ldmkit", "sample", str(pipeline.ldm)],
        stdout=follower,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    os.close(follower)
    os.close(leader)
    assert done.returncode == 2
    assert b"would write binary data to the terminal" in done.stderr


def test_sigterm_saves_and_says_run_again(pipeline, tmp_path, run):
    import signal
    import time

    config = ae_config(
        pipeline.data, tmp_path / "run", steps=100_000, sample_every=100_000, save_every=100_000
    )
    (tmp_path / "run.toml").write_text(to_toml(config))
    command = [sys.executable, "-m", "ldmkit", "train-ae", "--config", str(tmp_path / "run.toml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr.decode()
    assert stdout == b""
    assert re.search(r"stopped and saved before step \d+; run again to go on", stderr.decode())
    assert len(list((tmp_path / "run/checkpoints").iterdir())) in (1, 2)  # one before the adversary


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), 6),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 6),
        (OSError(28, "No space left on device"), 4),
        (KeyboardInterrupt(), 130),
        (NonFiniteError("loss became nan"), 5),
        (ZeroDivisionError("a bug"), 1),
    ],
)
def test_every_other_exit_code(error, code, pipeline, tmp_path, run, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr("ldmkit.recipes.sample.draw_latents", fail)
    done = run("sample", pipeline.ldm, "--out", tmp_path / "x")
    assert done.returncode == code, done.stderr.decode()
    assert done.stdout == b""
    assert (b"Traceback" in done.stderr) == (code == 1)
    assert not list(tmp_path.iterdir())
    debug = run("sample", pipeline.ldm, "--out", tmp_path / "x", "--debug")
    assert b"Traceback" in debug.stderr


def test_dry_run_prints_the_config_and_touches_nothing(pipeline, tmp_path, run):
    for command, data in (("train-ae", pipeline.data), ("train-diffusion", pipeline.latents)):
        out = tmp_path / command
        done = run(command, data, "--preset", "tiny", "--out", out, "--dry-run")
        assert done.returncode == 0, done.stderr.decode()
        assert not out.exists()
        assert b"parameters:" in done.stderr
        assert b"memory: about" in done.stderr
        assert b"disk: about" in done.stderr
        (tmp_path / "again.toml").write_bytes(done.stdout)
        again = run(command, "--config", tmp_path / "again.toml", "--dry-run")
        assert again.stdout == done.stdout
    done = run("encode", pipeline.data, "--ae", pipeline.ae, "--out", tmp_path / "l", "--dry-run")
    assert b"12 pictures, 2 classes" in done.stderr


def test_inspect_tells_what_everything_is(pipeline, run):
    for path, kind in (
        (pipeline.ae, "autoencoder"),
        (pipeline.ldm, "diffusion"),
        (pipeline.latents, "latents"),
        (pipeline.ae.parent, "run"),
    ):
        report = json.loads(run("inspect", path, "--json").stdout)
        assert (report["kind"], report["digests"]) == (kind, "hold")
        assert f"kind: {kind}" in run("inspect", path).stdout.decode()
