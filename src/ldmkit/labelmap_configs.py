"""Config of label maps beside pictures: where they lie, and what their colours mean. Imports no torch."""

from pathlib import Path

from ldmkit.fields import Config, field


class LabelMapConfig(Config):
    """What every command that reads pictures asks for about their label maps."""

    labelmaps: Path | None = field(
        None, "Folder of label maps: for each picture a .png or .npy of the same relative name"
    )
    labelmap_colours: Path | None = field(
        None,
        "Table (.json or .csv) of colours, the class id of each and perhaps its name, for label maps that are"
        " RGB pictures; docs/data.md",
    )
