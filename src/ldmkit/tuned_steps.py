"""Files of noise levels that `tune-steps` found for a model: JSON, checked, and bound to that model."""

import itertools
import json
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from ldmkit.durable import atomic_file
from ldmkit.errors import DataError
from ldmkit.facts import Facts, validated
from ldmkit.fields import Config, Positive

FORMAT = "ldmkit.steps/1"
MAX_BYTES = 1_000_000
Level = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class TunedSteps(Config):
    """What such a file holds."""

    format: str = FORMAT
    diffusion: str
    """Fingerprint of the model."""
    steps: Positive
    """Model calls that the levels are for."""
    levels: Annotated[tuple[Level, ...], Field(min_length=2, max_length=1001)]
    """Falling noise levels in units of whitened latents: `steps`, and where the step to 0 would have begun with one
    more; see `diffusion.grids.of_levels`."""
    manner: Facts
    """Sampler, guidance and data that they were found with."""
    errors: dict[str, float]
    """Root mean square difference of latents to the exact solution, in their standard deviations, with these levels
    (`tuned`) and with other grids of as many, on samples that did not choose the levels."""
    versions: dict[str, str]

    @field_validator("format")
    @classmethod
    def _known(cls, value: str) -> str:
        if value != FORMAT:
            raise ValueError(f"{value!r} is not {FORMAT}: another version of ldmkit wrote it")
        return value

    @field_validator("levels")
    @classmethod
    def _falling(cls, levels: tuple[float, ...]) -> tuple[float, ...]:
        if any(following >= level for level, following in itertools.pairwise(levels)):
            raise ValueError("noise levels must fall")
        return levels


def write_tuned(path: Path, found: TunedSteps) -> None:
    """Write the file, whole or not at all."""
    with atomic_file(path) as temporary:
        text = json.dumps(found.model_dump(mode="json"), ensure_ascii=False, indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_tuned(path: Path, diffusion: str) -> TunedSteps:
    """The levels of a file.

    Args:
        path: of the file.
        diffusion: fingerprint of the model that they are to be used with.

    Raises:
        DataError: the file cannot be read, is damaged, or was made for another model.
    """
    try:
        with path.open(encoding="utf-8") as file:
            value = json.loads(file.read(MAX_BYTES))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not what tune-steps writes: {error}") from error
    found = validated(TunedSteps, value, str(path))
    if found.diffusion != diffusion:
        raise DataError(
            f"{path} was found for another model ({found.diffusion[:12]}) than this one ({diffusion[:12]}): "
            "run ldmkit tune-steps for it"
        )
    return found
