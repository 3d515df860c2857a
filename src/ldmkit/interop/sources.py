"""What is to be imported, opened once: a file of the original layout, or a folder of diffusers."""

from pathlib import Path
from typing import Literal, NamedTuple

from ldmkit.interop.diffusers_unet import DOWN_BLOCKS
from ldmkit.interop.layout import Imported, Tensors
from ldmkit.interop.reading import CONFIG, autoencoder_in, read_autoencoder, read_page, read_tensors
from ldmkit.interop.unet_layout import LDM_PREFIX


class Source(NamedTuple):
    """A file with its tensors, or a folder."""

    path: Path
    tensors: Tensors
    """Of a file; empty for a folder."""
    metadata: dict[str, str]
    unet: Path | None
    """A folder's U-Net; None where it has none, and for a file."""

    @property
    def form(self) -> Literal["file", "folder"]:
        """Which of the two it is."""
        return "folder" if self.path.is_dir() else "file"

    @property
    def is_whole(self) -> bool:
        """Whether it holds a U-Net beside whatever else."""
        return self.unet is not None or any(name.startswith(LDM_PREFIX) for name in self.tensors)


def open_source(path: Path) -> Source:
    """Open a source of models.

    Raises:
        DataError: it is missing, damaged, or a file of ldmkit already.
    """
    if path.is_dir():
        return Source(path, {}, {}, _unet_folder(path))
    return Source(path, *read_tensors(path), None)


def autoencoder_of(source: Source) -> Imported:
    """The autoencoder of a source, alone or in a whole model.

    Raises:
        DataError: there is none, or it is not one that ours can express.
    """
    if source.form == "folder":
        return read_autoencoder(source.path)
    return autoencoder_in(source.tensors, source.metadata, str(source.path))


def _unet_folder(folder: Path) -> Path | None:
    """Where a folder of diffusers has its U-Net: in `unet`, or itself; None if it has none."""
    if (folder / "unet" / CONFIG).is_file():
        return folder / "unet"
    bare = folder / CONFIG
    if bare.is_file() and read_page(bare).get("_class_name") in DOWN_BLOCKS:
        return folder
    return None
