"""DICOM files: one, or a folder of them at any depth; each frame is a picture.

| stored                     | becomes                                                            |
|----------------------------|--------------------------------------------------------------------|
| grey                       | `slope * stored + intercept` (CT: Hounsfield units), whole numbers |
|                            | exact as int32, else float32; as stored where there is no rescale  |
| modality lookup table      | applied                                                            |
| MONOCHROME1 (white is low) | lowest + highest number of its bits - stored, before the rescale   |
| RGB, YBR                   | RGB                                                                |
| palette                    | RGB of the palette's depth                                         |
| compressed                 | decoded where pydicom finds a decoder; else a problem that says    |
|                            | what to install                                                    |
| deflated as a whole        | refused                                                            |

Nothing that identifies anyone is copied: a key is the file's path in the source, a group is a hash of
the patient's ID (of the study's, where there is none), and no other tag leaves the file. The window is
`--preprocessing.range`. The window, padding value and presentation tables of the file are not applied.
"""

import hashlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ldmkit.data.arrays import require_size
from ldmkit.data.formats.sidecars import suffix_of
from ldmkit.data.formats.slices import (
    Listed,
    has_dicom_mark,
    named_if_damaged,
    npy_bytes,
    require_unchanged,
    rescaled,
    scan_files,
)
from ldmkit.data.items import Item, Problem, Source
from ldmkit.data_configs import SourceConfig
from ldmkit.errors import DataError

DEFLATED = ("1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.8.1")
"""Transfer syntaxes whose whole content is one deflated stream, of unknown length until inflated."""
JPEG_12_BIT = "1.2.840.10008.1.2.4.51"
READ_TAGS = (
    "PatientID",
    "StudyInstanceUID",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "PixelRepresentation",
    "RescaleSlope",
    "RescaleIntercept",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")
GREY = ("MONOCHROME1", "MONOCHROME2")
WHITE_IS_LOW = "MONOCHROME1"
GROUP_DIGITS = 16


class DicomFrame(NamedTuple):
    """One frame of a DICOM file, as a Blob."""

    file: str
    size: int
    """Bytes of the file."""
    frame: int
    slope: float
    intercept: float

    @property
    def name(self) -> str:
        """The file and the number of the frame, from 0."""
        return f"{self.file} (frame {self.frame})" if self.frame else self.file

    def read(self) -> bytes:
        """The frame as a `.npy` file, `[h, w]` or `[h, w, 3]`, in the units of the file.

        Raises:
            DataError: the file is damaged or has changed.
        """
        pydicom = _pydicom()
        require_unchanged(self.file, self.size)
        with named_if_damaged(self.name, "DICOM"):
            from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
            from pydicom.pixels.utils import pixel_array

            tags = pydicom.Dataset()
            stored = pixel_array(self.file, ds_out=tags, index=self.frame)
            if tags.PhotometricInterpretation == "PALETTE COLOR":
                return npy_bytes(apply_color_lut(stored, tags))
            if tags.PhotometricInterpretation == WHITE_IS_LOW:
                stored = _turned_round(stored, int(tags.BitsStored))
            if tags.get("ModalityLUTSequence"):
                return npy_bytes(apply_modality_lut(stored, tags))
            return npy_bytes(rescaled(stored, self.slope, self.intercept))


def scan_dicom(config: SourceConfig) -> Source:
    """List the frames of a DICOM file, or of all in a folder; pixels are not read.

    Raises:
        DataError: nothing is there, or pydicom is missing.
    """
    _pydicom()
    return scan_files(config.data, "DICOM", _is_dicom, _frames_of)


def _pydicom() -> ModuleType:
    try:
        import pydicom
    except ImportError as error:
        raise DataError("DICOM files are read by pydicom: pip install 'ldmkit[medical]'") from error
    return pydicom


def _is_dicom(file: Listed) -> bool:
    """By its name, so that a damaged one is said, or by its mark; DICOMDIR only lists others."""
    if Path(file.path).name.upper() == "DICOMDIR":
        return False
    return suffix_of(file.name) in ("dcm", "dicom") or has_dicom_mark(file.path)


def _frames_of(file: Listed, problems: list[Problem]) -> list[Item]:
    if not has_dicom_mark(file.path):
        raise DataError(f"{file.path} is no DICOM file: the mark DICM is missing at byte 128")
    with named_if_damaged(file.path, "DICOM"):
        tags = _tags(file.path)
        if "Rows" not in tags:
            text = f"{file.path} is passed over, as it holds no picture (a report or the like)"
            problems.append(Problem("not a picture", file.name, text, "warning"))
            return []
        frames = _checked_frames(tags, file)
        group = _group(tags, file, problems)
        scales = [_scale(tags, frame) for frame in range(frames)]
    return [
        Item(
            file.name + (f"#frame-{frame:04d}" if frames > 1 else ""),
            DicomFrame(file.path, file.size, frame, *scale),
            group=group,
        )
        for frame, scale in enumerate(scales)
    ]


def _tags(path: str) -> Any:  # noqa: ANN401 - a pydicom.Dataset
    """What is needed of a file, without its pixels, and only if its pixels can be decoded here."""
    pydicom = _pydicom()
    from pydicom.filereader import read_file_meta_info
    from pydicom.pixels.decoders.base import get_decoder

    syntax = read_file_meta_info(path).get("TransferSyntaxUID")
    if not syntax:
        raise DataError(f"{path} does not say how it is encoded (no transfer syntax)")
    if syntax in DEFLATED:
        raise DataError(
            f"{path} is deflated as a whole, which is not read; inflate it with dcmconv"
        )
    tags = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(READ_TAGS))
    if "Rows" not in tags:
        return tags
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise DataError(f"{path} is encoded as {syntax.name}, which is not read") from error
    only_pillow = decoder.available_plugins == ("pillow",)
    deep = str(syntax) == JPEG_12_BIT and int(tags.BitsStored) > 8  # Pillow decodes 8 bits of it
    if not decoder.is_available or (only_pillow and deep):
        raise DataError(f"{path} is compressed as {syntax.name}; {_what_decodes(decoder)}")
    return tags


def _what_decodes(decoder: Any) -> str:  # noqa: ANN401 - a pydicom Decoder
    """What to install; GDCM is passed over, as its package is not called so."""
    lines = [line for line in decoder.missing_dependencies if not line.startswith("gdcm")]
    needs = [
        re.sub(r">=[0-9.]+| and\b|numpy and ", "", line.rpartition("requires ")[2])
        for line in lines
    ]
    return f"pip install {' or '.join(needs)}"


def _checked_frames(tags: Any, file: Listed) -> int:  # noqa: ANN401
    """How many frames there are; shape, colours and length are checked.

    Raises:
        DataError: it cannot be used.
    """
    frames = int(tags.get("NumberOfFrames") or 1)
    sides = [int(tags.Rows), int(tags.Columns)]
    require_size(sides, file.path)
    colours = tags.get("PhotometricInterpretation")
    if colours not in (*GREY, *COLOURS):
        raise DataError(f"{file.path} has the colours {str(colours)[:40]!r}, which are not read")
    samples = 1 if colours in (*GREY, "PALETTE COLOR") else 2  # at least: YBR may share colours
    if tags.file_meta.TransferSyntaxUID.is_encapsulated:
        needed = frames  # a frame is some bytes
    else:
        needed = frames * sides[0] * sides[1] * samples * int(tags.BitsAllocated) // 8
    if frames < 1 or needed > file.size:
        raise DataError(
            f"{file.path} is cut off: its {frames:,} frame(s) need {needed:,} bytes and it has "
            f"{file.size:,}; copy it again"
        )
    return frames


def _group(tags: Any, file: Listed, problems: list[Problem]) -> str:  # noqa: ANN401
    """A hash in place of the patient; the same patient has the same one in any collection."""
    patient, study = str(tags.get("PatientID") or ""), str(tags.get("StudyInstanceUID") or "")
    if not patient.strip():
        text = f"{file.path} names no patient, so that its study is held back as a whole instead"
        problems.append(Problem("no patient ID", file.name, text, "warning"))
    known = patient.strip() or study.strip()
    return hashlib.sha256(known.encode()).hexdigest()[:GROUP_DIGITS] if known else ""


def _scale(tags: Any, frame: int) -> tuple[float, float]:  # noqa: ANN401
    """Rescale slope and intercept of a frame, which lie deeper in enhanced files (PS3.3 C.7.6.16.2.9)."""
    places = [tags]
    for sequence, number in (
        ("SharedFunctionalGroupsSequence", 0),
        ("PerFrameFunctionalGroupsSequence", frame),
    ):
        groups = tags.get(sequence) or []
        if number < len(groups):
            places += groups[number].get("PixelValueTransformationSequence") or []
    slope, intercept = 1.0, 0.0
    for place in places:
        if place.get("RescaleSlope") is not None:
            slope, intercept = float(place.RescaleSlope), float(place.get("RescaleIntercept") or 0)
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        raise DataError(f"the rescale slope {slope:g} and intercept {intercept:g} cannot be meant")
    return slope, intercept


def _turned_round(stored: np.ndarray, bits: int) -> np.ndarray:
    """Low and high exchanged, in the number format they are stored in."""
    if stored.dtype.kind == "i":
        return -1 - stored
    if stored.dtype.kind != "u" or stored.max() >> bits:
        raise DataError("values that are white where low do not fit in their bits")
    return stored.dtype.type(2**bits - 1) - stored
