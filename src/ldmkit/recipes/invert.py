"""`ldmkit invert`: latents in, the noise that leads to them out."""

from pathlib import Path

import torch

from ldmkit.assembly import diffusion_facts, load_diffusion
from ldmkit.data.latents import text_columns
from ldmkit.drawing import levels_of
from ldmkit.facts import NoiseFacts
from ldmkit.generation_configs import SampleConfig
from ldmkit.inversion_configs import InvertConfig
from ldmkit.manner import manner_of
from ldmkit.modelfile import save, versions
from ldmkit.origins import noise_behind, open_latents, require_same_count
from ldmkit.requests import asked_of
from ldmkit.tensors import Latents
from ldmkit.terminal import track
from ldmkit.training.runtime import groups_of, pick_device


def invert(config: InvertConfig) -> Path:
    """Write the noise from which deterministic samplers lead to given latents.

    Args:
        config: of which latents, with which model, to where.

    Returns:
        The noise file: `noise [N, z, h, w]`, and by `key` what latents each row is of.

    Raises:
        UsageError: the model cannot be told what is asked for, or its schedule has no such grid.
        DataError: a file cannot be used, or the latents are not of the model's autoencoder or shape.
    """
    facts = diffusion_facts(config.model)
    device = pick_device(config.device)
    model = load_diffusion(config.model, device)
    source = open_latents(config.latents, facts, "LATENTS")
    itself = config.latents if source.directory and not (config.label or config.prompt) else None
    require_same_count(config.like, source.total, 0.0, config.latents)
    as_sampled = SampleConfig(
        model=config.model,
        num=source.total,
        label=config.label,
        prompt=config.prompt,
        like=config.like or itself,
        steps=config.steps,
        grid=config.grid,
        guidance=config.guidance,
    )
    manner = manner_of(as_sampled, model)
    asked = asked_of(as_sampled, model.config, facts.latent_shape, None)
    found: list[Latents] = []
    with track("invert", source.total, unit="sample") as progress:
        for group, kept in groups_of(source.total, config.batch_size, device):
            numbers = group.tolist()
            values, latents = asked.values(numbers), source.latents(numbers)
            found.append(noise_behind(model, values, latents, manner)[:kept].cpu())
            progress.advance(kept)
    its_facts = NoiseFacts(
        fingerprint="",
        autoencoder=facts.autoencoder,
        diffusion=facts.fingerprint,
        level=float(levels_of(model.schedule, manner)[0]),
        manner={
            "steps": config.steps,
            "grid": config.grid,
            "guidance": config.guidance,
            "source": source.facts,
        },
        versions=versions(),
    )
    keys = text_columns("key", [source.name(number) for number in range(source.total)])
    save(
        config.out,
        {"noise": torch.cat(found), **keys},
        kind="noise",
        config={},
        facts=its_facts.model_dump(mode="json"),
    )
    return config.out
