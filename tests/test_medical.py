"""DICOM and NIfTI as sources: values in the units of the file, the same way up, nobody named."""

import gzip
import hashlib
import shutil
import sys
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEGLSLossless, generate_uid

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.formats import nifti, slices
from ldmkit.data.images import read_images, split
from ldmkit.data.sources import open_source, scan_source
from ldmkit.data_configs import SourceConfig
from ldmkit.errors import DataError
from test_volumes import array_of, integers, said_by

DICOM_FILES = Path(pydicom.__file__).parent / "data" / "test_files"
NIFTI_FILES = Path(nibabel.__file__).parent / "tests" / "data"


def listed(path, **settings):
    return scan_source(SourceConfig.model_validate({"data": path} | settings))


@pytest.fixture(autouse=True)
def _nothing_held():
    yield
    slices.forget_all()


def write_dicom(path, stored, **tags):
    """A CT file of one or more frames `[h, w]`."""
    content = Dataset()
    content.file_meta = FileMetaDataset()
    content.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    content.file_meta.MediaStorageSOPClassUID = content.SOPClassUID = CTImageStorage
    content.file_meta.MediaStorageSOPInstanceUID = content.SOPInstanceUID = generate_uid()
    content.PatientName, content.PatientID = "Mustermann^Erika", "secret-4711"
    content.Rows, content.Columns = stored.shape[-2:]
    content.NumberOfFrames = len(stored) if stored.ndim == 3 else 1
    content.SamplesPerPixel, content.PhotometricInterpretation = 1, "MONOCHROME2"
    content.BitsAllocated = stored.dtype.itemsize * 8
    content.BitsStored = content.BitsAllocated
    content.HighBit = content.BitsStored - 1
    content.PixelRepresentation = int(stored.dtype.kind == "i")
    for name, value in tags.items():
        setattr(content, name, value)
    content.PixelData = stored.tobytes()
    content.save_as(path, enforce_file_format=True)


def transformation(slope, intercept):
    values = Dataset()
    values.RescaleSlope, values.RescaleIntercept, values.RescaleType = slope, intercept, "US"
    group = Dataset()
    group.PixelValueTransformationSequence = [values]
    return group


# ---- DICOM -----------------------------------------------------------------------------------------


def test_real_ct_is_in_hounsfield_units(tmp_path):
    shutil.copy(DICOM_FILES / "CT_small.dcm", tmp_path / "slice")  # without its extension
    (item,) = listed(tmp_path).items
    content = pydicom.dcmread(DICOM_FILES / "CT_small.dcm")
    array = array_of(item)
    assert array.dtype == np.int32
    assert np.array_equal(array, content.pixel_array.astype(int) - 1024)
    assert item.key == "slice"


@pytest.mark.parametrize(
    "name",
    [
        "MR_small.dcm",
        "MR_small_RLE.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_implicit.dcm",
        "MR_small_jp2klossless.dcm",
    ],
)
def test_transfer_syntaxes_give_the_same_numbers(name):
    (item,) = listed(DICOM_FILES / name).items
    (plain,) = listed(DICOM_FILES / "MR_small_expb.dcm").items
    assert array_of(item).dtype == np.int16
    assert np.array_equal(array_of(item), array_of(plain))
    assert item.group == plain.group


def test_colours_become_rgb():
    palette = array_of(listed(DICOM_FILES / "examples_palette.dcm").items[0])
    assert palette.ndim == 3
    assert palette.shape[2] == 3
    direct = array_of(listed(DICOM_FILES / "SC_rgb_rle.dcm").items[0])
    shared = array_of(listed(DICOM_FILES / "SC_ybr_full_422_uncompressed.dcm").items[0])
    assert direct.shape == shared.shape == (100, 100, 3)
    assert direct.dtype == shared.dtype == np.uint8
    red = array_of(listed(DICOM_FILES / "SC_rgb_jpeg_dcmtk.dcm").items[0])[5, 50].astype(int)
    assert np.abs(red - (255, 0, 0)).max() <= 2


def test_frames_are_pictures(tmp_path):
    stored = integers(4, 8, 9, dtype="int16")
    write_dicom(tmp_path / "a.dcm", stored)
    found = listed(tmp_path).items
    assert [item.key for item in found] == [f"a.dcm#frame-{n:04d}" for n in range(4)]
    assert all(np.array_equal(array_of(found[n]), stored[n]) for n in (3, 0, 2))


@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024), (2, 0), (0.25, 3.5), (1e-3, 0)])
def test_rescale_is_exact(tmp_path, slope, intercept):
    stored = integers(16, 16)
    write_dicom(tmp_path / "a.dcm", stored, RescaleSlope=slope, RescaleIntercept=intercept)
    array = array_of(listed(tmp_path).items[0])
    expected = stored * float(slope) + intercept
    whole = float(slope).is_integer() and float(intercept).is_integer()
    assert array.dtype == (np.int32 if whole else np.float32)
    assert np.array_equal(array, expected.astype(array.dtype))


def test_enhanced_files_rescale_each_frame(tmp_path):
    stored = integers(3, 8, 8, dtype="int16")
    groups = [transformation(number + 1, -5) for number in range(3)]
    write_dicom(tmp_path / "a.dcm", stored, PerFrameFunctionalGroupsSequence=groups)
    write_dicom(tmp_path / "b.dcm", stored, SharedFunctionalGroupsSequence=[transformation(7, 1)])
    found = listed(tmp_path).items
    for number in range(3):
        expected = stored[number].astype(int) * (number + 1) - 5
        assert np.array_equal(array_of(found[number]), expected)
        assert np.array_equal(array_of(found[3 + number]), stored[number].astype(int) * 7 + 1)


@pytest.mark.parametrize(("dtype", "bits", "total"), [("uint16", 12, 4095), ("int16", 16, -1)])
def test_monochrome1_is_turned_round(tmp_path, dtype, bits, total):
    stored = integers(8, 8, dtype=dtype) & (4095 if bits == 12 else -1)
    stored = stored.astype(dtype)
    tags = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": bits, "HighBit": bits - 1}
    write_dicom(tmp_path / "a.dcm", stored, **tags)
    write_dicom(tmp_path / "b.dcm", stored, RescaleSlope=2, RescaleIntercept=-7, **tags)
    plain, scaled = (array_of(item) for item in listed(tmp_path).items)
    assert np.array_equal(plain.astype(int), total - stored.astype(int))
    assert plain.dtype == dtype
    assert np.array_equal(scaled, 2 * (total - stored.astype(int)) - 7)


def test_a_patient_is_a_hash_and_nothing_else_leaves_the_file(tmp_path):
    for number in range(3):
        write_dicom(tmp_path / f"{number}.dcm", integers(8, 8))
    write_dicom(tmp_path / "3.dcm", integers(8, 8), PatientID="", StudyInstanceUID="1.2.3")
    source = listed(tmp_path)
    patient = hashlib.sha256(b"secret-4711").hexdigest()[:16]
    study = hashlib.sha256(b"1.2.3").hexdigest()[:16]
    assert [item.group for item in source.items] == [patient] * 3 + [study]
    assert [problem.kind for problem in source.problems] == ["no patient ID"]
    everything = repr(source) + "".join(repr(item.picture.read()) for item in source.items)
    for secret in ("secret", "4711", "Mustermann", "Erika", "1.2.3"):
        assert secret not in everything
    for share in (0.2, 0.5, 0.8):
        held = [item.group for item in source.items]
        try:
            parts = split(source.items, share)
        except DataError:
            continue
        held = {item.group for item in parts.held_back}
        assert not held & {item.group for item in parts.training}


def test_what_is_no_picture_is_passed_over(tmp_path):
    for name in ("rtplan.dcm", "MR_small.dcm"):
        shutil.copy(DICOM_FILES / name, tmp_path)
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "README").write_text("x")
    (tmp_path / ".DS_Store").write_text("x")
    source = listed(tmp_path)
    assert [item.key for item in source.items] == ["MR_small.dcm"]
    assert {problem.severity for problem in source.problems} == {"warning"}
    assert sorted(problem.where for problem in source.problems) == [
        "DICOMDIR",
        "README",
        "rtplan.dcm",
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("MR_small_jpeg_ls_lossless.dcm", "JPEG-LS.* pip install .*pyjpegls"),
        ("SC_rgb_jpeg_gdcm.dcm", "JPEG Lossless.* pip install pylibjpeg pylibjpeg-libjpeg"),
        ("JPEG-lossy.dcm", "JPEG Extended.* pip install pylibjpeg pylibjpeg-libjpeg"),
        ("image_dfl.dcm", "deflated as a whole"),
        ("no_meta.dcm", "no DICOM file"),
        ("meta_missing_tsyntax.dcm", "no transfer syntax"),
    ],
)
def test_unusable_files_are_named(name, words):
    (problem,) = listed(DICOM_FILES / name, format="dicom").problems
    with pytest.raises(DataError, match=words):
        open_source(SourceConfig(data=str(DICOM_FILES / name), format="dicom"))
    assert problem.where.endswith(name)


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"Rows": 60000, "Columns": 60000}, "pixels; at most"),
        ({"Rows": 0}, "no pixels"),
        ({"NumberOfFrames": 2**30}, "is cut off"),
        ({"PhotometricInterpretation": "HSV"}, "colours 'HSV'"),
        ({"RescaleSlope": 0}, "slope 0"),
    ],
)
def test_impossible_headers_are_refused(tmp_path, tags, words):
    write_dicom(tmp_path / "a.dcm", integers(8, 8), **tags)
    source = listed(tmp_path)
    assert source.items == []
    assert words in source.problems[0].text


def test_truncated_pixels_are_named():
    (item,) = listed(DICOM_FILES / "MR_truncated.dcm").items
    assert "MR_truncated.dcm is a damaged DICOM file" in said_by(item)


def test_a_window_reaches_the_network_exactly(tmp_path):
    stored = integers(32, 32, dtype="uint16")
    write_dicom(tmp_path / "a.dcm", stored, RescaleSlope=1, RescaleIntercept=-1024)
    (item,) = open_source(SourceConfig(data=str(tmp_path))).items
    low, high = -160.0, 24000.0
    images = read_images([item], PreprocessingConfig(size=32, channels=1, range=(low, high)))
    expected = ((stored - 1024.0 - low) / (high - low) * 2 - 1).clip(-1, 1)
    assert images.dtype == torch.float32
    assert np.abs(images[0, 0].double().numpy() - expected).max() <= 2**-24
    assert (np.abs(expected) == 1).any()


# ---- NIfTI -----------------------------------------------------------------------------------------


def write_nifti(path, numbers, kind=nibabel.Nifti1Image):
    kind(numbers, np.eye(4)).to_filename(path)


RAS = integers(5, 6, 7, dtype="int16")
"""Right, anterior, superior."""


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR", "PIR", "LAI"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_slices_are_the_same_however_the_axes_lie(tmp_path, codes, name):
    axes, signs = [], []
    for code in codes:
        axes.append("RAS".find(code) if code in "RAS" else "LPI".find(code))
        signs.append(1 if code in "RAS" else -1)
    affine = np.eye(4)
    affine[:3, :3] = 0
    affine[axes, range(3)] = np.multiply(signs, (1, 2, 3))
    turned = nibabel.Nifti1Image(
        RAS.transpose(axes)[tuple(slice(None, None, n) for n in signs)], affine
    )
    assert "".join(nibabel.aff2axcodes(turned.affine)) == codes
    turned.to_filename(tmp_path / name)
    for axis, word, expected in (
        (0, "axis0", [RAS[n].T[::-1] for n in range(5)]),
        (1, "axis1", [RAS[:, n].T[::-1] for n in range(6)]),
        (2, "slice", [RAS[:, :, n].T[::-1] for n in range(7)]),
    ):
        found = listed(tmp_path, axis=axis).items
        assert [item.key for item in found] == [
            f"{name}#{word}-{n:03d}" for n in range(len(expected))
        ]
        for number in (2, 0, len(expected) - 1):
            assert np.array_equal(array_of(found[number]), expected[number])


@pytest.mark.parametrize("scale", [(1.0, 0.0), (2.0, -1000.0), (0.37, 1.25)])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_values_are_those_the_file_means(tmp_path, scale, name, kind):
    write_nifti(tmp_path / "a.nii", RAS, kind=kind)
    place, number_format = (112, "<f4") if kind is nibabel.Nifti1Image else (176, "<f8")
    slope, intercept = stated = np.array(scale, number_format)
    patched(tmp_path / "a.nii", place, stated.tobytes())
    if name == "a.nii.gz":
        (tmp_path / name).write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes()))
    expected = RAS * np.float64(slope) + np.float64(intercept)
    for index, item in enumerate(listed(tmp_path / name).items):
        array = array_of(item)
        assert array.dtype == {1.0: np.int16, 2.0: np.int32, 0.37: np.float32}[scale[0]]
        assert np.array_equal(array, expected[:, :, index].T[::-1].astype(array.dtype))


def test_stored_numbers_are_scaled_in_float64():
    stored = integers(8, 8, dtype="int16")
    assert slices.rescaled(stored, 1.0, 0.0) is stored
    exact = slices.rescaled(stored, 3.0, -2.0)
    assert exact.dtype == np.int32
    assert np.array_equal(exact, stored.astype(int) * 3 - 2)
    rounded = slices.rescaled(stored, 0.37, 1.25)
    assert np.array_equal(rounded, (stored * np.float64(0.37) + 1.25).astype(np.float32))
    huge = slices.rescaled(stored, 1e6, 0.0)
    assert huge.dtype == np.float32


def test_time_gives_slices_and_vectors_give_channels(tmp_path):
    over_time = integers(4, 5, 6, 3)
    write_nifti(tmp_path / "a.nii", over_time)
    vectors = integers(4, 5, 6, 1, 3)
    write_nifti(tmp_path / "b.nii.gz", vectors)
    coloured = integers(4, 5, 6, 3, dtype="uint8")
    rgb = np.ascontiguousarray(coloured).view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    write_nifti(tmp_path / "c.nii", rgb)
    write_nifti(tmp_path / "d.nii", over_time[:, :, 0, 0])
    found = {item.key: item for item in listed(tmp_path).items}
    assert len(found) == 6 * 3 + 6 + 6 + 1
    array = array_of(found["a.nii#slice-004-time-0002"])
    assert np.array_equal(array, over_time[:, :, 4, 2].T[::-1])
    assert np.array_equal(
        array_of(found["b.nii.gz#slice-004"]), vectors[:, :, 4, 0].swapaxes(0, 1)[::-1]
    )
    assert np.array_equal(
        array_of(found["c.nii#slice-004"]), coloured[:, :, 4].swapaxes(0, 1)[::-1]
    )
    assert np.array_equal(array_of(found["d.nii#slice-000"]), over_time[:, :, 0, 0].T[::-1])


def test_a_subject_is_a_group(tmp_path):
    for name in ("sub-01/anat/sub-01_T1w.nii", "sub-01/anat/T2w.nii", "p2/T1.nii", "p3/T1.nii"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_nifti(tmp_path / name, integers(4, 4, 1))
    groups = {item.key: item.group for item in listed(tmp_path).items}
    assert groups == {
        "p2/T1.nii#slice-000": "p2/T1",
        "p3/T1.nii#slice-000": "p3/T1",
        "sub-01/anat/T2w.nii#slice-000": "sub-01",
        "sub-01/anat/sub-01_T1w.nii#slice-000": "sub-01",
    }


def test_a_zipped_volume_is_inflated_once(tmp_path, monkeypatch):
    write_nifti(tmp_path / "a.nii.gz", integers(9, 9, 30))
    write_nifti(tmp_path / "b.nii.gz", integers(9, 9, 31))
    turns = []
    turned = nifti._turned
    monkeypatch.setattr(nifti, "_turned", lambda path: turns.append(path) or turned(path))
    monkeypatch.setattr(slices, "HELD_BYTES", 9 * 9 * 35 * 2)  # one volume, not two
    found = listed(tmp_path).items
    for item in found:
        item.picture.read()
    assert [Path(path).name for path in turns] == ["a.nii.gz", "b.nii.gz"]
    found[0].picture.read()
    assert len(turns) == 3


def test_real_volumes_agree_with_nibabel():
    for name in ("anatomical.nii", "functional.nii", "example_nifti2.nii.gz"):
        content = nibabel.as_closest_canonical(nibabel.load(NIFTI_FILES / name)).get_fdata()
        found = listed(NIFTI_FILES / name, axis=1).items
        content = content if content.ndim == 4 else content[..., None]
        assert len(found) == content.shape[1] * content.shape[3]
        for item in found[:: len(found) // 5]:
            index = int(item.key.partition("axis1-")[2][:3])
            time = int(item.key.partition("time-")[2] or 0)
            expected = content[:, index, :, time].T[::-1]
            assert np.array_equal(array_of(item), expected.astype(np.float32))


def patched(path, place, data):
    whole = bytearray(path.read_bytes())
    whole[place : place + len(data)] = data
    path.write_bytes(bytes(whole))


@pytest.mark.parametrize(
    ("place", "data", "words"),
    [
        (0, b"\0\0\0\0", "no NIfTI file"),
        (42, np.array([30000, 30000, 30000], "<i2").tobytes(), "at most|cut off"),
        (70, np.array([32], "<i2").tobytes(), "voxels of type|cut off"),
        (108, np.array([1e9], "<f4").tobytes(), "voxels begin"),
        (280, np.zeros(12, "<f4").tobytes(), "affine is singular"),
    ],
)
def test_impossible_volumes_are_refused(tmp_path, place, data, words):
    write_nifti(tmp_path / "a.nii", integers(6, 6, 6, dtype="int16"))
    patched(tmp_path / "a.nii", place, data)
    with pytest.raises(DataError, match=words):
        open_source(SourceConfig(data=str(tmp_path)))


def test_a_zipped_bomb_is_refused_by_its_header(tmp_path, monkeypatch):
    write_nifti(tmp_path / "a.nii.gz", np.zeros((40, 40, 40), np.int16))
    monkeypatch.setattr(nifti, "HELD_BYTES", 1000)
    with pytest.raises(DataError, match="gunzip it"):
        open_source(SourceConfig(data=str(tmp_path)))


def test_a_float_slice_reaches_the_network_exactly(tmp_path):
    numbers = (integers(32, 32, 3).astype(np.float32) / 7).astype(np.float32)
    write_nifti(tmp_path / "a.nii.gz", numbers)
    found = open_source(SourceConfig(data=str(tmp_path))).items
    low, high = -3.0, 9500.0
    images = read_images(found, PreprocessingConfig(size=32, channels=1, range=(low, high)))
    expected = (np.moveaxis(numbers, 2, 0).swapaxes(1, 2)[:, ::-1].astype(np.float64) - low) / (
        high - low
    ) * 2 - 1
    assert np.abs(images[:, 0].double().numpy() - expected).max() <= 2**-24


# ---- both ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["MR_small_RLE.dcm", "CT.dcm", "rtdose_rle_1frame.dcm", "a.nii", "a.nii.gz"]
)
def test_damage_never_crashes(tmp_path, name):
    """200 truncations and flips: each is listed or named, and reads or says why not."""
    draw = np.random.default_rng(0)
    path = tmp_path / name
    if name == "CT.dcm":
        write_dicom(path, integers(8, 8), RescaleSlope=1, RescaleIntercept=-1024)
    elif name.startswith("a.nii"):
        write_nifti(path, integers(6, 6, 6))
    else:
        shutil.copy(DICOM_FILES / name, path)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    head = min(len(whole), 3000)
    for number in range(200):
        damaged = whole.copy()
        if number % 2:
            damaged = damaged[: draw.integers(len(whole))]
        else:
            damaged[draw.integers(head, size=3)] ^= 1 << draw.integers(8, size=3).astype(np.uint8)
        slices.forget_all()
        path.write_bytes(damaged.tobytes())
        source = listed(path, format="nifti" if ".nii" in name else "dicom")
        answers = [said_by(item) for item in source.items]
        assert all(not answer or str(path) in answer for answer in answers)
        assert source.items or source.problems
        if number % 2 and ".nii" in name:
            assert source.problems or any(answers)


@pytest.mark.parametrize(("name", "package"), [("dicom", "pydicom"), ("nifti", "nibabel")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"{package}: pip install 'ldmkit\[medical\]'"):
        listed(tmp_path, format=name)


def test_the_format_is_told_by_what_lies_there(tmp_path):
    nested = tmp_path / "n" / "deep"
    nested.mkdir(parents=True)
    write_nifti(nested / "a.nii.gz", integers(4, 4, 2))
    (tmp_path / "n" / "participants.tsv").write_text("x")
    assert len(listed(tmp_path / "n").items) == 2
    np.save(nested / "beside.npy", integers(4, 4))
    assert [item.key for item in listed(tmp_path / "n").items] == ["deep/beside.npy"]


def test_missing_decoders_are_those_of_the_test():
    """Without them the tests above prove what is said; with them they would prove nothing."""
    from pydicom.pixels.decoders.base import get_decoder

    assert not get_decoder(JPEGLSLossless).is_available
