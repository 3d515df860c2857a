"""`ldmkit decode`: sampled latents in, pictures out."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from io import BufferedIOBase
from pathlib import Path

import torch

from ldmkit.assembly import load_autoencoder, require_same_autoencoder
from ldmkit.configs import STREAM, DecodeConfig
from ldmkit.durable import atomic_file, sweep_temporaries
from ldmkit.errors import DataError
from ldmkit.facts import SampleFacts, validated
from ldmkit.modelfile import load_messages
from ldmkit.pixels import Pixels, grid, save_png, to_pixels
from ldmkit.tensors import Latents
from ldmkit.terminal import say, track
from ldmkit.training.runtime import groups_of, pick_device

MAX_GRID = 256


def decode(config: DecodeConfig, stream: BufferedIOBase | None = None) -> Path:
    """Decode samples to PNG files named by seed and class, and a grid of the first 256.

    Args:
        config: what to decode, with what, to where.
        stream: where the bytes come from if `config.samples` is `-`.

    Returns:
        The directory of the pictures.

    Raises:
        DataError: the samples are not of this autoencoder, are damaged, or the stream ended early.
    """
    source = "standard input" if config.samples == STREAM else str(config.samples)
    device = pick_device(config.device)
    model = load_autoencoder(config.ae, device)
    config.out.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(config.out)
    shown: list[Pixels] = []
    done = total = 0
    with ExitStack() as stack:
        progress = None
        for latents, names, facts in _blocks(config, stream, source):
            if progress is None:
                require_same_autoencoder(facts.autoencoder, config.ae, f"the samples in {source}")
                total = facts.total
                progress = stack.enter_context(track("decode", total, unit="picture"))
            for group, kept in groups_of(len(latents), config.batch_size, device):
                with torch.inference_mode():
                    pixels = to_pixels(model.decode(latents[group].to(device)))[:kept]
                _save(config.out, [names[index] for index in group[:kept]], pixels)
                shown += [pixels] if done < MAX_GRID else []
                done += kept
                progress.advance(kept)
    if done != total or not total:
        raise DataError(
            f"{source} ended after {done} of {total} samples"
            if total
            else f"{source} holds no samples"
        )
    pictures = torch.cat(shown)[:MAX_GRID]
    with atomic_file(config.out / "grid.png") as temporary:
        save_png(temporary, grid(pictures, columns=max(1, round(len(pictures) ** 0.5))))
    say(f"{done} pictures and grid.png in {config.out}")
    return config.out


def picture_name(seed: int, label: int, class_names: tuple[str, ...]) -> str:
    """File name of a picture: seed and class, of safe characters only."""
    if label < 0:
        return f"{seed:06d}.png"
    slug = re.sub(r"[^a-z0-9]+", "-", class_names[label].lower()).strip("-")[:60]
    return f"{seed:06d}-{slug or label}.png"


def _blocks(
    config: DecodeConfig, stream: BufferedIOBase | None, source: str
) -> Iterator[tuple[Latents, list[str], SampleFacts]]:
    if stream is not None:
        yield from _read(stream, source)
        return
    try:
        with config.samples.open("rb") as file:
            yield from _read(file, source)
    except OSError as error:
        raise DataError(f"cannot read {config.samples}: {error.strerror}") from error


def _read(file: BufferedIOBase, source: str) -> Iterator[tuple[Latents, list[str], SampleFacts]]:
    for header, tensors in load_messages(file, source, kind="samples"):
        facts = validated(SampleFacts, header.facts, source)
        seeds, labels = tensors["seed"].tolist(), tensors["label"].tolist()
        names = [
            picture_name(seed, label, facts.class_names)
            for seed, label in zip(seeds, labels, strict=True)
        ]
        yield tensors["latents"], names, facts


def _save(directory: Path, names: list[str], pixels: Pixels) -> None:
    for name, picture in zip(names, pixels, strict=True):
        with atomic_file(directory / name) as temporary:
            save_png(temporary, picture)
