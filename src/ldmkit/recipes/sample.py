"""`ldmkit sample`: seeds and labels in, latents out."""

from io import BufferedIOBase
from pathlib import Path
from typing import Any

import torch

from ldmkit.assembly import diffusion_facts, load_diffusion
from ldmkit.conditioning.condition import stacked
from ldmkit.conditioning.self_conditioning import remembering
from ldmkit.configs import STREAM, SampleConfig
from ldmkit.data.order import generator_for
from ldmkit.diffusion.denoiser import guided
from ldmkit.diffusion.samplers import sample_ddim
from ldmkit.errors import UsageError
from ldmkit.facts import DiffusionFacts, SampleFacts
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.modelfile import save, versions, write_message
from ldmkit.tensors import Labels, Latents, Noise
from ldmkit.terminal import track
from ldmkit.training.runtime import groups_of, pick_device

NO_CLASS = "none"


def sample(config: SampleConfig, stream: BufferedIOBase | None = None) -> Path | None:
    """Draw samples; each depends on its own seed and label only, not on its batch.

    Args:
        config: what to draw, from what, to where.
        stream: where the bytes go, one message a batch; without it they go to `config.out`.

    Returns:
        The sample file; None if it was streamed.

    Raises:
        UsageError: an unknown class, more steps than the model has, or `-` without a stream.
        DataError: the model file cannot be used.
    """
    if config.out == STREAM and stream is None:
        raise UsageError("out is `-`, and no stream was given to write to")
    facts = diffusion_facts(config.model)
    labels = choose_labels(config, facts)
    device = pick_device(config.device)
    model = load_diffusion(config.model, device)
    try:
        model.schedule.steps(config.steps)
    except ValueError as error:
        raise UsageError(f"--steps: {error}") from error

    seeds = torch.arange(config.num, dtype=torch.int64) + config.seed
    drawn: list[Latents] = []
    with track("sample", config.num, unit="sample") as progress:
        for first in range(0, config.num, config.batch_size):
            rows = slice(first, first + config.batch_size)
            parts: list[Latents] = []
            for group, kept in groups_of(len(seeds[rows]), config.batch_size, device):
                part = draw(model, facts, config, seeds[rows][group], labels[rows][group])
                parts.append(part[:kept])
                progress.advance(kept)
            latents = torch.cat(parts)
            if stream is not None:
                write_message(
                    stream, **_block(latents, seeds[rows], labels[rows], facts, config.num, first)
                )
            else:
                drawn.append(latents)
    if stream is not None:
        return None
    save(config.out, **_block(torch.cat(drawn), seeds, labels, facts, config.num, 0))
    return config.out


@torch.inference_mode()
def draw(
    model: LatentDiffusion,
    facts: DiffusionFacts,
    config: SampleConfig,
    seeds: Labels,
    labels: Labels,
) -> Latents:
    """Raw latents `[n, z, h, w]` (CPU, float32) for n seeds and labels (-1: no class)."""
    noise = seeded_noise(seeds.tolist())
    condition = model.condition(labels)
    denoise = model.denoise
    if config.guidance != 1.0 and model.config.classes:
        condition = stacked(condition, model.null(len(seeds)))
        denoise = guided(model.denoise, config.guidance)
    if model.config.unet.self_conditioning:
        denoise = remembering(denoise)
    sigmas = model.schedule.steps(config.steps)
    start = noise(torch.empty(len(seeds), *facts.latent_shape, device=model.latent_mean.device))
    x = sample_ddim(
        lambda x, sigma: denoise(x, sigma, condition),
        model.schedule.initial(start, float(sigmas[0])),
        sigmas,
        noise=noise,
        eta=config.eta,
    )
    return model.unwhiten(x).cpu()


def seeded_noise(seeds: list[int]) -> Noise:
    """Noise whose row i comes from a generator of seed i alone."""
    generators = [generator_for(seed) for seed in seeds]

    def noise(like: torch.Tensor) -> torch.Tensor:
        rows = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
        return torch.stack(rows).to(like.device)

    return noise


def choose_labels(config: SampleConfig, facts: DiffusionFacts) -> Labels:
    """A class index for each sample: the labels asked for take turns, all classes if none are.

    Raises:
        UsageError: a name or index that the model does not know; the message lists what it knows.
    """
    names = list(facts.class_names)
    if config.label and not names:
        raise UsageError(f"--label: {config.model} was trained without classes")
    chosen = [_label_index(text, names) for text in config.label] or list(range(len(names))) or [-1]
    return torch.tensor([chosen[number % len(chosen)] for number in range(config.num)])


def _label_index(text: str, names: list[str]) -> int:
    folded = {name.casefold(): index for index, name in enumerate(names)}
    if text.casefold() in folded:
        return folded[text.casefold()]
    if text.casefold() == NO_CLASS:
        return -1
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    known = ", ".join(f"{index} {name}" for index, name in enumerate(names[:20]))
    raise UsageError(
        f"--label {text!r}: no such class; the model knows {known}{' ...' if len(names) > 20 else ''}"
    )


def _block(
    latents: Latents, seeds: Labels, labels: Labels, facts: DiffusionFacts, total: int, first: int
) -> dict[str, Any]:
    block_facts = SampleFacts(
        fingerprint="",
        autoencoder=facts.autoencoder,
        diffusion=facts.fingerprint,
        class_names=facts.class_names,
        total=total,
        first=first,
        versions=versions(),
    )
    return {
        "tensors": {"latents": latents, "seed": seeds, "label": labels},
        "kind": "samples",
        "config": {},
        "facts": block_facts.model_dump(mode="json"),
    }
