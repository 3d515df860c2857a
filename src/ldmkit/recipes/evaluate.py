"""`ldmkit evaluate`: how good are generated pictures, and are they new?"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldmkit.assembly import autoencoder_facts, load_autoencoder, preprocessing_of
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
    effnet_network,
    inception_network,
)
from ldmkit.metrics.memorization import (
    Nearness,
    Verdict,
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
from ldmkit.pixels import grid, save_png
from ldmkit.recipes.evaluation_parts import (
    DECODED,
    REAL,
    SAMPLES,
    TRAINING,
    Pictures,
    Sampled,
    Seen,
    areas_seen,
    asked_of_jobs,
    features_seen,
    job_of,
    of_all_jobs,
    own_of,
    own_range,
    side_of,
)
from ldmkit.recipes.evaluation_report import (
    as_text,
    check_thresholds,
    described,
    described_memory,
    findings,
)
from ldmkit.recipes.generated import drawn_pictures, written_items
from ldmkit.seals import sealed_page
from ldmkit.terminal import say
from ldmkit.training.runtime import pick_device

SCHEMA_VERSION = 1
REAL_ORDER, SAMPLE_ORDER = 10, 11  # places in the seed tree
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


class Memory(NamedTuple):
    """What the search for copies found."""

    samples: Nearness
    held_back: Nearness
    found: Verdict
    nearer: float
    """Share of samples nearer to training than to held-back pictures."""


def evaluate(config: EvaluateConfig) -> Path:
    """Measure generated pictures against real ones, look for copies, and check the thresholds.

    With several jobs each looks at its part of all pictures, and the last one does the rest.

    Returns:
        The directory of the report; with several jobs it is there when the last of them ends.

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
    job = job_of(config)
    sampled = sample_pictures(config, preprocessing, device, job)
    mine = look(config, networks, (sampled, None if stored else real, training), device, job)
    sides = {REAL: real.items, TRAINING: training.items if training else []}
    if config.model is None and not str(config.samples).endswith(SAMPLE_FILE):
        sides[SAMPLES] = sampled.items(range(sampled.total))
    asked = asked_of_jobs(config, networks, sides, device)
    seen = of_all_jobs(config.out, asked, mine, job)
    if seen is None:
        return config.out
    sweep_temporaries(config.out)
    samples = sampled.pictures(range(sampled.total))

    measured: dict[str, Quality] = {}
    references: dict[str, Reference] = {}
    memory: Memory | None = None
    for network in networks:
        if stored:
            reference = stored[network.name]
        else:
            reference = reference_of(side_of(seen, network.name, REAL), wanted[network.name])
        references[network.name] = reference
        measured[network.name] = quality(
            network.name,
            side_of(seen, network.name, SAMPLES),
            reference.side,
            (reference.mean, reference.covariance),
            draws=config.bootstrap,
            seed=config.seed,
        )
    if training is not None:
        memory = search_copies(config, seen, networks[0].name)
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
        "config": config.model_dump(mode="json", exclude={"jobs"}),
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
        return Pictures(drawn(items, config.num_data, config.seed, REAL_ORDER), preprocessing), None
    training, held_back = split(items, config.holdout)
    if not held_back:
        raise DataError(f"--holdout {config.holdout} keeps none of the {len(items)} pictures out")
    chosen = drawn(held_back, config.num_data, config.seed, REAL_ORDER)
    return Pictures(chosen, preprocessing), Pictures(training, preprocessing)


def sample_pictures(
    config: EvaluateConfig,
    preprocessing: PreprocessingConfig,
    device: torch.device,
    job: tuple[int, int],
) -> Sampled:
    """The generated pictures; this job's part of those of a model or a sample file is drawn and written first."""
    if config.samples is None or config.samples.endswith(SAMPLE_FILE):
        paths = drawn_pictures(
            config, device, lambda total: own_range(total, config.batch_size, job)
        )
        # written with 8 bits for [-1, 1], whatever the range of the real ones
        said = preprocessing.model_copy(update={"range": None})
        return Sampled(lambda numbers: written_items(paths, numbers), len(paths), said)
    found = open_source(SourceConfig(data=config.samples, cache=config.cache)).items
    items = drawn(found, config.num, config.seed, SAMPLE_ORDER)
    return Sampled(lambda part: items[part.start : part.stop], len(items), preprocessing)


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


def look(
    config: EvaluateConfig,
    networks: Sequence[FeatureNetwork],
    sides: tuple[Sampled, Pictures | None, Pictures | None],
    device: torch.device,
    job: tuple[int, int],
) -> Seen:
    """What this job sees of its part of the samples, real and training pictures."""
    sampled, real, training = sides
    size = config.batch_size
    mine = {SAMPLES: sampled.pictures(own_range(sampled.total, size, job))}
    mine |= {REAL: own_of(real, size, job)} if real is not None else {}
    seen: dict[str, Tensor] = {}
    for network in networks:
        for name, pictures in mine.items():
            seen |= features_seen(network, pictures, name, size)
    if training is not None:  # copies are looked for with the first network's features
        mine[TRAINING] = own_of(training, size, job)
        seen |= features_seen(networks[0], mine[TRAINING], TRAINING, size)
        decoder = None if config.ae is None else load_autoencoder(config.ae, device)
        seen |= areas_seen(mine, size, decoder)
    return seen


def search_copies(config: EvaluateConfig, seen: Seen, network: str) -> Memory:
    """Look for samples that are training pictures, as files or as the autoencoder gives them back."""
    areas = {name: seen[f"areas: {name}"] for name in (SAMPLES, REAL, TRAINING)}
    versions = [areas[TRAINING]]
    if config.ae is not None:
        versions.append(seen[f"areas: {DECODED}"])
    near, calm = nearness(areas[SAMPLES], versions), nearness(areas[REAL], versions)
    sides = {name: side_of(seen, network, name).features for name in (SAMPLES, TRAINING, REAL)}
    nearer = nearer_to_training(sides[SAMPLES], sides[TRAINING], sides[REAL], config.seed)
    return Memory(near, calm, verdict(near, calm, config.copy_quantile), nearer)


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
