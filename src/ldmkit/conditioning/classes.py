"""Class labels of one or several sets: a learnt embedding each (Rombach et al. 2022, App. E)."""

import itertools
from collections.abc import Mapping, Sequence
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


def labels_in_turns(labels: Sequence[str], config: ClassCondition) -> list[object]:
    """What several `--label` say, for samples that take turns.

    With several label sets each label names its own, as `kind=cat`, and the labels of each set take
    turns beside those of the others; a set that no label names is not told.

    Args:
        labels: as typed.
        config: the label sets.

    Raises:
        ValueError: it is not said of which label set a class is.
    """
    names = sorted((one.name for one in config.sets), key=len, reverse=True)
    told: dict[str, list[str]] = {}
    for label in labels:
        name = next((name for name in names if label.startswith(f"{name}=")), None)
        if name is not None:
            told.setdefault(name, []).append(label.removeprefix(f"{name}="))
    if sum(map(len, told.values())) < len(labels):
        if not told:  # of the one set that there is, or none; `values_by_set` looks at that
            return list(labels)
        raise ValueError(f"name the label set of each class: {_example(config)}")
    turns = max(map(len, told.values()), default=0)
    return [{name: of[turn % len(of)] for name, of in told.items()} for turn in range(turns)]


def all_in_turns(config: ClassCondition, most: int) -> list[object]:
    """Every class, or every combination of classes of several label sets, the last set's fastest."""
    if len(config.label_sets) == 1:
        return list(config.names)
    names = [one.name for one in config.sets]
    combined = itertools.product(*(one.classes for one in config.sets))
    return [dict(zip(names, row, strict=True)) for row in itertools.islice(combined, most)]


def values_by_set(config: ClassCondition, value: object) -> list[object]:
    """What a user says of each label set, in their order; None where nothing is said.

    Args:
        config: the label sets.
        value: a class, where there is one set; else a class by name of set, or "none".

    Raises:
        ValueError: it is not said of which label set a class is, or there is no such set.
    """
    names = [one.name for one in config.sets]
    if isinstance(value, Mapping) and names:
        unknown = next((str(name) for name in value if name not in names), None)
        if unknown is not None:
            raise ValueError(
                f"{unknown[:60]!r} is no label set of this model; it has {', '.join(names)}"
            )
        return [value.get(name) for name in names]
    if len(names) < 2:
        return [value]
    if value is None or (isinstance(value, str) and value.strip().casefold() == NO_CLASS):
        return [None] * len(names)
    raise ValueError(
        f"{str(value)[:60]!r} names no label set of this model ({', '.join(names)}): {_example(config)}"
    )


def _example(config: ClassCondition) -> str:
    first = config.label_sets[0]
    pair = first.name, first.classes[0] if first.classes else 0
    return 'write "{}={}", in JSON {{"class": {{"{}": "{}"}}}}'.format(*pair, *pair)


def _settle(options: ClassOptions, latents: LatentSet) -> ClassCondition:
    if not latents.has_labels:
        raise DataError(f"--condition class: {latents.directory} has no labels")
    sets, names = latents.manifest.label_sets, latents.manifest.class_names
    if options.sets is not None:
        known = {one.name: one for one in sets}
        absent = next((name for name in options.sets if name not in known), None)
        if absent is not None:
            raise DataError(
                f"--classes.sets {absent}: {latents.directory} has "
                + (f"the label sets {', '.join(known)}" if known else "one label set, without name")
            )
        sets = tuple(known[name] for name in options.sets)
        names = sets[0].classes
    return ClassCondition(way=options.way, names=names, sets=sets)


def _build(config: ClassCondition, widths: Widths) -> ClassConditioner:
    width = widths.context if config.attended else widths.embedding
    sizes = tuple(len(one.classes) for one in config.label_sets)
    return ClassConditioner(sizes, width, way=config.way)


def _reader(config: ClassCondition, options: ClassOptions, latents: LatentSet) -> Reader:
    there = list(latents.manifest.label_sets)
    if any(one not in there for one in config.sets) or (
        not config.sets and latents.manifest.class_names != config.names
    ):
        raise DataError(f"{latents.directory} has other classes than the model")
    places = [there.index(one) for one in config.sets] or [0]
    return lambda indices, _: torch.from_numpy(latents.labels_of_sets[indices][:, places])


def _row(config: ClassCondition, value: object) -> Int[Tensor, " sets"]:
    row = []
    for said, one in zip(values_by_set(config, value), config.label_sets, strict=True):
        try:
            row.append(class_index(said, one.classes))
        except ValueError as error:
            raise ValueError(f"{one.name}: {error}" if one.name else str(error)) from error
    return torch.tensor(row, dtype=torch.int64)


def _words(config: ClassCondition, value: object) -> str:
    rows = zip(_row(config, value).tolist(), config.label_sets, strict=True)
    return " ".join(one.classes[index] for index, one in rows if index >= 0)


CLASS = Kind(
    settle=_settle,
    build=_build,
    reader=_reader,
    row=_row,
    silence=NO_CLASS,
    words=_words,
)
