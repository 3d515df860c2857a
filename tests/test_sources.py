import io
import json
import tarfile

import pytest

from conftest import draw_picture
from ldmkit.data.sources import open_source
from ldmkit.errors import DataError


def png(number=0):
    buffer = io.BytesIO()
    draw_picture("circle", number).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_class_folders_give_labels(pictures):
    source = open_source(pictures)
    assert source.class_names == ("circle", "square")
    assert [item.label for item in source.items] == [0] * 6 + [1] * 6
    assert source.items[0].key == "circle/0.png"
    assert source.items[0].read() == (pictures / "circle/0.png").read_bytes()


def test_a_flat_folder_has_no_classes_and_takes_captions(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.txt").write_text("a grüner circle\n", encoding="utf-8")
    (tmp_path / "notes.pdf").write_text("no picture")
    (tmp_path / ".hidden.png").write_text("no picture")
    source = open_source(tmp_path)
    assert source.class_names == ()
    assert [(item.key, item.label, item.caption) for item in source.items] == [
        ("a.png", -1, "a grüner circle")
    ]
    assert source.ignored == ["notes.pdf"]


def test_tars_are_random_access(tmp_path):
    facts = json.dumps({"label": 1, "caption": "two"}).encode()
    write_tar(tmp_path / "0.tar", [("one.png", png(1)), ("one.cls", b"0"), ("one.txt", b"first")])
    write_tar(
        tmp_path / "1.tar", [("sub/two.png", png(2)), ("sub/two.json", facts), ("x.bin", b"?")]
    )
    (tmp_path / "classes.json").write_text('["left", "right"]')
    for source in (open_source(tmp_path), open_source(tmp_path / "{0..1}.tar")):
        assert source.class_names == ("left", "right")
        one, two = source.items
        assert (one.key, one.label, one.caption, one.read()) == ("one", 0, "first", png(1))
        assert (two.key, two.label, two.caption, two.read()) == ("sub/two", 1, "two", png(2))


def test_without_class_names_labels_name_themselves(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", png()), ("a.cls", b"2")])
    assert open_source(tmp_path / "0.tar").class_names == ("0", "1", "2")


def test_every_truncation_of_a_tar_is_found(tmp_path):
    path = tmp_path / "0.tar"
    write_tar(
        path,
        [
            (f"{n}.{kind}", png(n) if kind == "png" else b"0")
            for n in range(4)
            for kind in ("png", "cls")
        ],
    )
    whole = path.read_bytes()
    content = len(whole.rstrip(b"\0"))
    complete = -(-content // 512) * 512 + 1024
    assert len(open_source(path).items) == 4
    for length in range(1, complete, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError):
            open_source(path)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.png", b"1"), ("a.json", b"{")], "JSON object"),
        ([("a.png", b"1"), ("a.json", b'{"label": "cat"}')], "whole-number label"),
        ([("a.png", b"1"), ("a.cls", b"cat")], "class index"),
        ([("a.png", b"1"), ("a.txt", b"\xff")], "not UTF-8"),
        ([("a.txt", b"1")], "no pictures"),
    ],
)
def test_bad_members_are_named(tmp_path, members, words):
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(DataError, match=words):
        open_source(tmp_path / "0.tar")


def test_a_key_that_comes_twice_is_refused(tmp_path):
    for name in ("0.tar", "1.tar"):
        write_tar(tmp_path / name, [("a.png", png())])
    with pytest.raises(DataError, match="comes twice"):
        open_source(tmp_path)


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(DataError, match="there is no"):
        open_source(tmp_path / "absent")
    with pytest.raises(DataError, match="no pictures found"):
        open_source(tmp_path)
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(DataError, match="not a whole tar"):
        open_source(tmp_path / "text.txt")


def test_a_class_list_that_is_too_short_is_refused(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", png()), ("a.cls", b"2")])
    (tmp_path / "classes.json").write_text('["only"]')
    with pytest.raises(DataError, match="at least 3 class names"):
        open_source(tmp_path)
