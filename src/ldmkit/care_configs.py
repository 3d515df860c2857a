"""Configs of `verify` and `doctor`. Imports no torch."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from ldmkit.fields import Config, Positive, argument, field


class VerifyConfig(Config):
    """Recompute the digests of anything ldmkit wrote, and say which file and tensor is damaged."""

    path: Annotated[tuple[Path, ...], Field(min_length=1)] = argument(
        "Model, sample and statistics files, streams kept in files, latent sets, run directories, decoded"
        " pictures, tars, reports; of a directory, all that lies in it"
    )


class DoctorConfig(Config):
    """Say whether this machine and installation can do the work, and what to do where not."""

    directory: Path = argument("Where files are to be written; its disk is tried", Path())
    timeout: Positive = field(60, "Seconds that two processes may take to add up two numbers")
