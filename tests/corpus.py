"""Data sets with one thing wrong or odd in each: `python tests/corpus.py DIR` writes them all.

Each case is eight clean pictures and what the case adds. The table at the foot says what has to be
found and how a command that reads the set has to end: 3 where a picture cannot be used, else 0.
"""

import io
import json
import os
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
from PIL import Image

SIDE = 32
CLEAN = 8
ROWS = 4 * SIDE  # of a picture that is cut in the middle of its pixels


class Case(NamedTuple):
    """One data set, and what has to be said of it."""

    name: str
    write: Callable[[Path], None]
    """Adds to a folder that holds the clean pictures."""
    kind: str
    """Of the finding of `check`."""
    severity: str
    """error or warning"""
    where: str
    """A part of the name that is found, and that the error of another command has to have."""
    exit_code: int = 0
    """Of encode and train-ae."""
    data: str = ""
    """DATA, relative to the folder; "" for the folder itself."""
    options: tuple[str, ...] = ()
    """Further options of every command."""
    grey: bool = False
    """Whether it is for a model of one channel and the range 0 to 255."""
    check_options: tuple[str, ...] = ()
    """Further options of check."""
    converted: bool = False
    """Whether reading changes the picture, which encode and train-ae have to count and name."""


def clean_picture(number: int, side: int = SIDE) -> Image.Image:
    """A smooth picture of many colours that looks like no other."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """The bytes of a picture file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_clean(root: Path) -> None:
    """Eight pictures that nothing is to be said about."""
    root.mkdir(parents=True)
    for number in range(CLEAN):
        clean_picture(number).save(root / f"{number}.png")


def write_case(case: Case, root: Path) -> Path:
    """Write the set of a case; returns DATA."""
    write_clean(root)
    case.write(root)
    return root / case.data


ODD = clean_picture(100)
GREY = ODD.convert("L")


def file(name: str, data: bytes) -> Callable[[Path], None]:
    """A case of one more file."""
    return lambda root: void((root / name).write_bytes(data))


def picture(name: str, image: Image.Image, kind: str = "PNG", **options) -> Callable[[Path], None]:
    """A case of one more picture."""
    return file(name, encoded(image, kind, **options))


def void(_: object) -> None:
    """Nothing, so that a lambda can write."""


def png_header(width: int, height: int) -> bytes:
    """A PNG file that says how large it is, and ends."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    length, checksum = struct.pack(">I", len(chunk) - 4), struct.pack(">I", zlib.crc32(chunk))
    end = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + length + chunk + checksum + end


def npy(array: np.ndarray) -> bytes:
    """The bytes of a NumPy file; object arrays as well, which nothing may unpickle."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def tar(root: Path, *extra: tuple[str, bytes]) -> Path:
    """The clean pictures as a tar, with more members; the loose files go."""
    with tarfile.open(root / "data.tar", "w") as archive:
        for path in sorted(root.glob("*.png")):
            add(archive, path.name, path.read_bytes())
            path.unlink()
        for name, data in extra:
            add(archive, name, data)
    return root / "data.tar"


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Put a member into a tar."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def float_tiff(root: Path) -> None:
    """Floating-point pictures, of which one has a hole; they take the place of the clean ones."""
    for path in root.glob("*.png"):
        values = np.asarray(Image.open(path).convert("L"), np.float32)
        tifffile.imwrite(path.with_suffix(".tif"), values)
        path.unlink()
    values = np.asarray(GREY, np.float32).copy()
    values[:4, :4] = np.nan
    tifffile.imwrite(root / "odd.tif", values)


def cut_tar(root: Path) -> None:
    """A tar without its second half."""
    path = tar(root)
    path.write_bytes(path.read_bytes()[: 3 * 512 + 100])


def captions(root: Path) -> None:
    """A caption for each clean picture."""
    for number in range(CLEAN):
        (root / f"{number}.txt").write_text(f"picture {number}")


def with_captions(name: str, data: bytes, caption: bytes | None) -> Callable[[Path], None]:
    """Captions for all, and one more picture with this one."""

    def write(root: Path) -> None:
        captions(root)
        (root / name).write_bytes(data)
        if caption is not None:
            (root / name).with_suffix(".txt").write_bytes(caption)

    return write


def class_folders(root: Path, *sizes: int) -> None:
    """The clean pictures in folders of these sizes."""
    paths = iter(sorted(root.glob("*.png")))
    for number, size in enumerate(sizes):
        (root / f"class{number}").mkdir()
        for _ in range(size):
            path = next(paths)
            path.rename(root / f"class{number}" / path.name)


def two_classes(root: Path) -> None:
    """Two pictures of one class, six of another."""
    class_folders(root, 6, 2)


def empty_class(root: Path) -> None:
    """A class folder of no pictures beside one of all."""
    class_folders(root, 8)
    (root / "empty").mkdir()


def held_back_leak(root: Path) -> None:
    """Copies of the clean pictures, of which --holdout keeps some out and not their originals."""
    for number in range(CLEAN):
        (root / f"copy{number}.png").write_bytes((root / f"{number}.png").read_bytes())


def animation() -> bytes:
    """Two frames."""
    return encoded(ODD, "GIF", save_all=True, append_images=[clean_picture(101)], duration=100)


def turned() -> bytes:
    """A JPEG that says it lies on its side."""
    exif = Image.Exif()
    exif[274] = 6
    return encoded(ODD, "JPEG", exif=exif, quality=95)


def coco(boxes: list[list[float]]) -> Callable[[Path], None]:
    """A COCO file on the clean pictures, with these boxes in the first one."""

    def write(root: Path) -> None:
        images = [
            {"id": number, "file_name": f"{number}.png", "width": SIDE, "height": SIDE}
            for number in range(CLEAN)
        ]
        annotations = [
            {"id": number, "image_id": 0, "category_id": 1, "bbox": box, "area": 1, "iscrowd": 0}
            for number, box in enumerate(boxes)
        ]
        categories = [{"id": 1, "name": "thing"}]
        document = {"images": images, "annotations": annotations, "categories": categories}
        (root / "instances.json").write_text(json.dumps(document))

    return write


def metadata(column: str, *lines: str) -> Callable[[Path], None]:
    """A metadata.jsonl on the clean pictures: their captions in this column, and these lines."""

    def write(root: Path) -> None:
        rows = [
            json.dumps({"file_name": f"{number}.png", column: f"picture {number}"})
            for number in range(CLEAN)
        ]
        (root / "metadata.jsonl").write_text("\n".join([*rows, *lines]) + "\n")

    return write


SMOOTH = clean_picture(100, ROWS)
HOLES = np.full((SIDE, SIDE, 3), np.nan, np.float32)
DEEP = (np.asarray(GREY).astype(np.uint16) * 257).copy()
TRANSPARENT = ODD.copy()
TRANSPARENT.putalpha(GREY)

CASES: tuple[Case, ...] = (
    Case("truncated-jpeg", file("odd.jpg", encoded(SMOOTH, "JPEG")[:-700]), "damaged picture", "error", "odd.jpg", 3),
    Case("truncated-png", file("odd.png", encoded(SMOOTH, "PNG")[:-700]), "damaged picture", "error", "odd.png", 3),
    Case("zero-bytes", file("odd.png", b""), "empty file", "error", "odd.png", 3),
    Case("text-named-png", file("odd.png", b"hello"), "not a picture", "error", "odd.png", 3),
    Case("huge-header", file("odd.png", png_header(50_000, 50_000)), "too many pixels", "error", "odd.png", 3),
    Case("16-bit-grey", picture("odd.png", Image.fromarray(DEEP)), "wrong channels", "error", "odd.png", 3),
    Case("1-bit", picture("odd.png", GREY.convert("1")), "1 bit widened to 8", "warning", "odd.png", converted=True),
    Case("grey", picture("odd.png", GREY), "grey shown as RGB", "warning", "odd.png", converted=True),
    Case("palette", picture("odd.png", ODD.convert("P", palette=Image.Palette.ADAPTIVE)), "palette turned into RGB", "warning", "odd.png", converted=True),
    Case("transparent-palette", picture("odd.png", ODD.convert("P", palette=Image.Palette.ADAPTIVE), transparency=0), "transparency laid over white", "warning", "odd.png", converted=True),
    Case("cmyk", picture("odd.jpg", ODD.convert("CMYK"), "JPEG"), "CMYK turned into RGB", "warning", "odd.jpg", converted=True),
    Case("alpha", picture("odd.png", TRANSPARENT), "transparency laid over white", "warning", "odd.png", converted=True),
    Case("animated", file("odd.gif", animation()), "first of several frames taken", "warning", "odd.gif", converted=True),
    Case("turned-by-exif", file("odd.jpg", turned()), "turned upright by EXIF", "warning", "odd.jpg", converted=True),
    Case("wrong-extension", picture("odd.jpg", ODD), "extension does not fit the content", "warning", "odd.jpg", converted=True),
    Case("small", picture("odd.png", ODD.resize((SIDE // 2, SIDE // 2))), "smaller than the target size, enlarged", "warning", "odd.png", converted=True),
    Case("constant", picture("odd.png", Image.new("RGB", (SIDE, SIDE), "teal")), "constant picture", "warning", "odd.png"),
    Case("truncated-tar", cut_tar, "damaged tar", "error", "data.tar", 3, data="data.tar"),
    Case("names-that-go-up", lambda root: void(tar(root, ("../odd.png", encoded(ODD, "PNG")))), "unsafe name", "error", "../odd.png", 3, data="data.tar"),
    Case("duplicate-keys", lambda root: void(tar(root, ("odd.png", encoded(ODD, "PNG")), ("odd.png", encoded(clean_picture(101), "PNG")))), "duplicate key", "error", "odd.png", 3, data="data.tar"),
    Case("bad-label-in-a-tar", lambda root: void(tar(root, ("odd.png", encoded(ODD, "PNG")), ("odd.cls", b"cat"))), "bad sidecar", "error", "odd", 3, data="data.tar"),
    Case("missing-caption", with_captions("odd.png", encoded(ODD, "PNG"), None), "empty caption", "warning", "odd.png"),
    Case("empty-caption", with_captions("odd.png", encoded(ODD, "PNG"), b"\n"), "empty caption", "warning", "odd.png"),
    Case("caption-not-utf-8", with_captions("odd.png", encoded(ODD, "PNG"), b"caf\xe9"), "bad caption", "error", "odd.", 3),
    Case("small-class", two_classes, "small class", "warning", "class1"),
    Case("empty-class", empty_class, "empty class folder", "warning", "empty"),
    Case("nan-in-a-tiff", float_tiff, "NaN or infinite pixels", "warning", "odd.tif", grey=True),
    Case("all-nan", file("odd.npy", npy(HOLES)), "no pixel counts", "error", "odd.npy", 3, check_options=("--range", "0,255")),
    Case("object-array", file("odd.npy", npy(np.array([[{}]], object))), "Python objects", "error", "odd.npy", 3),
    Case("float-without-range", file("odd.npy", npy(np.asarray(ODD, np.float32))), "no range declared", "error", "odd.npy", 3),
    Case("two-channels", file("odd.npy", npy(np.zeros((SIDE, SIDE, 2), np.uint8))), "wrong channels", "error", "odd.npy", 3),
    Case("no-permission", lambda root: void((picture("odd.png", ODD)(root), (root / "odd.png").chmod(0))), "cannot be read", "error", "odd.png", 3),
    Case("folder-named-like-a-picture", lambda root: (root / "odd.png").mkdir(), "folder named like a picture", "error", "odd.png", 3),
    Case("dangling-link", lambda root: (root / "odd.png").symlink_to("gone.png"), "dangling link", "error", "odd.png", 3),
    Case("link-loop", lambda root: (root / "odd.png").symlink_to("odd.png"), "link loop", "error", "odd.png", 3),
    Case("linked-folder", lambda root: (root / "again").symlink_to("."), "linked folder", "warning", "again"),
    Case("line-break-in-a-name", picture("o\ndd.png", ODD), "control character in a name", "warning", "o\ndd.png"),
    Case("name-not-utf-8", lambda root: void((root / os.fsdecode(b"odd\xff.png")).write_bytes(encoded(ODD, "PNG"))), "name is not UTF-8", "warning", "odd\\udcff.png"),
    Case("markup-in-a-name", picture("<script>.png", GREY), "grey shown as RGB", "warning", "<script>.png", converted=True),
    Case("not-a-picture-beside", file("notes.pdf", b"notes"), "not a picture", "warning", "notes.pdf"),
    Case("exact-duplicate", picture("odd.png", clean_picture(0)), "exact duplicate", "warning", "odd.png"),
    Case("same-pixels", picture("odd.png", clean_picture(0), compress_level=1), "same pixels", "warning", "odd.png"),
    Case("near-duplicate", picture("odd.jpg", clean_picture(0, ROWS), "JPEG", quality=90), "near duplicate", "warning", "odd.jpg"),
    Case("leak", held_back_leak, "leak: exact duplicate", "error", "copy", 0, check_options=("--holdout", "0.5")),
    Case("box-outside-the-picture", coco([[4, 4, 8, 8], [40, 40, 8, 8]]), "box outside the picture", "warning", "instances.json", data="instances.json", options=("--format", "coco")),
    Case("metadata-with-an-unknown-column", metadata("txet"), "unknown column", "warning", "metadata.jsonl", options=("--format", "metadata")),
    Case("metadata-with-a-broken-line", metadata("text", '{"file_name": "7.png", "text"'), "bad line", "error", "metadata.jsonl", 3, options=("--format", "metadata")),
)  # fmt: skip


def main() -> None:
    """Write every case to a folder of its own."""
    target = Path(sys.argv[1])
    for case in CASES:
        write_case(case, target / case.name)
        print(f"{case.name}: {case.severity}: {case.kind} ({case.where})")


if __name__ == "__main__":
    main()
