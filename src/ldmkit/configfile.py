"""Configurations in TOML: what `--config` reads and a run directory keeps."""

import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import tomli_w

from ldmkit.errors import UsageError
from ldmkit.fields import Config


def to_toml(config: Config) -> str:
    """The whole config as TOML, which `read_toml` takes back; fields without a value are left out."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file to nested dictionaries; not validated here.

    Raises:
        UsageError: it cannot be read or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from error


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
