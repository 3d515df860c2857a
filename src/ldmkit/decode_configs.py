"""Config of `decode`: what becomes a picture, in which files, with what beside them. Imports no torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ldmkit.canvas_configs import Seamless
from ldmkit.configs import STREAM
from ldmkit.data_configs import SCRATCH, TILE, TILING, Job
from ldmkit.fields import Count, Positive, argument, field
from ldmkit.precision_configs import InferencePrecisionConfig

PictureFormat = Literal["png", "jpg", "webp", "png16", "tiff", "tiff16", "tiff32", "npy"]
AnimationFormat = Literal["webp", "gif"]


class DecodeConfig(InferencePrecisionConfig):
    """Turn sampled latents into pictures and a contact sheet of them; writes to OUT, or into a tar."""

    samples: Path = argument("Sample file; - reads standard input", STREAM)
    ae: Path = field(Path("runs/ae/autoencoder.safetensors"), "Autoencoder file")
    out: Path = field(Path("samples"), "Directory for the pictures", short="-o")
    format: Literal["auto", PictureFormat] = field(
        "auto",
        "8 bits: png, jpg, webp (grey or RGB), tiff; 16 bits: png16 (grey or RGB), tiff16; float32 in the units"
        " of the training pictures: tiff32, npy; auto = png, png16 or npy, what loses nothing of their depth,"
        " range and channels",
    )
    quality: Annotated[int, Field(ge=1, le=100)] = field(
        95, "Of JPEG and WebP, percent; at 100 WebP loses nothing"
    )
    tar: Path | None = field(
        None,
        "Webdataset tar to write in place of OUT, NAME.png and NAME.json for each sample; - streams it to"
        " standard output",
    )
    provenance: bool = field(
        True,
        "Write into each picture what it was made of (seed, what was told, models, settings), and a line"
        " for each into OUT/samples.jsonl",
    )
    resume: bool = field(
        False, "Leave pictures in OUT alone that were made of the same, and decode the others"
    )
    grid: Literal["none", "square", "by-class"] = field(
        "square",
        "Contact sheet of the first 256 pictures, OUT/grid.png: in order, or a row for all that were told the"
        " same",
    )
    columns: Positive | None = field(
        None,
        "Pictures in a row of the sheet, at most (default: square, or as many as the largest class)",
    )
    animate: Literal["none", AnimationFormat] = field(
        "none",
        "Write NAME.denoising.webp or .gif for each sample, how it came out of the noise, and a sheet of the"
        " first 64; for samples drawn with --keep-path",
    )
    labels: bool = field(False, "Write the pictures' names under them in the sheet")
    seamless: Literal["auto", Seamless] = field(
        "auto",
        "Decode as pictures that continue at their opposite border, along x, y or both; auto = as the samples"
        " were drawn",
    )
    feather: Count = field(
        0,
        "Inpainting: width of the rim around the hole in which the given and the decoded picture are mixed,"
        " pixels",
    )
    jobs: Job | None = field(
        None, "I/N: decode the I-th of N parts of a sample file (I from 1), for array jobs"
    )
    batch_size: Positive = field(
        16, "Samples decoded at once (on the CPU always two); the result does not depend on it"
    )
    writers: Positive = field(
        4, "Threads that encode and write pictures; the result does not depend on it"
    )
    tile: Count = field(0, TILE)
    tiling: Literal["exact", "independent"] = field("exact", TILING)
    scratch: Path | None = field(None, SCRATCH)
    device: Literal["auto", "cpu", "cuda", "mps"] = field("auto", "Where to compute")

    @property
    def part(self) -> tuple[int, int]:
        """Which part of the samples to decode, from 1, and of how many."""
        part, _, count = (self.jobs or "1/1").partition("/")
        return int(part), int(count)

    @model_validator(mode="after")
    def _goes_together(self) -> "DecodeConfig":
        if self.jobs and self.samples == STREAM:
            raise ValueError("--jobs divides a sample file: name one, a pipe has no parts")
        if self.resume and self.tar is not None:
            raise ValueError(
                "--resume needs pictures in OUT: a tar is whole or absent, leave out --tar"
            )
        if self.resume and not self.provenance:
            raise ValueError(
                "--resume knows pictures by their provenance: leave out --no-provenance"
            )
        if self.tile and self.precision == "bf16":
            raise ValueError("--tile computes in float32: leave out --precision bf16")
        if self.grid == "none" and (self.labels or self.columns):
            raise ValueError(
                "--labels and --columns are of the contact sheet: leave out --grid none"
            )
        return self
