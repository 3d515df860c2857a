"""SIGTERM to any one of two processes, at any moment of a step: both save and leave, soon, every time."""

import random

import pytest

from conftest import ae_config, diffusion_config
from ldmkit.training.checkpoint import saved_checkpoints, step_of
from test_ranks import job, left, torchrun

TRIALS = 20
LIMIT = 840
MARGIN = 10.0
"""Seconds in which both have to be gone, beside the longest step."""


@pytest.mark.slow
@pytest.mark.timeout(LIMIT + 60)
@pytest.mark.parametrize("name", ["train-ae", "train-diffusion", "fsdp2"])
def test_both_are_gone_soon_twenty_times_of_twenty(name, pipeline, tmp_path):
    chance = random.Random(name)
    every = {"steps": 100_000, "save_every": 100_000, "sample_every": 100_000, "log_every": 100}
    jobs = []
    for trial in range(TRIALS):
        out = tmp_path / f"{trial}"
        if name == "train-ae":
            data, config = pipeline.data, ae_config(pipeline.data, out, **every)
        else:
            shard = {"shard": "fsdp2"} if name == "fsdp2" else {}
            data = pipeline.latents
            config = diffusion_config(data, out, **every, **shard)
        order = [trial % 2, chance.randrange(1, 6), chance.uniform(0.0, 0.2)]
        jobs.append(job(config, data, term=order))
    torchrun(2, jobs, tmp_path / "jobs.json", limit=LIMIT)
    waits = []
    for trial in range(TRIALS):
        both = left(tmp_path / f"{trial}", 2)
        assert [one.code for one in both] == [75, 75]
        assert len({len(one.digests) for one in both}) == 1
        # `train-ae` has one from before its adversary begins
        newest = saved_checkpoints(tmp_path / f"{trial}" / "checkpoints")[-1]
        assert step_of(newest) == len(both[0].digests) > 0
        sent = both[trial % 2].times["sent"]
        wait = max(one.times["ended"] for one in both) - sent
        assert wait < max(one.times["longest_step"] for one in both) + MARGIN
        waits.append(wait)
    print(
        f"{name}: gone after {min(waits):.2f} to {max(waits):.2f} s, median {sorted(waits)[10]:.2f}"
    )
