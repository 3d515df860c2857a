"""What `torchrun` starts in tests: jobs one after the other, watched from inside; also run without it.

A job is a JSON object: command, argument, config (a TOML file), record (path of what it leaves, `-RANK.json` added)
and, where wanted, signal (rank, step, number, and a file that says it was sent), term (rank, step, and seconds after the
step has begun) and poison (a step).
"""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ldmkit.cli import app
from ldmkit.data.images import TrainingImages
from ldmkit.data.latent_set import LatentSet
from ldmkit.recipes import train_ae, train_diffusion
from ldmkit.training import ranks
from ldmkit.training.sharding import local_elements, whole


def digest(module: torch.nn.Module) -> str:
    """Of all weights."""
    weights = [whole(p).detach().flatten() for p in module.parameters()]
    return hashlib.sha256(torch.cat(weights).numpy().tobytes()).hexdigest()


def held(learner: Any) -> dict[str, list[int]]:
    """How many numbers of the second stage this process holds, and how many there are."""
    if not hasattr(learner, "tracked"):
        return {}
    moments = [
        value
        for optimizer in learner.optimizers.values()
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    ]
    weights = list(learner.model.parameters())
    groups = {
        "weights": weights,
        "gradients": [p.grad for p in weights if p.grad is not None],
        "average": list(learner.average.parameters()),
        "tracked": [p for module in learner.tracked.values() for p in module.parameters()],
        "moments": moments,
    }
    return {
        name: [sum(map(local_elements, tensors)), sum(x.numel() for x in tensors)]
        for name, tensors in groups.items()
    }


def run_job(job: dict[str, Any]) -> int:
    """Run a command in this process; leaves its exit code, the samples read and the weights' digests."""
    ids: list[Any] = []
    digests: list[str] = []
    numbers: dict[str, list[int]] = {}
    times: dict[str, float] = {}

    def watched(take_step, place: int):
        def step(learners, config, *rest):
            if job.get("signal"):
                send(job["signal"], rest[place])
            send_later(job.get("term"), rest[place], times)
            begun = time.time()
            result = take_step(learners, config, *rest)
            times["longest_step"] = max(times.get("longest_step", 0.0), time.time() - begun)
            digests.append(digest(learners.model))
            numbers.update(held(learners))
            return result

        return step

    def read(latents, indices):
        ids.append(indices.tolist())
        return former_read(latents, indices)

    def picture(images, place):
        ids.append(list(place))
        return former_picture(images, place)

    def draw(*arguments):
        batch = former_draw(*arguments)
        step = len(digests)
        if job.get("poison") == step and ranks.rank() == ranks.size() - 1:
            batch.latents[-1] = torch.nan
        return batch

    former_read, former_picture = LatentSet.read, TrainingImages.__getitem__
    former_draw = train_diffusion.draw_batch
    with ExitStack() as patches:
        for replaced in (
            patch.object(LatentSet, "read", read),
            patch.object(TrainingImages, "__getitem__", picture),
            patch.object(train_diffusion, "draw_batch", draw),
            patch.object(train_diffusion, "take_step", watched(train_diffusion.take_step, 0)),
            patch.object(train_ae, "take_step", watched(train_ae.take_step, 1)),
        ):
            patches.enter_context(replaced)
        try:
            app([job["command"], job["argument"], "--config", job["config"]])
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    rank = os.environ.get("RANK", "0")
    times["ended"] = time.time()
    left = {"code": code, "ids": ids, "digests": digests, "held": numbers, "times": times}
    Path(f"{job['record']}-{rank}.json").write_text(json.dumps(left))
    return code


def send(order: list[Any], step: int) -> None:
    """Send this process a signal, once."""
    rank, at, number, said = order
    if ranks.rank() == rank and step == at and not Path(said).exists():
        Path(said).touch()
        os.kill(os.getpid(), number)


def send_later(order: list[Any] | None, step: int, times: dict[str, float]) -> None:
    """Send this process SIGTERM some time after a step has begun, whatever it is doing then."""
    rank, at, delay = order or (None, None, 0.0)

    def terminate() -> None:
        times["sent"] = time.time()
        os.kill(os.getpid(), signal.SIGTERM)

    if ranks.rank() == rank and step == at:
        threading.Timer(delay, terminate).start()


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    for job in jobs:
        code = run_job(job)
        if code == 1 or len(jobs) == 1:  # 1: another process is gone
            sys.exit(code)
