"""`ldmkit decode`: sampled latents in, pictures out."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from io import BufferedIOBase
from pathlib import Path

import torch

from ldmkit.assembly import autoencoder_facts, load_autoencoder, require_same_autoencoder
from ldmkit.autoencoder.tiling import compute_in_tiles
from ldmkit.configs import STREAM, DecodeConfig
from ldmkit.data.latents import unragged
from ldmkit.durable import atomic_file, sweep_temporaries
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import AutoencoderFacts, SampleFacts, validated
from ldmkit.modelfile import load_messages
from ldmkit.pixels import Pixels, grid, save_npy, save_png, save_png16, shown, to_pixels
from ldmkit.tensors import Latents
from ldmkit.terminal import say, track
from ldmkit.training.runtime import groups_of, pick_device

MAX_GRID = 256


def decode(config: DecodeConfig, stream: BufferedIOBase | None = None) -> Path:
    """Decode samples to files named by seed and class, and a grid of the first 256.

    Args:
        config: what to decode, with what, to where.
        stream: where the bytes come from if `config.samples` is `-`.

    Returns:
        The directory of the pictures.

    Raises:
        DataError: the samples are not of this autoencoder, are damaged, or the stream ended early.
        UsageError: the format cannot hold the autoencoder's channels.
    """
    source = "standard input" if config.samples == STREAM else str(config.samples)
    device = pick_device(config.device)
    model = load_autoencoder(config.ae, device)
    ae_facts = autoencoder_facts(config.ae)
    suffix, write = WRITERS[choose_format(config, ae_facts)]
    if config.tile:
        compute_in_tiles(model, config.tile, exact=config.tiling == "exact", scratch=config.scratch)
    config.out.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(config.out)
    previews: list[Pixels] = []
    done = total = 0
    with ExitStack() as stack:
        progress = None
        for latents, names, facts in _blocks(config, stream, source):
            if progress is None:
                require_same_autoencoder(facts.autoencoder, config.ae, f"the samples in {source}")
                total = facts.total
                progress = stack.enter_context(track("decode", total, unit="picture"))
            for group, kept in _groups(len(latents), config, device):
                with torch.inference_mode():
                    images = model.decode(latents[group].to(device))[:kept].float().cpu()
                for index, image in zip(group, images, strict=False):
                    with atomic_file(config.out / f"{names[index]}.{suffix}") as temporary:
                        write(temporary, image, ae_facts)
                previews += [shown(to_pixels(images))] if done < MAX_GRID else []
                done += kept
                progress.advance(kept)
    if done != total or not total:
        raise DataError(
            f"{source} ended after {done} of {total} samples"
            if total
            else f"{source} holds no samples"
        )
    pictures = torch.cat(previews)[:MAX_GRID]
    with atomic_file(config.out / "grid.png") as temporary:
        save_png(temporary, grid(pictures, columns=max(1, round(len(pictures) ** 0.5))))
    say(f"{done} pictures and grid.png in {config.out}")
    return config.out


def picture_name(seed: int, told: str) -> str:
    """File name of a picture without suffix: seed and what it was told, of safe characters only.

    Args:
        seed: of the sample.
        told: what it was told, as JSON.
    """
    words = " ".join(str(value) for value in json.loads(told).values() if isinstance(value, str))
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower())[:60].strip("-")
    return f"{seed:06d}-{slug}" if slug else f"{seed:06d}"


def choose_format(config: DecodeConfig, facts: AutoencoderFacts) -> str:
    """The file format: the one asked for, or the smallest that loses nothing.

    `auto` is PNG for what was trained on 8 bits of 1 or 3 channels, 16-bit PNG for 16 bits of
    these, and NumPy files for all others and wherever a range is declared.

    Raises:
        UsageError: the format cannot hold that many channels.
    """
    channels, wanted = facts.image_channels, config.format
    if wanted == "auto":
        whole = facts.preprocessing.range is None
        if not whole or channels not in (1, 3):
            return "npy"
        return {"uint8": "png", "uint16": "png16"}.get(facts.depth, "npy")
    if wanted in ("png", "png16") and channels not in (1, 3):
        raise UsageError(f"--format {wanted} cannot hold {channels} channels; take npy")
    return wanted


def _write_png(path: Path, image: torch.Tensor, facts: AutoencoderFacts) -> None:
    del facts
    save_png(path, to_pixels(image[None])[0])


def _write_png16(path: Path, image: torch.Tensor, facts: AutoencoderFacts) -> None:
    del facts
    save_png16(path, image)


def _write_npy(path: Path, image: torch.Tensor, facts: AutoencoderFacts) -> None:
    natural = 65535.0 if facts.depth == "uint16" else 255.0
    save_npy(path, image, facts.preprocessing.range or (0.0, natural))


def _groups(
    count: int, config: DecodeConfig, device: torch.device
) -> Iterator[tuple[torch.Tensor, int]]:
    """As `groups_of`; in tiles one by one, since even one picture may be large."""
    if config.tile:
        return ((torch.tensor([number]), 1) for number in range(count))
    return groups_of(count, config.batch_size, device)


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
        told = unragged(tensors["told.bytes"].numpy(), tensors["told.offsets"].numpy())
        names = [
            picture_name(seed, one)
            for seed, one in zip(tensors["seed"].tolist(), told, strict=True)
        ]
        yield tensors["latents"], names, facts


WRITERS: dict[str, tuple[str, Callable[[Path, torch.Tensor, AutoencoderFacts], None]]] = {
    "png": ("png", _write_png),
    "png16": ("png", _write_png16),
    "npy": ("npy", _write_npy),
}
"""Format -> suffix, and what writes one image `[c, h, w]` in [-1, 1]."""
