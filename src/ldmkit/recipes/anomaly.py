"""`ldmkit anomaly`: where do pictures differ from what a model of normal ones makes of them?"""

import csv
import io
import json
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ldmkit.assembly import autoencoder_facts, load_autoencoder, require_same_autoencoder
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.data.order import seed_for
from ldmkit.diffusion.samplers import SAMPLERS, Levels, run_sampler
from ldmkit.diffusion.schedule import Schedule
from ldmkit.drawing import seeded_noise
from ldmkit.durable import atomic_file, sweep_temporaries, write_text
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import AutoencoderFacts
from ldmkit.measures_configs import AnomalyConfig
from ldmkit.output.formats import units_of
from ldmkit.output.maps import over_channels, require_formats, white_of, write_map
from ldmkit.pixels import OneImage, Sheet, grid, save_png, to_pixels
from ldmkit.sample_blocks import picture_name
from ldmkit.tensors import Images
from ldmkit.terminal import say, track
from ldmkit.told_latents import Group, Told, groups, sampling_denoise_of, told_latents, whitened

SCHEMA_VERSION = 1
SUMMARY, TABLE, SHEET = "anomaly.json", "scores.csv", "grid.png"
NOISE = 23  # place in the seed tree
SHOWN = 16
"""Pictures in the sheet, those of the highest scores."""
COLUMNS = ("index", "key", "score", "mean", "max", "files")


def anomaly(config: AnomalyConfig) -> dict[str, Any]:
    """Noise latents to a level, take the noise away, and compare (AnoDDPM: Wyatt et al. 2022).

    The map is |r - mean of the draws|, where r is the autoencoder's reconstruction, not the picture: what the
    autoencoder alone loses is not in it. The mean over draws takes away what differs by chance.

    Args:
        config: which model, which latents, how much noise, to where.

    Returns:
        The summary, as in OUT/anomaly.json: `{"schema_version", "out", "autoencoder", "diffusion", "sigma",
        "units", "white", "pictures"}`, pictures by falling score, each with index, key, score, mean, max (in
        units of the training pictures) and files.

    Raises:
        DataError: latents, model and autoencoder do not belong together.
        UsageError: strength, steps and sampler do not fit the model's schedule.
    """
    facts = autoencoder_facts(config.ae)
    require_formats(config.format, facts)
    told = told_latents(config, config.num)
    require_same_autoencoder(told.facts.autoencoder, config.ae, f"the latents in {config.latents}")
    sigmas = levels_from(told.model.schedule, config)
    decoder = load_autoencoder(config.ae, told.model.latent_mean.device)
    config.out.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(config.out)
    pictures: list[dict[str, Any]] = []
    sheet: list[tuple[float, int, list[OneImage]]] = []
    with track("anomaly", len(told.indices), unit="picture") as progress:
        for group in groups(told):
            reconstructed, repaired = reconstructions(told, group, decoder, sigmas, config)
            differences = (reconstructed - repaired).abs() * counting_pixels(told, group, repaired)
            for place in range(group.kept):
                index, difference = group.rows[place], differences[place].cpu()
                if not difference.isfinite().all():
                    raise DataError(
                        f"{config.model} makes no finite numbers of latent {index}: retrain it"
                    )
                picture = scored(told, index, difference, config, facts)
                pictures.append(picture)
                seen = [x[place].cpu() for x in (reconstructed, repaired)]
                sheet.append((picture["score"], -index, [*seen, difference]))
                sheet = sorted(sheet, key=lambda entry: entry[:2], reverse=True)[:SHOWN]
            progress.advance(group.kept)
    pictures.sort(key=lambda one: (-one["score"], one["index"]))
    summary = {
        "schema_version": SCHEMA_VERSION,
        "out": str(config.out),
        "autoencoder": facts.fingerprint,
        "diffusion": told.facts.fingerprint,
        "sigma": float(sigmas[0]),
        "units": list(units_of(facts)),
        "white": white_of(facts, config.white),
        "pictures": pictures,
    }
    write_text(config.out / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    write_text(config.out / TABLE, as_csv(pictures))
    with atomic_file(config.out / SHEET) as temporary:
        save_png(temporary, contact_sheet([columns for *_, columns in sheet], facts, config))
    say(
        f"{len(pictures)} pictures; scores {pictures[-1]['score']:.4g} to {pictures[0]['score']:.4g}, highest: "
        f"{pictures[0]['key']}"
    )
    return summary


def levels_from(schedule: Schedule, config: AnomalyConfig) -> Levels:
    """Falling noise levels from that of --strength: even along the schedule's own time, then 0.

    Raises:
        UsageError: the schedule has not so many levels below.
    """
    steps = SAMPLERS[config.sampler].grid_steps(config.steps)
    places = torch.linspace(config.strength, 0.0, steps + 1, dtype=torch.float64)[:-1]
    sigmas = schedule.sigma_at(places)
    if bool((sigmas.diff() >= 0).any()):
        raise UsageError(
            f"--steps {config.steps}: there are fewer noise levels below --strength {config.strength:g}"
        )
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


@torch.no_grad()
def reconstructions(
    told: Told, group: Group, decoder: Autoencoder, sigmas: Levels, config: AnomalyConfig
) -> tuple[Images, Images]:
    """What the autoencoder makes of some latents, and the mean of what it makes of their draws."""
    model, clean = told.model, whitened(told, group, drawn=False)
    total: Images | None = None
    for draw in range(config.draws):
        noise = seeded_noise([seed_for(config.seed, NOISE, row, draw) for row in group.rows])
        start = clean + float(sigmas[0]) * noise(clean)
        denoise = sampling_denoise_of(told, group)
        try:
            latents = run_sampler(
                config.sampler, denoise, start, sigmas, calls=config.steps, noise=noise, settings={}
            )
        except ValueError as error:
            raise UsageError(f"--sampler {config.sampler}: {error}") from error
        images = decoder.decode(model.unwhiten(latents)).float()
        total = images if total is None else total + images
    assert total is not None  # noqa: S101 - there is at least one draw
    return decoder.decode(model.unwhiten(clean)).float(), total / config.draws


def counting_pixels(
    told: Told, group: Group, like: Images
) -> Float[Tensor, "batch 1 height width"]:
    """1 where a pixel counts: everywhere, unless the set says otherwise."""
    if "mask" not in told.latents.manifest.columns:
        return like.new_ones(len(like), 1, *like.shape[2:])
    return told.latents.rows("mask", group.rows).to(like)[:, None]


def scored(
    told: Told, index: int, difference: OneImage, config: AnomalyConfig, facts: AutoencoderFacts
) -> dict[str, Any]:
    """Write the maps of a picture; returns what the summary says of it."""
    low, high = units_of(facts)
    key = told.latents.text("key", index)
    values = over_channels(difference).double().flatten() * ((high - low) / 2.0)
    count = max(1, round(config.share * len(values)))
    stem = config.out / f"{picture_name(index, key)}.map"
    return {
        "index": index,
        "key": key,
        "score": float(values.topk(count).values.mean()),
        "mean": float(values.mean()),
        "max": float(values.max()),
        "files": write_map(stem, difference, config.format, facts, white_of(facts, config.white)),
    }


def contact_sheet(
    pictures: list[list[OneImage]], facts: AutoencoderFacts, config: AnomalyConfig
) -> Sheet:
    """Reconstructions, what they become, and their maps: a row each, the highest score on the left.

    Pictures of another size than the first one's are left out.
    """
    low, high = units_of(facts)
    gain = (high - low) / white_of(facts, config.white)
    alike = [images for images in pictures if images[0].shape == pictures[0][0].shape]
    maps = torch.stack([over_channels(images[2])[None].expand_as(images[0]) for images in alike])
    rows = [torch.stack([images[row] for images in alike]) for row in range(2)]
    return grid(to_pixels(torch.cat([*rows, maps * gain - 1.0])), len(alike))


def as_csv(pictures: list[dict[str, Any]]) -> str:
    """The pictures as a table."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in pictures:
        writer.writerow([" ".join(one[name]) if name == "files" else one[name] for name in COLUMNS])
    return file.getvalue()


def as_text(report: dict[str, Any]) -> str:
    """The directory, for a shell."""
    return str(report["out"])
