"""Guidance by pictures behind the decoder, put together: targets from files, and what compares with them."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldmkit.assembly import (
    autoencoder_facts,
    load_autoencoder,
    preprocessing_of,
    require_same_autoencoder,
)
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.images import read_images
from ldmkit.data.items import Item, Span
from ldmkit.data.latent_set import LatentSet
from ldmkit.data.sources import open_source
from ldmkit.data_configs import SourceConfig
from ldmkit.diffusion.guidance import image_guided
from ldmkit.diffusion.samplers import DenoiseAt
from ldmkit.digests import file_digest
from ldmkit.drawing import Steer
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import DiffusionFacts
from ldmkit.image_guide_configs import ImageGuideConfig
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.manifest import MANIFEST
from ldmkit.tensors import Images

SteerOf = Callable[[Sequence[int]], Steer | None]
"""Numbers of samples -> what leads them; None where nothing does."""
Targets = Callable[[Sequence[int]], Images]
"""Numbers of samples -> the small pictures that they are to look like, in [-1, 1]."""


def guide_of(config: ImageGuideConfig, model: LatentDiffusion, facts: DiffusionFacts) -> SteerOf:
    """What leads samples to pictures (Rombach et al. 2022, App. C), as the options say.

    The comparison is made on the pictures made `guide_factor` times smaller (anti-aliased bicubic). Its
    gradient runs through decoder and U-Net for the samples that are drawn at once; no step goes further
    than where the difference is smallest.

    Args:
        config: of the command.
        model: that draws, on its device.
        facts: of the model.

    Raises:
        UsageError: the factor does not divide the side of the pictures.
        DataError: the autoencoder is another one, or a picture or the set cannot be used.
    """
    if config.guide_image is None or config.guide_ae is None:
        return lambda numbers: None
    require_same_autoencoder(facts.autoencoder, config.guide_ae, "the model's latents")
    ae_facts = autoencoder_facts(config.guide_ae)
    sides = tuple(ae_facts.factor * side for side in facts.latent_shape[1:])
    if any(side % config.guide_factor for side in sides):
        raise UsageError(
            f"--guide-factor {config.guide_factor} does not divide {sides[1]} x {sides[0]}, the pixels of a "
            "sample"
        )
    height, width = (side // config.guide_factor for side in sides)
    autoencoder = load_autoencoder(config.guide_ae, model.latent_mean.device)
    small = preprocessing_of(ae_facts, None).model_copy(update={"size": height})
    targets = _targets(config, config.guide_image, autoencoder, small)
    _require_fit(targets([0]), (height, width), config.guide_image)  # before the first sample
    if not config.guide_scale:
        return lambda numbers: None

    def steer_of(numbers: Sequence[int]) -> Steer:
        target = targets(numbers).to(model.latent_mean.device)

        def steer(denoise: DenoiseAt) -> DenoiseAt:
            guided = image_guided(
                lambda x, sigma, _: denoise(x, sigma),
                lambda clean: autoencoder.decode(model.unwhiten(clean)),
                target,
                lambda images: smaller(images, (height, width)),
                config.guide_scale,
                bounded=True,
            )
            return lambda x, sigma: guided(x, sigma, None)

        return steer

    return steer_of


def guide_digest(place: Path) -> str:
    """What tells a picture, a folder of them or a latent set from one that was changed since.

    Files of a folder by name, size and time of their last change; a picture and a set by their bytes.
    """
    if place.is_file():
        return file_digest(place)
    if (place / MANIFEST).is_file():
        return file_digest(place / MANIFEST)
    found = hashlib.sha256()
    for file in sorted(place.rglob("*")):
        state = file.stat()
        found.update(f"{file.relative_to(place)}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return found.hexdigest()


def smaller(images: Tensor, sides: tuple[int, int]) -> Tensor:
    """Pictures at another height and width, anti-aliased; not clipped, so that gradients stay."""
    if tuple(images.shape[2:]) == sides:
        return images
    return torch.nn.functional.interpolate(images, sides, mode="bicubic", antialias=True)


def _require_fit(target: Images, sides: tuple[int, int], place: Path) -> None:
    if tuple(target.shape[2:]) != sides or not target.isfinite().all():
        raise DataError(
            f"--guide-image {place} gives {target.shape[3]} x {target.shape[2]} pixels, or some without a "
            f"value, where {sides[1]} x {sides[0]} are compared: give pictures without gaps for a model of "
            "squares, or latents of the model's size"
        )


def _targets(
    config: ImageGuideConfig, place: Path, autoencoder: Autoencoder, small: PreprocessingConfig
) -> Targets:
    """The pictures of a latent set, a folder or a file, in turns."""
    if (place / MANIFEST).is_file():
        latents = LatentSet(place)
        assert config.guide_ae is not None  # noqa: S101 - whoever calls has looked
        made_by = latents.manifest.recipe["autoencoder"]
        require_same_autoencoder(made_by, config.guide_ae, f"the latents of {place}")
        return _targets_of_set(latents, autoencoder, config.guide_factor)
    if place.is_dir():
        items = open_source(SourceConfig(data=str(place))).items
    elif place.is_file():
        items = [Item(key=place.name, picture=Span(str(place), 0, place.stat().st_size))]
    else:
        raise DataError(f"--guide-image {place}: there is no such picture, folder or latent set")
    return lambda numbers: read_images([items[n % len(items)] for n in numbers], small)


def _targets_of_set(latents: LatentSet, autoencoder: Autoencoder, factor: int) -> Targets:
    """What the latents of a set look like."""

    @torch.no_grad()
    def targets(numbers: Sequence[int]) -> Images:
        rows = [n % len(latents) for n in numbers]
        mean = latents.read(rows).mean.float().to(autoencoder.device)
        pictures = autoencoder.decode(mean)
        height, width = pictures.shape[2:]
        return smaller(pictures, (height // factor, width // factor))

    return targets
