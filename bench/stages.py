"""Whole stages from disk to disk beside the bare loop, start-up of commands, and cost over the size of a set.

    python bench/stages.py encode train generate start scale --json stages.json

A stage is run on few and on many things, `--few` and `--many`: the difference says what one more of them costs, the
rest is the fixed cost of starting and ending. Its share is what the bare loop (`ours.py`, the functions that the
command itself calls) needs for one, over that. Everything is taken in turns, `--rounds` times; medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import clock
import ours
import torch
from data import write_latents, write_pictures
from measuring import alone
from workloads import SAMPLING_STEPS, Sizes, Workload

import ldmkit
from ldmkit import terminal
from ldmkit.assembly import autoencoder_facts, build_autoencoder, save_autoencoder, save_diffusion
from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.cli import COMMANDS
from ldmkit.configs import TrainDiffusionConfig
from ldmkit.data.latent_batches import samples_of_step, training_buckets
from ldmkit.data.latent_set import LatentSet
from ldmkit.data.latents import shard_name
from ldmkit.data_configs import EncodeConfig
from ldmkit.diffusion_configs import UNetConfig
from ldmkit.facts import DiffusionFacts, ShardEntry, Whitening
from ldmkit.heap import keep_heap
from ldmkit.manifest import read_manifest, write_manifest

TINY = Sizes(32, 32, (1, 2), 1, 4, 16, 5, 24, 8)
PIXELS, LATENTS, BATCH = 64, 16, 8
ENTRY = [sys.executable, "-m", "ldmkit"]
COUNTS = (1_000, 10_000, 100_000, 1_000_000)
MANY_SHARDS = 100_000
READ_BATCH, READ_STEPS = 64, 200
STARTS = 3
UNCHANGING = Whitening(mean=(0.0,) * 4, std=(1.0,) * 4)


class Row(NamedTuple):
    """One measurement."""

    what: str
    value: float
    unit: str


class Asked(NamedTuple):
    """What the command line says."""

    few: int
    many: int
    rounds: int
    threads: int
    sizes: Sizes


def beside(
    what: str,
    stage: Callable[[int], object],
    bare: Callable[[], object],
    of_bare: int,
    asked: Asked,
) -> list[Row]:
    """A stage, as a function of how many, beside a loop that does `of_bare` of them at once."""
    bare()
    each, fixed, shares = [], [], []
    others = []
    for _ in range(asked.rounds):
        loop = clock.timed(bare, "cpu")
        few, many = (clock.timed(lambda n=n: stage(n), "cpu") for n in (asked.few, asked.many))
        each.append((many.seconds - few.seconds) / (asked.many - asked.few))
        fixed.append(few.seconds - asked.few * each[-1])
        shares.append(100 * loop.seconds / of_bare / each[-1])
        others += [loop.others, few.others, many.others]
    return [
        Row(f"{what}: one more", 1e3 * statistics.median(each), "ms"),
        Row(f"{what}: fixed cost", statistics.median(fixed), "s"),
        Row(f"{what}: bare loop / one more", statistics.median(shares), "%"),
        Row(f"{what}: cores used by others", statistics.median(others), "cores"),
    ]


def encode_rows(root: Path, asked: Asked) -> list[Row]:
    """`encode` from a tar."""
    _begin(asked)
    ae = autoencoder_file(root, asked.sizes)
    tars = {count: tar_of(root, count) for count in (asked.few, asked.many)}
    bare = ours.encode(_pictures(ours.ENCODE_BATCH, asked.sizes), "cpu", "auto")

    def stage(count: int) -> None:
        with tempfile.TemporaryDirectory(dir=root) as out:
            config = EncodeConfig(data=str(tars[count]), ae=ae, out=Path(out) / "latents")
            ldmkit.encode(config)

    return beside("encode from a tar", stage, bare.step, ours.ENCODE_BATCH, asked)


def train_rows(root: Path, asked: Asked) -> list[Row]:
    """`train-diffusion` from a set on disk; one of it is a step."""
    _begin(asked)
    latents = write_latents(root / "latents", 4, 1024, (4, LATENTS, LATENTS), noisy=True)
    work = Workload("unet-train", LATENTS, BATCH, attends=False, sizes=asked.sizes)
    config = ours.diffusion_config(work, "auto")
    bare = ours.train_unet(work, "cpu", "auto")

    def stage(count: int) -> None:
        with tempfile.TemporaryDirectory(dir=root) as out:
            changes = {"latents": latents, "out": Path(out) / "ldm", "steps": count}
            ldmkit.train_diffusion(TrainDiffusionConfig.model_validate(dict(config) | changes))

    return beside("train-diffusion", stage, bare.step, 1, asked)


def generate_rows(root: Path, asked: Asked) -> list[Row]:
    """`sample | decode`, two processes, against both bare loops one after the other."""
    _begin(asked)
    ae, ldm = autoencoder_file(root, asked.sizes), diffusion_file(root, asked.sizes)
    draw = Workload("sample", LATENTS, BATCH, attends=False, sizes=asked.sizes)
    drawn = ours.sample(draw, "cpu", "auto")
    decoded = ours.decode(_pictures(BATCH, asked.sizes), "cpu", "auto")
    options = ["--sampler", "ddim", "--steps", str(SAMPLING_STEPS), "--batch-size", str(BATCH)]

    def stage(count: int) -> None:
        with tempfile.TemporaryDirectory(dir=root) as out:
            sampling = [*ENTRY, "sample", str(ldm), "--num", str(count), *options, "--out", "-"]
            decoding = [*ENTRY, "decode", "-", "--ae", str(ae), "--out", f"{out}/pictures"]
            piped(sampling, decoding)

    def bare() -> None:
        drawn.step()
        decoded.step()

    return beside("sample | decode", stage, bare, BATCH, asked)


def start_rows(root: Path, asked: Asked) -> list[Row]:
    """How long `--help` of each command takes, and a training that is done already."""
    rows = []
    for name in sorted(COMMANDS):
        took = [called([*ENTRY, name, "--help"]) for _ in range(STARTS)]
        rows.append(Row(f"ldmkit {name} --help", statistics.median(took), "s"))
    latents = write_latents(root / "latents", 1, 64, (4, 2, 2), noisy=False)
    training = small_training(latents, root / "ldm")
    rows.append(Row("train-diffusion of one step, 64 latents", called(training), "s"))
    took = [called(training) for _ in range(STARTS)]
    rows.append(Row("the same again, which is done", statistics.median(took), "s"))
    return rows


def scale_rows(root: Path, asked: Asked) -> list[Row]:
    """Cost of a batch, and of the start, over the size of a latent set."""
    _begin(asked)
    rows = []
    for count in COUNTS:
        shards = max(count // 1000, 1)
        place = write_latents(root / str(count), shards, count // shards, (4, 2, 2), noisy=False)
        rows.append(
            Row(f"{count:,} latents: a batch of {READ_BATCH}", 1e6 * batch_seconds(place), "us")
        )
        took = called(small_training(place, root / f"ldm-{count}"))
        rows.append(Row(f"{count:,} latents: train-diffusion of one step", took, "s"))
    place = long_manifest(root / "long")
    begin = time.perf_counter()
    read_manifest(place)
    rows.append(Row(f"manifest of {MANY_SHARDS:,} shards, read", time.perf_counter() - begin, "s"))
    return rows


def batch_seconds(place: Path) -> float:
    """Median seconds to find and read a batch, the digests checked and the order of the epoch drawn."""
    latents = LatentSet(place)
    latents.wait_until_verified()
    buckets, seconds = training_buckets(latents, 0.0), []
    for step in range(READ_STEPS):
        begin = time.perf_counter()
        latents.read(samples_of_step(step, buckets, batch_size=READ_BATCH, seed=0))
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def long_manifest(place: Path) -> Path:
    """A set of a great many shards, of which there is the manifest alone."""
    write_latents(place, 1, 1, (4, 2, 2), noisy=False)
    manifest = read_manifest(place)
    entries = tuple(
        ShardEntry(
            name=shard_name(number),
            start=number,
            stop=number + 1,
            count=1,
            bytes=1,
            sha256="0" * 64,
        )
        for number in range(MANY_SHARDS)
    )
    write_manifest(place, manifest.model_copy(update={"shards": entries, "count": MANY_SHARDS}))
    return place


def autoencoder_file(root: Path, sizes: Sizes) -> Path:
    """A model file with fresh weights."""
    torch.manual_seed(0)
    path, preprocessing = root / "autoencoder.safetensors", PreprocessingConfig(size=PIXELS)
    model = build_autoencoder(ours.autoencoder_config(sizes), preprocessing)
    save_autoencoder(path, model, preprocessing, {"pictures": 0, "steps": 0})
    return path


def diffusion_file(root: Path, sizes: Sizes) -> Path:
    """A model file with fresh weights, of the latents of the autoencoder's file."""
    path, work = root / "diffusion.safetensors", Workload("sample", LATENTS, 1, False, sizes)
    side = PIXELS // sizes.factor
    facts = DiffusionFacts(
        fingerprint="",
        autoencoder=autoencoder_facts(root / "autoencoder.safetensors").fingerprint,
        latent_shape=(sizes.latent_channels, side, side),
        factor=sizes.factor,
        whitening=UNCHANGING,
        trained={"latents": 0, "steps": 0},
        versions={},
    )
    save_diffusion(path, ours.diffusion_model(work), facts)
    return path


def tar_of(root: Path, count: int) -> Path:
    """A tar of so many JPEGs, photo-like, larger than the network's input."""
    place = root / f"pictures-{count}"
    place.mkdir()
    file = Path(write_pictures(place, count)["tar"])
    with tarfile.open(file) as tar:
        if len(tar.getnames()) != count:
            raise SystemExit(f"{file} does not hold {count} pictures")
    return file


def small_training(latents: Path, out: Path) -> list[str]:
    """A command that trains a very small network for one step."""
    unet = UNetConfig(channels=16, multipliers=(1,), residual_blocks=1, attention_factors=(1,))
    options = [f"--unet.{name.replace('_', '-')}={_as_typed(getattr(unet, name))}" for name in UNET]
    place = ["--out", str(out), "--steps", "1", "--batch-size", "8", "--condition", "none"]
    return [*ENTRY, "train-diffusion", str(latents), *place, *options]


def called(command: Sequence[str]) -> float:
    """Seconds that a command takes from its start to its end.

    Raises:
        SystemExit: it failed.
    """
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, check=False)  # noqa: S603 - this package's own
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.decode()}")
    return time.perf_counter() - begin


def piped(first: Sequence[str], second: Sequence[str]) -> None:
    """Two commands with a pipe between them.

    Raises:
        SystemExit: one failed.
    """
    with subprocess.Popen(first, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as writing:  # noqa: S603
        done = subprocess.run(second, stdin=writing.stdout, capture_output=True, check=False)  # noqa: S603
        if writing.stdout is not None:
            writing.stdout.close()
    if writing.returncode or done.returncode:
        raise SystemExit(f"sample | decode failed: {done.stderr.decode()}")


def _begin(asked: Asked) -> None:
    """The way that the commands begin."""
    terminal.be_quiet(True)
    keep_heap()
    torch.set_num_threads(asked.threads)


def _pictures(batch: int, sizes: Sizes) -> Workload:
    return Workload("encode", PIXELS, batch, sizes=sizes)


def _as_typed(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


UNET = ("channels", "multipliers", "residual_blocks", "attention_factors")
PARTS: dict[str, Callable[[Path, Asked], list[Row]]] = {
    "encode": encode_rows,
    "train": train_rows,
    "generate": generate_rows,
    "start": start_rows,
    "scale": scale_rows,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print."""
    described = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = described.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (all)")
    add("--few", type=int, default=32, help="pictures, steps or samples of the short run (32)")
    add("--many", type=int, default=160, help="of the long one (160)")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=2)
    add("--tiny", action="store_true", help="networks of a test's size, to see that it works")
    add("--json", type=Path, help="file for the rows")
    asked = described.parse_args(arguments)
    if unknown := [part for part in asked.parts if part not in PARTS]:
        described.error(f"{unknown[0]} is none of: {', '.join(PARTS)}")
    sizes = TINY if asked.tiny else Sizes()
    settings = Asked(asked.few, asked.many, asked.rounds, asked.threads, sizes)
    rows: list[Row] = []
    for part in asked.parts or PARTS:
        with tempfile.TemporaryDirectory() as scratch:
            found = alone(PARTS[part], Path(scratch), settings)
        for row in found:
            print(f"{row.what:<52} {row.value:>12,.3f} {row.unit}", flush=True)
        rows += found
        if asked.json:
            page = {"schema_version": 1, "rows": [row._asdict() for row in rows]}
            asked.json.write_text(json.dumps(page, indent=1) + "\n")


if __name__ == "__main__":
    main()
