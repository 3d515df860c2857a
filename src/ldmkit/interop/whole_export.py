"""Both stages of ours, as they go out together."""

from pathlib import Path
from typing import NamedTuple

from ldmkit.assembly import (
    autoencoder_facts,
    diffusion_facts,
    load_autoencoder,
    load_diffusion,
    require_same_autoencoder,
)
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.condition_configs import ClassCondition
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import DiffusionFacts
from ldmkit.interop.class_tables import told_of
from ldmkit.latent_diffusion import LatentDiffusion


class BothStages(NamedTuple):
    """A diffusion model and the autoencoder of its latents."""

    model: LatentDiffusion
    facts: DiffusionFacts
    autoencoder: Autoencoder
    preprocessing: PreprocessingConfig
    """Of the autoencoder's pictures."""
    told: ClassCondition | None
    source: str
    """How to name the diffusion model in errors."""


def load_both(path: Path, ae: Path | None) -> BothStages:
    """Load what other projects keep in one place.

    Args:
        path: the diffusion model's file.
        ae: the autoencoder's.

    Raises:
        DataError: the files do not belong together, or no other project has a place for something.
        UsageError: no autoencoder is given.
    """
    if ae is None:
        raise UsageError(
            f"{path} is a diffusion model: give the autoencoder of its latents with --ae FILE"
        )
    facts = diffusion_facts(path)
    require_same_autoencoder(facts.autoencoder, ae, f"the latents of {path}")
    model, autoencoder = load_diffusion(path), load_autoencoder(ae)
    if autoencoder.config.bottleneck == "identity":
        raise DataError(f"{ae} has no networks (bottleneck identity): nothing to export")
    told = told_of(model, str(path))
    preprocessing = autoencoder_facts(ae).preprocessing
    return BothStages(model, facts, autoencoder, preprocessing, told, str(path))
