"""Sources described by tables: metadata.*, parquet, COCO; label maps, keys, empty captions."""

import csv
import io
import json
import multiprocessing
import pickle  # noqa: TID251 - blobs travel to reading processes so
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import SIZE, draw_picture
from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.formats import parquet_cells
from ldmkit.data.items import Box
from ldmkit.data.pictures import decode_picture
from ldmkit.data.sources import open_source, scan_source
from ldmkit.data_configs import SourceConfig
from ldmkit.errors import DataError, UsageError


def png(number=0):
    buffer = io.BytesIO()
    draw_picture("circle", number).save(buffer, "PNG")
    return buffer.getvalue()


def scan(data, **settings):
    return scan_source(SourceConfig(data=data, **settings))


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def jsonl(folder, *lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    return put(folder / "metadata.jsonl", text + "\n")


def found(source, severity=None):
    """(kind, text) of all problems, or those of one severity."""
    return [
        (problem.kind, problem.text)
        for problem in source.problems
        if severity in (None, problem.severity)
    ]


# metadata


TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20)
NAME = st.text("abcäßλ0123 -_'#%", min_size=1, max_size=8).map(str.strip).filter(bool)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.dictionaries(NAME, st.tuples(TEXT, st.sampled_from(["cat", "dög", "3d"])), min_size=1),
    column=st.sampled_from(["text", "caption", "prompt"]),
)
def test_jsonl_round_trip(tmp_path_factory, rows, column):
    root = tmp_path_factory.mktemp("set")
    for name in rows:
        put(root / "train" / f"{name}.png", b"?")
    jsonl(
        root / "train",
        *({"file_name": f"{n}.png", column: c, "label": k} for n, (c, k) in rows.items()),
    )
    source = scan(root)
    assert found(source, "error") == []
    assert [(item.key, item.caption, source.class_names[item.label]) for item in source.items] == [
        (f"train/{name}.png", text.strip(), label) for name, (text, label) in rows.items()
    ]
    assert source.class_names == tuple(sorted({label for _, label in rows.values()}))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_all_kinds_of_table_say_the_same(tmp_path, kind):
    rows = [
        {"file_name": "b.png", "text": 'red, "round"', "label": 2},
        {"file_name": "sub/a.png", "text": "blue", "label": 0},
    ]
    for row in rows:
        put(tmp_path / row["file_name"], png())
    path = tmp_path / f"metadata.{kind}"
    if kind == "jsonl":
        jsonl(tmp_path, *rows)
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    source = open_source(SourceConfig(data=tmp_path))
    assert [(item.key, item.caption, item.label) for item in source.items] == [
        ("b.png", 'red, "round"', 2),
        ("sub/a.png", "blue", 0),
    ]
    assert source.class_names == ("0", "1", "2")
    assert source.problems == ()
    assert source.items[1].picture.read() == png()


def test_columns_can_be_named_and_tables_of_all_folders_share_classes(tmp_path):
    for split, label in (("train", "dog"), ("test", "cat")):
        put(tmp_path / split / "a.png", png())
        put(tmp_path / split / "a.mask.png", png())
        jsonl(tmp_path / split, {"image_file_name": "./a.png", "alt": split, "species": label})
    source = scan(tmp_path, caption_column="alt", label_column="species")
    assert [(item.key, item.caption, item.label) for item in source.items] == [
        ("test/a.png", "test", 0),
        ("train/a.png", "train", 1),
    ]
    assert all(item.mask is not None for item in source.items)
    assert source.problems == ()
    (fatal, _) = found(scan(tmp_path, caption_column="atl", label_column="species"), "fatal")
    assert fatal[1] == (
        f"{tmp_path}/test/metadata.jsonl has no column atl (--caption-column); "
        "its columns are image_file_name, alt, species"
    )


def test_planted_errors_are_named_with_their_line(tmp_path):
    for number in range(4):
        put(tmp_path / f"{number}.png", png())
    put(tmp_path / "inner" / "x.png", png())
    path = jsonl(
        tmp_path,
        {"file_name": "0.png", "text": "fine", "label": "cat"},
        {"file_nmae": "1.png", "text": "typo"},
        {"file_name": "2.png", "txet": "typo"},
        '{"file_name": "3.png",',
        {"file_name": "gone.png", "text": "no file"},
        {"file_name": "../0.png", "text": "leaves"},
        {"file_name": "/etc/0.png", "text": "leaves"},
        {"file_name": "0.png", "text": "again"},
        {"file_name": "1.png", "text": ["one", 2]},
        '["no object"]',
        '{"file_name": "2.png", "text": "\\ud800"}',
        {"file_name": "3.png", "text": "fine", "label": True},
        "",
        {"file_name": "2.png", "text": ""},
    )
    source = scan(tmp_path)
    assert [item.key for item in source.items] == ["0.png", "2.png"]
    valid = 'a valid line is {"file_name": "a.png", "text": "a red circle", "label": "circle"}'
    where = {problem.where: (problem.kind, problem.text) for problem in source.problems}

    def line(number):
        return where[f"{path}, line {number}"]

    assert line(2) == (
        "bad line",
        f"{path}, line 2 has no column file_name; did you mean file_name by file_nmae? {valid}",
    )
    assert line(3) == (
        "bad line",
        f"{path}, line 3 has no column text; did you mean text by txet? {valid}",
    )
    assert line(4)[1].startswith(f"{path}, line 4 is no JSON object (Expecting property name")
    assert line(4)[1].endswith(valid)
    assert line(5) == (
        "line without a picture",
        f"{path}, line 5: there is no {tmp_path}/gone.png; remove the line or add the file",
    )
    for number, name in ((6, "../0.png"), (7, "/etc/0.png")):
        assert line(number) == (
            "bad line",
            f"{path}, line {number}, column file_name: {name} leads out of the folder of the table; "
            "give the path relative to it, without ..",
        )
    assert line(8) == (
        "duplicate key",
        f"{path}, line 8: 0.png comes twice; keep one line for each picture",
    )
    assert line(9)[1] == f"{path}, line 9, column text: the caption 2 is no text"
    assert line(10)[1] == f"{path}, line 10 is no JSON object (it is a list); {valid}"
    assert "surrogates not allowed" in line(11)[1]
    assert line(12)[1] == f"{path}, line 12: the label True is none of the classes cat"
    assert where["2.png"] == ("empty caption", f"{path}, line 14: the caption of 2.png is empty")
    assert found(source, "warning")[-1] == (
        "picture without a line",
        f"{tmp_path}/inner/x.png stands in no table and is left out",
    )
    with pytest.raises(DataError, match="line 4 is no JSON object"):
        open_source(SourceConfig(data=tmp_path))


def test_a_csv_names_its_bad_lines(tmp_path):
    put(tmp_path / "a.png", png())
    path = put(
        tmp_path / "metadata.csv",
        b'\xef\xbb\xbffile_name,text\na.png,"two\nlines"\nb.png,red, round\nc.png,\xff\n',
    )
    source = scan(tmp_path)
    assert [(item.key, item.caption) for item in source.items] == [("a.png", "two\nlines")]
    assert found(source) == [
        (
            "bad line",
            f"{path}, line 4 has 3 fields and the first line 2; "
            'put text that holds commas in quotes, as in a.png,"red, round"',
        ),
        ("bad line", f"{path}, line 5 is not UTF-8; save it as UTF-8"),
    ]
    path.write_text('file_name,text\na.png,"never closed\n')
    assert found(scan(tmp_path), "fatal")[0][1].startswith(f"{path}, line 2 is no CSV (")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            {"filename": "a.png", "text": ""},
            "line 1 has no column file_name; did you mean filename?",
        ),
        ({"x": 1}, "line 1 has no column file_name; its columns are x; a valid line"),
        (
            {"a_file_name": "a.png", "b_file_name": "a.png"},
            "line 1 has no column file_name; it has a_file_name, b_file_name",
        ),
    ],
)
def test_a_table_without_file_names_is_fatal(tmp_path, line, text):
    put(tmp_path / "a.png", png())
    jsonl(tmp_path, line)
    (problem,) = found(scan(tmp_path), "fatal")
    assert text in problem[1]
    assert "--format folder" in problem[1]


def test_a_misspelt_caption_column_is_said(tmp_path):
    put(tmp_path / "a.png", png())
    jsonl(tmp_path, {"file_name": "a.png", "captoin": "red"})
    assert (
        "did you mean caption? Rename it, or give --caption-column captoin"
        in (found(scan(tmp_path))[0][1])
    )


def test_boxes_of_objects_become_shares(tmp_path):
    image = Image.new("RGB", (40, 20))
    exif = Image.Exif()
    exif[274] = 6  # shown as 20 x 40
    image.save(tmp_path / "a.jpg", exif=exif)
    put(tmp_path / "b.png", png())
    objects = {"bbox": [[5, 10, 10, 20], [0, 0, 20, 40]], "categories": ["tree", "dog"]}
    path = jsonl(
        tmp_path,
        {"file_name": "a.jpg", "objects": objects},
        {"file_name": "b.png", "objects": {"bbox": [[1, 1, 2, 2]], "categories": []}},
    )
    source = scan(tmp_path)
    assert source.box_names == ("dog", "tree")
    assert source.items[0].boxes == (Box(1, 0.25, 0.25, 0.75, 0.75), Box(0, 0, 0, 1, 1))
    assert found(source) == [
        (
            "bad line",
            f"{path}, line 2: objects does not list as many boxes as categories; "
            'a valid one is {"bbox": [[x, y, width, height]], "categories": [0]}',
        )
    ]


def test_two_tables_of_one_folder_are_refused(tmp_path):
    put(tmp_path / "a.png", png())
    jsonl(tmp_path, {"file_name": "a.png"})
    put(tmp_path / "metadata.csv", "file_name\na.png\n")
    assert "describe the same folder" in found(scan(tmp_path), "fatal")[0][1]
    with pytest.raises(DataError, match="give its folder"):
        scan(tmp_path / "metadata.csv")


# parquet


def write_parquet(path, count, *, group=3, names=None, first=0):
    pictures = [{"bytes": png(n), "path": f"{n}.png"} for n in range(first, first + count)]
    table = pa.table(
        {
            "image": pa.array(pictures, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "text": [f"number {n}" for n in range(first, first + count)],
            "label": [n % 2 for n in range(first, first + count)],
        }
    )
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    pq.write_table(table, path, row_group_size=group)
    return path


def test_parquet_is_random_access(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", 11, names=["even", "odd"])
    write_parquet(tmp_path / "train-1.parquet", 4, first=11, names=["even", "odd"])
    source = open_source(SourceConfig(data=tmp_path))
    assert source == open_source(SourceConfig(data=tmp_path / "train-{0..1}.parquet"))
    assert source.class_names == ("even", "odd")
    assert [item.label for item in source.items] == [n % 2 for n in range(15)]
    assert [item.caption for item in source.items] == [f"number {n}" for n in range(15)]
    assert source.items[10].key == "train-0.parquet/10"
    assert source.items[11].key == "train-1.parquet/0"
    assert len({item.key for item in source.items}) == 15
    for seed in range(5):
        order = random.Random(seed).sample(range(15), 15)
        blobs = pickle.loads(pickle.dumps([source.items[n].picture for n in order]))
        assert [blob.read() for blob in blobs] == [png(n) for n in order]
        assert decode_picture(
            blobs[0].read(), blobs[0].name, PreprocessingConfig(size=SIZE)
        ).shape == (3, 32, 32)


def test_parquet_cells_are_read_in_children_of_a_process_that_reads(tmp_path):
    source = open_source(SourceConfig(data=write_parquet(tmp_path / "a.parquet", 8)))
    assert source.items[0].picture.read() == png(0)
    cells = [item.picture for item in source.items[::-1]]
    with multiprocessing.get_context("fork").Pool(2) as pool:  # as reading processes are made
        assert pool.map_async(read_cell, cells).get(60) == [png(n) for n in range(7, -1, -1)]


def read_cell(cell):
    return cell.read()


def test_a_large_row_group_is_read_in_parts(tmp_path, monkeypatch):
    generator = random.Random(0)
    pictures = [generator.randbytes(1000) for _ in range(100)]
    pq.write_table(pa.table({"jpg": pictures}), tmp_path / "a.parquet", use_dictionary=False)
    monkeypatch.setattr(parquet_cells, "BATCH_BYTES", 5000)
    monkeypatch.setattr(parquet_cells, "GROUP_BYTES", 20000)
    items = open_source(SourceConfig(data=tmp_path / "a.parquet")).items
    for order in (range(100), range(99, 0, -7), generator.sample(range(100), 30)):
        for number in order:
            assert items[number].picture.read() == pictures[number]
            for group in parquet_cells._OPEN.values():
                assert sum(part.nbytes for part in group.kept.values()) <= 26000
    assert items[0].label == -1
    assert items[0].caption == ""
    assert len(parquet_cells._OPEN) <= parquet_cells.OPEN_GROUPS


def test_a_cell_of_a_changed_or_empty_file_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", 4)
    stale = open_source(SourceConfig(data=path)).items[0].picture
    pq.write_table(pa.table({"image": [b"x", None], "text": ["", "b"]}), path)
    parquet_cells._OPEN.clear()
    with pytest.raises(DataError, match="has changed since it was listed"):
        stale.read()
    source = scan(path)
    with pytest.raises(DataError, match=r"a.parquet, row 2, column image holds no picture"):
        source.items[1].picture.read()
    assert found(source) == [
        ("empty caption", f"{path}, row 1, column image: the caption is empty")
    ]


def test_every_truncation_of_a_parquet_file_is_found(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", 4)
    write_parquet(tmp_path / "b.parquet", 2)
    whole = path.read_bytes()
    for length in range(0, len(whole), 61):
        path.write_bytes(whole[:length])
        source = scan(tmp_path)
        assert [problem.severity for problem in source.problems] == ["fatal"]
        assert str(path) in source.problems[0].text
        assert len(source.items) == 2


def test_damaged_pages_are_an_error_of_the_picture(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", 4)
    items = open_source(SourceConfig(data=path)).items
    data = bytearray(path.read_bytes())
    data[4:300] = bytes(296)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet"):
        items[0].picture.read()


@pytest.mark.parametrize(
    ("table", "settings", "words"),
    [
        ({"text": ["a"]}, {}, "has no column of pictures"),
        ({"x": [b"a"], "y": [b"b"]}, {}, "has no column of pictures"),
        ({"png": [b"a"], "lable": [1]}, {"label_column": "label"}, "did you mean lable?"),
    ],
)
def test_parquet_without_the_columns_is_fatal(tmp_path, table, settings, words):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    ((_, text),) = found(scan(tmp_path, **settings), "fatal")
    assert words in text


def test_labels_that_are_no_class_are_errors_of_their_row(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"png": [b"a"] * 5, "label": ["cat", "dog", "7", None, "cat"]}), path)
    source = scan(path)
    assert (source.class_names, [item.label for item in source.items]) == (
        ("7", "cat", "dog"),
        [1, 2, 0, -1, 1],
    )
    pq.write_table(pa.table({"png": [b"a"] * 4, "label": [0, 10**12, -2, 3]}), path)
    source = scan(path)
    assert [item.label for item in source.items] == [0, 3]
    assert [text.partition(": ")[2] for _, text in found(source)] == [
        f"the label {label} is none of the classes 0, 1, 2, 3" for label in (10**12, -2)
    ]


def test_files_with_other_class_names_are_refused(tmp_path):
    write_parquet(tmp_path / "0.parquet", 2, names=["even", "odd"])
    write_parquet(tmp_path / "1.parquet", 2, names=["odd", "even"])
    ((_, text),) = found(scan(tmp_path), "fatal")
    assert text == f"{tmp_path}/1.parquet has other class names than the files before it"


# COCO


def coco(root, annotations, captions=None, **changes):
    for name in ("a.jpg", "b.jpg"):
        put(root / "val2017" / name, png())
    content = {
        "images": [
            {"id": 7, "file_name": "b.jpg", "width": 100, "height": 50},
            {"id": 3, "file_name": "a.jpg", "width": 10, "height": 10},
        ],
        "annotations": annotations,
        "categories": [{"id": 90, "name": "tooth brush"}, {"id": 2, "name": "bicycle"}],
    } | changes
    return put(root / "annotations" / "instances_val2017.json", json.dumps(content))


def box(bbox, **changes):
    return {"id": 1, "image_id": 7, "category_id": 90, "bbox": bbox, "iscrowd": 0} | changes


def test_coco_boxes_and_captions(tmp_path):
    path = coco(tmp_path, [box([10, 10, 50, 20]), box([0, 0, 100, 50], category_id=2)])
    notes = [
        {"id": 5, "image_id": 7, "caption": "A dog\n on a bike. "},
        {"id": 6, "image_id": 7, "caption": "Second"},
        {"id": 7, "image_id": 99, "caption": "of a picture of the captions file only"},
    ]
    captions = put(
        tmp_path / "captions.json",
        json.dumps({"images": [{"id": 7}, {"id": 99}], "annotations": notes}),
    )
    source = open_source(SourceConfig(data=path, captions=captions))
    assert source.box_names == ("bicycle", "tooth brush")
    first, second = source.items
    assert (first.key, first.caption) == ("b.jpg", "A dog on a bike.\nSecond")
    assert first.boxes == (Box(1, 0.1, 0.2, 0.6, 0.6), Box(0, 0, 0, 1, 1))
    assert (second.key, second.caption, second.boxes) == ("a.jpg", "", ())
    assert first.picture.read() == png()
    assert [kind for kind, _ in found(source)] == ["caption of another picture", "empty caption"]


@pytest.mark.parametrize(
    ("annotation", "kind", "severity", "text", "kept"),
    [
        (box([0, 0, 1, 1], iscrowd=1), "crowd box", "warning", "is a crowd", 0),
        (box([1, 1, 0, 5]), "degenerate box", "warning", "[1, 1, 0, 5] has no area", 0),
        (box([1, 1, -3, 5]), "degenerate box", "warning", "has no area", 0),
        (box([1, float("nan"), 3, 5]), "degenerate box", "warning", "[1, nan, 3, 5]", 0),
        (box([1, 1, float("inf"), 5]), "degenerate box", "warning", "has no area", 0),
        (
            box([90, 40, 20, 20]),
            "box clipped",
            "warning",
            "sticks out of the picture of 100 x 50",
            1,
        ),
        (box([-5, -5, 10, 10]), "box clipped", "warning", "is clipped", 1),
        (box([100, 10, 20, 20]), "box outside the picture", "warning", "lies outside", 0),
        (box([-30, 10, 20, 20]), "box outside the picture", "warning", "lies outside", 0),
        (box([1, 2, 3]), "bad box", "error", "[1, 2, 3] is no box [x, y, width, height]", 0),
        (box([1, 2, 3, "4"]), "bad box", "error", "is no box", 0),
        (box([1, 2, 3, 10**400]), "bad box", "error", "is no box", 0),
        (box(None), "bad box", "error", "None is no box", 0),
        (box([1, 2, 3, 4], image_id=1), "unknown image", "error", "is of image 1, which", 0),
        (box([1, 2, 3, 4], image_id=[7]), "unknown image", "error", "is of image [7]", 0),
        (box([1, 2, 3, 4], category_id=5), "unknown category", "error", "is of category 5", 0),
        ({"id": 1, "image_id": 7}, "empty annotation", "warning", "neither a bbox nor a", 0),
        ({"id": 1, "image_id": 7, "caption": 5}, "bad caption", "error", "5 is no text", 0),
        ("text", "bad annotation", "error", "is no object", 0),
    ],
)
def test_each_defect_of_a_coco_annotation(tmp_path, annotation, kind, severity, text, kept):
    path = coco(tmp_path, [annotation, box([1, 1, 2, 2], id=2)])
    source = scan(path)
    (problem,) = source.problems
    assert (problem.kind, problem.severity) == (kind, severity)
    assert problem.where == f"{path}, annotation 1"
    assert problem.text.startswith(problem.where)
    assert text in problem.text
    assert len(source.items[0].boxes) == kept + 1
    for _, x0, y0, x1, y1 in source.items[0].boxes:
        assert 0 <= x0 < x1 <= 1
        assert 0 <= y0 < y1 <= 1


def test_boxes_that_touch_the_edge_are_no_false_alarm(tmp_path):
    path = coco(tmp_path, [box([0, 0, 100.004, 50]), box([99.5, 49.5, 0.5, 0.5])])
    assert scan(path).problems == ()


def test_defects_of_coco_images(tmp_path):
    images = [
        {"id": 1, "file_name": "a.jpg"},
        {"id": 2, "file_name": "gone.jpg"},
        {"id": 3, "file_name": "../a.jpg"},
        {"id": 1, "file_name": "b.jpg"},
        {"id": 5, "file_name": "a.jpg"},
        {"id": 6},
        {"id": 7, "file_name": "a\0.jpg"},
        "text",
    ]
    path = coco(tmp_path, [box([8, 8, 16, 16], image_id=1)], images=images)
    source = scan(path)
    assert [item.key for item in source.items] == ["a.jpg"]
    assert source.items[0].boxes == (Box(1, 0.25, 0.25, 0.75, 0.75),)  # sizes read from the picture
    assert [(problem.kind, problem.where.partition(", ")[2]) for problem in source.problems] == [
        ("bad image entry", "entry 3 of images"),
        ("bad image entry", "entry 4 of images"),
        ("bad image entry", "entry 6 of images"),
        ("bad image entry", "entry 7 of images"),
        ("bad image entry", "entry 8 of images"),
        ("image without a file", "image 2"),
        ("duplicate key", "image 5"),
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[" * 100000, "is not JSON"),
        ("[]", "is a JSON list, no object"),
        ('{"images": []}', r"lacks the list 'annotations' \(it has images\)"),
        ('{"annotations": [], "info": 1}', "lacks the list 'images'"),
        ('{"images": [], "annotations": [], "categories": 3}', "'categories' is no list"),
        ('{"images": [{"id": 1, "file_name": "x.jpg"}], "annotations": []}', "--images DIR"),
    ],
)
def test_what_is_no_coco_file_says_why(tmp_path, content, words):
    path = put(tmp_path / "x.json", content)
    with pytest.raises(DataError, match=words):
        scan(path)


def test_the_folder_of_coco_pictures_can_be_given(tmp_path):
    path = coco(tmp_path, [])
    (tmp_path / "val2017").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"are not in .*annotations.*val2017.*images"):
        scan(path)
    assert len(scan(path, images=tmp_path / "elsewhere").items) == 2


# every format


def test_label_maps_are_found_by_the_relative_name(tmp_path):
    data, maps = tmp_path / "data", tmp_path / "maps"
    for name in ("x/a.png", "x/b.png", "y/a.png"):
        put(data / name, png())
    put(maps / "x/a.png", png(1))
    np.save(maps / "x/b.npy", np.zeros((2, 2), np.uint8))
    put(maps / "z.png", png())
    source = scan(data, labelmaps=maps)
    assert [item.key for item in source.items] == ["x/a.png", "x/b.png"]
    first, second = (item.labelmap for item in source.items)
    assert first is not None
    assert second is not None
    assert first.read() == png(1)
    assert second.name == f"{maps}/x/b.npy"
    assert found(source, "error") == [
        (
            "missing label map",
            f"{data}/y/a.png has no label map: {maps}/y/a.png or .npy is needed",
        )
    ]
    assert found(source, "warning") == [
        ("label map without a picture", f"{maps}/z.png is the label map of no picture")
    ]
    put(maps / "x/b.png", png())
    assert found(scan(data, labelmaps=maps), "error")[0][0] == "two label maps"
    with pytest.raises(UsageError, match="put it beside that folder"):
        scan(tmp_path, labelmaps=maps)
    with pytest.raises(DataError, match="there is no folder"):
        scan(data, labelmaps=tmp_path / "absent")


def test_label_maps_of_described_pictures(tmp_path):
    put(tmp_path / "data/a.png", png())
    put(tmp_path / "maps/a.png", png(2))
    jsonl(tmp_path / "data", {"file_name": "a.png"})
    source = open_source(SourceConfig(data=tmp_path / "data", labelmaps=tmp_path / "maps"))
    assert source.items[0].labelmap is not None
    assert source.items[0].labelmap.read() == png(2)


def test_only_the_keys_of_a_file(tmp_path):
    for name in "abc":
        put(tmp_path / "data" / f"{name}.png", png())
    keys = put(tmp_path / "keys.txt", "c.png\r\n\r\na.png\r\nc.png\r\n")
    source = open_source(SourceConfig(data=tmp_path / "data", keys=keys))
    assert [item.key for item in source.items] == ["a.png", "c.png"]
    assert source.problems == ()
    keys.write_text("a.png\nd.png\n\ne.png\n")
    with pytest.raises(DataError) as error:
        open_source(SourceConfig(data=tmp_path / "data", keys=keys))
    assert str(error.value).startswith(
        f"{keys}, line 2: no picture has the key d.png; keys look like a.png (and 1 more;"
    )
    for data, words in ((b"\xff", "not UTF-8"), (b"\n \n", "holds no key")):
        keys.write_bytes(data)
        with pytest.raises(DataError, match=words):
            scan(tmp_path / "data", keys=keys)
    with pytest.raises(DataError, match="cannot read"):
        scan(tmp_path / "data", keys=tmp_path / "absent")


def test_empty_captions_are_a_warning_where_others_have_one(tmp_path):
    for name in "abc":
        put(tmp_path / f"{name}.png", png())
    assert scan(tmp_path).problems == ()
    put(tmp_path / "a.txt", " \n")
    assert found(scan(tmp_path)) == [("empty caption", f"{tmp_path}/a.txt is an empty caption")]
    put(tmp_path / "b.txt", "red")
    assert found(scan(tmp_path), "warning") == [
        ("empty caption", f"{tmp_path}/a.txt is an empty caption"),
        ("empty caption", f"{tmp_path}/c.png has no caption, and others have"),
    ]


@pytest.mark.parametrize("option", ["images", "captions", "caption_column", "label_column"])
def test_options_of_other_formats_are_refused(tmp_path, option):
    put(tmp_path / "a.png", png())
    name = option.replace("_", "-")
    with pytest.raises(UsageError, match=f"--{name} is for --format .*, and DATA is folder"):
        scan(tmp_path, **{option: "x"})
