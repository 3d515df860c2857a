"""Samples of a model as picture files: drawn here, or from a sample file."""

from collections.abc import Iterator
from pathlib import Path

import torch

from ldmkit.assembly import (
    diffusion_facts,
    load_autoencoder,
    load_diffusion,
    require_same_autoencoder,
)
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.data.items import Item, Span
from ldmkit.drawing import draw_latents, seeded_noise
from ldmkit.durable import atomic_file
from ldmkit.errors import DataError
from ldmkit.evaluation_configs import EvaluateConfig
from ldmkit.facts import SampleFacts, validated
from ldmkit.generation_configs import SampleConfig
from ldmkit.manner import manner_of
from ldmkit.metrics.frechet import rgb_pixels
from ldmkit.modelfile import load_messages
from ldmkit.pixels import save_png
from ldmkit.requests import asked_of
from ldmkit.tensors import Latents
from ldmkit.terminal import track
from ldmkit.training.runtime import groups_of

USUAL = 1000
"""Samples, where nothing says how many."""
Drawn = tuple[Latents, list[int]]
"""Raw latents of some samples, and their seeds."""


def drawn_pictures(config: EvaluateConfig, device: torch.device) -> list[Item]:
    """Samples of `config.model`, or of the sample file, as OUT/samples/SEED.png.

    Raises:
        DataError: a file cannot be used, or the samples are of another autoencoder.
        UsageError: more steps than the model has.
    """
    ae = config.ae
    assert ae is not None  # noqa: S101 - the config asks for it
    if config.model is not None:
        blocks, count = _from_model(config, config.model, ae, device), config.num or USUAL
    else:
        file = Path(str(config.samples))
        blocks, count = _from_file(config, file, ae)
    decoder = load_autoencoder(ae, device)
    folder = config.out / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    items: list[Item] = []
    with track("samples", count, unit="sample") as progress:
        for latents, seeds in blocks:
            items += _decoded(decoder, latents, seeds, folder, config.batch_size)
            progress.advance(len(seeds))
    return items


@torch.no_grad()
def _decoded(
    decoder: Autoencoder, latents: Latents, seeds: list[int], folder: Path, batch_size: int
) -> list[Item]:
    """Decode and write some samples."""
    device = next(decoder.parameters()).device
    items = []
    for group, kept in groups_of(len(seeds), batch_size, device):
        images = decoder.decode(latents[group].to(device))[:kept].float()
        if not images.isfinite().all():
            raise DataError(
                f"sample {seeds[int(group[0])]} has no finite numbers: retrain the model"
            )
        for index, pixels in zip(group.tolist(), rgb_pixels(images), strict=False):
            path = folder / f"{seeds[index]:06d}.png"
            with atomic_file(path) as temporary:
                save_png(temporary, pixels)
            items.append(Item(path.name, Span(str(path), 0, path.stat().st_size)))
    return items


def _from_model(
    config: EvaluateConfig, file: Path, ae: Path, device: torch.device
) -> Iterator[Drawn]:
    facts = diffusion_facts(file)
    require_same_autoencoder(facts.autoencoder, ae, f"the latents that {file} makes")
    model = load_diffusion(file, device)
    total = config.num or USUAL
    wish = SampleConfig(
        model=file,
        num=total,
        like=config.like,
        holdout=config.holdout if config.like else 0.0,
        seed=config.seed,
        sampler=config.sampler,
        steps=config.steps,
        guidance=config.guidance,
        eta=config.eta,
    )
    asked, manner = asked_of(wish, model.config, facts.latent_shape, None), manner_of(wish, model)
    for group, kept in groups_of(total, config.batch_size, device):
        numbers = group.tolist()
        seeds = [config.seed + number for number in numbers]
        shape = (len(numbers), *facts.latent_shape)
        latents = draw_latents(model, asked.values(numbers), shape, seeded_noise(seeds), manner)
        yield latents[:kept].cpu(), seeds[:kept]


def _from_file(config: EvaluateConfig, file: Path, ae: Path) -> tuple[Iterator[Drawn], int]:
    """The samples of a file: the first `--num` of it."""
    try:
        with file.open("rb") as stream:
            blocks = list(load_messages(stream, str(file), kind="samples"))
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    if not blocks:
        raise DataError(f"{file} holds no samples")
    facts = validated(SampleFacts, blocks[0][0].facts, str(file))
    require_same_autoencoder(facts.autoencoder, ae, f"the samples in {file}")
    latents = torch.cat([tensors["latents"] for _, tensors in blocks])[: config.num]
    seeds = torch.cat([tensors["seed"] for _, tensors in blocks])[: config.num].tolist()
    parts = range(0, len(seeds), config.batch_size)
    size = config.batch_size
    return (((latents[n : n + size], seeds[n : n + size])) for n in parts), len(seeds)
