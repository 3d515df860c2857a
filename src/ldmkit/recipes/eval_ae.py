"""`ldmkit eval-ae`: is this autoencoder good enough for the second stage?"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ldmkit.assembly import autoencoder_facts, load_autoencoder, preprocessing_of
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder.loss import where_valid
from ldmkit.autoencoder.perceptual import MIN_SIZE, PerceptualDistance, build_perceptual
from ldmkit.autoencoder_configs import AutoencoderLossConfig, PreprocessingConfig
from ldmkit.configs import EvalAEConfig
from ldmkit.data.gaps import fill_gaps
from ldmkit.data.images import read_images, split
from ldmkit.data.items import Item
from ldmkit.data.order import generator_for
from ldmkit.data.sources import open_source
from ldmkit.durable import atomic_file, sweep_temporaries, write_text
from ldmkit.errors import DataError, QualityError
from ldmkit.facts import AutoencoderFacts
from ldmkit.metrics import st_lpips
from ldmkit.metrics.comparison import Comparison
from ldmkit.metrics.findings import bias_findings, codebook_findings, latent_findings
from ldmkit.metrics.frechet import Features, inception, inception_features
from ldmkit.metrics.latents import CodebookUsage, LatentHealth, LatentStatistics, described
from ldmkit.metrics.plots import can_plot, plot_report
from ldmkit.metrics.reconstruction import SSIM_WINDOW
from ldmkit.metrics.sheets import (
    COLUMNS,
    error_map_sheet,
    interpolation_sheet,
    pairs_sheet,
    prior_sheet,
)
from ldmkit.modelfile import versions
from ldmkit.networks.efficientnet import load_efficientnet_lite0
from ldmkit.pixels import Sheet, save_png
from ldmkit.seals import sealed_page
from ldmkit.tensors import Images, Latents
from ldmkit.terminal import say, track
from ldmkit.training.runtime import noise_from, pick_device

SCHEMA_VERSION = 1
ORDER, PRIOR = 5, 6  # places in the seed tree
MIN_SIDES = {
    "lpips-alex": 31,
    "lpips-squeeze": 17,
    **dict.fromkeys(("st-lpips-alex", "st-lpips-vgg"), st_lpips.MIN_SIZE),
}
"""Smallest sides of pictures, pixels, for networks that shrink them faster than VGG16."""
UNITS = {
    "psnr_db": "dB, range 2",
    "ssim": "1 for equals",
    "vgg16, lpips, st_lpips": "0 for equals; each its own scale",
    "rfd_effnet, rfid": "squared distance of features; comparable at equal numbers of pictures only",
    "range": "units of pictures in [-1, 1]",
    "latents": "raw latents, the autoencoder's own space",
    "nats_per_value": "nats for each latent value",
    "frequency": "cycles for each latent pixel",
    "spectrum": "power over the channel's variance; white noise is 1",
}


def eval_ae(config: EvalAEConfig) -> Path:
    """Measure reconstructions and latents, say what stands out, and check the thresholds.

    Returns:
        The directory of the report.

    Raises:
        DataError: a picture, the autoencoder or a network's weights cannot be used.
        QualityError: a threshold is missed; the report is written all the same.
    """
    device = pick_device(config.device)
    facts = autoencoder_facts(config.ae)
    preprocessing = preprocessing_of(facts, config.size)
    items = chosen_items(config)
    distances = build_distances(config, device)
    comparison = Comparison(distances, build_features(config, device))
    model = load_autoencoder(config.ae, device)
    codebook = model.codebook
    codes = CodebookUsage(len(codebook.codes)) if codebook is not None else None
    latents = LatentStatistics()
    shape: tuple[int, ...] = ()
    config.out.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(config.out)

    with track("eval-ae", len(items), unit="picture") as progress:
        for first in range(0, len(items), config.batch_size):
            batch = items[first : first + config.batch_size]
            images, valid = fill_gaps(read_images(batch, preprocessing))
            images, valid = images.to(device), valid if valid is None else valid.to(device)
            require_size(images, distances)
            with torch.no_grad():
                posterior = model.encode(images)
                reconstructions = where_valid(images, model.decode(posterior.mean), valid)
                if codes is not None and codebook is not None:
                    codes.add(codebook.nearest(posterior.mean))
            if not reconstructions.isfinite().all():
                raise DataError(
                    f"{config.ae} makes no finite numbers of {batch[0].key}: retrain it"
                )
            comparison.add(images, reconstructions)
            latents.add(posterior.mean, posterior.std)
            shape = tuple(images.shape[1:])
            progress.advance(len(batch))

    health = latents.health()
    bias = (50.0 * comparison.colour_bias()).tolist()  # percent of a range of 2
    findings = [
        *holdout_findings(config, facts),
        *bias_findings(bias),
        *latent_findings(health),
        *(codebook_findings(codes) if codes is not None else []),
    ]
    order = comparison.per_picture("psnr").argsort().tolist()
    ranked = {
        "worst": [items[index] for index in order[:COLUMNS]],
        "best": [items[index] for index in order[::-1][:COLUMNS]],
        "random": items[:COLUMNS],
    }
    sheets = draw_sheets(config, model, ranked, preprocessing, health)
    sheets["error-map"] = error_map_sheet(comparison.error_map())
    for name, sheet in sheets.items():
        with atomic_file(config.out / f"{name}.png") as temporary:
            save_png(temporary, sheet)
    plots = plot_report(config.out, comparison.per_picture("psnr"), health) if can_plot() else []

    measured = {
        **{key_of(name): comparison.spread(name)._asdict() for name in comparison.distances},
        **{name: found._asdict() for name, found in comparison.frechet_distances().items()},
    }
    thresholds = check_thresholds(config, measured, health)
    write_report(
        config,
        {
            "autoencoder": {"file": str(config.ae), **facts.model_dump(mode="json")},
            "pictures": len(items),
            "picture_shape": shape,
            "reconstruction": measured,
            "colour_bias": {"range": comparison.colour_bias().tolist(), "percent_of_range": bias},
            "mean_absolute_error": {
                "mean_range": comparison.error_map().mean().item(),
                "max_over_positions_range": comparison.error_map().max().item(),
            },
            **{name: [item.key for item in row] for name, row in ranked.items()},
            "latents": described(health, codes),
            "findings": findings,
            "thresholds": thresholds,
            "files": [*(f"{name}.png" for name in sheets), *plots],
        },
    )
    summarise(config, len(items), measured, findings, plotted=bool(plots))
    missed = [check for check in thresholds if not check["met"]]
    if missed:
        raise QualityError("; ".join(check["sentence"] for check in missed))
    return config.out


def chosen_items(config: EvalAEConfig) -> list[Item]:
    """The pictures to look at, in random order.

    Raises:
        DataError: none are held back by `--holdout`.
    """
    items = open_source(config).items
    if config.holdout:
        found = split(items, config.holdout).held_back
        if not found:
            raise DataError(
                f"--holdout {config.holdout} keeps none of the {len(items)} pictures out"
            )
        items = found
    order = torch.randperm(len(items), generator=generator_for(config.seed, ORDER)).tolist()
    return [items[index] for index in order[: config.num]]


def build_distances(config: EvalAEConfig, device: torch.device) -> dict[str, PerceptualDistance]:
    """The perceptual distances that were asked for, by name; the box's is among them unless `none`.

    Raises:
        DataError: weights are not to be had; the message names the ways to get them.
    """
    names = dict.fromkeys(("vgg16", config.perceptual)) if config.perceptual != "none" else {}
    distances: dict[str, PerceptualDistance] = {}
    for name in names:
        weights = config.perceptual_weights if name == config.perceptual else None
        asked = AutoencoderLossConfig(perceptual=name, perceptual_weights=weights)
        try:
            distance = build_perceptual(asked)
        except DataError as error:  # it speaks of the options of train-ae
            raise DataError(str(error).replace("--loss.", "--")) from error
        if distance is not None:
            distances[name] = distance.to(device)
    if config.st_lpips:
        parts = st_lpips.load_st_lpips(config.st_lpips)
        distances[parts.name] = PerceptualDistance(*parts).to(device)
    return distances


def build_features(config: EvalAEConfig, device: torch.device) -> dict[str, Features]:
    """The networks of the Fréchet distances that were asked for, by the distance's name.

    Raises:
        DataError: weights are not to be had; the message names what to get.
        UsageError: a package is missing; the message names it.
    """
    features: dict[str, Features] = {}
    if config.effnet:
        features["rfd_effnet"] = load_efficientnet_lite0(config.effnet).to(device).pooled
    if config.rfid:
        features["rfid"] = inception_features(inception(config.inception).to(device))
    return features


def require_size(images: Images, distances: dict[str, PerceptualDistance]) -> None:
    """Check that pictures are large enough for every metric.

    Raises:
        DataError: they are not; the message names the metric.
    """
    needed = {"ssim": SSIM_WINDOW} | {name: MIN_SIDES.get(name, MIN_SIZE) for name in distances}
    name, side = max(needed.items(), key=lambda pair: pair[1])
    if min(images.shape[2:]) < side:
        raise DataError(
            f"{name} needs pictures of {side} pixels or more, these have {min(images.shape[2:])}"
        )


def holdout_findings(config: EvalAEConfig, facts: AutoencoderFacts) -> list[str]:
    """A reminder where pictures of the training may be among those that are looked at."""
    share = facts.trained.get("holdout")
    if not share or config.holdout == share:
        return []
    return [
        f"the autoencoder was trained with --holdout {share}: if these are its pictures, give the same "
        "here to look at those only which it never saw"
    ]


@torch.no_grad()
def draw_sheets(
    config: EvalAEConfig,
    model: Autoencoder,
    ranked: Mapping[str, list[Item]],
    preprocessing: PreprocessingConfig,
    health: LatentHealth,
) -> dict[str, Sheet]:
    """The contact sheets by name: rows of pictures, the prior, interpolations of the last row."""
    device = next(model.parameters()).device
    sheets: dict[str, Sheet] = {}
    latents: Latents = torch.empty(0, 0, 0, 0)
    for name, items in ranked.items():
        images = read_images(items, preprocessing).to(device)
        latents = model.encode(images).mean
        sheets[name] = pairs_sheet(images, model.decode(latents))
    noise = noise_from(generator_for(config.seed, PRIOR))
    sheets["prior"] = prior_sheet(model.decode, health, latents, noise)
    ends = torch.cat([latents, latents])[: 2 * max(1, len(latents) // 2)]  # one picture: to itself
    sheets["interpolation"] = interpolation_sheet(model.decode, ends)
    return sheets


def check_thresholds(
    config: EvalAEConfig, measured: dict[str, Any], health: LatentHealth
) -> list[dict[str, Any]]:
    """Each threshold that was given, with the number found and whether it is met."""
    perceptual = key_of(config.perceptual)
    table = (
        ("--min-psnr", config.min_psnr, "psnr_db", "mean", " dB"),
        ("--min-ssim", config.min_ssim, "ssim", "mean", ""),
        ("--max-perceptual", config.max_perceptual, perceptual, "mean", ""),
        ("--max-rfd", config.max_rfd, "rfd_effnet", "distance", ""),
        ("--max-rfid", config.max_rfid, "rfid", "distance", ""),
        ("--max-dead-channels", config.max_dead_channels, "dead_channels", "count", ""),
    )
    values = measured | {"dead_channels": {"count": len(health.dead)}}
    checks = []
    for option, bound, metric, statistic, unit in table:
        if bound is None:
            continue
        value = values.get(metric, {}).get(statistic, float("nan"))
        met = value >= bound if option.startswith("--min") else value <= bound
        relation = "meets" if met else "misses"
        sentence = f"{metric} is {value:.4g}{unit}, which {relation} {option} {bound:g}"
        checks.append(
            {"metric": metric, "value": value, "option": option, "bound": bound}
            | {"met": met, "sentence": sentence}
        )
    return checks


def write_report(config: EvalAEConfig, found: dict[str, Any]) -> None:
    """Write OUT/report.json."""
    head = {
        "schema_version": SCHEMA_VERSION,
        "kind": "eval-ae",
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "units": UNITS,
    }
    text = json.dumps(head | found, ensure_ascii=False, indent=1)
    write_text(config.out / "report.json", sealed_page(text + "\n"))


def summarise(
    config: EvalAEConfig,
    pictures: int,
    measured: dict[str, Any],
    findings: Sequence[str],
    *,
    plotted: bool,
) -> None:
    """The report for people, on standard error."""
    for name, numbers in measured.items():
        if "mean" in numbers:
            say(
                f"{name}: {numbers['mean']:.4g} (90 % of the pictures between "
                f"{numbers['percentile_5']:.4g} and {numbers['percentile_95']:.4g})"
            )
        else:
            floor = numbers["floor"]
            against = f"; two halves of the originals differ by {floor:.4g}" if floor else ""
            say(f"{name}: {numbers['distance']:.4g} over {numbers['pictures']} pictures{against}")
    for finding in findings:
        say(f"- {finding}")
    if not plotted:
        say("no plots without matplotlib: pip install 'ldmkit[eval]'")
    say(f"report on {pictures} pictures in {config.out}")


def key_of(name: str) -> str:
    """The name of a metric in the report."""
    return "psnr_db" if name == "psnr" else name.replace("-", "_")
