"""From the options of `sample` to what samples begin with: latents, a picture around a hole, noise, two seeds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldmkit.data.latent_set import LatentSet
from ldmkit.diffusion.interpolation import slerp
from ldmkit.diffusion.inversion import invert_ddim
from ldmkit.diffusion.known_region import KnownRegion, touched
from ldmkit.digests import file_digest
from ldmkit.drawing import Destination, Manner, Origin, denoise_at, levels_of, seeded_noise
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import DiffusionFacts, NoiseFacts, SampleFacts, validated
from ldmkit.generation_configs import SampleConfig
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.manifest import MANIFEST
from ldmkit.modelfile import load
from ldmkit.origin_configs import USUAL_FRAMES
from ldmkit.requests import Asked, rows_of_set
from ldmkit.sample_blocks import HOLE, IMAGE, read_samples
from ldmkit.tensors import Latents, Noise

LEVEL_TOLERANCE = 1e-3
"""Two noise levels that differ by less, relatively, are one."""
Numbers = Sequence[int]
"""Of samples."""


class Source(NamedTuple):
    """Latents of a file or directory, or noise."""

    total: int
    latents: Callable[[Numbers], Latents]
    """Raw, or unit noise."""
    name: Callable[[int], str]
    facts: dict[str, Any]
    """For the sample file."""
    directory: LatentSet | None = None
    rows: Sequence[int] = ()
    """Of the set, which are used."""


class Origins(NamedTuple):
    """What all samples of a call begin with."""

    asked: Asked
    """What they are told, each a line and with its source."""
    noise: Callable[[Numbers], Noise]
    origin: Callable[[Numbers], Origin]
    facts: dict[str, Any]
    """For the sample file."""


def origins_of(
    config: SampleConfig,
    model: LatentDiffusion,
    facts: DiffusionFacts,
    manner: Manner,
    ask: Callable[[SampleConfig], Asked],
) -> Origins:
    """What the samples of a command begin with, and what they are told.

    Args:
        config: of the command.
        model: the one it names.
        facts: of that model.
        manner: how samples are drawn.
        ask: a command -> what its samples are told.

    Raises:
        UsageError: options do not go together.
        DataError: a source cannot be read, or is not of the model's latents; `ask` raises both too.
    """
    if config.between:
        return _strip(config, ask)
    path = config.from_ or config.inpaint or config.noise
    if path is None:
        asked = ask(config)
        return Origins(asked, lambda ns: _seeded(config, ns), lambda _: Origin(), {})
    if config.noise is not None:
        level = float(levels_of(model.schedule, manner)[0])
        source = _read_noise(config.noise, facts, level)
    else:
        option = "--from" if config.from_ else "--inpaint"
        source = open_latents(path, facts, option, config.holdout)
    require_same_count(config.like, source.total, config.holdout, path)
    lines = config.num or config.prompts or config.conditions
    asked = ask(config if lines else config.model_copy(update={"num": source.total}))
    asked = _with_names(asked, source)
    known = {"source": source.facts}
    if config.inpaint is not None:
        return _inpainting(config, source, asked, known)

    def origin(numbers: Numbers) -> Origin:
        found = source.latents([number % source.total for number in numbers])
        return Origin(noise=found) if config.noise else Origin(latents=found)

    strength = {} if config.noise else {"strength": config.share}
    return Origins(asked, lambda ns: _seeded(config, ns), origin, known | strength)


def open_latents(path: Path, facts: DiffusionFacts, what: str, holdout: float = 0.0) -> Source:
    """The latents of a set or a sample file, checked against the model that is to go on from them.

    Args:
        path: a latent set's directory, or a sample file.
        facts: of the model.
        what: the option that names it, for errors.
        holdout: of a set, only what training with this holdout left out; 0 = all.

    Raises:
        DataError: it cannot be read, or its latents are of another autoencoder or shape.
    """
    if path.is_dir():
        latents = LatentSet(path)
        autoencoder, shapes = latents.manifest.recipe["autoencoder"], list(latents.shapes)
        _require_fitting(f"{what} {path}", autoencoder, shapes, facts)
        rows = rows_of_set(latents, holdout).tolist()
        return Source(
            len(rows),
            lambda ns: latents.read([rows[n] for n in ns]).mean.float(),
            lambda n: latents.text("key", rows[n]),
            {"name": path.name, "sha256": file_digest(path / MANIFEST)},
            latents,
            rows,
        )
    blocks = list(read_samples(path))
    if not blocks:
        raise DataError(f"{what} {path} holds no samples")
    seeds = [seed for block in blocks for seed in block.seeds]
    first: SampleFacts = blocks[0].facts
    shapes = list({tuple(block.latents.shape[1:]) for block in blocks})
    _require_fitting(f"{what} {path}", first.autoencoder, shapes, facts)
    every = torch.cat([block.latents for block in blocks]).float()
    return Source(
        len(seeds),
        lambda ns: every[list(ns)],
        lambda n: f"seed {seeds[n]}",
        {"name": path.name, "sha256": file_digest(path)},
    )


def require_same_count(like: Path | None, count: int, holdout: float, source: Path) -> None:
    """Check that a set says of each source what it is: its rows go with the source's, one by one.

    Raises:
        DataError: it has more or fewer.
    """
    if like is None or like == source:
        return
    found = len(rows_of_set(LatentSet(like), holdout))
    if found != count:
        raise DataError(
            f"--like {like} has {found} latents and {source} {count}: both go together row by row, so give a "
            "set of the same pictures"
        )


@torch.no_grad()
def noise_behind(
    model: LatentDiffusion, values: dict[str, Tensor], raw: Latents, manner: Manner
) -> Latents:
    """Unit noise from which deterministic samplers lead to given latents, by DDIM inversion.

    Args:
        model: in evaluation mode.
        values: what it is told of the latents.
        raw: the latents.
        manner: steps, grid and guidance.
    """
    sigmas = levels_of(model.schedule, manner)
    denoise = denoise_at(model, values, manner.guide, sigmas)
    noisy = invert_ddim(denoise, model.whiten(raw.to(model.latent_mean.device)), sigmas)
    return noisy / model.schedule.initial(torch.ones(1), float(sigmas[0])).item()


def _seeded(config: SampleConfig, numbers: Numbers) -> Noise:
    return seeded_noise([config.seed + number for number in numbers])


def _with_names(asked: Asked, source: Source) -> Asked:
    """What is told, and the source of each sample beside it."""
    names = [source.name(number) for number in range(min(source.total, len(asked.said)))]
    said = [
        told if (name := names[number % source.total]) in told.values() else told | {"from": name}
        for number, told in enumerate(asked.said)
    ]
    return asked._replace(said=said)


def _inpainting(
    config: SampleConfig, source: Source, asked: Asked, facts: dict[str, Any]
) -> Origins:
    latents, rows = source.directory, source.rows
    if latents is None or not {IMAGE, HOLE} <= set(latents.manifest.columns):
        raise DataError(
            f"--inpaint {config.inpaint} has no pictures with holes: give a set of `ldmkit encode --holes ... "
            "--keep-pictures`"
        )

    def turns(numbers: Numbers) -> list[int]:
        return [rows[number % source.total] for number in numbers]

    def origin(numbers: Numbers) -> Origin:
        found = latents.read(turns(numbers)).mean.float()
        hole = latents.rows(HOLE, turns(numbers)) > 0
        known = KnownRegion(found, touched(hole, found.shape[2], found.shape[3]))
        return Origin(latents=None if config.strength is None else found, known=known)

    def kept(numbers: Numbers) -> dict[str, Tensor]:
        return {name: latents.rows(name, turns(numbers)) for name in (IMAGE, HOLE)}

    strength = {} if config.strength is None else {"strength": config.strength}
    manner = {"inpaint": True, **facts, **strength}
    asked = asked._replace(kept=kept)
    return Origins(asked, lambda ns: _seeded(config, ns), origin, manner)


def _strip(config: SampleConfig, ask: Callable[[SampleConfig], Asked]) -> Origins:
    """Samples on the way through several seeds, each of which is told what the sample of its place would be."""
    if config.num is not None:
        raise UsageError("--between makes as many samples as --frames says: leave out --num")
    seeds, frames = config.between, config.frames or USUAL_FRAMES
    stops = ask(config.model_copy(update={"num": len(seeds)}))
    way = [frame * (len(seeds) - 1) / (frames - 1) for frame in range(frames)]
    before = [min(int(place), len(seeds) - 2) for place in way]
    after = [place + 1 for place in before]

    def shares(numbers: Numbers) -> Tensor:
        return torch.tensor([way[number] - before[number] for number in numbers])

    def noise(numbers: Numbers) -> Noise:
        first = seeded_noise([seeds[before[number]] for number in numbers])
        last = seeded_noise([seeds[after[number]] for number in numbers])
        return lambda like: slerp(first(like), last(like), shares(numbers))

    def origin(numbers: Numbers) -> Origin:
        there = stops.values([after[number] for number in numbers])
        return Origin(towards=Destination(there, shares(numbers)))

    said = [
        _words_between(stops.said[one], stops.said[other], place - one)
        for one, other, place in zip(before, after, way, strict=True)
    ]
    asked = Asked(said, lambda ns: stops.values([before[n] for n in ns]), stops.digest)
    return Origins(asked, noise, origin, {"between": list(seeds), "frames": frames})


def _words_between(first: dict[str, str], last: dict[str, str], share: float) -> dict[str, str]:
    if share in (0.0, 1.0) or first == last:
        return last if share == 1.0 else first
    return {kind: f"{first.get(kind, 'none')} to {last.get(kind, 'none')}" for kind in first | last}


def _read_noise(path: Path, facts: DiffusionFacts, level: float) -> Source:
    header, tensors = load(path, kind="noise")
    its_facts = validated(NoiseFacts, header.facts, str(path))
    noise = tensors["noise"]
    _require_fitting(f"--noise {path}", its_facts.autoencoder, [tuple(noise.shape[1:])], facts)
    if abs(its_facts.level / level - 1.0) > LEVEL_TOLERANCE:
        raise DataError(
            f"--noise {path} stands for the noise level {its_facts.level:g}, and sampling begins at {level:g}: "
            "take the --grid that `ldmkit invert` took"
        )
    return Source(
        len(noise),
        lambda ns: noise[list(ns)],
        lambda n: f"noise {n}",
        {"name": path.name, "sha256": file_digest(path)},
    )


def _require_fitting(
    what: str, autoencoder: str, shapes: Sequence[tuple[int, ...]], facts: DiffusionFacts
) -> None:
    if autoencoder != facts.autoencoder:
        raise DataError(
            f"{what} is of another autoencoder ({autoencoder[:12]}) than the model ({facts.autoencoder[:12]}); "
            "encode with the model's own"
        )
    other = next((shape for shape in shapes if shape != facts.latent_shape), None)
    if other is not None:
        raise DataError(
            f"{what} has latents of {other}; the model was trained on {facts.latent_shape}"
        )
