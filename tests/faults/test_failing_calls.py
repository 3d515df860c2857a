"""Each call that writes fails once: the command says so and ends, and nothing that was whole is lost."""

import errno
import os
import random
import shutil
from collections.abc import Callable
from typing import Any

import power_loss
import pytest
import torch
from disk_watch import Watch, watched
from stages import COMMANDS, Stage, make_stages
from torch import nn

from ldmkit.errors import StorageError
from ldmkit.training.checkpoint import TrainingState, saved_checkpoints, step_of

SHORT = 2
"""Failing calls of each command in the default tier."""
HARMLESS = ("rmdir", "unlink")
"""Clearing away what is not needed any more may fail: the next run sweeps it."""


@pytest.fixture
def stages(pipeline, run, tmp_path) -> dict[str, Stage]:
    return make_stages(pipeline, run, tmp_path)


def undisturbed(stage: Stage, run: Callable[..., Any]) -> tuple[list[str], dict[str, Any]]:
    """The calls of a run, and what it leaves."""
    with watched(Watch(stage.root)) as watch:
        assert run(*stage.arguments).returncode == 0
    return watch.attempts, stage.left()


def fail_once(
    stage: Stage, run: Callable[..., Any], number: int, code: int, expected: dict[str, Any]
) -> bool:
    """Let one call fail, look at what is left, and run again; returns whether it did no harm."""
    stage.empty()
    with watched(Watch(stage.root, number, code)) as watch:
        done = run(*stage.arguments)
    where = f"{watch.attempts[number]}: {os.strerror(code)}"
    said = done.stderr.decode()
    if done.returncode == 0:
        kind, path = watch.attempts[number].split(" ", 1)
        known = kind == "mkdir" and f"mkdir {path}" in watch.attempts[:number]
        assert kind in HARMLESS or known, where
        assert stage.result.exists(), where
    else:
        assert done.returncode == 4, (where, said)
        assert said.count("\n") == 1, (where, said)
        assert said.startswith("error: "), (where, said)
        assert os.strerror(code) in said, (where, said)
        assert str(stage.root) in said, (where, said)
    assert stage.problems() == [], where
    history = power_loss.history_of(watch.trace)
    for path, data in power_loss.committed(history, len(watch.trace)).items():
        assert (stage.root / path).read_bytes() == data, (where, path)
    again = run(*stage.arguments)
    assert again.returncode == 0, (where, again.stderr)
    assert stage.left() == expected, where
    assert stage.temporaries() == [], where
    return done.returncode == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_a_failing_call_ends_in_a_sentence_and_loses_nothing(name, stages, run):
    calls, expected = undisturbed(stages[name], run)
    numbers = random.Random(name).sample(range(len(calls)), SHORT)
    for turn, number in enumerate(numbers):
        fail_once(stages[name], run, number, (errno.ENOSPC, errno.EIO)[turn % 2], expected)


def test_unfinished_samples_of_another_command_stay(stages, run):
    stage = stages["sample"]
    other = stage.root / "other.safetensors"
    sampling = [*stage.arguments[:3], "1", *stage.arguments[4:]]
    assert sampling[2] == "--num"
    sampling[sampling.index(str(stage.result))] = str(other)
    assert run(*stage.arguments).returncode == 0
    assert run(*sampling).returncode == 0
    parts = stage.result.with_name(f"{stage.result.name}.parts")
    parts.mkdir()
    shutil.copy(other, parts / "000000000.safetensors")
    assert run(*stage.arguments).returncode == 0
    assert (parts / "000000000.safetensors").exists()
    shutil.copy(stage.result, parts / "000000000.safetensors")
    assert run(*stage.arguments).returncode == 0
    assert not parts.exists()


def test_checkpoints_that_a_stopped_run_could_not_drop_go_with_the_next_save(tmp_path):
    state = TrainingState(tmp_path, {"network": nn.Linear(2, 2)}, {})
    for step in (1, 2):
        state.save(step)
    with watched(Watch(tmp_path)) as watch:
        state.save(3)
    dropping = next(n for n, one in enumerate(watch.attempts) if "step-000000001.tmp" in one)
    shutil.rmtree(tmp_path / "checkpoints")
    for step in (1, 2):
        state.save(step)
    with pytest.raises(StorageError, match="cannot remove"), watched(Watch(tmp_path, dropping)):
        state.save(3)
    again = TrainingState(tmp_path, {"network": nn.Linear(2, 2)}, {})
    assert again.load_latest(torch.device("cpu")) == 3
    again.save(3)
    assert [step_of(path) for path in saved_checkpoints(state.directory)] == [2, 3]


def test_the_only_whole_checkpoint_never_goes(tmp_path):
    state = TrainingState(tmp_path, {"network": nn.Linear(2, 2)}, {})
    for step in (1, 2):
        state.save(step)
    shutil.copytree(
        tmp_path / "checkpoints/step-000000002", tmp_path / "checkpoints/step-000000003"
    )
    for step in (2, 3):
        (tmp_path / f"checkpoints/step-00000000{step}/state.safetensors").write_bytes(b"x")
    assert state.load_latest(torch.device("cpu")) == 1
    state.save(1)
    assert state.load_latest(torch.device("cpu")) == 1


def test_checkpoints_go_only_when_a_newer_one_is_whole(tmp_path):
    state = TrainingState(tmp_path, {"network": nn.Linear(2, 2)}, {})
    for step in (1, 2):
        state.save(step)
    with watched(Watch(tmp_path)) as watch:
        state.save(3)
    committed = watch.attempts.index("rename checkpoints/step-000000003")
    shutil.rmtree(tmp_path / "checkpoints")
    for step in (1, 2):
        state.save(step)
    needed = [n for n in range(committed + 1) if not watch.attempts[n].startswith(HARMLESS)]
    for number in needed:
        state.saved_step = 2
        with pytest.raises(StorageError), watched(Watch(tmp_path, number)):
            state.save(3)
        assert [step_of(path) for path in saved_checkpoints(state.directory)] == [1, 2]
        assert state.load_latest(torch.device("cpu")) == 2
    state.save(3)
    assert [step_of(path) for path in saved_checkpoints(state.directory)] == [2, 3]


@pytest.mark.faults
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", COMMANDS)
def test_every_call_fails_once(name, stages, run, capfdbinary):
    calls, expected = undisturbed(stages[name], run)
    harmless = 0
    for number in range(len(calls)):
        for code in (errno.ENOSPC, errno.EIO):
            harmless += fail_once(stages[name], run, number, code, expected)
    with capfdbinary.disabled():
        print(f"\n{name}: {2 * len(calls)} failing calls, {harmless} of them harmless")
