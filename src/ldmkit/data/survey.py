"""Read every picture once before a training run: what cannot be used is named at its start.

The answer is kept in the run directory, so that a run that goes on does not ask again.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.images import decode_item
from ldmkit.data.items import Item
from ldmkit.data.latents import items_digest
from ldmkit.data.look import conversions, look_at
from ldmkit.data.preprocessing import preprocess
from ldmkit.data.tally import Tally, lines_of, tally_of
from ldmkit.durable import write_text
from ldmkit.errors import DataError, LdmkitError
from ldmkit.seals import read_page, sealed_page
from ldmkit.terminal import say, track

SURVEY = "pictures.json"
AT_ONCE = 16


class Survey(NamedTuple):
    """What reading all pictures showed."""

    left_out: dict[str, str]
    """Key and reason of what cannot be used."""
    converted: Tally


class _Answers(Dataset[tuple[str, tuple[str, ...], LdmkitError | None]]):
    """For an item: its key, what decoding changes, and why it cannot be used."""

    def __init__(self, items: Sequence[Item], config: PreprocessingConfig) -> None:
        self.items, self.config = items, config

    def __getitem__(self, index: int) -> tuple[str, tuple[str, ...], LdmkitError | None]:
        item = self.items[index]
        try:
            data = item.picture.read()
            preprocess(decode_item(item, data, self.config), self.config, None, item.name)
            changes = conversions(look_at(data, item.name), item.name, self.config)
        except LdmkitError as error:
            return item.key, (), error
        return item.key, changes, None

    def __len__(self) -> int:
        return len(self.items)


def survey(items: Sequence[Item], config: PreprocessingConfig, workers: int) -> Survey:
    """Decode all pictures, with `workers` processes, and keep none.

    Raises:
        StorageError: the disk or the network fails.
    """
    loader = DataLoader(
        _Answers(items, config),
        batch_size=AT_ONCE,
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),
    )
    left_out: dict[str, str] = {}
    changed: list[tuple[str, tuple[str, ...]]] = []
    with track("look at pictures", len(items), unit="picture") as progress:
        for answers in loader:
            errors = {key: error for key, _, error in answers if error}
            others = [error for error in errors.values() if not isinstance(error, DataError)]
            if others:  # not a picture's fault
                raise others[0]
            left_out |= {key: str(error) for key, error in errors.items()}
            changed += [(key, changes) for key, changes, _ in answers if changes]
            progress.advance(len(answers))
    return Survey(left_out, tally_of(changed))


def usable_items(
    items: Sequence[Item], config: PreprocessingConfig, run: Path, *, max_bad: float, workers: int
) -> list[Item]:
    """The items whose pictures can be used; says what is left out and what decoding changes.

    Args:
        items: all of them.
        config: how they are read.
        run: directory where the answer is kept.
        max_bad: share that may be left out.
        workers: processes that read.

    Raises:
        DataError: more than that cannot be used; the message names the first.
    """
    found = _kept(run / SURVEY, items, config)
    if found is None:
        found = survey(items, config, workers)
        facts = {"made_for": _identity(items, config), **found._asdict()}
        text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
        write_text(run / SURVEY, sealed_page(text))
    if len(found.left_out) > int(max_bad * len(items)):
        reason = next(iter(found.left_out.values()))
        raise DataError(
            f"{reason} ({len(found.left_out)} of {len(items)} pictures cannot be used, all named in "
            f"{run / SURVEY}; to leave some out: --max-bad 0.01)"
        )
    for line in lines_of(found.converted):
        say(line)
    for key, reason in list(found.left_out.items())[:10]:
        say(f"left out {key}: {reason}")
    return [item for item in items if item.key not in found.left_out]


def _kept(file: Path, items: Sequence[Item], config: PreprocessingConfig) -> Survey | None:
    """An earlier answer to the same question."""
    try:
        facts, _ = read_page(file)
        if facts["made_for"] != _identity(items, config):
            return None
        converted = {
            name: (count, tuple(keys)) for name, (count, keys) in facts["converted"].items()
        }
        return Survey(dict(facts["left_out"]), converted)
    except (DataError, AttributeError, ValueError, KeyError, TypeError):
        return None  # it is only kept to save time


def _identity(items: Sequence[Item], config: PreprocessingConfig) -> list[str]:
    return [items_digest(items), config.model_dump_json()]
