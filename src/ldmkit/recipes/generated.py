"""Samples of a model as picture files: drawn here, or from a sample file."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ldmkit.assembly import (
    autoencoder_facts,
    diffusion_facts,
    load_autoencoder,
    load_diffusion,
    precision_for,
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
from ldmkit.sample_groups import sample_groups
from ldmkit.tensors import Latents
from ldmkit.terminal import track

USUAL = 1000
"""Samples, where nothing says how many."""
Drawn = tuple[Latents, list[int]]
"""Raw latents of some samples, and their seeds."""


def drawn_pictures(
    config: EvaluateConfig, device: torch.device, own: Callable[[int], range]
) -> list[Path]:
    """Samples of `config.model`, or of the sample file, as OUT/samples/SEED.png.

    Args:
        config: what to draw, or from which file.
        device: where.
        own: of so many samples, the numbers of those that are to be written here.

    Returns:
        The files of all samples, those of others too.

    Raises:
        DataError: a file cannot be used, or the samples are of another autoencoder.
        UsageError: more steps than the model has.
    """
    ae = config.ae
    assert ae is not None  # noqa: S101 - the config asks for it
    if config.model is not None:
        seeds = [config.seed + number for number in range(config.num or USUAL)]
        mine = own(len(seeds))
        blocks = _from_model(config, config.model, ae, device, mine)
    else:
        latents, seeds = _of_file(config, Path(str(config.samples)), ae)
        mine = own(len(seeds))
        starts = range(mine.start, mine.stop, config.batch_size)
        ranges = (slice(n, min(n + config.batch_size, mine.stop)) for n in starts)
        blocks = ((latents[part], seeds[part]) for part in ranges)
    # as `decode` and `sample` compute unless asked otherwise
    decoder = load_autoencoder(ae, device, precision_for(autoencoder_facts(ae), "auto"))
    folder = config.out / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    with track("samples", len(mine), unit="sample") as progress:
        for drawn, numbers in blocks:
            _decode(decoder, drawn, numbers, folder, config.batch_size)
            progress.advance(len(numbers))
    return [_path_of(folder, seed) for seed in seeds]


def written_items(paths: Sequence[Path], numbers: range) -> list[Item]:
    """Pictures in files of their own."""
    chosen = (paths[number] for number in numbers)
    return [Item(path.name, Span(str(path), 0, path.stat().st_size)) for path in chosen]


def _path_of(folder: Path, seed: int) -> Path:
    return folder / f"{seed:06d}.png"


@torch.no_grad()
def _decode(
    decoder: Autoencoder, latents: Latents, seeds: list[int], folder: Path, batch_size: int
) -> None:
    """Decode and write some samples."""
    device = next(decoder.parameters()).device
    pixels = latents.shape[2] * latents.shape[3]
    for group, kept in sample_groups(len(seeds), batch_size, decoder, pixels):
        images = decoder.decode(latents[group].to(device))[:kept].float()
        if not images.isfinite().all():
            raise DataError(
                f"sample {seeds[int(group[0])]} has no finite numbers: retrain the model"
            )
        for index, pixels in zip(group.tolist(), rgb_pixels(images), strict=False):
            with atomic_file(_path_of(folder, seeds[index])) as temporary:
                save_png(temporary, pixels)


def _from_model(
    config: EvaluateConfig, file: Path, ae: Path, device: torch.device, mine: range
) -> Iterator[Drawn]:
    facts = diffusion_facts(file)
    require_same_autoencoder(facts.autoencoder, ae, f"the latents that {file} makes")
    model = load_diffusion(file, device, "auto")
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
    _, *sides = facts.latent_shape
    groups = sample_groups(len(mine), config.batch_size, model.unet, math.prod(sides))
    for group, kept in groups:
        numbers = [mine[place] for place in group.tolist()]
        seeds = [config.seed + number for number in numbers]
        shape = (len(numbers), *facts.latent_shape)
        latents = draw_latents(model, asked.values(numbers), shape, seeded_noise(seeds), manner)
        yield latents[:kept].cpu(), seeds[:kept]


def _of_file(config: EvaluateConfig, file: Path, ae: Path) -> Drawn:
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
    return latents, seeds
