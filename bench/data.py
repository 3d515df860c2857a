"""How fast data is read: `python bench/data.py`, a table, or one JSON document with --json.

Pictures: photo-like 256 px JPEGs (smooth noise and edges, quality 90), in a folder and in a tar, warm
page cache. Four rates, pictures for each second of CPU time, over all processes: nothing here waits, and
so whatever else the machine does counts little. Each process goes through its pictures 16 at a time, all
four ways in turns; the least time of some rounds counts for each 16:

    decoder       Pillow decodes the bytes, held in memory, to a uint8 RGB array
    read, decode  the real path up to the same array: `items.Span.read`, `pictures.decode_array`
    to float      `images.read_picture`: checks, and float32 in [-1, 1] on top
    resized       `preprocessing.preprocess` to 224 px on top

Latents: fully shuffled batches of 64 of 4x32x32 bfloat16 from a set of several shards through
`LatentSet.read`, samples/s in one process, best of some rounds; with the order of the batches drawn
as in training. Opening: seconds and growth of resident memory for a set of a million 1x2x2 latents.

Listing: peak resident memory of listing small files, bytes for each one beyond the first.
"""

import argparse
import ctypes
import io
import json
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from ldmkit import terminal
from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.images import read_picture
from ldmkit.data.items import Item
from ldmkit.data.latent_set import LatentSet
from ldmkit.data.latents import shard_name
from ldmkit.data.order import indices_of_step
from ldmkit.data.pictures import decode_array
from ldmkit.data.preprocessing import preprocess
from ldmkit.data.sources import open_source
from ldmkit.data_configs import SourceConfig
from ldmkit.digests import file_digest
from ldmkit.facts import Manifest, ShardEntry, Whitening
from ldmkit.manifest import write_manifest
from ldmkit.modelfile import save

SIDE, RESIZED, CHUNK, BATCH, LATENT = 256, 224, 16, 64, (4, 32, 32)
FORMATS = ("folder", "tar")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class Row(NamedTuple):
    """One measurement."""

    what: str
    value: float
    unit: str


def photo(number: int) -> bytes:
    """A JPEG file of smooth noise with edges."""
    rng = np.random.default_rng(number)
    image = np.zeros((SIDE, SIDE, 3), np.float32)
    for cells, weight in ((4, 90.0), (16, 40.0), (64, 18.0), (256, 6.0)):  # about 1/f
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        smooth = coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        image += (np.asarray(smooth, np.float32) / 127.5 - 1.0) * weight
    drawn = Image.fromarray((image + 128).clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(drawn)
    for _ in range(8):
        corners = [tuple(point) for point in rng.integers(0, SIDE, (3, 2)).tolist()]
        pen.polygon(corners, fill=tuple(rng.integers(0, 256, 3).tolist()))
    file = io.BytesIO()
    drawn.save(file, "JPEG", quality=90)
    return file.getvalue()


def write_pictures(root: Path, count: int) -> dict[str, str]:
    """The same pictures as a folder and as a tar; where each lies."""
    folder, tar = root / "folder", root / "pictures.tar"
    folder.mkdir()
    with tarfile.open(tar, "w") as file:
        for number in range(count):
            path = folder / f"{number:06d}.jpg"
            path.write_bytes(photo(number))
            file.add(path, path.name)
    return {"folder": str(folder), "tar": str(tar)}


def decode_alone(items: Sequence[Item]) -> float:
    """CPU seconds that the decoder takes for bytes in memory."""
    held = [item.picture.read() for item in items]
    start = time.thread_time()
    for data in held:
        np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return time.thread_time() - start


def read_and_decode(items: Sequence[Item]) -> float:
    """CPU seconds from files to uint8 arrays."""
    config = PreprocessingConfig(size=SIDE)
    start = time.thread_time()
    for item in items:
        decode_array(item.picture.read(), item.name, config)
    return time.thread_time() - start


def read_to_float(items: Sequence[Item]) -> float:
    """CPU seconds from files to float32 tensors."""
    config = PreprocessingConfig(size=SIDE)
    start = time.thread_time()
    for item in items:
        read_picture(item, config)
    return time.thread_time() - start


def read_and_resize(items: Sequence[Item]) -> float:
    """CPU seconds from files to what a network takes."""
    config = PreprocessingConfig(size=RESIZED)
    start = time.thread_time()
    for item in items:
        preprocess(read_picture(item, config), config, None)
    return time.thread_time() - start


WAYS: dict[str, Callable[[Sequence[Item]], float]] = {
    "decoder": decode_alone,
    "read, decode": read_and_decode,
    "to float": read_to_float,
    "resized": read_and_resize,
}


def keep_memory() -> None:
    """Let glibc keep what is freed: whether it gives it back, to be zeroed anew by the kernel, is chance.

    That chance is 20 % of the time of either way, and hides what is compared.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)


def rates(items: Sequence[Item], rounds: int) -> list[float]:
    """Pictures for each second of CPU time of this process, for each of `WAYS`."""
    torch.set_num_threads(1)
    keep_memory()
    parts = [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
    least = np.full((len(WAYS), len(parts)), np.inf)
    for _ in range(rounds + 1):  # one more, for imports and the page cache
        for number, part in enumerate(parts):
            seconds = [way(part) for way in WAYS.values()]
            least[:, number] = np.minimum(least[:, number], seconds)
    return (len(items) / least.sum(1)).tolist()


def picture_rows(places: dict[str, str], rounds: int, processes: int) -> list[Row]:
    """All ways of reading, from each place; every process reads its own part of the pictures."""
    rows = []
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for name, place in places.items():
            items = open_source(SourceConfig(data=place)).items
            parts = [items[start::processes] for start in range(processes)]
            total = np.sum(list(pool.map(rates, parts, [rounds] * processes)), axis=0)
            title = f"{name}, {processes} process(es)"
            for way, rate in zip(WAYS, total.tolist(), strict=True):
                rows.append(Row(f"{title}: {way}", rate, "pictures/CPU s"))
            rows.append(Row(f"{title}: read, decode / decoder", 100 * total[1] / total[0], "%"))
    return rows


def write_latents(
    root: Path, shards: int, count: int, shape: tuple[int, int, int], *, noisy: bool
) -> Path:
    """A set of random bfloat16 latents."""
    root.mkdir()
    keys = b"".join(b"%08d" % number for number in range(count))
    tensors = {
        "label": torch.zeros(count, dtype=torch.int64),
        "key.bytes": torch.frombuffer(bytearray(keys), dtype=torch.uint8),
        "key.offsets": torch.arange(count + 1) * 8,
    }
    entries = []
    for number in range(shards):
        path = root / shard_name(number)
        mean = torch.randn(count, *shape).bfloat16()
        moments = {"mean": mean, "std": mean.abs()} if noisy else {"mean": mean}
        facts = {"fingerprint": ""}
        save(path, {**moments, **tensors}, kind="latents", config={}, facts=facts)
        entry = ShardEntry(
            name=path.name,
            start=number * count,
            stop=(number + 1) * count,
            count=count,
            bytes=path.stat().st_size,
            sha256=file_digest(path),
        )
        entries.append(entry)
    manifest = Manifest(
        format="ldmkit.latents/1",
        recipe={"autoencoder": "none"},  # as `train-diffusion` wants to know
        items="",
        count=shards * count,
        latent_shape=shape,
        columns=("mean", *(["std"] if noisy else []), "key", "label"),
        class_names=("all",),
        whitening=Whitening(mean=(0.0,) * shape[0], std=(1.0,) * shape[0]),
        shards=tuple(entries),
        skipped=(),
        converted={},
        versions={},
    )
    write_manifest(root, manifest)
    return root


def latent_rate(root: Path, rounds: int) -> float:
    """Samples/s of the epochs `rounds`; the first warms the map."""
    latents = LatentSet(root)
    latents.wait_until_verified()
    steps = len(latents) // BATCH
    best = 0.0
    for epoch in range(rounds + 1):
        start = time.perf_counter()
        for step in range(epoch * steps, (epoch + 1) * steps):
            places = indices_of_step(step, count=len(latents), batch_size=BATCH, seed=0)
            latents.read([index for index, _ in places])
        if epoch:
            best = max(best, steps * BATCH / (time.perf_counter() - start))
    return best


def resident() -> int:
    """Bytes of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def opening(root: Path) -> tuple[float, int]:
    """Seconds until a set is open with its labels and training samples, and growth in bytes."""
    before, start = resident(), time.perf_counter()
    latents = LatentSet(root)
    latents.training_indices(0.0)
    return time.perf_counter() - start, resident() - before


def listing_peak(place: str) -> int:
    """Peak bytes of this process while it lists a source."""
    terminal.be_quiet(True)
    Path("/proc/self/clear_refs").write_text("5")  # else the parent's peak, kept by fork and exec
    open_source(SourceConfig(data=place))
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def alone(function: Callable[..., object], *arguments: object) -> object:
    """Call a function in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def latent_rows(root: Path, shards: int, shard_size: int, rounds: int, opened: int) -> list[Row]:
    """Rates of reading, with and without std, and the cost of opening a large set."""
    rows = []
    for noisy, title in ((False, "mean"), (True, "mean and std")):
        place = write_latents(root / title, shards, shard_size, LATENT, noisy=noisy)
        rate = alone(latent_rate, place, rounds)
        assert isinstance(rate, float)  # noqa: S101
        rows.append(Row(f"latents, {shards} shards of {shard_size}: {title}", rate, "samples/s"))
    place = write_latents(root / "many", max(opened // 1024, 1), 1024, (1, 2, 2), noisy=False)
    result = alone(opening, place)
    assert isinstance(result, tuple)  # noqa: S101
    rows.append(Row(f"opening {opened:,} latents", result[0], "s"))
    rows.append(Row(f"opening {opened:,} latents: memory", result[1] / 1e6, "MB"))
    return rows


def listing_rows(root: Path, files: int) -> list[Row]:
    """Memory of listing, as the difference between a small source and one of four times the size."""
    picture = photo(0)[:64]
    rows = []
    for name in FORMATS:
        peaks = []
        for count in (files, 4 * files):
            place = root / f"{name}-{count}"
            place.mkdir()
            if name == "folder":
                for number in range(count):
                    (place / f"{number:08d}.jpg").write_bytes(picture)
            else:
                with tarfile.open(place / "0.tar", "w") as file:
                    for number in range(count):
                        member = tarfile.TarInfo(f"{number:08d}.jpg")
                        member.size = len(picture)
                        file.addfile(member, io.BytesIO(picture))
            peak = alone(listing_peak, str(place))
            assert isinstance(peak, int)  # noqa: S101
            peaks.append(peak)
            rows.append(Row(f"listing {count:,} pictures, {name}: peak", peak / 1e6, "MB"))
        each = (peaks[1] - peaks[0]) / (3 * files)
        rows.append(Row(f"listing, {name}: for each picture", each, "bytes"))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--pictures", type=int, default=1000, help="JPEG files (default 1000)")
    parser.add_argument("--shards", type=int, default=64, help="shards of latents (default 64)")
    parser.add_argument("--shard-size", type=int, default=1024, help="latents in each (1024)")
    parser.add_argument("--opened", type=int, default=1_000_000, help="latents to open (1,000,000)")
    parser.add_argument(
        "--files", type=int, default=10_000, help="files to list, and 4 times (10000)"
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="that read (1 2)")
    parser.add_argument("--rounds", type=int, default=5, help="of which the best counts (5)")
    parser.add_argument("--only", choices=("pictures", "latents", "listing"), help="one part alone")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    options = parser.parse_args(arguments)
    terminal.be_quiet(True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        if options.only in (None, "pictures"):
            places = write_pictures(root, options.pictures)
            for processes in options.processes:
                rows += picture_rows(places, options.rounds, processes)
        if options.only in (None, "latents"):
            rows += latent_rows(
                root, options.shards, options.shard_size, options.rounds, options.opened
            )
        if options.only in (None, "listing"):
            rows += listing_rows(root, options.files)
    if options.json:
        print(json.dumps({"schema_version": 1, "rows": [row._asdict() for row in rows]}, indent=1))
        return
    for row in rows:
        digits = 0 if row.value >= 100 else 2
        print(f"{row.what:<58} {row.value:>12,.{digits}f} {row.unit}")


if __name__ == "__main__":
    main()
