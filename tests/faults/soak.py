"""Hours of training, killed again and again: `python tests/faults/soak.py OUT --steps 40000 --every 60`.

Two runs of the same config go side by side. One is killed (SIGKILL) at random moments, on average after
`--every` seconds, and started again; after each kill `verify` must find no damage. The other is left
alone, and its memory and open files are read once a second. In the end both must have written the same
weights, memory must not grow and the number of open files must not rise. Exit 0 if all of that holds, else 1.
Linux only: it reads /proc.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ldmkit.artefacts import check_path
from ldmkit.container import read_header
from ldmkit.training.checkpoint import saved_checkpoints, step_of

MIB = 2**20
ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "ldmkit")
SMALL_AE = ("--preset", "tiny", "--steps", "4", "--disc.weight", "0", "--preprocessing.size", "32")
SMALL_UNET = ("--unet.channels", "32", "--unet.attention-factors", "2", "--batch-size", "4")
GROWTH = 1.0
"""MiB an hour that memory may grow, beyond twice the error of the slope."""
SETTLED = 0.25
"""Share of a life after which memory is expected to be even."""
LEAVING = 5
"""Readings at the end that may be of a process that clears up."""


class Reading(NamedTuple):
    """What a process held at a moment."""

    seconds: float
    resident: float
    """MiB."""
    files: int


def main() -> int:
    """Run both, say what was found."""
    options = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    options.add_argument("out", type=Path, help="directory, which must not be there yet")
    options.add_argument("--steps", type=int, default=40_000, help="of each of the two runs")
    options.add_argument("--every", type=float, default=60.0, help="mean seconds from kill to kill")
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    given.out.mkdir(parents=True)
    prepare(given.out)
    whole = start(given.out / "whole", given.steps, given.out)
    draw = random.Random(given.seed)
    killed, kills, damages = start(given.out / "killed", given.steps, given.out), 0, []
    due = time.monotonic() + draw.expovariate(1 / given.every)
    readings: list[Reading] = []
    while None in (whole.poll(), killed.poll()):
        time.sleep(1)
        readings += [] if whole.poll() is not None else reading_of(whole.pid)
        if killed.poll() is None and time.monotonic() > due:
            killed.send_signal(signal.SIGKILL)
            killed.wait()
            kills += 1
            damages += damage(given.out / "killed")
            killed = start(given.out / "killed", given.steps, given.out)
            due = time.monotonic() + draw.expovariate(1 / given.every)
    report = report_of(given.out, kills, damages, readings) | {
        "codes": [whole.returncode, killed.returncode]
    }
    print(json.dumps(report, indent=2))
    return 0 if sound(report) else 1


def prepare(out: Path) -> None:
    """A small autoencoder and its latents."""
    pictures = str(ROOT / "examples/data/emoji-64-00000.tar")
    run("train-ae", pictures, *SMALL_AE, "--out", str(out / "ae"))
    model = str(out / "ae/autoencoder.safetensors")
    run("encode", pictures, "--ae", model, "--out", str(out / "latents"))


def run(*arguments: str) -> None:
    """One command, to its end."""
    subprocess.run([*COMMAND, *arguments], check=True, stdout=subprocess.DEVNULL)


def start(out: Path, steps: int, shared: Path) -> subprocess.Popen[bytes]:
    """Begin or go on with a training; what it says is added to OUT.log."""
    plan = ("--steps", str(steps), "--save-every", "100", "--sample-every", str(steps))
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [
                *(*COMMAND, "train-diffusion", str(shared / "latents"), "--preset", "tiny"),
                *(*SMALL_UNET, *plan, "--device", "cpu", "--out", str(out)),
            ],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def reading_of(process: int) -> list[Reading]:
    """Memory and files of a process; nothing when it has just left."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        files = len(list(Path(f"/proc/{process}/fd").iterdir()))
    except (OSError, IndexError):
        return []
    return [Reading(time.monotonic(), pages * os.sysconf("SC_PAGE_SIZE") / MIB, files)]


def damage(out: Path) -> list[str]:
    """What `verify` says of what a kill left."""
    return [text for found in check_path(out) for text in found.problems] if out.exists() else []


def report_of(
    out: Path, kills: int, damages: list[str], readings: Sequence[Reading]
) -> dict[str, object]:
    """All that was found."""
    even = readings[int(len(readings) * SETTLED) : -LEAVING]
    hours = np.array([one.seconds for one in even]) / 3600
    memory = np.array([one.resident for one in even])
    (slope, _), covariance = np.polyfit(hours, memory, 1, cov=True)
    models = [out / name / "diffusion.safetensors" for name in ("whole", "killed")]
    same = len({read_header(file).fingerprint for file in models}) == 1
    last = saved_checkpoints(out / "killed" / "checkpoints")[-1]
    return {
        "kills": kills,
        "damages": damages,
        "steps": step_of(last),
        "same_weights": same,
        "hours": round(float(hours[-1] - hours[0]), 3),
        "memory_mib": [round(float(memory.min()), 1), round(float(memory.max()), 1)],
        "memory_mib_per_hour": round(float(slope), 3),
        "memory_error": round(float(np.sqrt(covariance[0, 0])), 3),
        "files": [min(one.files for one in even), max(one.files for one in even)],
        "files_at_the_end": [even[0].files, even[-1].files],
    }


def sound(report: dict[str, object]) -> bool:
    """Whether all of it is as it has to be."""
    slope, error = float(str(report["memory_mib_per_hour"])), float(str(report["memory_error"]))
    return (
        report["codes"] == [0, 0]
        and not report["damages"]
        and bool(report["same_weights"])
        and slope - 2 * error < GROWTH
    )


if __name__ == "__main__":
    sys.exit(main())
