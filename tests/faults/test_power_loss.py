"""Whenever the power goes, what was committed is whole, and the same command ends with the same bytes."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import power_loss
import pytest
from disk_watch import Call, Watch, watched
from stages import COMMANDS, Stage, make_stages

SHORT, SEEDS = 2, 5
"""States of each command that the default tier resumes; random states of each moment."""


@pytest.fixture
def stages(pipeline, run, tmp_path) -> dict[str, Stage]:
    return make_stages(pipeline, run, tmp_path)


class Found(NamedTuple):
    """A state of the disk, when it may come about, and what must be in it."""

    cut: int
    state: power_loss.State
    committed: dict[str, bytes]


def traced(stage: Stage, run: Callable[..., Any]) -> tuple[list[Call], dict[str, Any]]:
    """The calls of an undisturbed run, and what it leaves."""
    with watched(Watch(stage.root)) as watch:
        assert run(*stage.arguments).returncode == 0
    return watch.trace, stage.left()


def found_states(trace: list[Call]) -> list[Found]:
    """All states that differ, of every moment."""
    history = power_loss.history_of(trace)
    found: dict[Any, Found] = {}
    for cut in range(len(trace) + 1):
        must = power_loss.committed(history, cut)
        for state in power_loss.states(history, cut, range(SEEDS)):
            for path, data in must.items():
                assert state.get(path) == data, (
                    f"before call {cut} of {len(trace)} {path} can be lost"
                )
            found.setdefault(frozenset(state.items()), Found(cut, state, must))
    end, _, whole = power_loss.states(history, len(trace), ())
    for path, data in whole.items():
        assert end.get(path) == data, f"{path} can be lost after the command has ended"
    return list(found.values())


def resume(stage: Stage, found: Found, run: Callable[..., Any], expected: dict[str, Any]) -> None:
    """What is there is whole, and the command goes on to the end from it."""
    stage.empty()
    power_loss.write(found.state, stage.root)
    where = f"{stage.name}, before call {found.cut}"
    assert stage.problems() == [], where
    done = run(*stage.arguments)
    assert done.returncode == 0, (where, done.stderr)
    assert stage.left() == expected, where
    assert stage.temporaries() == [], where


@pytest.mark.parametrize("name", COMMANDS)
def test_what_was_committed_outlasts_a_loss_of_power_at_any_moment(name, stages, run):
    trace, expected = traced(stages[name], run)
    found = found_states(trace)
    assert len(found) > len(trace) // 2
    for one in random.Random(name).sample(found, SHORT):
        resume(stages[name], one, run, expected)


@pytest.mark.faults
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", COMMANDS)
def test_every_state_after_a_loss_of_power_resumes(name, stages, run, capfdbinary):
    trace, expected = traced(stages[name], run)
    found = found_states(trace)
    for one in found:
        resume(stages[name], one, run, expected)
    with capfdbinary.disabled():
        print(f"\n{name}: {len(trace)} calls, {len(found)} states, all resumed to the same bytes")


def test_the_model_of_a_disk_loses_what_was_not_flushed():
    """The model itself: a file that was written and renamed, with and without each flush."""
    made = [Call("create", "a"), Call("write", "a", data=b"new"), Call("fsync", "a")]
    renamed = [*made, Call("rename", "a", "b"), Call("fsync", "")]
    none, everything, kept, *_ = power_loss.states(power_loss.history_of(renamed), 5, ())
    assert none == everything == kept == {"b": b"new"}
    assert power_loss.committed(power_loss.history_of(renamed), 5) == {"b": b"new"}
    history = power_loss.history_of(renamed)
    assert power_loss.states(history, 4, ())[:2] == [{}, {"b": b"new"}]
    assert power_loss.committed(history, 4) == {}
    unflushed = power_loss.history_of([call for call in renamed if call != made[2]])
    assert power_loss.states(unflushed, 4, ())[0] == {"b": b""}
    seen = {str(state) for state in power_loss.states(unflushed, 4, range(40))}
    assert seen == {str({"b": data}) for data in (b"", b"new", b"n", b"\0\0\0")}
    folder = [Call("mkdir", "x"), Call("create", "x/a"), Call("fsync", "x")]
    assert power_loss.states(power_loss.history_of(folder), 3, ())[0] == {}
