"""Text, frozen: captions embedded by a tower as they come, or embeddings stored with the latents.

The tower is never part of the trained weights: it is no submodule, has no gradients, stays in evaluation
mode, and a copy of the model for averages shares it.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ldmkit.conditioning.condition import Condition
from ldmkit.conditioning.text_tower import Embeddings, FrozenTower, Ids
from ldmkit.conditioning.tokenizer import empty_row


class FrozenTextConditioner(nn.Module):
    """Captions as tokens to attend to, embedded by a frozen tower as they come.

    A batch of values is rows of ids as `tokenizer.caption_row` gives them for `tower.tokenizer`.

    Args:
        tower: not trained, not saved; it follows the module to its device.
        context_width: of the tokens; where the tower's differs, a learnt projection stands between.
    """

    def __init__(self, tower: FrozenTower, context_width: int) -> None:
        super().__init__()
        self.tower = tower
        self.empty_ids = tuple(empty_row(tower.tokenizer).tolist())
        self.projection = _projection(tower.shape.width, context_width)

    def empty(self, values: Ids) -> Ids:
        """The rows of the empty text, in the shape of `values`."""
        return torch.tensor(self.empty_ids).to(values).expand_as(values)

    def forward(self, values: Ids) -> Condition:
        """Tokens `[batch, count, context_width]`."""
        return Condition(tokens=self.projection(self.tower(values)))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # noqa: ANN401 - as torch declares it
        self.tower.network._apply(fn, recurse)  # so that `.to(device)` reaches the tower too
        return super()._apply(fn, recurse)


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
