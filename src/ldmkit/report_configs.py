"""Config of `report`. Imports no torch."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from ldmkit.fields import Config, argument, field


class ReportConfig(Config):
    """Write one HTML page about run directories: curves, pictures, findings, settings; no network."""

    run: Annotated[tuple[Path, ...], Field(min_length=1)] = argument(
        "Directories of train-ae, encode, train-diffusion and eval-ae, finished or not; several are"
        " compared by their fingerprints"
    )
    out: Path = field(Path("report.html"), "The page", short="-o")
