"""What samples are told, encoded once for all of them that are told the same."""

from collections import OrderedDict

import torch
from torch import Tensor

from ldmkit.conditioning.condition import Condition
from ldmkit.conditioning.kind import Values
from ldmkit.conditioning.kinds import joined
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.training.runtime import groups_of

KEPT = 256
"""Rows of single kinds of condition; one of 77 tokens of 1280 numbers takes 0.4 MB."""


class Encodings:
    """Conditions by what is told; to be called in place of `LatentDiffusion.condition`.

    The text of a prompt, and the empty one of guidance, go through their transformer once for a
    command instead of once for each batch. On the CPU rows are encoded two at a time, so that
    the bytes are the same beside any others. What is concatenated is each sample's own and not kept.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[LatentDiffusion, str, bytes], Condition] = OrderedDict()

    def __call__(self, model: LatentDiffusion, values: Values) -> Condition:
        """The condition of a batch from received values of every condition of the model."""
        own = {one.kind for one in model.config.conditions if one.channels}
        return joined(
            [
                model.condition_of(kind, values[kind])
                if kind in own
                else self._of_kind(model, kind, values[kind])
                for kind in model.conditioners
            ]
        )

    def _of_kind(self, model: LatentDiffusion, kind: str, values: Tensor) -> Condition:
        keys = [(model, kind, row.numpy().tobytes()) for row in values.cpu()]
        rows = {key: self._known[key] for key in keys if key in self._known}
        new = {key: place for place, key in enumerate(keys) if key not in rows}
        places = torch.tensor(list(new.values()))
        for group, count in groups_of(len(new), max(len(new), 1), values.device):
            encoded = model.condition_of(kind, values[places[group]])
            for row, place in enumerate(group[:count].tolist()):
                rows[list(new)[place]] = _row(encoded, row)
        for key in dict.fromkeys(keys):
            self._known[key] = rows[key]
            self._known.move_to_end(key)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return _stacked([rows[key] for key in keys])


def _row(batch: Condition, row: int) -> Condition:
    return Condition(*(None if part is None else part[row] for part in batch))


def _stacked(rows: list[Condition]) -> Condition:
    parts = zip(*rows, strict=True)
    return Condition(
        *(
            None if part[0] is None else torch.stack([x for x in part if x is not None])
            for part in parts
        )
    )
