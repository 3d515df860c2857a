"""What `decode` writes: formats, tars, provenance, sheets, parts of jobs; with a tiny random autoencoder."""

import io
import json
import sys
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset import tariterators

import ldmkit
from ldmkit.assembly import autoencoder_facts, build_autoencoder, load_autoencoder, save_autoencoder
from ldmkit.autoencoder_configs import AutoencoderConfig, PreprocessingConfig
from ldmkit.conditioning.mask import blended
from ldmkit.data.latents import text_columns
from ldmkit.data.pictures import decode_picture
from ldmkit.data.tar_members import tar_members
from ldmkit.decode_configs import DecodeConfig
from ldmkit.digests import file_digest
from ldmkit.errors import DataError, StorageError, UsageError
from ldmkit.facts import Depth, SampleFacts
from ldmkit.modelfile import save, write_message
from ldmkit.output import formats, writing
from ldmkit.output.contact_sheet import SIDE, contact_sheet, thumbnail
from ldmkit.output.formats import FORMATS, Note, encode_picture
from ldmkit.output.listing import Listing
from ldmkit.output.provenance import MAX_EXIF, as_text, provenance_of
from ldmkit.output.threads import in_order, read_ahead
from ldmkit.pixels import grid, to_pixels
from ldmkit.sample_blocks import share_of

PIXELS = 16
TINY = AutoencoderConfig(
    channels=8, multipliers=(1, 2), residual_blocks=1, norm_groups=2, middle_attention=False
)
MANNER = {"sampler": "ddim", "steps": 5, "guidance": 2.0, "eta": 0.0}


def autoencoder(path, channels=3, depth: Depth = "uint8", value_range=None):
    torch.manual_seed(0)
    preprocessing = PreprocessingConfig(size=PIXELS, channels=channels, range=value_range)
    model = build_autoencoder(TINY, preprocessing)
    save_autoencoder(path, model, preprocessing, {"steps": 0}, depth=depth)
    return path


def blocks(ae, count, *, size=None, first_seed=0, extra=None, changes=0.0) -> list[dict[str, Any]]:
    """Messages of sampled latents; classes take turns."""
    seeds = torch.arange(first_seed, first_seed + count)
    torch.manual_seed(1)
    latents = torch.randn(count, 4, PIXELS // 2, PIXELS // 2) + changes
    told = [json.dumps({"class": ("Cat", "Großer Hund")[n % 2]}) for n in range(count)]
    size = size or count
    found = []
    for first in range(0, count, size):
        rows = slice(first, first + size)
        facts = SampleFacts(
            fingerprint="",
            autoencoder=autoencoder_facts(ae).fingerprint,
            diffusion="d" * 64,
            total=count,
            first=first,
            manner=MANNER,
            versions={"ldmkit": "0"},
        )
        tensors = {"latents": latents[rows], "seed": seeds[rows]}
        tensors |= text_columns("told", told[rows])
        tensors |= {name: values[rows] for name, values in (extra or {}).items()}
        found.append(
            {
                "tensors": tensors,
                "kind": "samples",
                "config": {},
                "facts": facts.model_dump(mode="json"),
            }
        )
    return found


def sample_file(path, ae, count, **changes):
    [block] = blocks(ae, count, **changes)
    save(path, **block)
    return path


@pytest.fixture(scope="module")
def ae(tmp_path_factory) -> Path:
    return autoencoder(tmp_path_factory.mktemp("ae") / "ae.safetensors")


@pytest.fixture
def samples(tmp_path, ae) -> Path:
    return sample_file(tmp_path / "s.safetensors", ae, 7)


@pytest.fixture
def decode(ae, samples, tmp_path):
    def call(out="out", **settings) -> Path:
        given = {"samples": samples, "ae": ae, "out": tmp_path / out} | settings
        done = ldmkit.decode(DecodeConfig.model_validate(given))
        assert done is not None
        return done

    return call


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def images(seed=0, channels=3, side=12):
    torch.manual_seed(seed)
    return torch.rand(channels, side, side + 1) * 2.2 - 1.1


NOTE = Note('{"ldmkit": 1, "told": "Gro\\u00dfer"}', 90, "x")


HELD = [
    (name, channels)
    for name, format_ in FORMATS.items()
    for channels in ((1, 3) if format_.colours_only else (1, 2, 3, 4, 5))
    if name != "jpg"
]


@pytest.mark.parametrize(("name", "channels"), HELD)
def test_what_is_written_is_read_back(name, channels, tmp_path):
    image, units = images(channels=channels), (-100.0, 300.0)
    note = NOTE._replace(quality=100)  # WebP without loss
    data = encode_picture(image, name, units, note)
    declared = units if FORMATS[name].numbers == "float32" else None
    config = PreprocessingConfig(channels=channels, range=declared)
    found = decode_picture(data, "x", config)
    steps = {"uint8": 255, "uint16": 65535, "float32": 1e6}[FORMATS[name].numbers]
    clipped = image if FORMATS[name].numbers == "float32" else image.clamp(-1.0, 1.0)
    error = (found - clipped).abs().max()
    assert error <= 1.001 / steps
    if steps == 1e6:  # nothing is clipped in the file itself
        raw = np.load(io.BytesIO(data)) if name == "npy" else tiff_array(data)
        assert raw.max() > 300.0
    if FORMATS[name].carries_text:
        path = tmp_path / f"x.{FORMATS[name].suffix}"
        path.write_bytes(data)
        assert provenance_of(path) == {"ldmkit": 1, "told": "Großer"}
    assert encode_picture(image, name, units, note) == data


def tiff_array(data):
    import tifffile

    return tifffile.imread(io.BytesIO(data))


def test_jpeg_is_near_and_better_with_more_quality():
    smooth = torch.linspace(-1, 1, 32).expand(3, 32, 32)
    error = {}
    for quality in (10, 95):
        data = encode_picture(smooth, "jpg", (0.0, 1.0), NOTE._replace(quality=quality))
        found = decode_picture(data, "x", PreprocessingConfig())
        error[quality] = float((found - smooth).abs().mean())
    assert error[95] < 0.01 < error[10]
    grey = encode_picture(smooth[:1], "jpg", (0.0, 1.0), NOTE)
    with Image.open(io.BytesIO(grey)) as image:
        assert image.mode == "L"


def test_nan_is_mid_grey_where_numbers_are_whole():
    image = torch.full((1, 4, 4), torch.nan)
    found = decode_picture(
        encode_picture(image, "tiff16", (0.0, 1.0), NOTE), "x", PreprocessingConfig(channels=1)
    )
    assert found.abs().max() < 1e-4


def test_formats_that_do_not_fit_are_refused_by_name(tmp_path, ae, decode, monkeypatch):
    many = autoencoder_facts(autoencoder(tmp_path / "5", 5))
    deep = autoencoder_facts(autoencoder(tmp_path / "16", 3, "uint16"))
    units = autoencoder_facts(autoencoder(tmp_path / "f", 1, "float32", (0.0, 9.0)))
    for name in ("png", "jpg", "webp", "png16"):
        with pytest.raises(UsageError, match=f"--format {name} cannot hold 5 channels"):
            formats.choose_format(name, many)
    for name in ("jpg", "webp", "tiff"):
        with pytest.raises(
            UsageError, match=f"--format {name} has 8 bits.* on 16 bits; take png16"
        ):
            formats.choose_format(name, deep)
        with pytest.raises(UsageError, match="units of their own; take tiff32"):
            formats.choose_format(name, units)
    for name in ("tiff", "tiff16", "tiff32", "npy"):
        assert formats.choose_format(name, many) == name
    assert [formats.choose_format("auto", facts) for facts in (many, deep, units)] == [
        *("npy", "png16", "npy"),
    ]
    monkeypatch.setitem(sys.modules, "tifffile", None)
    assert formats.choose_format("tiff", autoencoder_facts(ae)) == "tiff"  # Pillow writes it
    with pytest.raises(UsageError, match=r"ldmkit\[scientific\]"):
        decode(format="tiff16")
    wide = torch.zeros(1, 1, 20_000)
    with pytest.raises(UsageError, match="webp cannot hold 20000 pixels"):
        encode_picture(wide, "webp", (0.0, 1.0), NOTE)
    with pytest.raises(DataError, match=r"provenance of x .* EXIF"):
        encode_picture(wide[:, :, :9], "jpg", (0.0, 1.0), NOTE._replace(text="x" * MAX_EXIF))


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "npy"])
def test_provenance_is_in_the_picture_and_in_the_list(name, ae, decode, run):
    out = decode(format=name)
    [picture] = out.glob("000003*")
    record = provenance_of(picture)
    assert record is not None
    assert record["seed"] == 3
    assert record["told"] == {"class": "Großer Hund"}
    assert record["diffusion"] == "d" * 64
    assert record["autoencoder"] == autoencoder_facts(ae).fingerprint
    assert record["manner"] == MANNER
    assert record["decoded"]["format"] == name
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 7
    own = {key: lines[3].pop(key) for key in ("file", "sha256", "crc32")}
    assert lines[3] == record
    assert own["file"] == picture.name
    assert own["sha256"] == file_digest(picture)
    done = run("inspect", picture, "--json")
    assert json.loads(done.stdout)["provenance"] == record


def test_no_provenance_leaves_pictures_and_directory_bare(decode, run):
    out = decode(provenance=False)
    assert {path.suffix for path in out.iterdir()} == {".png"}
    assert provenance_of(out / "000000-cat.png") is None
    done = run("inspect", out / "000000-cat.png")
    assert done.returncode == 3
    assert b"does not say what it was made of" in done.stderr
    (out / "000001-gro-er-hund.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    assert run("inspect", out / "000001-gro-er-hund.png").returncode == 3
    decode(out="both")
    decode(out="both", provenance=False)  # what the list said holds no longer
    assert not (out.parent / "both/samples.jsonl").exists()


def test_the_number_of_threads_and_batches_changes_no_byte(ae, decode, tmp_path):
    whole = contents(decode("1", writers=1, batch_size=1))
    assert contents(decode("5", writers=5, batch_size=4)) == whole
    stream = io.BytesIO()
    for block in blocks(ae, 7, size=3):
        write_message(stream, **block)
    stream.seek(0)
    config = DecodeConfig(ae=ae, out=tmp_path / "streamed")
    assert ldmkit.decode(config, stream) == tmp_path / "streamed"
    assert contents(tmp_path / "streamed") == whole


def test_parts_of_a_job_make_the_whole(decode):
    whole = contents(decode("whole"))
    for part in ("2/3", "3/3", "1/3"):
        decode("parts", jobs=part)
    names = {path.name for path in (decode("parts", jobs="1/3")).iterdir()}
    assert names - whole.keys() == {
        *(f"grid.{n}-of-3.png" for n in (1, 2, 3)),
        *(f"samples.{n}-of-3.jsonl" for n in (1, 2, 3)),
    }
    joined = contents(decode("parts", resume=True))
    assert {name: joined[name] for name in whole} == whole
    assert not [name for name in joined if name.endswith("jsonl") and name not in whole]
    assert [list(share_of(7, (n, 3))) for n in (1, 2, 3)] == [[0, 1], [2, 3], [4, 5, 6]]
    assert list(share_of(1, (1, 2))) == []


@pytest.mark.parametrize("name", ["png", "jpg", "npy", "tiff16"])
def test_a_job_that_was_stopped_resumes_and_ends_with_the_same_bytes(
    name, decode, tmp_path, monkeypatch
):
    whole = contents(decode("whole", format=name))
    written = writing.atomic_file
    count = 0

    def full(path):
        nonlocal count
        count += 1
        if count > 3:
            raise StorageError("the disk is full")
        return written(path)

    monkeypatch.setattr(writing, "atomic_file", full)
    with pytest.raises(StorageError):
        decode("half", format=name, writers=1)
    monkeypatch.setattr(writing, "atomic_file", written)
    half = contents(tmp_path / "half")
    pictures = [key for key in half if key.endswith(FORMATS[name].suffix)]
    assert len(pictures) == 3
    assert "samples.jsonl" not in half
    assert decoded_again(decode, monkeypatch, "half", format=name) == 4
    assert contents(tmp_path / "half") == whole
    assert decoded_again(decode, monkeypatch, "half", format=name) == 0
    assert contents(tmp_path / "half") == whole


def decoded_again(decode, monkeypatch, out, **settings):
    """How many pictures a resumed job decodes."""
    seen = []
    real = writing.encode_picture

    def counted(*arguments):
        seen.append(1)
        return real(*arguments)

    monkeypatch.setattr(writing, "encode_picture", counted)
    decode(out, resume=True, **settings)
    monkeypatch.setattr(writing, "encode_picture", real)
    return len(seen)


def test_resume_decodes_what_was_made_of_something_else(decode, ae, tmp_path, monkeypatch):
    out = decode("out")
    (out / "000000-cat.png").unlink()
    (out / "000002-cat.png").write_bytes((out / "000004-cat.png").read_bytes())  # another seed's
    (out / "000004-cat.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    assert decoded_again(decode, monkeypatch, "out") == 3
    assert contents(out) == contents(decode("whole"))
    assert decoded_again(decode, monkeypatch, "out", format="png16") == 7  # the same suffix
    other = sample_file(tmp_path / "other.safetensors", ae, 7, changes=0.5)
    assert decoded_again(decode, monkeypatch, "out", samples=other, format="png16") == 7
    for name in ("format", "quality"):
        decode("jpg", format="jpg", quality=80)
        changed = {"format": "jpg", "quality": 70} if name == "quality" else {"format": "webp"}
        assert decoded_again(decode, monkeypatch, "jpg", **changed) == 7


def test_the_list_follows_what_lies_in_the_directory(decode, ae, tmp_path):
    more = sample_file(tmp_path / "more.safetensors", ae, 2, first_seed=100)
    out = decode("out")
    decode("out", samples=more)

    def files():
        return [
            json.loads(line)["file"] for line in (out / "samples.jsonl").read_text().splitlines()
        ]

    assert len(files()) == 9
    assert files() == sorted(files())
    (out / files()[0]).unlink()
    decode("out", samples=more)
    assert len(files()) == 8
    (out / "samples.jsonl").write_text('{"file": "../x.png"}\n')
    with pytest.raises(DataError, match="line 1 is damaged, or not one that ldmkit wrote"):
        decode("out")


def test_a_cut_off_journal_costs_one_line(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("")
    (tmp_path / "samples.jsonl.part").write_text('{"file": "a", "seed": 1}\n{"file": "b", "se')
    with Listing(tmp_path) as listing:
        assert listing.record("a") == {"seed": 1}
        assert listing.record("b") is None
        listing.add("b", {"seed": 2}, "1" * 64)
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [1, 2]
    assert json.loads(lines[1])["sha256"] == "1" * 64
    assert not (tmp_path / "samples.jsonl.part").exists()
    with pytest.raises(RuntimeError), Listing(tmp_path) as listing:
        listing.forget("a")
        raise RuntimeError
    assert Listing(tmp_path).record("a") is None  # its picture may be either by now


def test_a_tar_is_a_web_dataset_with_the_same_bytes_always(decode, tmp_path, run, ae, samples):
    tar = decode(tar=tmp_path / "new/t.tar")
    assert tar == tmp_path / "new/t.tar"
    assert not (tmp_path / "out").exists()
    again = decode(tar=tmp_path / "2.tar", writers=3, batch_size=3)
    assert again.read_bytes() == tar.read_bytes()
    plain = contents(decode("plain"))
    with tarfile.open(tar) as file:
        members = file.getmembers()
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}
    with tar.open("rb") as file:
        assert sum(1 for _ in tar_members(file, "t")) == 14
    with tar.open("rb") as file:
        expanded = tariterators.tar_file_expander([{"stream": file, "url": "t"}])
        found = list(tariterators.group_by_keys(expanded))
    assert [json.loads(one["json"])["seed"] for one in found] == list(range(7))
    for one in found:
        assert plain[f"{one['__key__']}.png"] == one["png"]
    assert (tmp_path / "new/t.grid.png").read_bytes() == plain["grid.png"]
    done = run("decode", samples, "--ae", ae, "--tar", "-")
    assert done.returncode == 0, done.stderr
    assert done.stdout == tar.read_bytes()
    bare = decode(tar=tmp_path / "bare.tar", provenance=False)
    with tarfile.open(bare) as file:
        assert all(name.endswith(".png") for name in file.getnames())


def test_a_tar_is_whole_or_absent(ae, tmp_path):
    stream = io.BytesIO()
    for block in blocks(ae, 6, size=2)[:2]:
        write_message(stream, **block)
    for tar in (tmp_path / "t.tar", Path("-")):
        stream.seek(0)
        output = io.BytesIO()
        with pytest.raises(DataError, match="ended after 4 of 6"):
            ldmkit.decode(DecodeConfig(ae=ae, tar=tar, out=tmp_path / "o"), stream, output)
        assert list(tmp_path.iterdir()) == []
    output.seek(0)
    with pytest.raises(DataError, match="cut off"):
        list(tar_members(output, "t"))
    with pytest.raises(UsageError, match="no stream"):
        ldmkit.decode(DecodeConfig(ae=ae, tar=Path("-")), stream)


def test_two_samples_of_one_name_are_refused(ae, tmp_path):
    [block] = blocks(ae, 3)
    block["tensors"]["seed"] = torch.tensor([1, 2, 1])
    save(tmp_path / "s", **block)
    with pytest.raises(DataError, match="two samples of the name 000001-cat"):
        ldmkit.decode(DecodeConfig(samples=tmp_path / "s", ae=ae, out=tmp_path / "out"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"jobs": "1/2", "samples": "-"}, "a pipe has no parts"),
        ({"jobs": "3/2"}, "I from 1 to N"),
        ({"resume": True, "tar": "x.tar"}, "leave out --tar"),
        ({"resume": True, "provenance": False}, "leave out --no-provenance"),
        ({"grid": "none", "labels": True}, "contact sheet"),
    ],
)
def test_what_does_not_go_together_is_said(settings, words):
    with pytest.raises(ValueError, match=words):
        DecodeConfig.model_validate({"samples": "s"} | settings)


def thumbnails(count, side=20, channels=3):
    names = [f"{n:06d}-a-name-of-more-than-one-line" for n in range(count)]
    return [
        thumbnail(to_pixels(images(n, channels, side)[None])[0], names[n], "abc"[n % 3])
        for n in range(count)
    ]


def test_a_square_sheet_is_the_plain_grid():
    small = thumbnails(7)
    pixels = torch.stack([torch.from_numpy(one.pixels).movedim(2, 0) for one in small])
    assert torch.equal(contact_sheet(small), grid(pixels, 3))
    assert torch.equal(contact_sheet(small, columns=2), grid(pixels, 2))
    assert contact_sheet(thumbnails(2, channels=1)).shape[0] == 1


def test_classes_begin_rows_of_their_own_and_names_stand_below():
    small = thumbnails(7)  # 3 of a, 2 of b, 2 of c
    sheet = contact_sheet(small, by_group=True)
    assert sheet.shape == (3, 3 * 22 + 2, 3 * 23 + 2)

    def cell(row, place):
        top, left = 2 + 22 * row, 2 + 23 * place
        return sheet[:, top : top + 20, left : left + 21].movedim(0, 2).numpy()

    for number, (row, place) in enumerate([(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 2)]):
        assert np.array_equal(cell(row, place), small[number].pixels)
    assert (cell(1, 2) == 255).all()
    assert contact_sheet(small, by_group=True, columns=2).shape[1] == 4 * 22 + 2
    labelled = contact_sheet(small, labels=True)
    below = labelled[:, 2 + 20 : 2 + 20 + 24, 2:98]
    assert below.min() < 100 < 255 == below.max()
    other = contact_sheet([small[0]._replace(name="another"), *small[1:]], labels=True)
    assert not torch.equal(other[:, 22:46, 2:98], below)


def test_large_pictures_are_small_in_the_sheet():
    one = thumbnail(torch.full((3, 300, 1000), 9, dtype=torch.uint8), "x", "")
    assert one.pixels.shape == (77, SIDE, 3)
    assert (one.pixels == 9).all()
    assert one.pixels.base is None  # holds on to nothing larger


def test_sheets_by_option(decode):
    assert not (decode("none", grid="none") / "grid.png").exists()
    with Image.open(decode("rows", grid="by-class") / "grid.png") as image:
        assert image.size == (4 * 18 + 2, 2 * 18 + 2)
    with Image.open(decode("one", columns=1) / "grid.png") as image:
        assert image.size == (18 + 2, 7 * 18 + 2)


@pytest.mark.parametrize("feather", [0, 3])
def test_inpainted_pictures_keep_what_is_outside_of_the_hole(feather, ae, tmp_path):
    given = torch.randint(0, 256, (3, 3, PIXELS, PIXELS), dtype=torch.uint8)
    hole = torch.zeros(3, PIXELS, PIXELS, dtype=torch.uint8)
    hole[:, 4:9, 5:10] = 1
    extra = {"image": given, "hole": hole}
    filled = sample_file(tmp_path / "filled", ae, 3, extra=extra)
    plain = sample_file(tmp_path / "plain", ae, 3)
    settings = {"ae": ae, "format": "npy", "feather": feather}
    out = ldmkit.decode(DecodeConfig(samples=filled, out=tmp_path / "f", **settings))
    bare = ldmkit.decode(DecodeConfig(samples=plain, out=tmp_path / "p", ae=ae, format="npy"))
    assert out is not None
    assert bare is not None
    for row, path in enumerate(sorted(out.glob("*.npy"))):
        generated = torch.from_numpy(np.load(bare / path.name)).movedim(2, 0)[None] / 127.5 - 1.0
        picture = given[row : row + 1].float() / 127.5 - 1.0
        expected = blended(picture, generated, hole[row : row + 1] > 0, feather)
        found = torch.from_numpy(np.load(path)).movedim(2, 0)[None] / 127.5 - 1.0
        assert torch.allclose(found, expected, atol=1e-5)
        assert torch.allclose(
            found[..., : 4 - feather, :], picture[..., : 4 - feather, :], atol=1e-6
        )
    if feather:
        with pytest.raises(UsageError, match="carry no pictures with holes"):
            ldmkit.decode(DecodeConfig(samples=plain, out=tmp_path / "p", ae=ae, feather=1))


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"image": torch.zeros(2, 3, 16, 16, dtype=torch.uint8)}, "not both of image and hole"),
        (
            {"image": torch.zeros(2, 3, 16, 16), "hole": torch.zeros(2, 16, 16, dtype=torch.uint8)},
            "are to be uint8",
        ),
        (
            {
                "image": torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
                "hole": torch.zeros(2, 8, 8, dtype=torch.uint8),
            },
            "sample for the pictures' own size",
        ),
    ],
)
def test_columns_of_inpainting_that_do_not_fit_are_named(extra, words, ae, tmp_path):
    samples = sample_file(tmp_path / "s", ae, 2, extra=extra)
    with pytest.raises(DataError, match=words):
        ldmkit.decode(DecodeConfig(samples=samples, ae=ae, out=tmp_path / "out"))


def test_what_no_sample_was_told_is_refused(ae, tmp_path):
    for told in ("[1]", "{"):
        [block] = blocks(ae, 1)
        block["tensors"] |= text_columns("told", [told])
        save(tmp_path / "s", **block)
        with pytest.raises(DataError, match="what a sample was told"):
            ldmkit.decode(DecodeConfig(samples=tmp_path / "s", ae=ae, out=tmp_path / "out"))


def test_work_in_threads_keeps_the_order_and_bounds_what_waits():
    taken, gates = [], [threading.Event() for _ in range(20)]

    def items():
        for number in range(20):
            taken.append(number)
            if number >= 4:
                gates[number - 4].set()  # the oldest is done last of those that wait
            yield number
        for gate in gates:
            gate.set()

    def work(number):
        gates[number].wait()
        return number

    results = []
    for result in in_order(work, items(), threads=5, ahead=5):
        results.append(result)
        assert len(taken) - len(results) <= 5
    assert results == list(range(20))

    def fails(number):
        if number == 2:
            raise StorageError("full")

    with pytest.raises(StorageError):
        list(in_order(fails, iter(range(9)), threads=2, ahead=4))


def test_one_block_is_read_ahead_and_no_more():
    read = []

    def source():
        for number in range(5):
            read.append(number)
            yield number
        raise DataError("cut")

    found = []
    with pytest.raises(DataError, match="cut"):
        for number in read_ahead(source()):
            found.append(number)
            assert len(read) <= number + 2
    assert found == list(range(5))


def test_a_record_survives_any_text():
    text = as_text({"ldmkit": 1, "told": "日本 \udcff \x00"})
    assert text.isascii()
    assert json.loads(text)["told"] == "日本 \udcff \x00"


def test_pixels_are_those_of_the_autoencoder(ae, decode, samples):
    out = decode(precision="fp32")
    [block] = blocks(ae, 7)
    model = load_autoencoder(ae)
    with torch.no_grad():
        expected = to_pixels(model.decode(block["tensors"]["latents"][2:4]))
    for row, name in enumerate(("000002-cat", "000003-gro-er-hund")):
        with Image.open(out / f"{name}.png") as image:
            assert (
                np.abs(np.asarray(image).astype(int) - expected[row].movedim(0, 2).numpy()).max()
                <= 1
            )
