"""Classes of a diffusion model as other projects keep them: a table with a row for each.

Whether its last row stands for no class, which classifier-free guidance needs, no table says.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ldmkit.condition_configs import ClassCondition
from ldmkit.errors import DataError
from ldmkit.interchange_configs import ImportConfig
from ldmkit.interop.stated import agreed
from ldmkit.latent_diffusion import LatentDiffusion

TABLE = "conditioners.class.embedding.weight"
"""Our name of it in a diffusion model."""
NULL_LAST: dict[int, Literal["last", "none"]] = {1000: "none", 1001: "last"}
"""Rows of the published tables of ImageNet's classes -> whether the last one is the null."""

Way = Literal["tokens", "vector"]


class ClassTable(NamedTuple):
    """A table of classes as ours."""

    weight: Tensor
    """`[classes + 1, width]`, float32; the null last."""
    condition: ClassCondition
    null_class: Literal["last", "none"]
    """`none`: it had none, and got a row of zeros that nobody trained."""


class Found(NamedTuple):
    """A table of classes as a source has it."""

    table: Tensor
    way: Way
    """Whether the network attends to its rows, or has them added to the time embedding."""
    names: object
    """Of the classes, as the source states them; None where it does not."""
    null_class: Literal["last", "none"] | None
    """As the source states it."""
    where: str
    """How to name the tensor in errors."""


def read_table(found: Found, width: int, config: ImportConfig) -> ClassTable:
    """A table of another project as ours; classes without names are called by their numbers.

    Args:
        found: the table.
        width: of its rows, as the network wants them.
        config: what the source does not say.

    Raises:
        DataError: it is no table of that width, it is not known whether its last row is the null, or the
            names are not those of its rows.
        UsageError: what is typed contradicts the source.
    """
    table, where = found.table, found.where
    if table.ndim != 2 or table.shape[1] != width or len(table) < 2:
        raise DataError(
            f"{where} has shape {list(table.shape)}; this network wants two or more rows of {width} "
            "numbers there"
        )
    typed = None if config.null_class == "auto" else config.null_class
    null = agreed(typed, found.null_class, "--null-class", where) or NULL_LAST.get(len(table))
    if null is None:
        raise DataError(
            f"{where} has {len(table)} rows, and nothing says whether the last one is the null of "
            "classifier-free guidance: give --null-class last or --null-class none"
        )
    if not table.float().isfinite().all():
        raise DataError(f"{where} holds values that are not finite")
    count, table = len(table) - (null == "last"), table.float().clone()
    if null == "none":
        table = torch.cat([table, table.new_zeros(1, width)])
    names = list(range(count)) if found.names is None else found.names
    if not isinstance(names, list) or len(names) != count:
        raise DataError(f"{where}: the names of its classes are no list of {count}")
    condition = ClassCondition(way=found.way, names=tuple(map(str, names)))
    return ClassTable(table, condition, "last" if null == "last" else "none")


def told_of(model: LatentDiffusion, source: str) -> ClassCondition | None:
    """The classes that a model is told, for layouts that have a place for nothing else.

    Raises:
        DataError: it is told something else too; it is named.
    """
    others = sorted(c.kind for c in model.config.conditions if not isinstance(c, ClassCondition))
    if others:
        raise DataError(
            f"{source} is told {', '.join(others)}, and exported models are told classes alone"
        )
    told = next((c for c in model.config.conditions if isinstance(c, ClassCondition)), None)
    if told is not None and len(told.label_sets) > 1:
        names = ", ".join(one.name for one in told.sets)
        raise DataError(
            f"{source} is told classes of several label sets ({names}), and exported models have one"
        )
    return told


def values_of_classes(model: LatentDiffusion, classes: Tensor) -> dict[str, Tensor]:
    """What `model.condition` takes for these indices `[b]`; nothing where it is told nothing."""
    return {"class": classes[:, None]} if model.config.conditions else {}


def load_beside(model: LatentDiffusion, table: ClassTable | None) -> None:
    """Give memory to what a model without memory has beside its U-Net: the table, and no whitening."""
    z = model.config.latent_channels
    rest = {"latent_mean": torch.zeros(z), "latent_std": torch.ones(z)}
    if table is not None:
        rest[TABLE] = table.weight
    model.load_state_dict(rest, strict=False, assign=True)
