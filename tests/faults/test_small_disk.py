"""A disk that fills up while a command works: no file is spoilt, and with room the same command goes on."""

import json
import random
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from stages import COMMANDS, Stage, make_stages

MEGABYTES = 8
RUNS = 50
Usage = namedtuple("Usage", "total used free")
LIMITED = """
import json, resource, signal, sys
from ldmkit.cli import app
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit, arguments in json.loads(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        app(arguments)
    except SystemExit as end:
        print(json.dumps(end.code or 0), flush=True)
"""
"""Runs commands one after the other, none of which may make a file larger than its limit in bytes."""


@contextmanager
def mounted(directory: Path) -> Iterator[bool]:
    """A disk of 8 MB there, where this process may mount one; says whether."""
    directory.mkdir(exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={MEGABYTES}m", "none", str(directory)]
    try:
        done = subprocess.run(["mount", *options], capture_output=True, check=False)
        there = done.returncode == 0
    except FileNotFoundError:
        there = False
    try:
        yield there
    finally:
        if there:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)


def after_trouble(stage: Stage, expected: dict[str, Any], where: str) -> None:
    """Nothing is damaged, and what has its final name and always the same bytes has those."""
    assert stage.problems() == [], where
    for path, content in stage.left().items():
        if path.endswith((".safetensors", "manifest.json", "grid.png")) and ".tmp-" not in path:
            same = path not in expected or expected[path] == content
            assert same, (where, path)


def limited(stages: list[tuple[Stage, int]]) -> list[int]:
    """Exit codes of commands whose files may not grow beyond so many bytes."""
    work = json.dumps([(limit, stage.arguments) for stage, limit in stages])
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, work], capture_output=True, check=True, timeout=250
    )
    codes = [int(line) for line in done.stdout.splitlines() if line.isdigit() or line == b"0"]
    said = [line for line in done.stderr.splitlines() if line.startswith(b"error: ")]
    assert len(said) == sum(code != 0 for code in codes), done.stderr
    assert all(b"File too large" in line for line in said), said
    return codes


def try_limits(
    stages: dict[str, Stage], run: Callable[..., Any], rounds: int, draw: random.Random
) -> int:
    """Run every command so many times with a limit on its files, each time anew; returns how many failed."""
    failed = 0
    whole = {}
    for name, stage in stages.items():
        assert run(*stage.arguments).returncode == 0
        whole[name] = stage.left()
    for _ in range(rounds):
        limits = []
        for name, stage in stages.items():
            stage.empty()
            largest = max(len(content) for content in whole[name].values())
            limits.append((stage, draw.randrange(1, largest)))
        codes = limited(limits)
        assert len(codes) == len(limits)
        for (stage, limit), code in zip(limits, codes, strict=True):
            where = f"{stage.name} with files of at most {limit} bytes"
            assert code == 4, where
            failed += 1
            after_trouble(stage, whole[stage.name], where)
            assert run(*stage.arguments).returncode == 0, where
            assert stage.left() == whole[stage.name], where
            assert stage.temporaries() == [], where
    return failed


def test_a_limit_on_the_size_of_files_ends_in_4_and_spoils_nothing(pipeline, run, tmp_path):
    stages = make_stages(pipeline, run, tmp_path)
    few = {name: stages[name] for name in ("train-ae", "sample")}
    assert try_limits(few, run, 1, random.Random(0)) == 2


@pytest.mark.faults
@pytest.mark.timeout(3000)
def test_fifty_runs_under_limits_on_the_size_of_files(pipeline, run, tmp_path, capfdbinary):
    stages = make_stages(pipeline, run, tmp_path)
    failed = try_limits(stages, run, RUNS // len(COMMANDS), random.Random(1))
    with capfdbinary.disabled():
        print(f"\n{failed} runs with a limit on the size of files: 0 corrupt files")


@pytest.mark.faults
@pytest.mark.timeout(3000)
def test_fifty_runs_on_a_disk_of_8_mb(pipeline, run, tmp_path, monkeypatch, capfdbinary):
    """Where no disk can be mounted, the same with limits on the size of files."""
    disk = tmp_path / "disk"
    with mounted(disk) as there:
        if there:
            stages = make_stages(pipeline, run, disk)
            said = fill_up(stages, run, disk, monkeypatch)
        else:
            disk.mkdir(exist_ok=True)
            failed = try_limits(make_stages(pipeline, run, disk), run, 10, random.Random(2))
            said = f"no disk can be mounted here; {failed} runs with limited files: 0 corrupt files"
    with capfdbinary.disabled():
        print(f"\n{said}")


def fill_up(
    stages: dict[str, Stage], run: Callable[..., Any], disk: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Ten runs of each command with ever more room, half of them told at the start that there is plenty."""
    codes = {0: 0, 4: 0}
    truly = shutil.disk_usage
    ballast = disk / "ballast"
    for stage in stages.values():
        free = truly(disk).free
        assert run(*stage.arguments).returncode == 0
        whole, used = stage.left(), free - truly(disk).free
        for turn in range(RUNS // len(COMMANDS)):
            stage.empty()
            room = (turn + 1) * used // 11
            ballast.write_bytes(bytes(max(0, truly(disk).free - room)))
            where = f"{stage.name} with {room} bytes of room"
            with monkeypatch.context() as patch:
                if turn % 2:
                    patch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, 10**12))
                done = run(*stage.arguments)
            assert done.returncode in codes, (where, done.stderr)
            codes[done.returncode] += 1
            after_trouble(stage, whole, where)
            ballast.unlink()
            assert run(*stage.arguments).returncode == 0, where
            assert stage.left() == whole, where
            assert stage.temporaries() == [], where
        stage.empty()
    return f"{sum(codes.values())} runs on a disk of 8 MB, {codes[4]} of which found it full: 0 corrupt files"
