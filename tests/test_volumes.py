"""NumPy archives and TIFF stacks as sources."""

import io
import multiprocessing
import zipfile

import numpy as np
import pytest
import tifffile
import torch

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data import arrays, items
from ldmkit.data.formats import npz, slices
from ldmkit.data.images import read_images
from ldmkit.data.sources import open_source, scan_source
from ldmkit.data_configs import SourceConfig
from ldmkit.errors import DataError


def integers(*shape, dtype="uint16"):
    limits = np.iinfo(dtype)
    return np.random.default_rng(sum(shape)).integers(
        limits.min, limits.max, shape, dtype=dtype, endpoint=True
    )


def array_of(item):
    return np.load(io.BytesIO(item.picture.read()), allow_pickle=False)


def listed(path, name="auto"):
    return scan_source(SourceConfig.model_validate({"data": path, "format": name}))


def said_by(item):
    """What is said of an item that cannot be read; "" if it can."""
    try:
        array_of(item)
    except DataError as error:
        return str(error)
    return ""


def kinds(source):
    return [(problem.kind, problem.severity) for problem in source.problems]


@pytest.fixture(autouse=True)
def _nothing_held():
    yield
    slices.forget_all()


# ---- npz ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    ("shape", "one"),
    [
        ((20, 24), (20, 24)),
        ((20, 24, 3), (20, 24, 3)),
        ((3, 20, 24), (3, 20, 24)),
        ((20, 24, 1), (20, 24)),
        ((1, 20, 24), (20, 24)),
    ],
)
def test_an_array_is_a_picture(tmp_path, save, shape, one):
    save(tmp_path / "a.npz", scan=integers(*shape))
    (item,) = listed(tmp_path).items
    assert item.key == "a.npz#scan"
    assert array_of(item).shape == one
    assert np.array_equal(array_of(item).reshape(shape), integers(*shape))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["uint8", ">u2", "int16", "float32"])
@pytest.mark.parametrize("shape", [(100, 28, 28), (5, 12, 10, 3), (5, 3, 12, 10), (5, 12, 10, 1)])
def test_an_array_with_one_more_axis_is_pictures(tmp_path, save, dtype, shape):
    numbers = integers(*shape, dtype="uint8").astype(dtype)
    save(tmp_path / "a.npz", numbers)
    found = listed(tmp_path / "a.npz").items
    assert [item.key for item in found] == [f"a.npz#arr_0-{n:06d}" for n in range(shape[0])]
    for number in (0, 3, shape[0] - 1, 1):
        array = array_of(found[number])
        assert array.dtype == np.dtype(dtype).newbyteorder("=")
        assert np.array_equal(array, numbers[number].squeeze())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_fortran_order_is_followed(tmp_path, save):
    one, many = integers(20, 24), integers(100, 20, 24)
    save(tmp_path / "a.npz", one=np.asfortranarray(one), many=np.asfortranarray(many))
    first, *others = listed(tmp_path / "a.npz").items
    assert np.array_equal(array_of(first), one)
    assert np.array_equal(array_of(others[41]), many[41])


def test_short_axes_count_pictures_where_labels_do(tmp_path):
    np.savez(tmp_path / "a.npz", images=integers(3, 8, 8), labels=np.array([2, 0, 1]))
    source = listed(tmp_path / "a.npz")
    assert [item.label for item in source.items] == [2, 0, 1]
    assert source.class_names == ("0", "1", "2")
    assert source.problems == ()


@pytest.mark.parametrize(
    "names",
    [("x_train", "y_train"), ("train_images", "train_labels"), ("arr_0", "arr_1"), ("x", "target")],
)
@pytest.mark.parametrize("column", [False, True])
def test_labels_are_found_by_name_and_length(tmp_path, names, column):
    labels = np.arange(40, dtype=np.uint8) % 7
    held = {"x_test": integers(40, 9, 9), "y_test": np.ones(40, int)}
    others = held if names[0].startswith("x_") else {}
    np.savez(
        tmp_path / "a.npz",
        **{names[0]: integers(40, 9, 9), names[1]: labels[:, None] if column else labels},
        **others,
    )
    source = listed(tmp_path / "a.npz")
    assert [item.label for item in source.items[:40]] == labels.tolist()
    assert [item.label for item in source.items[40:]] == [1] * (40 * bool(others))


def test_what_is_no_picture_is_said(tmp_path):
    np.savez(
        tmp_path / "a.npz",
        images=integers(40, 9, 9),
        ages=np.arange(40),
        features=np.zeros((40, 5)),
        fine_labels=np.zeros(40, int),
        coarse_labels=np.zeros(40, int),
    )
    source = listed(tmp_path / "a.npz")
    assert [item.label for item in source.items] == [-1] * 40
    assert [problem.where for problem in source.problems if problem.kind == "not a picture"] == [
        "a.npz/ages",
        "a.npz/features",
    ]
    assert ("unclear labels", "warning") in kinds(source)


def npy(array, **settings):
    buffer = io.BytesIO()
    np.save(buffer, array, **settings)
    return buffer.getvalue()


def declared(shape, dtype="|u1"):
    buffer = io.BytesIO()
    header = {"shape": shape, "fortran_order": False, "descr": dtype}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("member", "data", "words"),
    [
        ("a.npy", npy(np.array([[{}, 1]], object)), "Python objects"),
        ("a.npy", npy(np.zeros((4, 4), "U3")), "type <U3"),
        ("a.npy", npy(np.zeros((1, 2, 3, 4, 5))), "two, three or four axes"),
        ("a.npy", npy(np.zeros((0, 5))), "no pixels"),
        ("a.npy", declared((10**6, 10**6)), "does not hold the bytes"),
        ("a.npy", declared((-4, 4)), "negative"),
        ("a.npy", b"\x93NUMPY\x01\0", "damaged npz"),
        ("a.npy", b"no array", "damaged npz"),
        ("../a.npy", npy(np.zeros((4, 4))), "name it plainly"),
        ("/a.npy", npy(np.zeros((4, 4))), "name it plainly"),
    ],
)
def test_bad_members_are_named(tmp_path, member, data, words):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr(member, data)
        archive.writestr("good.npy", npy(integers(9, 9)))
    source = listed(tmp_path)
    assert [item.key for item in source.items] == ["a.npz#good"]
    (problem,) = source.problems
    assert words in problem.text
    assert problem.severity == "error"


def test_bombs_are_refused_by_their_headers(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "MAX_PIXELS", 1000)
    monkeypatch.setattr(npz, "HELD_BYTES", 5000)
    monkeypatch.setattr(npz, "MAX_BYTES", 20000)
    np.savez_compressed(tmp_path / "a.npz", large=np.zeros((50, 50)), tiny=np.zeros((600, 20, 20)))
    np.savez_compressed(tmp_path / "b.npz", many=np.zeros((20, 17, 17), np.uint8))
    np.savez(tmp_path / "c.npz", many=np.zeros((40, 17, 17), np.uint8))
    source = listed(tmp_path)
    assert {item.key.partition("#")[0] for item in source.items} == {"c.npz"}
    texts = [problem.text for problem in source.problems]
    assert ["inflates to" in text for text in texts] == [True, False, True]
    assert "50 x 50 pixels; at most 1,000" in texts[1]
    assert items.MAX_BYTES > npz.MAX_BYTES


def test_other_trouble_of_archives_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", npy(integers(9, 9)))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.npy", npy(integers(9, 9)))
    with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.npy", npy(integers(9, 9)))
    np.savez(tmp_path / "c.npz", images=integers(40, 9, 9), labels=np.full(40, -3))
    (tmp_path / "d.npz").write_bytes(b"no zip")
    (tmp_path / "gone.npz").symlink_to(tmp_path / "nowhere")
    source = listed(tmp_path, "npz")
    assert source.items == []
    texts = " ".join(problem.text for problem in source.problems)
    for words in ("more than once", "as NumPy does not", "from -3 to -3", "not a zip", "is gone"):
        assert words in texts


def test_a_deflated_array_is_inflated_once(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", integers(50, 20, 20))
    found = listed(tmp_path / "a.npz").items
    loads = []
    load = npz._load
    monkeypatch.setattr(npz, "_load", lambda array: loads.append(1) or load(array))
    for item in found:
        item.picture.read()
    assert len(loads) == 1


def test_a_stored_picture_is_read_alone(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", integers(50, 20, 20))
    found = listed(tmp_path / "a.npz").items
    read = []
    load = npz._load
    monkeypatch.setattr(npz, "_load", lambda array: read.append(array.nbytes) or load(array))
    found[30].picture.read()
    assert read == [20 * 20 * 2]


# ---- what is held --------------------------------------------------------------------------------


def test_what_is_held_is_bounded_and_closed(monkeypatch):
    monkeypatch.setattr(slices, "HELD_BYTES", 100)
    closed = []
    for name in ("a", "b", "a", "c"):
        with slices.borrowed((name,), lambda name=name: name, 40, closed.append) as thing:
            assert thing == name
    assert closed == ["b"]
    with slices.borrowed(("large",), lambda: "large", 1000, closed.append):
        assert closed == ["b", "a", "c"]


def _read_in_child(found, order, answers):
    answers.put([array_of(found[number]).sum() for number in order])


def test_a_forked_reader_opens_files_anew(tmp_path):
    numbers = integers(40, 32, 32)
    tifffile.imwrite(tmp_path / "a.tif", numbers, photometric="minisblack", metadata=None)
    found = listed(tmp_path / "a.tif").items
    array_of(found[0])  # held open before the fork
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    order = list(range(40))
    readers = [
        context.Process(target=_read_in_child, args=(found, order, answers)) for _ in range(2)
    ]
    for reader in readers:
        reader.start()
    sums = [answers.get(timeout=60) for _ in readers]
    for reader in readers:
        reader.join()
    assert sums == [[array.sum() for array in numbers]] * 2


# ---- TIFF stacks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"bigtiff": True}, {"byteorder": ">"}])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_pages_are_pictures(tmp_path, settings, compression, dtype):
    numbers = integers(5, 20, 24).astype(dtype)
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "a.tif"
    tifffile.imwrite(
        path, numbers, photometric="minisblack", compression=compression, metadata=None, **settings
    )
    source = listed(tmp_path, "stack")
    assert [item.key for item in source.items] == [f"sub/a.tif#page-{n:04d}" for n in range(5)]
    assert {item.group for item in source.items} == {"sub/a.tif"}
    for number in (4, 0, 2):
        array = array_of(source.items[number])
        assert array.dtype == dtype
        assert np.array_equal(array, numbers[number])


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_pages_keep_their_channels(tmp_path, planar):
    numbers = integers(3, 10, 12, 5)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for page in numbers:
            stored = np.moveaxis(page, 2, 0) if planar == "separate" else page
            file.write(stored, photometric="minisblack", planarconfig=planar, metadata=None)
    found = listed(tmp_path / "a.tif").items
    assert [np.array_equal(array_of(item), numbers[n]) for n, item in enumerate(found)] == [
        True
    ] * 3


def test_colours_of_pages_are_a_table(tmp_path):
    grey = integers(10, 12, dtype="uint8")
    palette = integers(3, 256)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(grey, photometric="palette", colormap=palette, metadata=None)
        file.write(grey, photometric="miniswhite", metadata=None)
        file.write(grey > 99, photometric="minisblack", metadata=None)
        file.write(grey, photometric="minisblack", subfiletype=1, metadata=None)
    source = listed(tmp_path / "a.tif")
    coloured, negative, bits = (array_of(item) for item in source.items)
    assert np.array_equal(coloured, np.moveaxis((palette >> 8)[:, grey], 0, 2))
    assert coloured.dtype == np.uint8
    assert np.array_equal(negative, 255 - grey)
    assert np.array_equal(bits, (grey > 99) * np.uint8(255))
    assert kinds(source) == [("not a picture", "warning")]


def test_unusable_pages_are_named(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(integers(10, 12), photometric="minisblack", metadata=None)
        file.write(integers(10, 12, 3), photometric="cielab", metadata=None)
    data = (tmp_path / "a.tif").read_bytes()
    tag = b"\x03\x01\x03\x00\x01\x00\x00\x00"  # Compression, one short
    lzw = data.replace(tag + b"\x01\0", tag + b"\x07\0", 1)
    assert lzw != data
    (tmp_path / "b.tif").write_bytes(lzw)
    tifffile.imwrite(tmp_path / "c.tif", integers(5, 10, 12), imagej=True)
    (tmp_path / "notes.md").write_text("x")
    source = listed(tmp_path, "stack")
    assert [item.key for item in source.items] == [
        "a.tif#page-0000",
        *(f"c.tif#page-{n:04d}" for n in range(5)),
    ]
    texts = " ".join(problem.text for problem in source.problems)
    for words in ("colours CIELAB", "JPEG, which needs another package", "passed over"):
        assert words in texts


def test_frames_behind_one_page_are_not_lost(tmp_path):
    settings = {"photometric": "minisblack", "shaped": True, "truncate": True}
    tifffile.imwrite(tmp_path / "a.tif", integers(4, 10, 12), **settings)
    source = listed(tmp_path / "a.tif")
    assert source.items == []
    assert "4 frames behind one page" in source.problems[0].text


def test_without_tifffile_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(DataError, match=r"ldmkit\[scientific\]"):
        listed(tmp_path, "stack")


# ---- both ------------------------------------------------------------------------------------------


def write_stack(path, numbers):
    with tifffile.TiffWriter(path) as file:
        for page in numbers:
            file.write(page, photometric="minisblack", metadata=None)


WRITERS = {
    "stored.npz": lambda path, numbers: np.savez(path, numbers[..., None]),
    "deflated.npz": lambda path, numbers: np.savez_compressed(path, numbers[..., None]),
    "stack.tif": write_stack,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_numbers_reach_the_network_exactly(tmp_path, name, dtype):
    numbers = integers(4, 32, 32).astype(dtype) / (1 if dtype == "uint16" else 7)
    numbers = numbers.astype(dtype)
    WRITERS[name](tmp_path / name, numbers)
    found = open_source(SourceConfig(data=str(tmp_path / name))).items
    low, high = -100.0, 70000.0
    config = PreprocessingConfig(size=32, channels=1, range=(low, high))
    expected = (numbers.astype(np.float64) - low) / (high - low) * 2 - 1
    images = read_images(found, config)
    assert images.dtype == torch.float32
    assert np.abs(images[:, 0].double().numpy() - expected).max() < 2**-23


@pytest.mark.parametrize("name", WRITERS)
def test_damage_never_crashes(tmp_path, name):
    """300 truncations and flips: each is listed or named, and reads or says why not."""
    draw = np.random.default_rng(0)
    path = tmp_path / name
    WRITERS[name](path, integers(3, 8, 8))
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for number in range(300):
        damaged = whole.copy()
        if number % 2:
            damaged = damaged[: draw.integers(len(whole))]
        else:
            damaged[draw.integers(len(whole), size=3)] ^= 1 << draw.integers(8, size=3).astype(
                np.uint8
            )
        slices.forget_all()
        path.write_bytes(damaged.tobytes())
        source = listed(path)
        answers = [said_by(item) for item in source.items]
        assert all(not answer or str(path) in answer for answer in answers)
        if number % 2:
            assert source.problems or any(answers)
        assert source.items or source.problems


def test_a_file_that_changes_is_noticed(tmp_path):
    for name, write in WRITERS.items():
        write(tmp_path / name, integers(4, 32, 32))
        item = listed(tmp_path / name).items[0]
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b"0")
        with pytest.raises(DataError, match="has changed"):
            item.picture.read()
        (tmp_path / name).unlink()
        with pytest.raises(DataError, match="cannot read"):
            item.picture.read()


def test_a_folder_without_such_files_is_said(tmp_path):
    for name in ("npz", "stack"):
        with pytest.raises(DataError, match="there is no"):
            open_source(SourceConfig.model_validate({"data": tmp_path, "format": name}))
        with pytest.raises(DataError, match="there is no"):
            listed(tmp_path / "absent", name)
