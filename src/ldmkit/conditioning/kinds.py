"""Every kind of condition by name, and several of them together."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmkit.condition_configs import ClassCondition
from ldmkit.conditioning.classes import CLASS
from ldmkit.conditioning.condition import Condition
from ldmkit.conditioning.frozen_image import EMBEDDED_IMAGE
from ldmkit.conditioning.frozen_text import EMBEDDED_TEXT
from ldmkit.conditioning.image import IMAGE
from ldmkit.conditioning.kind import Kind, Reader
from ldmkit.conditioning.labelmap import LABELMAP
from ldmkit.conditioning.layout import LAYOUT
from ldmkit.conditioning.lowres import LOWRES
from ldmkit.conditioning.mask import MASK
from ldmkit.conditioning.scalars import SCALARS
from ldmkit.conditioning.text import TEXT
from ldmkit.data.latent_set import LatentSet


def values_of(
    readers: Mapping[str, Reader], indices: np.ndarray, generator: torch.Generator
) -> dict[str, Tensor]:
    """The values of some samples of a latent set, in a fixed order of draws."""
    return {kind: reader(indices, generator) for kind, reader in readers.items()}


def readers_of(
    conditions: Sequence[Any], options_of: Callable[[str], Any], latents: LatentSet
) -> dict[str, Reader]:
    """What reads the values of every condition.

    Args:
        conditions: as a model file stores them.
        options_of: the training options of a kind.
        latents: to read from.

    Raises:
        DataError: the set does not hold what a condition needs, or names it otherwise.
    """
    return {
        config.kind: KINDS[config.kind].reader(config, options_of(config.kind), latents)
        for config in conditions
    }


def in_words(config: Any) -> str:  # noqa: ANN401 - any stored config
    """A condition as people are told of it: its kind, and label sets with their numbers of classes."""
    if not isinstance(config, ClassCondition) or not config.sets:
        return config.kind
    return f"class ({', '.join(f'{len(one.classes)} of {one.name}' for one in config.sets)})"


def joined(conditions: Sequence[Condition]) -> Condition:
    """Several conditions of a batch as one: vectors are added up, tokens and channels strung together."""
    vectors = [part.vector for part in conditions if part.vector is not None]
    tokens = [part.tokens for part in conditions if part.tokens is not None]
    channels = [part.channels for part in conditions if part.channels is not None]
    return Condition(
        vector=torch.stack(vectors).sum(0) if vectors else None,
        tokens=torch.cat(tokens, dim=1) if tokens else None,
        channels=torch.cat(channels, dim=1) if channels else None,
    )


KINDS: dict[str, Kind] = {
    "class": CLASS,
    "text": TEXT,
    "embedded-text": EMBEDDED_TEXT,
    "layout": LAYOUT,
    "labelmap": LABELMAP,
    "lowres": LOWRES,
    "mask": MASK,
    "scalars": SCALARS,
    "image": IMAGE,
    "embedded-image": EMBEDDED_IMAGE,
}
"""Keep in step with `condition_configs.ConditionKind`; a test compares them."""
