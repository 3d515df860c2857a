"""`ldmkit sample`: seeds and conditions in, latents out."""

from io import BufferedIOBase
from pathlib import Path
from typing import Any

import torch

from ldmkit.assembly import diffusion_facts, load_diffusion
from ldmkit.canvas import canvas_of, make_seamless
from ldmkit.configs import STREAM
from ldmkit.data.latents import text_columns
from ldmkit.drawing import draw_latents, models_of, seeded_noise
from ldmkit.errors import UsageError
from ldmkit.facts import DiffusionFacts, SampleFacts
from ldmkit.generation_configs import SampleConfig
from ldmkit.manner import manner_of
from ldmkit.modelfile import save, versions, write_message
from ldmkit.requests import Asked, as_lines, asked_of
from ldmkit.tensors import Labels, Latents
from ldmkit.terminal import track
from ldmkit.training.runtime import groups_of, pick_device

HOW = (
    *("grid", "eta", "guidance_combination", "guidance_interval", "guidance_rescale"),
    *("guidance_growth", "negative", "weaker", "size", "tile", "tile_overlap", "seamless"),
)
"""Options that change samples, beside sampler, steps and weight."""


def sample(
    config: SampleConfig,
    stream: BufferedIOBase | None = None,
    source: BufferedIOBase | None = None,
) -> Path | None:
    """Draw samples; each depends on its own seed and condition only, not on its batch.

    Args:
        config: what to draw, from what, to where.
        stream: where the bytes go, one message a batch; without it they go to `config.out`.
        source: where prompts or conditions come from if they are `-`.

    Returns:
        The sample file; None if it was streamed.

    Raises:
        UsageError: an unknown class, a sampler, guidance or size that does not fit, or `-` without a stream.
        DataError: a model file cannot be used, or a line of a file of conditions.
    """
    if config.out == STREAM and stream is None:
        raise UsageError("out is `-`, and no stream was given to write to")
    facts = diffusion_facts(config.model)
    device = pick_device(config.device)
    model = load_diffusion(config.model, device)
    canvas = canvas_of(config, model, facts)
    manner = manner_of(config, model)._replace(tiling=canvas.tiling)
    for one in models_of(model, manner.guide):
        make_seamless(one, canvas)
    asked = asked_of(config, model.config, canvas.shape, source)

    total = len(asked.said)
    seeds = torch.arange(total, dtype=torch.int64) + config.seed
    drawn: list[Latents] = []
    with track("sample", total, unit="sample") as progress:
        for first in range(0, total, config.batch_size):
            rows = slice(first, first + config.batch_size)
            parts: list[Latents] = []
            for group, kept in groups_of(len(seeds[rows]), config.batch_size, device):
                numbers = (first + group).tolist()
                noise = seeded_noise(seeds[numbers].tolist())
                shape = (len(numbers), *canvas.shape)
                part = draw_latents(model, asked.values(numbers), shape, noise, manner)
                parts.append(part[:kept].cpu())
                progress.advance(kept)
            latents = torch.cat(parts)
            if stream is not None:
                block = _block(latents, seeds[rows], asked, config, facts, (total, first))
                write_message(stream, **block)
            else:
                drawn.append(latents)
    if stream is not None:
        return None
    save(config.out, **_block(torch.cat(drawn), seeds, asked, config, facts, (total, 0)))
    return config.out


def _block(
    latents: Latents,
    seeds: Labels,
    asked: Asked,
    config: SampleConfig,
    facts: DiffusionFacts,
    place: tuple[int, int],
) -> dict[str, Any]:
    """Some samples as a file or message; `place`: of how many, and the number of the first."""
    numbers = range(place[1], place[1] + len(latents))
    told = as_lines([asked.said[number] for number in numbers])
    block_facts = SampleFacts(
        fingerprint="",
        autoencoder=facts.autoencoder,
        diffusion=facts.fingerprint,
        total=place[0],
        first=place[1],
        manner=_manner_facts(config),
        versions=versions(),
    )
    return {
        "tensors": {
            "latents": latents,
            "seed": seeds,
            **text_columns("told", told),
            **asked.kept(numbers),
        },
        "kind": "samples",
        "config": {},
        "facts": block_facts.model_dump(mode="json"),
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
