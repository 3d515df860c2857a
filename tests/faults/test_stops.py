"""Commands that are asked to stop, and that are started many times at once."""

import os
import random
import signal
import time
from typing import NamedTuple

import pytest
from kill_trials import COMMANDS, TRAINERS, begin, clear, damages, job_of, tree, undisturbed
from killer import serving

from ldmkit.training.checkpoint import saved_checkpoints

INTERRUPTED = 75
STEPS = 40
AT_ONCE = 10
REFUSED = "another ldmkit is at work in"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server")) as found:
        yield found


def long_job(name, pipeline, folder, **changes):
    """A run that saves only where it is stopped, and at its end."""
    plan = {
        "steps": STEPS,
        "batch_size": 8,
        "save_every": 1000,
        "sample_every": 1000,
        "holdout": 0.0,
    }
    if name == "train-diffusion":
        plan |= {"ae": None, "validate_every": 1000}
    return job_of(name, pipeline, folder, **(plan | changes))


def model_of(job):
    """Digests of the model files, which are all that an interruption leaves as it would be."""
    found = {name: x for name, x in tree(job.root).items() if name.endswith(".safetensors")}
    kept = {name: x for name, x in found.items() if "checkpoints" not in name}
    assert kept
    return kept


def stopped(server, job, *after):
    """Run a job, stopped after so many steps of each start, to its end."""
    clear(job.root)
    done = 0
    for steps in after:
        ended = server.wait(begin(server, job, stop_after=steps))
        done += steps
        assert ended.code == INTERRUPTED, ended.stderr
        assert f"saved before step {done}; run again" in ended.stderr
    ended = server.wait(begin(server, job))
    assert (ended.code, ended.trace.resumed) == (0, [done]), ended.stderr
    return model_of(job)


def stops(server, name, pipeline, folder, moments, **changes):
    """Stop at each of these steps, once and twice in a row; returns those that changed the weights."""
    job = long_job(name, pipeline, folder, **changes)
    undisturbed(server, job)
    whole = model_of(job)
    return [
        after
        for step in moments
        for after in ((step,), (step, 1))
        if stopped(server, job, *after) != whole
    ]


@pytest.mark.parametrize("name", TRAINERS)
def test_stopped_at_a_step_and_twice_in_a_row_the_weights_are_the_same(
    name, server, pipeline, tmp_path
):
    changes = {"steps": 8, "accumulate": 4}
    assert stops(server, name, pipeline, tmp_path, [5], **changes) == []


def kinds():
    """Trainer, parts of a batch, and reading processes where the trainer has them."""
    for accumulate in (1, 4):
        yield "train-diffusion", {"accumulate": accumulate}
        for workers in (0, 2):
            yield "train-ae", {"accumulate": accumulate, "workers": workers}


@pytest.mark.faults
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("name", "changes"), list(kinds()))
def test_stopped_at_every_step_the_weights_are_the_same(
    name, changes, server, pipeline, tmp_path, capsys
):
    wrong = stops(server, name, pipeline, tmp_path, range(1, 21), **changes)
    with capsys.disabled():
        print(
            f"\n{name} {changes}: 40 runs stopped at steps 1 to 20, {len(wrong)} with other weights"
        )
    assert wrong == []


class Left(NamedTuple):
    """How a run left that was sent SIGTERM."""

    code: int
    seconds: float
    """From the signal."""
    step: float
    """Seconds of one step, before."""
    saved: int
    damaged: list[str]

    @property
    def is_sound(self) -> bool:
        """Whether it has saved, and said so."""
        return self.code == INTERRUPTED and self.saved > 0 and not self.damaged


def lines_in(log, count):
    """Wait for so many lines; when that was."""
    while not log.exists() or log.read_bytes().count(b"\n") < count:
        time.sleep(0.005)
    return time.monotonic()


def stop_at_random(server, job, draw):
    """SIGTERM at a random moment of training."""
    clear(job.root)
    log = job.root / "run/metrics.jsonl"
    child = begin(server, job)
    first = lines_in(log, 1)
    step = lines_in(log, 2) - first
    time.sleep(draw.random())
    os.kill(child.pid, signal.SIGTERM)
    sent = time.monotonic()
    code = server.wait(child).code
    saved = saved_checkpoints(job.root / "run/checkpoints")
    return Left(code, time.monotonic() - sent, step, len(saved), damages(job.root))


@pytest.mark.parametrize("name", TRAINERS)
def test_sigterm_at_a_random_moment_saves_and_leaves(name, server, pipeline, tmp_path):
    job = long_job(name, pipeline, tmp_path, steps=100_000)
    left = stop_at_random(server, job, random.Random(name))
    assert left.is_sound
    assert left.seconds < 60  # where others compute too; the full version has the promised limit


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", TRAINERS)
def test_sigterm_twenty_times(name, server, pipeline, tmp_path, capsys):
    job, draw = long_job(name, pipeline, tmp_path, steps=100_000), random.Random(name)
    found = [stop_at_random(server, job, draw) for _ in range(20)]
    good = [left for left in found if left.is_sound and left.seconds < left.step + 10]
    slowest = max(found, key=lambda left: left.seconds)
    with capsys.disabled():
        print(
            f"\n{name}: {len(good)} of 20 saved and gone with 75 within a step and 10 s, the slowest in "
            f"{slowest.seconds:.2f} s (a step took {slowest.step:.2f} s)"
        )
    assert len(good) == 20


def start_together(server, jobs, workers, folder):
    """Start all at once; the disk is held until no more of them are left than can work; returns how all ended."""
    clear(jobs[0].root)
    hold = folder / "hold"
    hold.touch()
    children = [begin(server, job, patience=0.05, hold=str(hold)) for job in jobs]
    deadline = time.monotonic() + 200
    while sum(not server.has_ended(child) for child in children) > workers:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    hold.unlink()
    return [server.wait(child) for child in children]


def require_refused(ended):
    """One sentence, and exit code 2."""
    assert ended.code == 2, ended.stderr
    (sentence,) = [line for line in ended.stderr.splitlines() if REFUSED in line]
    assert sentence.endswith("wait for it, or give another --out")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_of_ten_starts_in_one_directory_one_runs(name, server, pipeline, tmp_path):
    job = job_of(name, pipeline, tmp_path)
    whole = undisturbed(server, job)
    first, *others = sorted(
        start_together(server, [job] * AT_ONCE, 1, tmp_path), key=lambda ended: ended.code
    )
    assert first.code == 0, first.stderr
    for ended in others:
        require_refused(ended)
    assert tree(job.root) == whole.tree


@pytest.mark.parametrize("name", ["encode", "sample"])
def test_who_waits_long_enough_finds_it_done(name, server, pipeline, tmp_path):
    job = job_of(name, pipeline, tmp_path)
    whole = undisturbed(server, job)
    clear(job.root)
    children = [begin(server, job, patience=100.0) for _ in range(4)]
    for child in children:
        ended = server.wait(child)
        assert ended.code == 0, ended.stderr
    assert tree(job.root) == whole.tree


@pytest.mark.parametrize("name", ["encode", "sample"])
def test_jobs_that_share_the_work_run_together_and_each_of_them_once(
    name, server, pipeline, tmp_path
):
    """Two processes for each of two jobs: one of each pair works."""
    job = job_of(name, pipeline, tmp_path)
    whole = undisturbed(server, job)
    shared = [
        job._replace(arguments=[*job.arguments, "--jobs", part])
        for part in ("1/2", "1/2", "2/2", "2/2")
    ]
    found = start_together(server, shared, 2, tmp_path)
    for pair in (found[:2], found[2:]):
        first, second = sorted(pair, key=lambda ended: ended.code)
        assert first.code == 0, first.stderr
        require_refused(second)
    assert tree(job.root) == whole.tree
