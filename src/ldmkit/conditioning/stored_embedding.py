"""Embeddings by a frozen tower, stored with the latents: what those of text and of pictures share.

The tower is no part of the model; whoever samples names its weights again.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ldmkit.conditioning.condition import Condition
from ldmkit.conditioning.kind import Reader, Widths
from ldmkit.conditioning.open_clip_weights import Embeddings, FrozenNetwork
from ldmkit.data.latent_set import LatentSet
from ldmkit.errors import DataError, UsageError
from ldmkit.tower_configs import EmbeddedCondition

BATCH = 32
"""Texts or pictures through a tower at once."""


class StoredConditioner(nn.Module):
    """Embeddings that were stored with the latents, as tokens to attend to.

    A batch of values is `[batch, count, width]`, of any floating type. The embedding that says nothing
    belongs to the trained model: `set_empty` takes it once, before training. Until then it is NaN, so that
    forgetting it cannot pass for a condition.

    Args:
        count: tokens of an embedding.
        width: of a stored token.
        context_width: of the tokens attended to; where it differs, a learnt projection stands between.
    """

    empty_embedding: Tensor

    def __init__(self, count: int, width: int, context_width: int) -> None:
        super().__init__()
        self.register_buffer("empty_embedding", torch.full((count, width), torch.nan))
        self.projection = _projection(width, context_width)

    def set_empty(self, embedding: Float[Tensor, "count width"]) -> None:
        """Take the embedding that says nothing.

        Raises:
            ValueError: its shape is not that of a value, or it is not finite.
        """
        count, width = self.empty_embedding.shape
        self.empty_embedding.copy_(embedding_row(embedding, count, width))

    def empty(self, values: Embeddings) -> Embeddings:
        """The embedding that says nothing, in the shape of `values`."""
        return self.empty_embedding.to(values).expand_as(values)

    def forward(self, values: Embeddings) -> Condition:
        """Tokens `[batch, count, context_width]`."""
        values = values.to(self.empty_embedding)
        return Condition(tokens=self.projection(values))


def embedding_row(
    value: Tensor | np.ndarray, count: int, width: int
) -> Float[Tensor, "count width"]:
    """A stored embedding as one row of values, float32.

    Raises:
        ValueError: it has another shape, is not floating point, or holds NaN or infinity.
    """
    row = torch.as_tensor(value)
    if tuple(row.shape) != (count, width) or not row.is_floating_point():
        raise ValueError(
            f"the embedding is {row.dtype} {list(row.shape)}; floating point [{count}, {width}] is needed"
        )
    if not row.isfinite().all():
        raise ValueError("the embedding holds NaN or infinity; encode again")
    return row.float().cpu()


def stored_facts(latents: LatentSet, column: str, advice: str) -> dict[str, Any]:
    """What a set says of a column of embeddings: its recipe, and count and width of the tokens.

    Raises:
        DataError: the set has no such column; the message ends with the advice.
    """
    recipe = latents.manifest.recipe.get(column)
    if recipe is None:
        raise DataError(f"{latents.directory} has no {advice}")
    count, width = latents.rows(column, [0]).shape[1:]
    return {**recipe, "count": count, "width": width}


def build(config: EmbeddedCondition, widths: Widths) -> StoredConditioner:
    """A conditioner with a fresh projection."""
    return StoredConditioner(config.count, config.width, widths.context)


def take_empty(conditioner: nn.Module, empty: Float[Tensor, "count width"]) -> None:
    """Give a conditioner that `build` made the embedding that says nothing."""
    assert isinstance(conditioner, StoredConditioner)  # noqa: S101
    conditioner.set_empty(empty)


def column_reader(latents: LatentSet, column: str) -> Reader:
    """What reads a column of embeddings."""
    return lambda indices, _: latents.rows(column, indices).float()


def require_weights(
    config: EmbeddedCondition, weights: Path | None, what: str, option: str
) -> Path:
    """The file of the tower that embeds what samples are told.

    Args:
        config: of the condition.
        weights: the file, if it is named.
        what: is embedded, for the error: prompts.
        option: that names it.

    Raises:
        UsageError: none is named.
    """
    if weights is None:
        raise UsageError(
            f"{what} are embedded by the tower {config.encoder}: give its weights with {option}"
        )
    return weights


def require_same_tower(tower: FrozenNetwork, config: EmbeddedCondition, weights: Path) -> None:
    """Check that a tower is the one that the training data were embedded with.

    Raises:
        DataError: it is another one.
    """
    if tower.fingerprint != config.fingerprint:
        raise DataError(
            f"{weights} is another tower ({tower.fingerprint[:12]}) than the model was trained with "
            f"({config.fingerprint[:12]})"
        )


def as_stored(embeddings: Embeddings) -> Embeddings:
    """Rounded as latent sets store them."""
    return embeddings.half().float()


def _projection(width: int, context_width: int) -> nn.Module:
    return nn.Identity() if width == context_width else nn.Linear(width, context_width)
