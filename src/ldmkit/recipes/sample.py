"""`ldmkit sample`: seeds and conditions in, latents out."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ldmkit.assembly import diffusion_facts, load_diffusion
from ldmkit.canvas import canvas_of, make_seamless
from ldmkit.configs import STREAM
from ldmkit.data.latents import text_columns
from ldmkit.drawing import Manner, draw_latents, models_of
from ldmkit.encodings import Encodings
from ldmkit.errors import InterruptedRun, UsageError
from ldmkit.facts import DiffusionFacts, SampleFacts
from ldmkit.generation_configs import SampleConfig
from ldmkit.guiding import SteerOf, guide_digest, guide_of
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.manner import manner_of
from ldmkit.modelfile import save, versions, write_message
from ldmkit.origins import Origins, origins_of
from ldmkit.ownership import owned
from ldmkit.requests import as_lines, asked_of
from ldmkit.sample_blocks import PATH, TOLD, Paths, share_of
from ldmkit.sample_groups import sample_groups
from ldmkit.sample_memory import batch_with_room
from ldmkit.sample_parts import (
    asked_digest,
    drop_leftovers,
    found_parts,
    is_complete,
    joined,
    missing,
    part_path,
    parts_of,
)
from ldmkit.tensors import Latents
from ldmkit.terminal import Track, say, track
from ldmkit.training.interruption import Interruption
from ldmkit.training.runtime import pick_device, settled

HOW = (
    *("grid", "eta", "guidance_combination", "guidance_interval", "guidance_rescale"),
    *("guidance_growth", "negative", "weaker", "guide_image", "guide_factor", "guide_scale"),
    *("size", "tile", "tile_overlap", "seamless", "precision"),
)
"""Options that change samples, beside sampler, steps and weight."""
BESIDE = {
    *(
        "model",
        "weaker",
        "out",
        "device",
        "jobs",
        "batch_size",
        "num",
        "label",
        "prompt",
        "prompts",
    ),
    *("conditions", "like", "holdout", "text_weights"),
}
"""Options that change no sample, or whose meaning is told in other ways: by fingerprints of files, and
by what each sample is told."""
TRIED = 6
"""Calls after which the most memory has been in use that drawing takes."""


class Work(NamedTuple):
    """What is settled before the first sample."""

    config: SampleConfig
    model: LatentDiffusion
    facts: DiffusionFacts
    manner: Manner
    origins: Origins
    steer_of: SteerOf
    encode: Encodings
    device: torch.device


class Drawn(NamedTuple):
    """Samples whose numbers follow one another."""

    latents: Latents
    """Raw."""
    path: Paths | None
    """Clean raw latents that were expected on the way."""


class _EnoughError(Exception):
    """Ends a trial."""


def sample(
    config: SampleConfig,
    stream: BufferedIOBase | None = None,
    source: BufferedIOBase | None = None,
) -> Path | None:
    """Draw samples; each depends on its own seed and condition only, not on its batch or job.

    What is drawn for a file is kept in OUT.parts/ batch by batch, so that the same call again resumes,
    and returns at once when the file is complete.

    Args:
        config: what to draw, from what, to where.
        stream: where the bytes go, one message a batch; without it they go to `config.out`.
        source: where prompts or conditions come from if they are `-`.

    Returns:
        The sample file; None if it was streamed. With several jobs it is there when the last of them
        ends.

    Raises:
        UsageError: an unknown class, a sampler, guidance or size that does not fit, `-` without a stream, or
            another process draws the same.
        DataError: a model file cannot be used, or a line of a file of conditions.
        InterruptedRun: a signal asked to stop; what is drawn is kept.
    """
    if config.out == STREAM and stream is None:
        raise UsageError("out is `-`, and no stream was given to write to")
    if config.keep_path > config.steps:
        raise UsageError(
            f"--keep-path {config.keep_path}: there are {config.steps} calls (--steps) to keep estimates of"
        )
    facts = diffusion_facts(config.model)
    device = pick_device(config.device)
    config = config.model_copy(update={"precision": settled(config.precision, device)})
    model = load_diffusion(config.model, device, config.precision)
    canvas = canvas_of(config, model, facts)
    facts = facts.model_copy(update={"latent_shape": canvas.shape})  # of what is drawn here
    manner = manner_of(config, model)._replace(tiling=canvas.tiling)
    for one in models_of(model, manner.guide):
        make_seamless(one, canvas)
    steer_of = guide_of(config, model, facts)
    origins = origins_of(
        config,
        model,
        facts,
        manner,
        lambda asking: asked_of(asking, model.config, canvas.shape, source),
    )
    work = Work(config, model, facts, manner, origins, steer_of, Encodings(), device)
    total, job = len(origins.asked.said), _job(config)
    mine = share_of(total, job)
    if not mine:
        raise UsageError(
            f"job {job[0]} of {job[1]}: {total} samples make no more than {total} parts"
        )

    if stream is not None:
        with track("sample", len(mine), unit="sample") as progress:
            for numbers in _batches([mine], _batch_size(work, len(mine))):
                place = (len(mine), numbers.start - mine.start)
                drawn = _draw(work, numbers, progress)
                write_message(stream, **_block(work, numbers, drawn, place, None))
        return None

    wanted = asked_digest(_everything(work))
    if not is_complete(config.out, wanted):
        with owned(parts_of(config.out), f"-{job[0]}-of-{job[1]}" if job[1] > 1 else ""):
            if not is_complete(config.out, wanted):  # made by who had the directory before
                return _drawn_to_file(work, mine, total, wanted)
    drop_leftovers(config.out, wanted)
    say(f"{config.out} is complete")
    return config.out


def _drawn_to_file(work: Work, mine: range, total: int, wanted: str) -> Path:
    """Draw what is not there yet of this job's samples; the last job makes one file of all."""
    config = work.config
    todo = missing(found_parts(config.out, wanted), mine)
    left = sum(map(len, todo))
    with (
        Interruption() as stop,
        track("sample", len(mine), done=len(mine) - left, unit="sample") as progress,
    ):
        for numbers in _batches(todo, _batch_size(work, left) if left else 1):
            drawn = _draw(work, numbers, progress, stop)
            if drawn is not None:
                place = (total, numbers.start)
                block = _block(work, numbers[: len(drawn.latents)], drawn, place, wanted)
                save(part_path(config.out, numbers.start), **block)
            if stop.requested:
                raise InterruptedRun(
                    f"stopped and kept what was drawn of {config.out}; run the same command again to go on"
                )
    if not joined(config.out, wanted, _block_facts(work, (total, 0), wanted)):
        say(f"the job that comes last makes {config.out} of the parts")
    return config.out


def _job(config: SampleConfig) -> tuple[int, int]:
    """Which job this is, from 1, and of how many: as asked for, or a process of torchrun."""
    if config.jobs is None and config.out != STREAM and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]) + 1, int(os.environ["WORLD_SIZE"])
    return config.part


def _batches(ranges: Iterable[range], size: int) -> Iterator[range]:
    return (part[first : first + size] for part in ranges for first in range(0, len(part), size))


def _batch_size(work: Work, count: int) -> int:
    """Samples to draw at once: as given, or as many as there is room for."""
    size = work.config.batch_size
    if size != "auto":
        return size

    def try_so_many(samples: int) -> None:
        numbers = [number % len(work.origins.asked.said) for number in range(samples)]

        def until_it_shows(call: int, clean: Latents) -> None:
            if call + 1 >= TRIED:
                raise _EnoughError

        try:
            _drawn_group(work, numbers, until_it_shows)
        except _EnoughError:
            return

    return batch_with_room(try_so_many, count, work.device)


def _draw(
    work: Work, numbers: range, progress: Track, stop: Interruption | None = None
) -> Drawn | None:
    """Samples of these numbers; the first of them, or None, where a signal asks to stop."""
    latents: list[Latents] = []
    paths: list[Latents] = []
    steps, count = work.config.steps, work.config.keep_path
    shown = {place * steps // count for place in range(count)}
    _, *sides = work.facts.latent_shape
    groups = sample_groups(len(numbers), len(numbers), work.model.unet, math.prod(sides))
    for group, kept in groups:
        if stop is not None and stop.requested:
            break
        estimates: list[Latents] = []

        def keep(call: int, clean: Latents, estimates: list[Latents] = estimates) -> None:
            if call in shown:
                estimates.append(clean)

        part = _drawn_group(work, [numbers[row] for row in group.tolist()], keep if shown else None)
        latents.append(part[:kept].cpu())
        if estimates:
            paths.append(torch.stack(estimates, dim=1)[:kept].cpu())
        progress.advance(kept)
    if not latents:
        return None
    return Drawn(torch.cat(latents), torch.cat(paths) if paths else None)


def _drawn_group(work: Work, numbers: Sequence[int], on_estimate: Any) -> Latents:  # noqa: ANN401
    origins = work.origins
    return draw_latents(
        work.model,
        origins.asked.values(numbers),
        (len(numbers), *work.facts.latent_shape),
        origins.noise(numbers),
        work.manner,
        origins.origin(numbers)._replace(steer=work.steer_of(numbers)),
        work.encode,
        on_estimate,
    )


def _block(
    work: Work, numbers: range, drawn: Drawn | None, place: tuple[int, int], wanted: str | None
) -> dict[str, Any]:
    """Some samples as a file or message; `place` as in `_block_facts`."""
    assert drawn is not None  # noqa: S101 - nothing was asked to stop
    seeds = torch.arange(numbers.start, numbers.stop, dtype=torch.int64) + work.config.seed
    lines = as_lines([work.origins.asked.said[number] for number in numbers])
    return {
        "tensors": {
            "latents": drawn.latents,
            "seed": seeds,
            **text_columns(TOLD, lines),
            **work.origins.asked.kept(numbers),
            **({} if drawn.path is None else {PATH: drawn.path}),
        },
        "kind": "samples",
        "config": {},
        "facts": _block_facts(work, place, wanted).model_dump(mode="json", exclude_none=True),
    }


def _block_facts(work: Work, place: tuple[int, int], wanted: str | None) -> SampleFacts:
    """Facts of some samples; `place`: of how many, and the number of the first."""
    return SampleFacts(
        fingerprint="",
        autoencoder=work.facts.autoencoder,
        diffusion=work.facts.fingerprint,
        total=place[0],
        first=place[1],
        manner=_manner_facts(work.config) | work.origins.facts,
        asked=wanted,
        versions=versions(),
    )


def _everything(work: Work) -> dict[str, Any]:
    """All that decides the bytes of the samples."""
    weaker, guide = work.config.weaker, work.config.guide_image
    return {
        "options": work.config.model_dump(mode="json", exclude=BESIDE),
        "said": work.origins.asked.said,
        "values": work.origins.asked.digest,
        "origins": work.origins.facts,
        "diffusion": work.facts.fingerprint,
        "weaker": diffusion_facts(weaker).fingerprint if weaker else None,
        "guide": guide_digest(guide) if guide else None,
        "device": work.device.type,
        "versions": versions(),
    }


def _manner_facts(config: SampleConfig) -> dict[str, Any]:
    """How samples are drawn, as far as it is not as usual; sampler, steps and weight always."""
    weight = (
        {"guidance_of": list(config.guidance_of)}
        if config.guidance_of
        else {"guidance": config.weight}
    )
    always = {"sampler": config.sampler, "steps": config.steps, **weight}
    fields = {*HOW, "sampler_options"}
    chosen = config.model_dump(mode="json", include=fields, exclude_defaults=True)
    return always | chosen
