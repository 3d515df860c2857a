"""Class labels: one learnt token each, attended to (Rombach et al. 2022, App. E)."""

import torch
from torch import nn

from ldmkit.conditioning.condition import Condition
from ldmkit.tensors import Labels


class LabelConditioner(nn.Module):
    """A class index to one token; the last row of the table is the null.

    Args:
        classes: number of classes.
        width: of the token.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.embedding = nn.Embedding(classes + 1, width)

    def forward(self, labels: Labels) -> Condition:
        """Tokens `[batch, 1, width]`; the label -1 gives the null."""
        labels = labels.to(self.embedding.weight.device)
        rows = torch.where(labels < 0, self.classes, labels)
        return Condition(tokens=self.embedding(rows)[:, None])

    def null(self, count: int) -> Condition:
        """The null for `count` samples."""
        return self(torch.full((count,), -1, dtype=torch.int64))
