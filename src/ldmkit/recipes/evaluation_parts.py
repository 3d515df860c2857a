"""`evaluate` in several jobs: each looks at fixed ranges of all pictures, the last one puts together what all saw.

A range is of whole batches, so every picture goes through the networks in the batch it would be in
without jobs, and the report is the same. OUT/parts/00001-of-00004.safetensors holds what the first of four
jobs saw, and what it was asked.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from torch import Tensor

from ldmkit.assembly import autoencoder_facts
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.container import read_header, read_headers
from ldmkit.data.images import read_images
from ldmkit.data.items import Item
from ldmkit.data.latents import items_digest
from ldmkit.durable import remove, sweep_temporaries
from ldmkit.errors import DataError
from ldmkit.evaluation_configs import SAMPLE_FILE, EvaluateConfig
from ldmkit.metrics.feature_networks import FeatureNetwork, Side, features_of
from ldmkit.metrics.frechet import rgb_pixels
from ldmkit.metrics.memorization import area_means
from ldmkit.modelfile import load, save, versions
from ldmkit.pixels import Pixels
from ldmkit.sample_parts import asked_digest
from ldmkit.terminal import say, track

FOLDER = "parts"
SAMPLES, REAL, TRAINING = "samples", "real pictures", "training pictures"
DECODED = "decoded training pictures"
BESIDE = {
    *("jobs", "out", "device", "cache", "bootstrap", "reference", "save_reference"),
    *("max_fd", "max_fid", "max_kid", "max_copies", "copy_quantile"),
}
"""Options that have no part in what a job sees."""
Seen = Mapping[str, Tensor]
"""Features (`effnet: samples`), logits (`effnet logits: samples`) and area means (`areas: samples`)."""


class Pictures(NamedTuple):
    """A list of pictures, and how they are read."""

    items: list[Item]
    preprocessing: PreprocessingConfig


class Sampled(NamedTuple):
    """The generated pictures, of which other jobs may have some to draw yet."""

    items: Callable[[range], list[Item]]
    """Those of some numbers, which have to be there."""
    total: int
    preprocessing: PreprocessingConfig

    def pictures(self, numbers: range) -> Pictures:
        """Those of some numbers."""
        return Pictures(self.items(numbers), self.preprocessing)


def job_of(config: EvaluateConfig) -> tuple[int, int]:
    """Which job this is, from 1, and of how many: as asked for, or a process of torchrun."""
    if config.jobs is None and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]) + 1, int(os.environ["WORLD_SIZE"])
    part, _, count = (config.jobs or "1/1").partition("/")
    return int(part), int(count)


def own_range(total: int, batch_size: int, job: tuple[int, int]) -> range:
    """The numbers of a job's pictures: fixed ranges of whole batches, which cover all once."""
    number, jobs = job
    batches = -(-total // batch_size)
    ends = (batches * part // jobs * batch_size for part in (number - 1, number))
    return range(*(min(end, total) for end in ends))


def own_of(pictures: Pictures, batch_size: int, job: tuple[int, int]) -> Pictures:
    """A job's pictures."""
    mine = own_range(len(pictures.items), batch_size, job)
    return pictures._replace(items=pictures.items[mine.start : mine.stop])


def features_seen(
    network: FeatureNetwork, pictures: Pictures, name: str, batch_size: int
) -> dict[str, Tensor]:
    """The features of a job's pictures; nothing where it has none."""
    if not pictures.items:
        return {}
    with track(f"{network.name}: {name}", len(pictures.items), unit="picture") as progress:
        side = features_of(network, pixels_of(pictures, batch_size), progress.advance)
    logits = {} if side.logits is None else {f"{network.name} logits: {name}": side.logits}
    return {f"{network.name}: {name}": side.features, **logits}


def side_of(seen: Seen, network: str, name: str) -> Side:
    """The features of all pictures of that name.

    Raises:
        DataError: there are none.
    """
    if f"{network}: {name}" not in seen:
        raise DataError(f"there are no {name} to measure")
    return Side(seen[f"{network}: {name}"], seen.get(f"{network} logits: {name}"))


def areas_seen(
    sides: Mapping[str, Pictures], batch_size: int, decoder: Autoencoder | None
) -> dict[str, Tensor]:
    """What the search for copies compares of a job's pictures.

    Held-back pictures are seen as the autoencoder gives them back, where there is one, training pictures also so:
    that is what a latent model which knows them by heart would draw.

    Args:
        sides: of samples, real and training pictures, by name.
        batch_size: pictures at once.
        decoder: the autoencoder.
    """
    wanted = {SAMPLES: (SAMPLES, None), REAL: (REAL, decoder), TRAINING: (TRAINING, None)}
    if decoder is not None:
        wanted[DECODED] = (TRAINING, decoder)
    return {
        f"areas: {name}": torch.cat(list(_areas(sides[side], batch_size, by)))
        for name, (side, by) in wanted.items()
        if sides[side].items
    }


@torch.no_grad()
def _areas(pictures: Pictures, batch_size: int, decoder: Autoencoder | None) -> Iterator[Tensor]:
    for first in range(0, len(pictures.items), batch_size):
        images = read_images(pictures.items[first : first + batch_size], pictures.preprocessing)
        if decoder is not None:
            posterior = decoder.encode(images.to(next(decoder.parameters()).device))
            images = decoder.decode(posterior.mean).float()
        yield area_means(rgb_pixels(images).float() / 127.5 - 1.0).cpu()


def pixels_of(pictures: Pictures, batch_size: int) -> Iterator[Pixels]:
    """8-bit RGB pixels, batch by batch."""
    for first in range(0, len(pictures.items), batch_size):
        batch = pictures.items[first : first + batch_size]
        yield rgb_pixels(read_images(batch, pictures.preprocessing))


def asked_of_jobs(
    config: EvaluateConfig,
    networks: Sequence[FeatureNetwork],
    sides: Mapping[str, Sequence[Item]],
    device: torch.device,
) -> str:
    """A digest of all that decides what the jobs see.

    Args:
        config: of this job.
        networks: that look.
        sides: all pictures that are files already, by name.
        device: where they are looked at.
    """
    drawn_from = config.model
    if drawn_from is None and str(config.samples).endswith(SAMPLE_FILE):
        drawn_from = Path(str(config.samples))
    asked: dict[str, Any] = {
        "options": config.model_dump(mode="json", exclude=BESIDE),
        "networks": {network.name: network.weights for network in networks},
        "autoencoder": config.ae and autoencoder_facts(config.ae).fingerprint,
        "samples": drawn_from and [one.fingerprint for one in read_headers(drawn_from)],
        "pictures": {name: items_digest(items) for name, items in sides.items()},
        "device": device.type,
        "versions": versions(),
    }
    return asked_digest(asked)


def of_all_jobs(out: Path, asked: str, mine: Seen, job: tuple[int, int]) -> Seen | None:
    """What all jobs saw, in the order of the pictures; None while some are at work still.

    A report of a former call goes.

    Args:
        out: directory of the report.
        asked: what `asked_of_jobs` says.
        mine: what this job saw.
        job: which it is, from 1, and of how many.

    Raises:
        StorageError: the part cannot be written.
    """
    number, jobs = job
    if jobs == 1:
        return mine
    folder = out / FOLDER
    paths = [folder / f"{one:05d}-of-{jobs:05d}{SAMPLE_FILE}" for one in range(1, jobs + 1)]
    sweep_temporaries(folder, paths[number - 1].name)
    facts = {"asked": asked, "part": number, "parts": jobs}
    (out / "report.json").unlink(missing_ok=True)  # of a former call
    save(paths[number - 1], mine, kind="features", config={}, facts=facts)
    lock = out / "join.lock"
    with FileLock(lock):  # several jobs may end at the same time
        parts = [_part(path, asked) for path in paths]
        if any(part is None for part in parts):
            there = sum(part is not None for part in parts)
            say(f"{there} of {jobs} parts are there; the job that comes last writes the report")
            return None
        found: dict[str, list[Tensor]] = {}
        for part in parts:
            for name, value in (part or {}).items():
                found.setdefault(name, []).append(value)
        seen = {name: torch.cat(values) for name, values in found.items()}
        remove(folder)
    lock.unlink(missing_ok=True)
    return seen


def _part(path: Path, asked: str) -> dict[str, Tensor] | None:
    """What a job saw; None if it is not there, or of another command."""
    try:
        if not path.is_file() or read_header(path).facts.get("asked") != asked:
            return None
        return load(path, kind="features")[1]
    except DataError as error:
        say(f"run that job again: {error}")
        return None
