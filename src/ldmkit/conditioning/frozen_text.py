"""Text, frozen: embeddings of captions by a tower of open_clip, stored with the latents.

The tower is no part of the model; whoever samples names its weights again.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ldmkit.condition_configs import EmbeddedTextCondition, EmbeddedTextOptions
from ldmkit.conditioning.condition import Condition
from ldmkit.conditioning.kind import Kind, Reader, Widths
from ldmkit.conditioning.text_tower import Embeddings, encode_texts, load_tower
from ldmkit.data.latent_set import LatentSet
from ldmkit.errors import DataError, UsageError

BATCH = 32
"""Texts through a tower at once."""


class StoredTextConditioner(nn.Module):
    """Embeddings of captions that were stored with the latents, as tokens to attend to.

    A batch of values is `[batch, count, width]`, of any floating type. The embedding of the empty text
    belongs to the trained model: `set_empty` takes it once, before training. Until then it is NaN, so that
    forgetting it cannot pass for a condition.

    Args:
        count: tokens of a text.
        width: of a stored token.
        context_width: of the tokens attended to; where it differs, a learnt projection stands between.
    """

    empty_embedding: Tensor

    def __init__(self, count: int, width: int, context_width: int) -> None:
        super().__init__()
        self.register_buffer("empty_embedding", torch.full((count, width), torch.nan))
        self.projection = _projection(width, context_width)

    def set_empty(self, embedding: Float[Tensor, "count width"]) -> None:
        """Take the tower's embedding of the empty text.

        Raises:
            ValueError: its shape is not that of a value, or it is not finite.
        """
        count, width = self.empty_embedding.shape
        self.empty_embedding.copy_(embedding_row(embedding, count, width))

    def empty(self, values: Embeddings) -> Embeddings:
        """The embedding of the empty text, in the shape of `values`."""
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
        raise ValueError("the embedding holds NaN or infinity; encode the text again")
    return row.float().cpu()


def _projection(width: int, context_width: int) -> nn.Module:
    return nn.Identity() if width == context_width else nn.Linear(width, context_width)


def embedded(
    config: EmbeddedTextCondition, texts: Sequence[str], weights: Path | None
) -> Embeddings:
    """The values of some texts, by the tower that the training captions were embedded with.

    Args:
        config: of the condition.
        texts: one for each sample.
        weights: of the tower.

    Raises:
        UsageError: no weights are named.
        DataError: they cannot be read, or are those of another tower.
    """
    if weights is None:
        raise UsageError(
            f"prompts are embedded by the text tower {config.encoder}: give its weights with --text-weights"
        )
    tower = load_tower(
        config.encoder,
        weights,
        config.output,
        option="--text-weights",
        pad_with_end=config.pad_with_end,
    )
    if tower.fingerprint != config.fingerprint:
        raise DataError(
            f"{weights} is another text tower ({tower.fingerprint[:12]}) than the model was trained with "
            f"({config.fingerprint[:12]})"
        )
    return encode_texts(tower, texts, BATCH).half().float()  # as latent sets store them


def _settle(options: EmbeddedTextOptions, latents: LatentSet) -> EmbeddedTextCondition:
    del options
    recipe = latents.manifest.recipe.get("text")
    if recipe is None:
        raise DataError(
            f"--condition embedded-text: {latents.directory} has no embedded captions; encode with "
            "--text-encoder NAME --text-weights FILE"
        )
    count, width = latents.rows("text", [0]).shape[1:]
    return EmbeddedTextCondition(**recipe, count=count, width=width)


def _build(config: EmbeddedTextCondition, widths: Widths) -> StoredTextConditioner:
    return StoredTextConditioner(config.count, config.width, widths.context)


def _start(conditioner: nn.Module, latents: LatentSet) -> None:
    assert isinstance(conditioner, StoredTextConditioner)  # noqa: S101 - `_build` made it
    conditioner.set_empty(latents.empty_text())


def _reader(
    config: EmbeddedTextCondition, options: EmbeddedTextOptions, latents: LatentSet
) -> Reader:
    if _settle(options, latents) != config:
        raise DataError(f"{latents.directory} has captions embedded by another text tower")
    return lambda indices, _: latents.rows("text", indices).float()


def _row(config: EmbeddedTextCondition, value: object) -> Tensor:
    raise ValueError("a text is embedded by its tower, not by itself")


EMBEDDED_TEXT = Kind(
    settle=_settle, build=_build, reader=_reader, row=_row, silence="", start=_start
)
