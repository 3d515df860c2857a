import io

import pytest

from conftest import draw_picture
from ldmkit.data.sources import open_source
from ldmkit.data_configs import SourceConfig
from ldmkit.errors import DataError


def png(number=0):
    buffer = io.BytesIO()
    draw_picture("circle", number).save(buffer, "PNG")
    return buffer.getvalue()


def test_class_folders_give_labels(pictures):
    source = open_source(SourceConfig(data=pictures))
    assert source.class_names == ("circle", "square")
    assert [item.label for item in source.items] == [0] * 6 + [1] * 6
    assert source.items[0].key == "circle/0.png"
    assert source.items[0].picture.read() == (pictures / "circle/0.png").read_bytes()


def test_a_flat_folder_has_no_classes_and_takes_captions(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.txt").write_text("a grüner circle\n", encoding="utf-8")
    (tmp_path / "notes.pdf").write_text("no picture")
    (tmp_path / ".hidden.png").write_text("no picture")
    source = open_source(SourceConfig(data=tmp_path))
    assert source.class_names == ()
    assert [(item.key, item.label, item.caption) for item in source.items] == [
        ("a.png", -1, "a grüner circle")
    ]
    assert [problem.where for problem in source.problems] == ["notes.pdf"]


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(DataError, match="there is no"):
        open_source(SourceConfig(data=tmp_path / "absent"))
    with pytest.raises(DataError, match="no pictures found"):
        open_source(SourceConfig(data=tmp_path))
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(DataError, match="not a whole tar"):
        open_source(SourceConfig(data=tmp_path / "text.txt"))
