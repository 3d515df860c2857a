import gzip
import io
import json
import random
import tarfile
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import draw_picture
from ldmkit.data.sources import open_source, scan_source
from ldmkit.data.tar_members import tar_members
from ldmkit.data_configs import SourceConfig
from ldmkit.errors import DataError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def png(number=0):
    buffer = io.BytesIO()
    draw_picture("circle", number).save(buffer, "PNG")
    return buffer.getvalue()


def tar_bytes(members, form="gnu"):
    """A tar of (name, bytes) or TarInfo."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[form]) as archive:
        for member in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member[0])
            data = b"" if isinstance(member, tarfile.TarInfo) else member[1]
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_tar(path, members, form="gnu"):
    path.write_bytes(tar_bytes(members, form))


def scan(path):
    return scan_source(SourceConfig(data=path))


def kinds(source):
    return [(problem.kind, problem.severity) for problem in source.problems]


def test_tars_are_random_access(tmp_path):
    facts = json.dumps({"label": 1, "caption": "two"}).encode()
    write_tar(tmp_path / "0.tar", [("one.png", png(1)), ("one.cls", b"0"), ("one.txt", b"first")])
    write_tar(
        tmp_path / "1.tar", [("sub/two.png", png(2)), ("sub/two.json", facts), ("x.bin", b"?")]
    )
    (tmp_path / "classes.json").write_text('["left", "right"]')
    for data in (tmp_path, tmp_path / "{0..1}.tar"):
        source = open_source(SourceConfig(data=data))
        assert source.class_names == ("left", "right")
        one, two = source.items
        assert (one.key, one.label, one.caption, one.picture.read()) == ("one", 0, "first", png(1))
        assert (two.key, two.label, two.caption) == ("sub/two", 1, "two")
        assert two.picture.read() == png(2)
        assert kinds(source) == [("no picture", "warning")]


def test_what_img2dataset_writes_is_read(tmp_path):
    """Null captions and fields, no label, statistics and a table beside the tar."""
    facts = {
        "caption": None,
        "url": "https://example.org/1.jpg",
        "key": "000000000",
        "status": "success",
        "error_message": None,
        "width": 32,
        "height": 32,
        "exif": "{}",
        "sha256": "0" * 64,
    }
    members = [("000000000.jpg", png()), ("000000000.txt", b"")]
    members += [("000000000.json", json.dumps(facts).encode()), ("000000001.webp", png(1))]
    members += [("000000001.json", json.dumps(facts | {"caption": "a circle"}).encode())]
    write_tar(tmp_path / "00000.tar", members)
    (tmp_path / "00000_stats.json").write_text('{"count": 2}')
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    source = scan(tmp_path)
    assert [problem.kind for problem in source.problems] == ["empty caption"]
    assert [(item.key, item.label, item.caption) for item in source.items] == [
        ("000000000", -1, ""),
        ("000000001", -1, "a circle"),
    ]
    assert source.class_names == ()


def test_masks_and_label_maps_belong_to_their_picture(tmp_path):
    names = ("a.mask.png", "a.png", "a.labelmap.png", "a.npy")
    write_tar(tmp_path / "0.tar", [(name, name.encode()) for name in names])
    source = scan(tmp_path / "0.tar")
    (item,) = source.items
    assert item.mask is not None
    assert item.labelmap is not None
    assert item.picture.read() == b"a.png"
    assert item.mask.read() == b"a.mask.png"
    assert item.labelmap.read() == b"a.labelmap.png"
    assert source.problems == ()


@pytest.mark.parametrize(
    ("label", "expected"),
    [(None, -1), (3, 3), (3.0, 3), ("3", 3), (float("nan"), -1)],
)
def test_labels_that_are_there_or_not(tmp_path, label, expected):
    facts = json.dumps({"label": label, "caption": ["one", "two\nlines"]}).encode()
    write_tar(tmp_path / "0.tar", [("a.png", png()), ("a.json", facts)])
    source = scan(tmp_path / "0.tar")
    assert [(item.label, item.caption) for item in source.items] == [(expected, "one\ntwo lines")]
    assert source.problems == ()
    assert len(source.class_names) == expected + 1


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.png", b"1"), ("a.json", b"{")], "JSON object"),
        ([("a.png", b"1"), ("a.json", b"[" * 100_000)], "JSON object"),
        ([("a.png", b"1"), ("a.json", b"[1]")], "JSON object"),
        ([("a.png", b"1"), ("a.json", b'{"label": "cat"}')], "whole-number label"),
        ([("a.png", b"1"), ("a.json", b'{"label": 1.5}')], "whole-number label"),
        ([("a.png", b"1"), ("a.json", b'{"label": true}')], "whole-number label"),
        ([("a.png", b"1"), ("a.json", b'{"label": -2}')], "whole-number label"),
        ([("a.png", b"1"), ("a.json", b'{"label": 1e300}')], "whole-number label"),
        ([("a.png", b"1"), ("a.json", b'{"caption": 7}')], "no text"),
        ([("a.png", b"1"), ("a.cls", b"cat")], "class index"),
        ([("a.png", b"1"), ("a.cls", "²".encode())], "class index"),
        ([("a.png", b"1"), ("a.cls", b"999999999")], "class index"),
        ([("a.png", b"1"), ("a.txt", b"\xff")], "not UTF-8"),
        ([("a.png", b"1"), ("a.txt", b"x" * (2 << 20))], "at most 1 MiB"),
        ([("a.txt", b"1")], "no pictures"),
    ],
)
def test_bad_members_are_named(tmp_path, members, words):
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(DataError, match=words):
        open_source(SourceConfig(data=tmp_path / "0.tar"))


def test_a_bad_sidecar_costs_its_picture_only(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", png()), ("a.json", b"{"), ("b.png", png())])
    source = scan(tmp_path / "0.tar")
    assert [item.key for item in source.items] == ["b"]
    assert kinds(source) == [("bad sidecar", "error")]


def test_without_class_names_labels_name_themselves(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", png()), ("a.cls", b"2")])
    assert open_source(SourceConfig(data=tmp_path / "0.tar")).class_names == ("0", "1", "2")


def test_a_class_list_that_is_too_short_is_refused(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", png()), ("a.cls", b"2")])
    (tmp_path / "classes.json").write_text('["only"]')
    with pytest.raises(DataError, match="at least 3 class names"):
        open_source(SourceConfig(data=tmp_path))


def test_a_key_that_comes_twice_is_refused(tmp_path):
    for name in ("0.tar", "1.tar"):
        write_tar(tmp_path / name, [("a.png", png())])
    with pytest.raises(DataError, match="comes twice"):
        open_source(SourceConfig(data=tmp_path))


@pytest.mark.parametrize("names", [("a.png", "a.png"), ("a.png", "./a.png"), ("a.png", "a.PNG")])
def test_a_member_that_comes_twice_is_named(tmp_path, names):
    write_tar(tmp_path / "0.tar", [(name, bytes([n])) for n, name in enumerate(names)])
    source = scan(tmp_path / "0.tar")
    assert [item.picture.read() for item in source.items] == [b"\0"]
    assert kinds(source) == [("duplicate key", "error")]


def test_two_pictures_of_one_key_and_dots_in_keys_are_said(tmp_path):
    members = [("a.png", b"1"), ("a.jpg", b"2"), ("b.v2.png", b"3"), (".png", b"4")]
    write_tar(tmp_path / "0.tar", members)
    source = scan(tmp_path / "0.tar")
    assert [(item.key, item.picture.read()) for item in source.items] == [("a", b"1")]
    assert kinds(source) == [
        ("not a picture", "warning"),
        ("several pictures for one key", "warning"),
        ("not a picture", "warning"),
        ("no picture", "warning"),
    ]


UNSAFE = ("../a.png", "b/../../a.png", "/a.png", "b\\a.png", "b/./a.png", "b//a.png", "x\na.png")


@pytest.mark.parametrize("name", [*UNSAFE, "x" * 252 + ".png", "\x1b[2J.png"])
@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_unsafe_names_are_left_out(tmp_path, name, form):
    write_tar(tmp_path / "0.tar", [("good.png", png()), (name, png())], form)
    source = scan(tmp_path / "0.tar")
    assert [item.key for item in source.items] == ["good"]
    assert kinds(source) == [("unsafe name", "error")]
    assert "\x1b" not in source.problems[0].text


def test_names_that_no_text_can_hold_are_left_out(tmp_path):
    """NUL in a PAX name, and bytes that are not UTF-8."""
    nul = tarfile.TarInfo("x.png")
    nul.pax_headers = {"path": "a\0b.png"}
    write_tar(tmp_path / "0.tar", [nul], "pax")
    odd = tar_bytes([("aXb.png", png())]).replace(b"aXb", b"a\xffb")
    checksum = sum(odd[:148]) + 8 * 32 + sum(odd[156:512])
    (tmp_path / "1.tar").write_bytes(odd[:148] + b"%06o\0 " % checksum + odd[156:])
    source = scan(tmp_path)
    assert source.items == []
    assert kinds(source) == [("unsafe name", "error")] * 2


names = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40
).filter(lambda name: name.strip("/") == name)


@given(st.lists(names, max_size=4))
@settings(max_examples=60)
def test_no_key_leads_out_of_a_directory(found):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0.tar"
        write_tar(path, [(f"{name}.png", b"1") for name in found], "pax")
        items = scan(path).items
    for item in items:
        parts = item.key.split("/")
        assert ".." not in parts
        assert "" not in parts
        assert "\\" not in item.key
        assert not any(ord(letter) < 32 for letter in item.key)


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_left_out(tmp_path, kind):
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = kind, "/etc/passwd"
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    write_tar(tmp_path / "0.tar", [folder, link, ("good.png", png())])
    source = scan(tmp_path / "0.tar")
    assert [item.key for item in source.items] == ["good"]
    assert kinds(source) == [("not a file in tar", "error")]


@given(
    st.lists(st.tuples(names, st.binary(max_size=1100)), max_size=5),
    st.sampled_from(sorted(FORMATS)),
)
def test_the_index_is_that_of_the_standard_library(members, form):
    if form == "ustar":
        members = [(name[:30], data) for name, data in members]
    whole = tar_bytes([(f"{name}.png", data) for name, data in members], form)
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive]
    found = list(tar_members(io.BytesIO(whole), "a.tar"))
    assert [(m.name.decode(), m.offset, m.size) for m in found] == expected
    assert [whole[m.offset : m.offset + m.size] for m in found] == [data for _, data in members]


def test_long_names_and_prefixes_are_those_of_the_standard_library():
    long = "d/" * 90 + "x" * 60
    for form in FORMATS:
        name = ("d" * 120 + "/" + "x" * 60) if form == "ustar" else long
        whole = tar_bytes([(name, b"1"), ("short", b"2")], form)
        assert [m.name.decode() for m in tar_members(io.BytesIO(whole), "")] == [name, "short"]


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_400_random_cuts_are_found(tmp_path, form):
    """Also on boundaries of members, in long names and in the end mark."""
    long = "" if form == "ustar" else "ü" * 90
    members = [
        (f"{long}{n}.{kind}", b"1" * size)
        for n in range(4)
        for kind, size in (("png", 900), ("cls", 1), ("txt", 512))
    ]
    members = [(name, b"0" if name.endswith("cls") else data) for name, data in members]
    whole = tar_bytes(members, form)
    content = max(m.offset + -(-m.size // 512) * 512 for m in tar_members(io.BytesIO(whole), ""))
    complete = content + 1024  # what follows are zeros that some writers add
    draw = random.Random(0)
    cuts = [draw.randrange(complete) for _ in range(400)]
    cuts += [*range(0, complete, 512), *range(content, complete, 7), complete - 1]
    path = tmp_path / "0.tar"
    path.write_bytes(whole)
    assert len(scan(path).items) == 4
    for cut in cuts:
        path.write_bytes(whole[:cut])
        source = scan(path)
        assert kinds(source) == [("damaged tar", "fatal")], cut
        assert source.items == []
    zeros = whole[:complete] + bytes(1024)
    for end, sound in ((0, True), (1, False), (511, False), (512, True), (1024, True)):
        path.write_bytes(zeros[: complete + end])
        assert (kinds(scan(path)) == []) == sound


def test_every_flipped_bit_of_a_header_is_found():
    whole = bytearray(tar_bytes([("a.png", b"1"), ("b.png", b"2"), ("c.png", b"3")]))
    for bit in range(8 * 512):
        whole[1024 + bit // 8] ^= 1 << bit % 8
        try:
            found = [member.name for member in tar_members(io.BytesIO(whole), "a.tar")]
        except DataError:
            found = []
        in_checksum = 148 <= bit // 8 < 156  # whose padding may read the same
        assert found == [] or (in_checksum and found == [b"a.png", b"b.png", b"c.png"])
        whole[1024 + bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda whole: whole + b"garbage" + bytes(505), "after its end mark"),
        (lambda whole: whole + whole, "list them one by one"),
        (lambda whole: whole[:1024] + bytes(512) + whole[1024:], "after its end mark"),
        (lambda whole: gzip.compress(whole), "is compressed"),
        (lambda whole: b"", "not a whole tar"),
        (lambda whole: b"text" * 1000, "not a whole tar"),
    ],
)
def test_damage_is_told_apart(tmp_path, change, words):
    (tmp_path / "0.tar").write_bytes(change(tar_bytes([("a.png", b"1"), ("b.png", b"2")])))
    with pytest.raises(DataError, match=words):
        open_source(SourceConfig(data=tmp_path / "0.tar"))


def test_one_damaged_tar_does_not_hide_another(tmp_path):
    whole = tar_bytes([("a.png", b"1")])
    (tmp_path / "0.tar").write_bytes(whole[:700])
    (tmp_path / "1.tar").write_bytes(whole[:900])
    (tmp_path / "2.tar").write_bytes(whole)
    source = scan(tmp_path)
    assert kinds(source) == [("damaged tar", "fatal")] * 2
    assert [item.key for item in source.items] == ["a"]


def test_a_compressed_tar_gets_a_sentence(tmp_path):
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(tar_bytes([("a.png", b"1")])))
    for data in (tmp_path, tmp_path / "0.tar.gz"):
        with pytest.raises(DataError, match="is compressed"):
            open_source(SourceConfig(data=data))


def _pax_bomb(data):
    header = bytearray(tar_bytes([("x", b"")])[:512])
    header[124:136] = b"%011o\0" % len(data)
    header[156:157] = b"x"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % 512)


@pytest.mark.parametrize(
    "data",
    [
        b"5 a=\n" * 200_000,
        b"9999999 path=x\n",
        b"7 path\n",
        b" path=x\n",
        b"-5 a=b\n",
        b"17 size=99999999\n",
        b"10 size=x\n",
        b"1 ",
    ],
)
def test_damaged_pax_headers_end_quickly(data):
    begun = time.monotonic()
    with pytest.raises(DataError):
        list(tar_members(io.BytesIO(_pax_bomb(data) + tar_bytes([("a", b"1")])), "a.tar"))
        raise DataError("sound") if data[:1] == b"5" else AssertionError
    assert time.monotonic() - begun < 2
