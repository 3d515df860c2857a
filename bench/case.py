"""Held-back samples of a run beside the pictures they should be like, and the row that a measurement of them is."""

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import ldmkit
from ldmkit.assembly import autoencoder_facts, load_autoencoder, preprocessing_of
from ldmkit.data.images import read_images
from ldmkit.data.items import Item
from ldmkit.data.latent_set import LatentSet
from ldmkit.data.sources import open_source
from ldmkit.data_configs import SourceConfig
from ldmkit.generation_configs import SampleConfig
from ldmkit.modelfile import load
from ldmkit.training.runtime import pick_device

AT_ONCE = 64
"""Pictures measured together."""


class Case(NamedTuple):
    """Held-back samples of one run."""

    latents: LatentSet
    indices: np.ndarray
    """Of the latents whose conditions the samples were told."""
    real: Tensor
    """The pictures, `[n, 3, y, x]` in [-1, 1]."""
    decoded: Tensor
    """The same through the autoencoder."""
    made: Tensor
    training: tuple[Sequence[Item], np.ndarray]
    """Pictures that were not held back, and where they are in the set."""


class Row(NamedTuple):
    """One measurement."""

    what: str
    made: float
    error: float
    """Standard error of it."""
    real: float
    control: float
    samples: int


@torch.no_grad()
def case_of(run: Path, asked: argparse.Namespace) -> Case:
    """Draw the samples of a run, and read what they should be like."""
    latents = LatentSet(run / "latents")
    training = latents.training_indices(asked.holdout)
    held_back = np.setdiff1d(np.arange(len(latents)), training)
    count = min(asked.num, len(held_back))
    # what is concatenated stays told, unless it is guided by its name
    by_name = asked.task in ("labelmap", "lowres", "mask") and asked.guidance != 1.0
    with tempfile.TemporaryDirectory() as scratch:
        drawn = ldmkit.sample(
            SampleConfig(
                model=run / "ldm" / "diffusion.safetensors",
                out=Path(scratch) / "samples.safetensors",
                like=run / "latents",
                holdout=asked.holdout,
                num=count,
                steps=asked.steps,
                guidance=None if by_name else asked.guidance,
                guidance_of=(f"{asked.task}={asked.guidance:g}",) if by_name else (),
                device=asked.device,
                batch_size=AT_ONCE,
            )
        )
        if drawn is None:
            raise SystemExit("nothing was drawn")
        samples = load(drawn, kind="samples")[1]["latents"]
    device = pick_device(asked.device)
    model = load_autoencoder(asked.ae, device)

    def decode(some: Tensor) -> Tensor:
        parts = [model.decode(part.float().to(device)) for part in some.split(AT_ONCE)]
        return torch.cat(parts).clamp(-1, 1).float().cpu()

    indices = held_back[:count]
    items = items_of(latents, asked.data)
    preprocessing = preprocessing_of(autoencoder_facts(asked.ae), None)
    real = read_images([items[index] for index in indices], preprocessing)
    seen = [items[index] for index in training]
    decoded = decode(latents.read(indices).mean)
    return Case(latents, indices, real, decoded, decode(samples), (seen, training))


def items_of(latents: LatentSet, data: str) -> list[Item]:
    """The pictures of a set, in its order."""
    known = {item.key: item for item in open_source(SourceConfig(data=data)).items}
    keys = list(latents.texts("key"))
    missing = [key for key in keys if key not in known]
    if missing:
        raise SystemExit(f"{data} lacks {missing[0]}: give --data the pictures that were encoded")
    return [known[key] for key in keys]


def mean_of(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))
