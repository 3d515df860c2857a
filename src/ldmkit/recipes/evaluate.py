"""`ldmkit evaluate`: how good are generated pictures, and are they new?"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ldmkit.assembly import autoencoder_facts, load_autoencoder, preprocessing_of
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.images import read_images, split
from ldmkit.data.items import Item
from ldmkit.data.order import generator_for
from ldmkit.data.sources import open_source
from ldmkit.data_configs import SourceConfig
from ldmkit.durable import atomic_file, sweep_temporaries, write_text
from ldmkit.errors import DataError, QualityError
from ldmkit.evaluation_configs import SAMPLE_FILE, EvaluateConfig
from ldmkit.metrics.feature_networks import (
    FeatureNetwork,
    Side,
    effnet_network,
    features_of,
    inception_network,
)
from ldmkit.metrics.frechet import rgb_pixels
from ldmkit.metrics.memorization import (
    Areas,
    Nearness,
    Verdict,
    area_means,
    nearer_to_training,
    nearest_first,
    nearness,
    verdict,
)
from ldmkit.metrics.quality import Quality, quality
from ldmkit.metrics.reference import (
    Protocol,
    Reference,
    load_reference,
    reference_of,
    save_reference,
)
from ldmkit.metrics.sheets import COLUMNS, shown
from ldmkit.modelfile import versions
from ldmkit.pixels import Pixels, grid, save_png
from ldmkit.recipes.evaluation_report import (
    as_text,
    check_thresholds,
    described,
    described_memory,
    findings,
)
from ldmkit.recipes.generated import drawn_pictures
from ldmkit.seals import sealed_page
from ldmkit.terminal import say, track
from ldmkit.training.runtime import pick_device

SCHEMA_VERSION = 1
REAL, SAMPLES = 10, 11  # places in the seed tree
UNITS = {
    "FD-effnet, FID": "squared distance of features; comparable at equal numbers of pictures only",
    "KD-effnet, KID": "squared distance of features; does not depend on the number of pictures",
    "IS": "at least 1, up is better",
    "precision, recall, coverage": "share of pictures",
    "density": "1 for real pictures",
    "interval": "95 %, over samples",
    "floor": "the same number for two halves of the real pictures",
    "areas": "largest difference of the means of areas, in units of pictures in [-1, 1]",
}


class Pictures(NamedTuple):
    """A list of pictures, and how they are read."""

    items: list[Item]
    preprocessing: PreprocessingConfig


class Memory(NamedTuple):
    """What the search for copies found."""

    samples: Nearness
    held_back: Nearness
    found: Verdict
    nearer: float
    """Share of samples nearer to training than to held-back pictures."""


def evaluate(config: EvaluateConfig) -> Path:
    """Measure generated pictures against real ones, look for copies, and check the thresholds.

    Returns:
        The directory of the report.

    Raises:
        DataError: pictures, a model, a network's weights or a reference cannot be used.
        UsageError: a package is missing, or more steps are asked for than the model has.
        QualityError: a threshold is missed; the report is written all the same.
    """
    device = pick_device(config.device)
    preprocessing = preprocessing_for(config)
    networks = build_networks(config, device)
    real, training = real_pictures(config, preprocessing)
    wanted = {one.name: protocol_for(one, preprocessing, config, real) for one in networks}
    stored: dict[str, Reference] = {}
    if config.reference is not None:
        stored = {name: load_reference(config.reference, one) for name, one in wanted.items()}
    config.out.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(config.out)
    samples = sample_pictures(config, preprocessing, device)

    measured: dict[str, Quality] = {}
    references: dict[str, Reference] = {}
    memory: Memory | None = None
    for network in networks:
        mine = look(network, samples, config, "samples")
        if stored:
            reference = stored[network.name]
        else:
            side = look(network, real, config, "real pictures")
            reference = reference_of(side, wanted[network.name])
        references[network.name] = reference
        measured[network.name] = quality(
            network.name,
            mine,
            reference.side,
            (reference.mean, reference.covariance),
            draws=config.bootstrap,
            seed=config.seed,
        )
        if training is not None and memory is None:  # in the first network's features
            seen = look(network, training, config, "training pictures")
            memory = search_copies(
                config, (samples, mine), (real, reference.side), (training, seen), device
            )
            draw_strip(config, samples, training, memory)
    if config.save_reference is not None:
        save_reference(config.save_reference, references)

    report: dict[str, Any] = {
        "samples": len(samples.items),
        "quality": {name: described(one) for name, one in measured.items()},
        "protocol": {
            name: {"sha256": one.protocol.digest, **one.protocol.model_dump(mode="json")}
            for name, one in references.items()
        },
        "memorization": None,
        "files": [],
    }
    if memory is not None and training is not None:
        report["memorization"] = {
            "network": networks[0].name,
            **described_memory(
                (memory.samples, memory.held_back),
                memory.found,
                memory.nearer,
                (samples.items, real.items, training.items),
            ),
        }
        report["files"].append("nearest.png")
    report["findings"] = findings(report["quality"], report["memorization"])
    report["thresholds"] = check_thresholds(config, report)
    head = {
        "schema_version": SCHEMA_VERSION,
        "kind": "evaluate",
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "units": UNITS,
    }
    text = json.dumps(head | report, ensure_ascii=False, indent=1)
    write_text(config.out / "report.json", sealed_page(text + "\n"))
    for line in as_text(report).splitlines():
        say(line)
    say(f"report on {len(samples.items)} samples in {config.out}")
    missed = [check["sentence"] for check in report["thresholds"] if not check["met"]]
    if missed:
        raise QualityError("; ".join(missed))
    return config.out


def preprocessing_for(config: EvaluateConfig) -> PreprocessingConfig:
    """How all pictures are read: as the autoencoder saw them, or RGB of `--size`."""
    if config.ae is not None:
        return preprocessing_of(autoencoder_facts(config.ae), config.size)
    assert config.size is not None  # noqa: S101 - the config asks for one of them
    return PreprocessingConfig(size=config.size)


def build_networks(config: EvaluateConfig, device: torch.device) -> list[FeatureNetwork]:
    """The feature networks that were asked for."""
    networks = []
    if config.effnet is not None:
        networks.append(effnet_network(config.effnet, device))
    if config.uses_inception:
        networks.append(inception_network(config.inception, device))
    return networks


def real_pictures(
    config: EvaluateConfig, preprocessing: PreprocessingConfig
) -> tuple[Pictures, Pictures | None]:
    """The pictures to compare with, in random order, and those that were trained on if that is known.

    Raises:
        DataError: none are held back by `--holdout`.
    """
    if not config.data:
        return Pictures([], preprocessing), None
    items = open_source(config).items
    if not config.holdout:
        return Pictures(drawn(items, config.num_data, config.seed, REAL), preprocessing), None
    training, held_back = split(items, config.holdout)
    if not held_back:
        raise DataError(f"--holdout {config.holdout} keeps none of the {len(items)} pictures out")
    chosen = drawn(held_back, config.num_data, config.seed, REAL)
    return Pictures(chosen, preprocessing), Pictures(training, preprocessing)


def sample_pictures(
    config: EvaluateConfig, preprocessing: PreprocessingConfig, device: torch.device
) -> Pictures:
    """The generated pictures; those of a model or a sample file are drawn and written first."""
    if config.samples is None or config.samples.endswith(SAMPLE_FILE):
        items = drawn_pictures(config, device)
        # written with 8 bits for [-1, 1], whatever the range of the real ones
        return Pictures(items, preprocessing.model_copy(update={"range": None}))
    items = open_source(SourceConfig(data=config.samples, cache=config.cache)).items
    return Pictures(drawn(items, config.num, config.seed, SAMPLES), preprocessing)


def drawn(items: list[Item], count: int | None, seed: int, place: int) -> list[Item]:
    """Items in random order, as many as asked for."""
    order = torch.randperm(len(items), generator=generator_for(seed, place)).tolist()
    return [items[index] for index in order[:count]]


def protocol_for(
    network: FeatureNetwork,
    preprocessing: PreprocessingConfig,
    config: EvaluateConfig,
    real: Pictures,
) -> Protocol:
    """How the real pictures become features."""
    return Protocol(
        network=network.name,
        weights=network.weights,
        network_input=network.resize,
        holdout=config.holdout,
        count=len(real.items),
        **preprocessing.model_dump(
            include={"size", "resize", "crop", "channels", "background", "range"}
        ),
    )


def look(network: FeatureNetwork, pictures: Pictures, config: EvaluateConfig, name: str) -> Side:
    """The features of pictures."""
    with track(f"{network.name}: {name}", len(pictures.items), unit="picture") as progress:
        return features_of(network, pixels_of(pictures, config.batch_size), progress.advance)


def pixels_of(pictures: Pictures, batch_size: int) -> Iterator[Pixels]:
    """8-bit RGB pixels, batch by batch."""
    for first in range(0, len(pictures.items), batch_size):
        batch = pictures.items[first : first + batch_size]
        yield rgb_pixels(read_images(batch, pictures.preprocessing))


def search_copies(
    config: EvaluateConfig,
    samples: tuple[Pictures, Side],
    held_back: tuple[Pictures, Side],
    training: tuple[Pictures, Side],
    device: torch.device,
) -> Memory:
    """Look for samples that are training pictures, as files or as the autoencoder gives them back."""
    decoder = None if config.ae is None else load_autoencoder(config.ae, device)
    versions = [areas_of(training[0], config.batch_size)]
    if decoder is not None:  # what a latent model that knows them by heart would draw
        versions.append(areas_of(training[0], config.batch_size, decoder))
    near = nearness(areas_of(samples[0], config.batch_size), versions)
    calm = nearness(areas_of(held_back[0], config.batch_size, decoder), versions)
    nearer = nearer_to_training(
        samples[1].features, training[1].features, held_back[1].features, config.seed
    )
    return Memory(near, calm, verdict(near, calm, config.copy_quantile), nearer)


@torch.no_grad()
def areas_of(pictures: Pictures, batch_size: int, decoder: Autoencoder | None = None) -> Areas:
    """Area means of pictures, or of what an autoencoder makes of them."""
    found = []
    for first in range(0, len(pictures.items), batch_size):
        images = read_images(pictures.items[first : first + batch_size], pictures.preprocessing)
        if decoder is not None:
            posterior = decoder.encode(images.to(next(decoder.parameters()).device))
            images = decoder.decode(posterior.mean).float()
        found.append(area_means(rgb_pixels(images).float() / 127.5 - 1.0).cpu())
    return torch.cat(found)


def draw_strip(
    config: EvaluateConfig, samples: Pictures, training: Pictures, memory: Memory
) -> None:
    """OUT/nearest.png: the samples nearest to training pictures, those pictures below."""
    order = nearest_first(memory.samples)[:COLUMNS]
    rows = (
        Pictures([samples.items[i] for i in order], samples.preprocessing),
        Pictures([training.items[memory.samples.place[i]] for i in order], training.preprocessing),
    )
    images = torch.cat([read_images(row.items, row.preprocessing) for row in rows])
    with atomic_file(config.out / "nearest.png") as temporary:
        save_png(temporary, grid(shown(images), len(order)))
