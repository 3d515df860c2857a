"""Which sampler, grid and number of model calls give the best pictures: FD-effnet of a trained model.

python bench/samplers.py MODEL --ae AE --latents LATENTS --data DATA --weights EFFNET --out DIR [--num 128]
python bench/samplers.py --page --out DIR

Each cell (sampler, grid, calls) draws the same seeds, told the classes of the same pictures of LATENTS, guided by
`--guidance`, and is measured against all pictures of DATA. Samples are drawn 64 at a time, and not two at a
time as `ldmkit sample` draws on a CPU so that a picture does not depend on its batch; that and bfloat16 (what
`--precision fp32` turns off) change a picture by rounding only.

The cells of 20 and 30 calls come first, then grids for the four samplers that are best there, then the rest.
DIR/results.jsonl has a line for each cell; DIR/cells/ its features and latents. Called again, it goes on where it
was; with a larger --num it adds samples to every cell. --page writes docs/sampler-choice.md's tables and its figures
anew from DIR. Cells without randomness have `rms` too: root mean square difference of the latents, in their
standard deviations, to those of 200 calls.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sampler_page
import torch
from torch import Tensor

from ldmkit.assembly import autoencoder_facts, load_autoencoder, load_diffusion, preprocessing_of
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.data.images import read_images
from ldmkit.data.latent_set import LatentSet
from ldmkit.data.order import generator_for
from ldmkit.data.sources import open_source
from ldmkit.data_configs import SourceConfig
from ldmkit.diffusion.samplers import SAMPLERS
from ldmkit.drawing import Guide, Manner, draw_latents, guide_together, seeded_noise
from ldmkit.durable import atomic_file
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.metrics.bootstrap import frechet_draws, interval, resampling_counts
from ldmkit.metrics.feature_networks import FeatureNetwork, effnet_network, features_of
from ldmkit.metrics.frechet import FeatureStatistics, covariance_root, rgb_pixels
from ldmkit.training.runtime import autocast_for

AT_ONCE = 64
FIRST_CALLS, OTHER_CALLS = (20, 30), (10, 50, 5, 15)
GRIDS, GRID_CALLS, BEST = ("karras", "exponential", "align-your-steps"), (20, 10), 4
"""Grids other than the schedule's own (auto: trailing, for a discrete schedule) for the best samplers."""
CONVERGED = ("dpmpp-2m", "auto", 200)
"""What samplers without randomness are compared with."""
SAME = {"euler": "ddim", "euler-ancestral": "ddpm"}
"""Samplers that are another one under their defaults; a test of ours says so."""
REAL, DECODED = "real", "decoded"
"""Cells that need no model: real pictures, and through the autoencoder."""
DRAWS = 200
PLACE = 20
"""In the seed tree."""
Reference = tuple[tuple[Tensor, Tensor], Tensor]
"""Mean and covariance of real features, and the covariance's root."""


class Cell(NamedTuple):
    """One way of drawing."""

    sampler: str
    grid: str
    calls: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.sampler}-{self.grid}-{self.calls}"


class Setting(NamedTuple):
    """Everything that all cells share."""

    model: LatentDiffusion
    guide: Guide | None
    decoder: Autoencoder
    network: FeatureNetwork
    labels: Tensor
    """Class of each sample, `[num, 1]`."""
    places: np.ndarray
    """Of the pictures that the classes are of."""
    latents: LatentSet
    shape: tuple[int, ...]
    precision: str
    out: Path


def main() -> None:
    """Measure all cells, or write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--ae", type=Path)
    parser.add_argument("--latents", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num", type=int, default=128)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS))
    parser.add_argument("--calls", nargs="+", type=int, help="these alone, and no other grids")
    parser.add_argument("--page", action="store_true")
    asked = parser.parse_args()
    if asked.page:
        sampler_page.write(asked.out)
        return
    missing = [
        n for n in ("model", "ae", "latents", "data", "weights") if getattr(asked, n) is None
    ]
    if missing:
        parser.error(f"{missing[0]} is missing")
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    setting = setting_of(asked)
    reference = reference_of(asked, setting)
    results = asked.out / "results.jsonl"
    for cell in cells(asked, results):
        if cell not in sampler_page.measured(results, asked.num):
            row = measure(cell, setting, reference)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{cell.name}: FD {row['fd']:.1f}, {row['seconds']:.0f} s", flush=True)


def setting_of(asked: argparse.Namespace) -> Setting:
    """Load everything once."""
    model = load_diffusion(asked.model)
    latents = LatentSet(asked.latents)
    order = torch.randperm(len(latents), generator=generator_for(0, PLACE))[: asked.num].numpy()
    return Setting(
        model,
        guide_together(model.config.conditions, asked.guidance),
        load_autoencoder(asked.ae),
        effnet_network(asked.weights, torch.device("cpu")),
        torch.from_numpy(latents.labels[order])[:, None],
        order,
        latents,
        latents.manifest.latent_shape,
        asked.precision,
        asked.out / "cells",
    )


def cells(asked: argparse.Namespace, results: Path) -> Iterator[Cell]:
    """What is to be measured, in order; grids once the best samplers are known."""
    yield Cell(DECODED, "auto", 0)
    yield Cell(*CONVERGED)
    samplers = [name for name in asked.samplers if name not in SAME]
    for calls in asked.calls or FIRST_CALLS:
        yield from (Cell(name, "auto", calls) for name in samplers)
    if asked.calls:
        return
    found = sampler_page.measured(results, asked.num)
    best = sorted(
        samplers,
        key=lambda name: sum(found[name, "auto", calls]["fd"] for calls in FIRST_CALLS),
    )
    for calls in OTHER_CALLS[:1]:
        yield from (Cell(name, "auto", calls) for name in samplers)
    for calls in GRID_CALLS:
        yield from (Cell(name, grid, calls) for grid in GRIDS for name in best[:BEST])
    for calls in OTHER_CALLS[1:]:
        yield from (Cell(name, "auto", calls) for name in samplers)


def measure(cell: Cell, setting: Setting, reference: Reference) -> dict[str, Any]:
    """Draw what is missing of a cell, and measure all of it."""
    start = time.perf_counter()
    file = setting.out / f"{cell.name}.npz"
    parts: list[dict[str, np.ndarray]] = [dict(np.load(file))] if file.exists() else []
    have = sum(len(part["features"]) for part in parts)
    for first in range(have, len(setting.labels), AT_ONCE):
        numbers = range(first, min(first + AT_ONCE, len(setting.labels)))
        latents = drawn(cell, setting, numbers)
        with torch.no_grad(), autocast_for(torch.device("cpu"), setting.precision)():
            images = rgb_pixels(setting.decoder.decode(latents).float())
        features = features_of(setting.network, [images], lambda _: None).features
        parts.append({"features": features.numpy(), "latents": latents.numpy()})
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    whole = {name: part[: len(setting.labels)] for name, part in whole.items()}
    save_cell(file, whole)
    features = torch.from_numpy(whole["features"])
    counts = resampling_counts(len(features), DRAWS, 0)
    once = torch.ones(1, len(features), dtype=counts.dtype)
    real, root = reference
    distance, *draws = frechet_draws(features, real, torch.cat([once, counts]), root).tolist()
    return {
        **cell._asdict(),
        "num": len(features),
        "fd": distance,
        "interval": interval(draws, distance),
        "rms": deviation(cell, setting, torch.from_numpy(whole["latents"])),
        "seconds": time.perf_counter() - start,
    }


def drawn(cell: Cell, setting: Setting, numbers: Sequence[int]) -> Tensor:
    """Raw latents of some samples."""
    rows = list(numbers)
    if cell.sampler == DECODED:
        return setting.latents.read(setting.places[rows]).mean.float()
    manner = Manner(cell.calls, setting.guide, cell.sampler, cell.grid)  # pyright: ignore
    with autocast_for(torch.device("cpu"), setting.precision)():
        return draw_latents(
            setting.model,
            {"class": setting.labels[rows]},
            (len(rows), *setting.shape),
            seeded_noise(rows),
            manner,
        ).float()


def deviation(cell: Cell, setting: Setting, latents: Tensor) -> float | None:
    """How far latents are from those of many calls, in standard deviations; None for random samplers."""
    file = setting.out / f"{Cell(*CONVERGED).name}.npz"
    if cell.sampler == DECODED or SAMPLERS[cell.sampler].stochastic or not file.exists():
        return None
    converged = torch.from_numpy(np.load(file)["latents"])[: len(latents)]
    if len(converged) < len(latents):
        return None
    error = (latents - converged) / setting.model.latent_std.view(-1, 1, 1)
    return error.square().mean().sqrt().item()


def reference_of(asked: argparse.Namespace, setting: Setting) -> Reference:
    """Of all real pictures, whose features are kept in a file."""
    file = setting.out / f"{REAL}.npz"
    if not file.exists():
        setting.out.mkdir(parents=True, exist_ok=True)
        items = open_source(SourceConfig(data=asked.data)).items
        preprocessing = preprocessing_of(autoencoder_facts(asked.ae), None)
        batches = (
            rgb_pixels(read_images(items[first : first + AT_ONCE], preprocessing))
            for first in range(0, len(items), AT_ONCE)
        )
        side = features_of(setting.network, batches, lambda _: None)
        save_cell(file, {"features": side.features.numpy()})
    statistics = FeatureStatistics()
    statistics.add(torch.from_numpy(np.load(file)["features"]))
    moments = statistics.moments()
    return moments, covariance_root(moments[1])


def save_cell(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays, whole or not at all."""
    with atomic_file(file) as temporary, temporary.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()
