"""Commands that are killed lose nothing, and end with the bytes of those that were not."""

import pytest
from kill_trials import (
    COMMANDS,
    damages,
    every_kill,
    job_of,
    named_kills,
    newest_whole,
    random_kills,
    trial,
    undisturbed,
)
from killer import serving

RANDOM, FULL_RANDOM = 3, 100
SPREAD = {"train-ae": 6, "train-diffusion": 6, "encode": 12, "sample": 12}
"""Places at which the short version kills, spread over the run, the ends among them."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server")) as found:
        yield found


def spread(points, count):
    """So many of them, evenly, with the last one."""
    return [points[(number + 1) * len(points) // count - 1] for number in range(count)]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_loses_nothing_and_ends_as_one_that_was_not(
    name, server, pipeline, tmp_path
):
    job = job_of(name, pipeline, tmp_path)
    whole = undisturbed(server, job, 2)
    points = list(every_kill(whole.calls))
    assert {call.name for call in whole.calls} >= {"save", "fsync", "replace", "rmdir"}
    tally = named_kills(server, job, whole, spread(points, SPREAD[name]), 0)
    assert (tally.failures, tally.count["kills"] >= SPREAD[name]) == ([], True)
    tally = random_kills(server, job, whole, RANDOM, 0)
    assert (tally.failures, tally.count["kills"] >= RANDOM) == ([], True)


@pytest.mark.faults
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_hundred_kills_at_random_moments(name, server, pipeline, tmp_path, capsys):
    job = job_of(name, pipeline, tmp_path)
    whole = undisturbed(server, job, 5)
    tally = random_kills(server, job, whole, FULL_RANDOM, 0)
    with capsys.disabled():
        print(f"\n{tally}; undisturbed {whole.seconds:.2f} s")
    assert tally.failures == []


@pytest.mark.faults
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_kill_around_every_call_that_writes(name, server, pipeline, tmp_path, capsys):
    job = job_of(name, pipeline, tmp_path)
    whole = undisturbed(server, job, 2)
    tally = named_kills(server, job, whole, list(every_kill(whole.calls)), 0)
    with capsys.disabled():
        print(f"\n{tally}; {len(whole.calls)} calls")
    assert tally.failures == []


def test_the_trial_would_notice_what_is_lost_damaged_or_left(server, pipeline, tmp_path):
    """A shard with a flipped bit, other bytes in the end, and a leftover are all seen."""
    job = job_of("encode", pipeline, tmp_path)
    whole = undisturbed(server, job)
    commit = [call.name for call in whole.calls].index("replace")
    outcome = trial(server, job, whole, [{"kill_at": commit, "kill_where": "after"}])
    assert outcome.sound
    assert outcome.kills == 1
    shard = job.root / "set/00000.safetensors"
    (job.root / "set/left.txt").touch()
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert any("damaged" in text for text in damages(job.root))
    outcome = trial(server, job, whole._replace(tree={}), [], clean=False)
    assert len(outcome.wrong) == len(whole.tree) + 1
    assert newest_whole(job.root) is None


def test_leftovers_of_a_kill_after_the_last_file_go_with_the_next_start(server, pipeline, tmp_path):
    for name in ("train-ae", "sample"):
        job = job_of(name, pipeline, tmp_path / name)
        whole = undisturbed(server, job)
        names = [call.name for call in whole.calls]
        last = len(names) - 1 - names[::-1].index("replace")
        outcome = trial(server, job, whole, [{"kill_at": last, "kill_where": "after"}])
        assert outcome.sound, outcome
        assert outcome.kills == 1
