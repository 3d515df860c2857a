"""Class labels of one or several sets: a learnt embedding each (Rombach et al. 2022, App. E)."""

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ldmkit.condition_configs import ClassCondition, ClassOptions
from ldmkit.conditioning.condition import Condition
from ldmkit.conditioning.kind import Kind, Reader, Widths
from ldmkit.data.latent_set import LatentSet
from ldmkit.errors import DataError

NO_CLASS = "none"
NOT_TOLD = -1
SHOWN = 20
MAX_DIGITS = 10

BatchLabels = Int[Tensor, "batch sets"]


class ClassConditioner(nn.Module):
    """Class indices of k label sets; each set's rows of the table end with its null.

    Values are indices `[b, k]`, int64; -1 where a sample is not told. With one set the table is
    `embedding.weight [classes + 1, width]`, its last row the null.

    Args:
        sizes: classes of each set.
        width: of a token, or of the vector.
        way: `tokens`, one for each set (the paper), or `vector`, their sum, added to the time
            embedding (Dhariwal and Nichol 2021).

    Raises:
        ValueError: there is no set, or one without classes.
    """

    def __init__(
        self, sizes: tuple[int, ...], width: int, *, way: Literal["tokens", "vector"] = "tokens"
    ) -> None:
        super().__init__()
        if not sizes or min(sizes) < 1:
            raise ValueError(f"{sizes} are no sizes of label sets: each has one class or more")
        self.way = way
        *starts, rows = itertools.accumulate((size + 1 for size in sizes), initial=0)
        self.offsets, self.sizes = tuple(starts), sizes
        self.embedding = nn.Embedding(rows, width)

    def empty(self, values: BatchLabels) -> BatchLabels:
        """-1: not told."""
        return torch.full_like(values, NOT_TOLD)

    def forward(self, values: BatchLabels) -> Condition:
        """Tokens `[b, k, width]` or a vector `[b, width]`.

        Raises:
            IndexError: a class that its set does not have.
        """
        values = values.to(self.embedding.weight.device)
        offsets, sizes = values.new_tensor(self.offsets), values.new_tensor(self.sizes)
        rows = offsets + torch.where(values < 0, sizes, values)
        # a class too high would read a row of the next set; this row no table has
        rows = torch.where(values >= sizes, self.embedding.num_embeddings, rows)
        tokens = self.embedding(rows)
        return Condition(tokens=tokens) if self.way == "tokens" else Condition(vector=tokens.sum(1))


def class_index(given: object, names: Sequence[str]) -> int:
    """The index of a class given by name (upper or lower case) or number; -1 for "none" and None.

    A name goes before a number: where a class is called "3", that is what "3" means.

    Args:
        given: text, an index, or None.
        names: of the classes, in order.

    Raises:
        ValueError: there is no such class; the message lists those there are.
    """
    if given is None or (given == NOT_TOLD and not isinstance(given, bool)):
        return NOT_TOLD
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(names):
        return given
    if isinstance(given, str):
        if given in names:  # as written, where two names differ in their case alone
            return names.index(given)
        folded = {name.casefold(): index for index, name in enumerate(names)}
        text = given.strip().casefold()
        if text in folded:
            return folded[text]
        if text == NO_CLASS:
            return NOT_TOLD
        if text.isdecimal() and len(text) < MAX_DIGITS and int(text) < len(names):
            return int(text)
    known = ", ".join(f"{index} {name}" for index, name in enumerate(names[:SHOWN]))
    more = " ..." if len(names) > SHOWN else ""
    raise ValueError(f"{str(given)[:60]!r} is no class; known are {known or 'none at all'}{more}")


def class_row(given: Sequence[object], names: Sequence[Sequence[str]]) -> Int[Tensor, " sets"]:
    """One row of values: a class of each label set, as `class_index` takes them.

    Args:
        given: for each set.
        names: of the classes of each set.

    Raises:
        ValueError: an unknown class, or not as many as there are sets.
    """
    if len(given) != len(names):
        raise ValueError(f"{len(given)} classes were given for {len(names)} label sets")
    indices = [class_index(*pair) for pair in zip(given, names, strict=True)]
    return torch.tensor(indices, dtype=torch.int64)


def _settle(options: ClassOptions, latents: LatentSet) -> ClassCondition:
    if not latents.has_labels:
        raise DataError(f"--condition class: {latents.directory} has no labels")
    return ClassCondition(way=options.way, names=latents.manifest.class_names)


def _build(config: ClassCondition, widths: Widths) -> ClassConditioner:
    width = widths.context if config.attended else widths.embedding
    return ClassConditioner((len(config.names),), width, way=config.way)


def _reader(config: ClassCondition, options: ClassOptions, latents: LatentSet) -> Reader:
    if latents.manifest.class_names != config.names:
        raise DataError(f"{latents.directory} has other classes than the model")
    return lambda indices, _: torch.from_numpy(latents.labels[indices])[:, None]


def _words(config: ClassCondition, value: object) -> str:
    index = class_index(value, config.names)
    return config.names[index] if index >= 0 else ""


CLASS = Kind(
    settle=_settle,
    build=_build,
    reader=_reader,
    row=lambda config, value: class_row([value], [config.names]),
    silence=NO_CLASS,
    words=_words,
)
