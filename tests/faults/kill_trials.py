"""One command, killed and run again: what is left in between, and what comes out in the end."""

import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from killer import HALVES, Call, Child, Ended, Orders, Server, Where

from conftest import ae_config, diffusion_config
from ldmkit.artefacts import check_path
from ldmkit.autoencoder_configs import AutoencoderConfig, PreprocessingConfig
from ldmkit.configfile import to_toml
from ldmkit.data_configs import EncodeConfig
from ldmkit.diffusion_configs import AverageConfig, UNetConfig
from ldmkit.durable import TEMPORARY_MARK
from ldmkit.errors import DataError
from ldmkit.fields import Config
from ldmkit.generation_configs import SampleConfig
from ldmkit.modelfile import load
from ldmkit.training.checkpoint import STATE, saved_checkpoints, step_of
from ldmkit.training.snapshots import FOLDER as SNAPSHOTS

COMMANDS = ("train-ae", "encode", "train-diffusion", "sample")
TRAINERS = ("train-ae", "train-diffusion")
KILLED = -9
SMALL_AE = AutoencoderConfig(channels=4, multipliers=(1, 2), residual_blocks=1, norm_groups=2)
SMALL_UNET = UNetConfig(
    channels=8, multipliers=(1,), residual_blocks=1, attention_factors=(), norm_groups=2
)
UNFINISHED = "belongs to a set without manifest.json"
"""What `verify` says of shards whose set is not committed yet; they are whole."""


class Job(NamedTuple):
    """A command, and the directory where all lies that it writes."""

    name: str
    arguments: list[str]
    root: Path


class Whole(NamedTuple):
    """The same, undisturbed."""

    tree: dict[str, str]
    seconds: float
    calls: list[Call]


class Outcome(NamedTuple):
    """What became of one trial; all lists are empty where all went well."""

    kills: int
    corrupt: list[str]
    """What `verify` complained of after a kill."""
    lost: list[str]
    """What had been committed and was gone, was done anew, or was not gone on with."""
    wrong: list[str]
    """What differs in the end from the undisturbed run, leftovers included."""

    @property
    def sound(self) -> bool:
        """Whether all went well."""
        return not (self.corrupt or self.lost or self.wrong)


def config_of(name: str, pipeline, root: Path, **changes: object) -> Config:
    """A command of a second, with several checkpoints, shards or parts."""
    if name == "train-ae":
        plan = {
            "steps": 8,
            "sample_every": 4,
            "holdout": 0.25,
            "preprocessing": PreprocessingConfig(size=16, flip=True),
            "autoencoder": SMALL_AE,
        }
        return ae_config(pipeline.data, root / "run", **(plan | changes))
    if name == "train-diffusion":
        plan = {
            "steps": 6,
            "sample_every": 4,
            "holdout": 0.25,
            "validate_every": 4,
            "ae": pipeline.ae,
            "average": AverageConfig(kind="power", snapshots=3),
            "unet": SMALL_UNET,
        }
        return diffusion_config(pipeline.latents, root / "run", **(plan | changes))
    if name == "encode":
        plan = {"data": str(pipeline.data), "ae": pipeline.ae, "shard_size": 3, "batch_size": 2}
        return EncodeConfig.model_validate(plan | {"out": root / "set"} | changes)
    plan = {"model": pipeline.ldm, "num": 8, "batch_size": 2, "steps": 2}
    return SampleConfig.model_validate(plan | {"out": root / "samples.safetensors"} | changes)


def job_of(name: str, pipeline, folder: Path, **changes: object) -> Job:
    """The command, its config in a file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "given.toml"
    file.write_text(to_toml(config_of(name, pipeline, folder / "root", **changes)))
    return Job(name, [name, "--config", str(file)], folder / "root")


def begin(server: Server, job: Job, **orders) -> Child:
    """Start a command."""
    return server.start(job.arguments, Orders(root=str(job.root), **orders))


def undisturbed(server: Server, job: Job, times: int = 1) -> Whole:
    """Run a command to its end; the median of its durations."""
    found: list[Whole] = []
    for _ in range(times):
        clear(job.root)
        ended = server.wait(begin(server, job))
        assert ended.code == 0, ended.stderr
        found.append(Whole(tree(job.root), ended.seconds, ended.trace.calls))
    assert all(one.tree == found[0].tree for one in found)
    seconds = sorted(one.seconds for one in found)[times // 2]
    return found[0]._replace(seconds=seconds)


def clear(root: Path) -> None:
    """Leave an empty directory."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)


def tree(root: Path) -> dict[str, str]:
    """Everything below a directory: sha256 of files, "directory" of directories.

    Of a log, what it says without the rate, which differs from run to run.
    """
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_dir():
            found[str(path.relative_to(root))] = "directory"
            continue
        data = path.read_bytes()
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in data.splitlines()]
            left_out = ("images_per_second", "crc32")
            kept = [{k: x for k, x in line.items() if k not in left_out} for line in lines]
            data = json.dumps(kept).encode()
        found[str(path.relative_to(root))] = hashlib.sha256(data).hexdigest()
    return found


def every_kill(calls: list[Call]) -> Iterator[tuple[int, Where]]:
    """Each place where a run can kill itself: around every call, and in the middle of those that take time."""
    for number, call in enumerate(calls):
        yield number, "before"
        if call.name in HALVES:
            yield number, "half"
        yield number, "after"


def trial(
    server: Server, job: Job, whole: Whole, orders: list[dict | float], *, clean: bool = True
) -> Outcome:
    """Kill a command again and again, then let it end.

    Args:
        server: of the processes.
        job: the command.
        whole: what is to come out.
        orders: of each kill: what the process is told, or seconds after which it is killed from outside.
        clean: begin with nothing.
    """
    if clean:
        clear(job.root)
    kills, committed = 0, set[str]()
    corrupt: list[str] = []
    lost: list[str] = []
    wrong: list[str] = []
    newest: int | None = None
    for order in [*orders, None]:
        told = order if isinstance(order, dict) else {}
        child = begin(server, job, **told)
        if isinstance(order, float):
            ended = server.wait_or_kill(child, order)
        else:
            ended = server.wait(child)
        lost += _not_gone_on_with(job, ended, newest, committed)
        committed |= commits_of(ended)
        kills += ended.code == KILLED
        if order is None:
            wrong += [] if ended.code == 0 else [f"exit {ended.code}: {ended.stderr}"]
            break
        if ended.code not in (0, KILLED):
            lost.append(f"exit {ended.code}: {ended.stderr}")
        corrupt += damages(job.root)
        newest = newest_whole(job.root)
        lost += _gone(job, committed, newest)
    found = tree(job.root)
    wrong += [
        f"{name}: {found.get(name, 'missing')} instead of {whole.tree.get(name, 'nothing')}"
        for name in sorted({*found, *whole.tree})
        if found.get(name) != whole.tree.get(name)
    ]
    return Outcome(kills, corrupt, lost, wrong)


def commits_of(ended: Ended) -> set[str]:
    """What got its final name: checkpoints, shards, parts, model and sample files."""
    return {
        call.path
        for call in ended.trace.calls
        if call.name == "replace"
        and TEMPORARY_MARK not in call.path
        and (call.path.endswith(".safetensors") or Path(call.path).name.startswith("step-"))
    }


def damages(root: Path) -> list[str]:
    """What `verify` finds wrong in all that is there."""
    problems = [text for found in check_path(root) for text in found.problems]
    return [text for text in problems if UNFINISHED not in text]


def newest_whole(root: Path) -> int | None:
    """The newest checkpoint that can be read."""
    for path in reversed(saved_checkpoints(root / "run/checkpoints")):
        try:
            load(path / STATE, kind="checkpoint")
        except DataError:
            continue
        return step_of(path)
    return None


def _not_gone_on_with(
    job: Job, ended: Ended, newest: int | None, committed: set[str]
) -> Iterator[str]:
    for step in ended.trace.resumed:
        if step != (newest or 0):
            yield f"went on with step {step}, and the newest whole checkpoint was {newest}"
    for path in sorted(commits_of(ended) & committed):
        if SNAPSHOTS not in Path(path).parts:  # those of steps that are done again are dropped
            yield f"made again: {path}"


def _gone(job: Job, committed: set[str], newest: int | None) -> Iterator[str]:
    steps = [step_of(Path(path)) for path in committed if "checkpoints" in path]
    if steps and (newest is None or newest < max(steps)):
        yield f"checkpoint {max(steps)} was committed, and the newest whole one is {newest}"
    done = job.root / "samples.safetensors"
    for path in committed:
        replaced = (".parts" in path and done.exists()) or SNAPSHOTS in Path(path).parts
        if "checkpoints" not in path and not replaced and not Path(path).exists():
            yield f"gone: {path}"


class Tally:
    """Counts outcomes; the rows of the table in docs/reliability.md."""

    def __init__(self, name: str) -> None:
        self.name, self.count, self.late = name, Counter[str](), 0
        self.failures: list[str] = []

    def add(self, what: str, outcome: Outcome) -> None:
        """One more trial."""
        self.count["trials"] += 1
        self.count["kills"] += outcome.kills
        for kind in ("corrupt", "lost", "wrong"):
            found = getattr(outcome, kind)
            self.count[kind] += bool(found)
            self.failures += [f"{what}: {kind}: {text}" for text in found]

    def __str__(self) -> str:
        figures = ", ".join(
            f"{self.count[k]} {k}" for k in ("trials", "kills", "corrupt", "lost", "wrong")
        )
        return f"{self.name}: {figures}"


def random_kills(server: Server, job: Job, whole: Whole, count: int, seed: int) -> Tally:
    """Kill from outside at moments uniform over the run's duration, until so many kills have met it."""
    draw, tally = random.Random(f"{job.name} {seed}"), Tally(f"{job.name}, random moments")
    met = 0
    while met < count:
        moments: list[dict | float] = [draw.random() * whole.seconds]
        if draw.random() < 0.25:
            moments.append(draw.random() * whole.seconds)
        outcome = trial(server, job, whole, moments)
        tally.add(" s, ".join(f"{moment:.3f}" for moment in moments), outcome)
        met += outcome.kills
    return tally


def named_kills(
    server: Server, job: Job, whole: Whole, points: list[tuple[int, Where]], seed: int
) -> Tally:
    """The process kills itself around the n-th call."""
    draw, tally = random.Random(f"{job.name} {seed}"), Tally(f"{job.name}, around calls")
    for number, where in points:
        orders: list[dict | float] = [{"kill_at": number, "kill_where": where}]
        if draw.random() < 0.1:
            orders.append({"kill_at": draw.randrange(20), "kill_where": "before"})
        outcome = trial(server, job, whole, orders)
        call = whole.calls[number]
        if not outcome.kills:
            outcome.wrong.append("the kill did not meet it")
        tally.add(f"{where} call {number} ({call.name} {Path(call.path).name})", outcome)
    return tally
