"""What `doctor` sees of a machine, and that it ends with 2 where something is not fit."""

import json
import os
import resource
import sys
from pathlib import Path

import pytest

from ldmkit import surroundings
from ldmkit.care_configs import DoctorConfig
from ldmkit.recipes import doctor as recipe
from ldmkit.training.collective import _outcome, try_collective


@pytest.fixture
def alone(monkeypatch):
    """Without the two processes, which take seconds to start."""
    monkeypatch.setattr(recipe, "try_collective", lambda timeout: "")


def states(lines):
    return {line.name: line.state for line in lines}


def test_two_processes_meet_and_are_ended_in_time():
    assert try_collective(120.0) == ""
    late = try_collective(0.01)
    assert late == "they did not end within 0 s"


def test_the_outcome_of_processes_is_told():
    def of(*codes):
        return _outcome([*codes], 5.0)

    assert of(0, 0) == ""
    assert of(0, 9) == "their sum is wrong"
    assert of(0, None) == "they did not end within 5 s"
    assert of(0, -9) == "they ended with the codes [0, -9]"


def test_a_fit_machine_ends_with_0(alone, run, tmp_path):
    done = run("doctor", tmp_path, "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert report["fail"] == 0
    found = {line["name"] for line in report["lines"]}
    assert found >= {"python", "package", "cpu", "cuda", "memory", "disk", "fsync", "weights"}
    assert list(tmp_path.iterdir()) == []
    names = [line["text"].split()[0] for line in report["lines"] if line["name"] == "package"]
    assert len(names) == len(set(names))
    assert "torch" in names


def test_what_is_not_fit_ends_with_2_and_says_what_to_do(alone, run, tmp_path):
    done = run("doctor", tmp_path / "nowhere")
    assert done.returncode == 2
    assert b"fail  disk: " in done.stdout
    assert b"      name a directory that is there" in done.stdout
    assert b"1 check(s) failed, the first" in done.stderr


def test_processes_that_do_not_meet_fail(monkeypatch, tmp_path):
    monkeypatch.setattr(recipe, "try_collective", lambda timeout: "they did not end within 1 s")
    report = recipe.doctor(DoctorConfig(directory=tmp_path, timeout=1))
    assert report["fail"] == 1
    assert "GLOO_SOCKET_IFNAME" in (recipe.complaint(report) or "")


def test_versions_are_compared_with_ranges_and_constraints(monkeypatch):
    needs = ["torch>=2.8", "rich>=9999", "nonsense-of-nobody>=1", 'torch-none>=1; extra == "x"']
    monkeypatch.setattr(surroundings.metadata, "requires", lambda name: needs)
    monkeypatch.setattr(surroundings, "constraints", lambda: {"torch": "1.0"})
    lines = [line for line in surroundings.packages() if line.name == "package"]
    assert [line.state for line in lines] == ["fail", "fail", "warn"]
    assert lines[0].text == "nonsense-of-nobody is missing, not >=1"
    assert lines[1].advice == "pip install 'rich>=9999'"
    assert "1.0 was tested" in lines[2].text
    monkeypatch.undo()
    assert surroundings.constraints()["torch"].startswith("2.")


def test_a_disk_that_cannot_flush_fails_and_a_slow_one_warns(monkeypatch, tmp_path):
    def broken(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(surroundings, "flush_to_disk", broken)
    assert states(surroundings.disk(tmp_path))["fsync"] == "fail"
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(surroundings, "SLOW_FLUSH", 0.0)
    monkeypatch.setattr(surroundings, "flush_to_disk", lambda path: None)
    assert states(surroundings.disk(tmp_path))["fsync"] == "warn"


def test_little_room_and_low_limits_warn(monkeypatch):
    monkeypatch.setattr(surroundings, "SHARED_MEMORY", Path(os.sep))
    monkeypatch.setattr(surroundings, "LEAST_SHARED", 1 << 60)
    monkeypatch.setattr(surroundings, "LEAST_MEMORY", 1 << 60)
    assert set(states(surroundings.memory()).values()) == {"warn"}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, 64))
    found = {line.name: line.advice for line in surroundings.limits()}
    assert found["open files"] == "ulimit -n 1024"
    assert found["file size"] == "ulimit -f unlimited"
    monkeypatch.setitem(sys.modules, "resource", None)
    assert list(surroundings.limits()) == []
