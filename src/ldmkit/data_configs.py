"""Configs of the data: where pictures come from, whether they are fit, and how they become latents.

Imports no torch.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ldmkit.fields import Count, Fraction, Names, Positive, ValueRange, argument, field
from ldmkit.labelmap_configs import LabelMapConfig
from ldmkit.precision_configs import InferencePrecisionConfig
from ldmkit.tower_configs import ImageTowerConfig

SourceFormat = Literal[
    "auto",
    "coco",
    "dicom",
    "folder",
    "metadata",
    "nifti",
    "npz",
    "parquet",
    "stack",
    "webdataset",
]
Location = Annotated[
    str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)
]
"""A path or a URL; not a `Path`, which would fold the two slashes of `https://`."""

DegradationName = Literal["bicubic", "bsr"]
HoleKind = Literal["strokes", "boxes", "half", "margin", "mixed", "given"]
HoleFill = Literal["black", "grey"]
TextOutput = Literal["last", "penultimate", "pooled"]


def _is_pattern(text: str | None) -> str | None:
    if text is not None:
        try:
            re.compile(text)
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from error
    return text


def _is_job(text: str) -> str:
    part, slash, count = text.partition("/")
    if not (slash and part.isdigit() and count.isdigit() and 1 <= int(part) <= int(count)):
        raise ValueError("give I/N with I from 1 to N, such as 1/4")
    return text


Job = Annotated[str, AfterValidator(_is_job)]
"""I/N: the I-th of N parts, from 1."""


class SourceConfig(LabelMapConfig):
    """What every command that reads pictures asks for."""

    data: Location = argument(
        "Pictures: a folder (class subfolders or metadata.* tables allowed), webdataset tar(s), parquet or"
        " .npz file(s), a COCO JSON file, DICOM or NIfTI volumes; URLs of tars; photos-{000..099}.tar for"
        " several"
    )
    format: SourceFormat = field("auto", "What DATA is; auto = by its name and what lies in it")
    axis: Annotated[int, Field(ge=0, le=2)] = field(
        2,
        "nifti: which way volumes are cut, after turning them to right-anterior-superior:"
        " 0 = sagittal, 1 = coronal, 2 = axial slices",
    )
    group_by: Annotated[str | None, AfterValidator(_is_pattern)] = field(
        None,
        "Regular expression on keys, such as '^patient[0-9]+': pictures for which it matches the same"
        " text are held back together or not at all",
    )
    keys: Path | None = field(
        None, "Text file with a key in each line: only these pictures (default: all)"
    )
    caption_column: str | None = field(
        None, "Column of captions in metadata and parquet (default: text, caption or prompt)"
    )
    label_column: Names = field(
        None,
        "NAME or NAME,NAME,...: column of class labels in metadata and parquet (default: label), or several,"
        " each a label set of its own, such as kind,style",
    )
    scalars: Names = field(
        None,
        "NAME,NAME,...: columns of metadata and parquet, or keys of the .json members of tars, that hold a"
        " number for each picture, such as age,dose",
    )
    hole_masks: Path | None = field(
        None,
        "Folder of holes to paint in: for each picture a mask, .png or .npy, of the same relative name and"
        " size, white where the hole is",
    )
    images: Path | None = field(
        None,
        "Folder of the pictures of a COCO file (default: its own, ../SPLIT, ../images or"
        " ../images/SPLIT, SPLIT being what follows the last _ of its name)",
    )
    captions: Path | None = field(
        None, "COCO captions file, beside the instances file that is DATA"
    )
    cache: Path | None = field(
        None, "Directory for copies of remote files (default: LDMKIT_CACHE, or ~/.cache/ldmkit)"
    )
    cache_size: Annotated[float, Field(gt=0, allow_inf_nan=False)] = field(
        50.0, "Space for them, GiB; those used longest ago are removed first"
    )


TILE = (
    "Side of the tiles that large pictures are computed in, pixels, one picture at a time; 0 = off"
)
TILING = (
    "exact = as without tiles, all feature maps of the picture in main memory; "
    "independent = in the memory of a tile, but norms and attention see only theirs: approximate"
)
SCRATCH = "Directory for the feature maps of exact tiles, where main memory is too small"


class EncodeConfig(SourceConfig, ImageTowerConfig, InferencePrecisionConfig):
    """Turn pictures into a set of latents, once; writes OUT/*.safetensors and OUT/manifest.json."""

    ae: Path = field(Path("runs/ae/autoencoder.safetensors"), "Autoencoder file")
    out: Path = field(Path("runs/latents"), "Directory of the latent set; - streams it", short="-o")
    size: Positive | None = field(None, "Picture size, pixels (default: what the autoencoder saw)")
    buckets: bool = field(
        False,
        "Keep the pictures' shapes: each goes to the nearest of some shapes of SIZE x SIZE area",
    )
    bucket_step: Positive = field(64, "Sides of buckets are multiples of this, pixels")
    bucket_ratio: Annotated[float, Field(ge=1)] = field(
        2.0, "Longer over shorter side of a bucket, at most"
    )
    views: Positive = field(
        1, "Latents for each picture: the plain one, and random crops of it as further ones"
    )
    view_zoom: Annotated[float, Field(ge=1)] = field(
        1.25, "Random crops show down to 1/ZOOM of the shorter side"
    )
    view_flip: bool = field(False, "Mirror half of the random crops (left and right)")
    view_jitter: Fraction = field(
        0.0, "Largest change of brightness and contrast of random crops; 0.1 = by up to 10 %"
    )
    seed: Count = field(
        0, "Fixes the random crops, random holes, and what --lowres-degradation bsr does"
    )
    lowres: Count = field(
        0, "Store each picture, smaller by this factor, as the input of super-resolution; 0 = no"
    )
    lowres_degradation: DegradationName = field(
        "bicubic",
        "How --lowres makes pictures small: bicubic, or bsr = with random blur, resizing, noise and JPEG"
        " as well (the paper's super-resolution model)",
    )
    text_encoder: str | None = field(
        None,
        "Store embeddings of the captions by the text tower of this open_clip architecture, such as"
        " ViT-L-14-quickgelu; of several captions that of the first",
    )
    text_weights: Path | None = field(
        None, "Weights of --text-encoder: safetensors, or a checkpoint"
    )
    text_output: TextOutput = field(
        "last",
        "What --text-encoder gives: all tokens after its last block or the one before (penultimate), or"
        " one embedding for the whole text (pooled)",
    )
    text_pad_with_end: bool = field(
        False, "Fill captions up with the end token, as Stable Diffusion 1 does; else with 0"
    )
    holes: HoleKind | None = field(
        None,
        "Store a hole to be painted in, and the latents of the picture with it, for inpainting: random"
        " strokes, boxes, half of the picture, a margin, mixed = any of these, or given = --hole-masks",
    )
    hole_fill: HoleFill = field(
        "black", "Colour of the hole that is encoded: black (the paper) or grey (Stable Diffusion)"
    )
    keep_pictures: bool = field(
        False,
        "With --holes: store the pictures too (8 bits), so that `sample --like` and `decode` paint in the"
        " hole alone",
    )
    shard_size: Positive = field(1024, "Pictures for each shard file")
    batch_size: Positive = field(32, "Latents computed at once")
    dtype: Literal["float16", "bfloat16", "float32"] = field(
        "float16", "Number format of the stored latents; bfloat16 = any size, 3 decimal digits"
    )
    max_bad: Fraction = field(
        0.0, "Share of unreadable pictures that may be left out (they are listed in the manifest)"
    )
    workers: Count = field(0, "Processes that read pictures; 0 = in the encoding process")
    jobs: Job | None = field(
        None,
        "I/N: encode the I-th of N parts of the shards (I from 1), for array jobs; the one that comes"
        " last writes the manifest (default: 1/1, or as torchrun says)",
    )
    add: bool = field(
        False,
        "Append the pictures that the set does not hold yet, and leave the others as they are",
    )
    tile: Count = field(0, TILE)
    tiling: Literal["exact", "independent"] = field("exact", TILING)
    scratch: Path | None = field(None, SCRATCH)
    device: Literal["auto", "cpu", "cuda", "mps"] = field("auto", "Where to compute")
    force: bool = field(False, "Replace a latent set that was made differently")

    @model_validator(mode="after")
    def _one_writer(self) -> "EncodeConfig":
        if self.add and self.force:
            raise ValueError("--add keeps a set and --force replaces it: give one of them")
        if str(self.out) == "-" and (self.add or self.jobs):
            raise ValueError("--add and --jobs write to a directory: give --out")
        if self.tile and self.precision == "bf16":
            raise ValueError("--tile computes in float32: leave out --precision bf16")
        return self

    @model_validator(mode="after")
    def _degradation_has_a_size(self) -> "EncodeConfig":
        if self.lowres_degradation != "bicubic" and not self.lowres:
            raise ValueError(
                f"--lowres-degradation {self.lowres_degradation} makes the pictures of --lowres: give "
                "their factor, such as --lowres 4"
            )
        return self

    @model_validator(mode="after")
    def _columns_have_what_they_need(self) -> "EncodeConfig":
        if self.text_encoder is None and (
            self.text_weights or self.text_pad_with_end or self.text_output != "last"
        ):
            raise ValueError("--text-weights and other --text options are for --text-encoder NAME")
        if (self.holes == "given") != (self.hole_masks is not None):
            raise ValueError(
                "--holes given and --hole-masks DIR go together: give both, or neither"
            )
        if self.hole_fill != "black" and self.holes is None:
            raise ValueError("--hole-fill is the colour of --holes: give their kind too")
        if self.keep_pictures and self.holes is None:
            raise ValueError("--keep-pictures is for pictures with --holes: give their kind too")
        return self


class CheckConfig(SourceConfig):
    """Read everything without training; say what is wrong or odd, and where (exit code 3 for errors)."""

    size: Positive = field(256, "Picture size you mean to train at, pixels; smaller ones are named")
    channels: Positive = field(3, "Channels you mean to train with, as --preprocessing.channels")
    range: ValueRange | None = field(
        None, "LO,HI: the values that become -1 and 1, as --preprocessing.range"
    )
    holdout: Fraction = field(
        0.0, "Name duplicates between training and the share that this --holdout keeps out"
    )
    against: Location | None = field(
        None, "Another set of pictures, such as for validation: name what lies in both"
    )
    out: Path | None = field(
        None, "Page with small versions of what is wrong, such as report.html", short="-o"
    )
    workers: Count = field(0, "Processes that read pictures; 0 = in this one")


class SplitConfig(SourceConfig):
    """Write down which pictures are held back; writes OUT/training.txt and OUT/held-back.txt (keys)."""

    holdout: Fraction = field(0.05, "Share of the pictures, or of the groups, to hold back")
    out: Path = field(Path("runs/split"), "Directory of the two lists", short="-o")
