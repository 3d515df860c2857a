"""Saving, stopping and refusing from outside: nothing is lost, and nobody works beside another."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from pydantic import ValidationError

import ldmkit
from conftest import ae_config, diffusion_config
from ldmkit import ownership
from ldmkit.data_configs import EncodeConfig
from ldmkit.errors import InterruptedRun, StorageError, UsageError
from ldmkit.fields import seconds
from ldmkit.ownership import owned
from ldmkit.sample_parts import drop_leftovers, found_parts, parts_of
from ldmkit.training import interruption
from ldmkit.training.checkpoint import saved_checkpoints
from ldmkit.training.interruption import SAVE_NOW, Interruption
from ldmkit.training.runlog import RunLog

STEPS = 6
Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("written", "meant"),
    [("90s", 90), ("45m", 2700), ("7.5h", 27000), ("2d", 172800), ("7:30:00", 27000)],
)
def test_durations_as_people_write_them(written, meant):
    assert seconds(written) == meant


@pytest.mark.parametrize("wrong", ["", "5", "h", "1:2:3", "-3s", "0s", "1h30m", "7:60:00"])
def test_what_is_no_duration_is_refused(wrong, tmp_path):
    with pytest.raises(ValidationError, match="duration"):
        ae_config(tmp_path, tmp_path / "run", time_limit=wrong)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(interruption.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(interruption, "BEGAN", 1000.0)


def test_a_run_stops_while_two_of_its_longest_steps_are_left(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    with Interruption(tmp_path, time_limit=100.0) as stop:
        for now, stopping in ((0, False), (20, False), (40, False), (59, False), (60, True)):
            clock.now = 1000.0 + now
            stop.look()
            assert stop.stopping is stopping, now


def test_save_now_is_looked_for_once_a_second_and_goes_when_it_is_done(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    with Interruption(tmp_path) as stop:
        stop.look()
        assert not stop.saving
        (tmp_path / SAVE_NOW).touch()
        clock.now += 0.5
        stop.look()
        assert not stop.saving
        clock.now += 0.6
        stop.look()
        assert stop.saving
        assert not stop.stopping
        stop.saved()
        assert not (tmp_path / SAVE_NOW).exists()


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory):
    """The bytes of both model files, undisturbed."""
    root = tmp_path_factory.mktemp("whole")
    return {name: run(name, pipeline, root / name).read_bytes() for name in TRAINERS}


def run(name, pipeline, out, **changes):
    return TRAINERS[name](pipeline, out, {"steps": STEPS, "save_every": 1000} | changes)


TRAINERS = {
    "train-ae": lambda pipeline, out, changes: ldmkit.train_ae(
        ae_config(pipeline.data, out, **changes)
    ),
    "train-diffusion": lambda pipeline, out, changes: ldmkit.train_diffusion(
        diffusion_config(pipeline.latents, out, **changes)
    ),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_save_now_saves_and_the_run_goes_on_to_the_same_bytes(
    name, pipeline, whole, tmp_path, monkeypatch
):
    out, seen = tmp_path / "run", []
    original = RunLog.add

    def add(self, scalars):
        original(self, scalars)
        seen.append([path.name for path in saved_checkpoints(out / "checkpoints")])
        if len(seen) == 2:
            (out / SAVE_NOW).touch()

    monkeypatch.setattr(RunLog, "add", add)
    monkeypatch.setattr(interruption, "LOOK_SECONDS", 0.0)
    assert run(name, pipeline, out).read_bytes() == whole[name]
    before, after = set(seen[1]), set(seen[2])
    assert after - before == {"step-000000002"}
    assert not (out / SAVE_NOW).exists()


@pytest.mark.parametrize("name", TRAINERS)
def test_out_of_time_it_saves_and_goes_on_when_it_is_run_again(name, pipeline, whole, tmp_path):
    with pytest.raises(InterruptedRun, match="run again"):
        run(name, pipeline, tmp_path / "run", time_limit="0.001s")
    assert run(name, pipeline, tmp_path / "run").read_bytes() == whole[name]


def test_a_stuck_step_ends_the_process_and_says_where_it_was(tmp_path):
    program = (
        "import time\nfrom pathlib import Path\n"
        "from ldmkit.training.interruption import Interruption\n"
        "def stuck_reading():\n    time.sleep(60)\n"
        f"with Interruption(Path({str(tmp_path)!r}), stall_timeout=0.3) as stop:\n"
        "    stop.look()\n    stop.expect_a_step()\n    time.sleep(0.1)\n    stop.look()\n"
        "    time.sleep(0.5)  # between steps nothing is expected\n"
        "    stop.expect_a_step()\n    stuck_reading()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False
    )
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
    assert "in stuck_reading" in ended.stderr


@pytest.mark.parametrize("name", [*TRAINERS, "encode"])
def test_a_directory_has_one_writer(name, pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "PATIENCE", 0.05)
    out = tmp_path / "run"
    with owned(out), pytest.raises(UsageError, match=r"another ldmkit is at work in .*run"):
        if name == "encode":
            ldmkit.encode(EncodeConfig(data=pipeline.data, ae=pipeline.ae, out=out))
        else:
            run(name, pipeline, out)
    assert not out.exists()


def test_the_lock_of_a_killed_process_is_free_again(tmp_path):
    program = (
        "import os, signal\nfrom pathlib import Path\nfrom ldmkit.ownership import owned\n"
        f"with owned(Path({str(tmp_path)!r})):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program], timeout=50, check=False)
    assert (tmp_path / ownership.LOCK).exists()
    with owned(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_of_many_at_once_one_at_a_time_is_the_owner(tmp_path):
    inside, most = [], []

    def work(_):
        with owned(tmp_path / "run"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.002)
            inside.pop()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(40)))
    assert max(most) == 1
    assert len(most) == 40
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "run"])


def test_a_directory_that_goes_while_it_is_made_is_made_anew(tmp_path, monkeypatch):
    directory, make = tmp_path / "run", os.mkdir
    refusals = iter((FileExistsError, FileNotFoundError))

    def removed_at_once(path, *rest, **options):
        refusal = next(refusals, None)
        if refusal is None:
            make(path, *rest, **options)
        else:
            raise refusal(17, "as if another process were at it", str(path))

    monkeypatch.setattr(os, "mkdir", removed_at_once)
    with owned(directory):
        assert directory.is_dir()
    assert next(refusals, None) is None


@pytest.mark.parametrize("inside", ["", "run"])
def test_what_is_no_directory_is_not_waited_for(inside, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError), owned(tmp_path / "link" / inside):
        pass


def test_parts_that_go_while_they_are_listed_are_no_parts(tmp_path, monkeypatch):
    """Of several processes that wait for the same samples, one removes the parts when they are joined."""
    out, list_directory = tmp_path / "samples.safetensors", os.scandir
    parts_of(out).mkdir()

    def removed_before(path):
        with suppress(FileNotFoundError):
            parts_of(out).rmdir()
        return list_directory(path)

    monkeypatch.setattr(os, "scandir", removed_before)
    drop_leftovers(out, "asked")
    parts_of(out).mkdir()
    assert found_parts(out, "asked") == []


def test_parts_of_one_set_are_written_side_by_side(tmp_path):
    with owned(tmp_path, "-1-of-2"), owned(tmp_path, "-2-of-2"):
        assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", [*TRAINERS, "encode"])
def test_no_room_is_said_before_the_work(name, pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1000, 1000))
    out = tmp_path / "run"
    with pytest.raises(StorageError, match="GB are free: make room"):
        if name == "encode":
            ldmkit.encode(EncodeConfig(data=pipeline.data, ae=pipeline.ae, out=out))
        else:
            run(name, pipeline, out)
    assert not list(out.glob("*.safetensors"))
    assert not saved_checkpoints(out / "checkpoints")
    lines = out / "metrics.jsonl"
    assert not lines.exists() or all("loss" not in json.loads(x) for x in lines.open())
