"""Configurations in TOML: what `--config` reads and a run directory keeps."""

import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import tomli_w

from ldmkit.errors import DataError, UsageError
from ldmkit.fields import Config
from ldmkit.seals import TOML_START, State, read_limited, sealed_toml, state_of

MAX_CONFIG_BYTES = 1 << 20


def to_toml(config: Config) -> str:
    """The whole config as TOML, which `read_toml` takes back; fields without a value are left out."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file to nested dictionaries; neither validated here nor compared with a digest.

    Raises:
        UsageError: it cannot be read, is too large, or is no TOML.
    """
    try:
        return tomllib.loads(read_limited(path, MAX_CONFIG_BYTES).decode())
    except DataError as error:
        raise UsageError(f"the config: {error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from error


def config_page(config: Config) -> str:
    """What a run directory keeps: `to_toml` below a comment with its digest."""
    return sealed_toml(to_toml(config))


def config_state(path: Path) -> State:
    """Whether a config that ldmkit wrote is as it was written.

    Raises:
        DataError: it was changed or damaged since, or cannot be read.
    """
    try:
        return state_of(read_limited(path, MAX_CONFIG_BYTES), TOML_START, str(path))
    except DataError as error:
        raise DataError(
            f"{error} (to keep a change made on purpose, remove its first line)"
        ) from error


def read_run_config(path: Path) -> dict[str, Any]:
    """The config that a run directory keeps.

    Raises:
        DataError: it was changed or damaged since it was written.
        UsageError: it cannot be read or is no TOML.
    """
    config_state(path)
    return read_toml(path)


def first_difference(
    ours: Config, theirs: dict[str, Any], *, ignore: Collection[str] = ()
) -> tuple[str, Any, Any] | None:
    """The first field in which a stored config differs: dotted name, our value, its value.

    Args:
        ours: the config of now.
        theirs: the stored one, as `read_toml` or JSON gives it.
        ignore: top-level fields that may differ.
    """
    stored, current = _flat(theirs), _flat(ours.model_dump(mode="json", exclude_none=True))
    for name in sorted(stored.keys() | current.keys()):
        if name.split(".")[0] not in ignore and stored.get(name) != current.get(name):
            return name, current.get(name), stored.get(name)
    return None


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
