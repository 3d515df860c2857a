"""What `ldmkit check` and `ldmkit split` say of clean, odd and bad data, and what training does with it."""

import base64
import contextlib
import ctypes
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

import corpus
import ldmkit
from conftest import SIZE, ae_config
from corpus import CASES, Case, clean_picture, encoded, write_case, write_clean
from ldmkit import CheckConfig, SplitConfig
from ldmkit.autoencoder_configs import AutoencoderConfig, DiscriminatorConfig, PreprocessingConfig
from ldmkit.data import similarity
from ldmkit.data.images import split
from ldmkit.data.pictures import decode_picture
from ldmkit.data.sources import FORMATS, open_source
from ldmkit.data_configs import SourceConfig
from ldmkit.errors import DataError

CONVERSIONS_ARE_NAMED = True
"""Whether encode and train-ae count and name what reading changes: `KIND (COUNT): names`."""
DAC_OVERRIDE, DAC_READ_SEARCH = 1, 2  # capabilities(7): rights of root that permissions do not stop


def has_format(case: Case) -> bool:
    wanted = case.options[1] if "--format" in case.options else "folder"
    return wanted in FORMATS


RUNNABLE = [case for case in CASES if has_format(case)]


@contextlib.contextmanager
def permissions_count():
    """Let root be refused what permissions refuse, in this thread, as everyone else is."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    former, changed = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, former) == 0
    changed[:] = former[:]
    changed[0] = former[0] & ~(1 << DAC_OVERRIDE | 1 << DAC_READ_SEARCH)  # the effective ones
    assert libc.capset(header, changed) == 0
    try:
        yield
    finally:
        assert libc.capset(header, former) == 0


def tiny_ae(data, out, **changes):
    return ae_config(
        data,
        out,
        steps=1,
        batch_size=16,
        autoencoder=AutoencoderConfig(
            channels=4, multipliers=(1, 2), residual_blocks=1, norm_groups=1
        ),
        loss={"perceptual": "none"},
        disc=DiscriminatorConfig(weight=0, channels=8, layers=1),
        **changes,
    )


BOX = Path(__file__).parent.parent / "examples/data"
GREY = PreprocessingConfig(size=corpus.SIDE, channels=1, range=(0.0, 255.0))


class Autoencoders(NamedTuple):
    colour: Path
    grey: Path


@pytest.fixture(scope="session")
def autoencoders(tmp_path_factory) -> Autoencoders:
    root = tmp_path_factory.mktemp("autoencoders")
    write_clean(root / "data")
    colour = ldmkit.train_ae(tiny_ae(root / "data", root / "colour"))
    grey = ldmkit.train_ae(tiny_ae(root / "data", root / "grey", preprocessing=GREY))
    return Autoencoders(colour, grey)


def check(data, **settings):
    return ldmkit.check(CheckConfig.model_validate({"data": data, "size": corpus.SIDE, **settings}))


def found(report):
    """(kind, severity) -> names."""
    return {
        (finding["kind"], finding["severity"]): [entry["name"] for entry in finding["found"]]
        for finding in report["findings"]
    }


def test_the_corpus_has_what_was_promised():
    assert len(CASES) >= 25
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(case.exit_code == 0 for case in CASES if case.severity == "warning")


def test_the_corpus_is_written_by_its_script(tmp_path):
    script = Path(corpus.__file__)
    subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True)
    assert {path.name for path in tmp_path.iterdir()} == {case.name for case in CASES}


@pytest.mark.parametrize("case", RUNNABLE, ids=lambda case: case.name)
def test_check_finds_and_names_each_case(case, tmp_path, run):
    data = write_case(case, tmp_path / "set")
    options = ["--size", corpus.SIDE, "--json", *case.options, *case.check_options]
    options += ["--channels", 1, "--range", "0,255"] if case.grey else []
    with permissions_count():
        done = run("check", data, *options)
    assert b"Traceback" not in done.stderr
    assert done.returncode == (3 if case.severity == "error" else 0), done.stderr
    report = json.loads(done.stdout)
    names = found(report).get((case.kind, case.severity))
    assert names, found(report)
    assert any(case.where in name for name in names)
    others = [name for group in found(report).values() for name in group if case.where not in name]
    assert others == [], "clean pictures are not reported"


@pytest.mark.parametrize("command", ["encode", "train-ae"])
@pytest.mark.parametrize("case", RUNNABLE, ids=lambda case: case.name)
def test_each_case_ends_as_the_table_says(case, command, autoencoders, tmp_path, run):
    data = write_case(case, tmp_path / "set")
    options = [*case.options, "--out", tmp_path / "out"]
    if command == "encode":
        options += ["--ae", autoencoders.grey if case.grey else autoencoders.colour]
    else:
        config = tiny_ae(data, tmp_path / "out", **({"preprocessing": GREY} if case.grey else {}))
        config = config.model_copy(update={"data": "from the command line"})
        (tmp_path / "ae.toml").write_text(ldmkit_toml(config))
        options += ["--config", tmp_path / "ae.toml"]
    with permissions_count():
        done = run(command, data, *options)
    text = done.stderr.decode(errors="replace")
    assert "Traceback" not in text
    assert done.returncode == case.exit_code, text
    if case.exit_code:
        assert case.where in next(line for line in text.splitlines() if "error: " in line)
    if case.converted and CONVERSIONS_ARE_NAMED:
        assert re.search(rf"^{re.escape(case.kind)} \(1\): .*{re.escape(case.where)}", text, re.M)


def ldmkit_toml(config):
    from ldmkit.configfile import to_toml

    return to_toml(config)


def test_a_clean_set_gives_no_finding(tmp_path):
    write_clean(tmp_path / "set")
    report = check(tmp_path / "set", holdout=0.3, out=tmp_path / "report.html")
    assert report["findings"] == []
    assert (report["pictures"], report["errors"], report["warnings"]) == (8, 0, 0)
    assert "<img" not in (tmp_path / "report.html").read_text()
    assert report["facts"]["parts"].keys() == {"training", "held back"}


def test_pictures_of_the_box_give_no_finding(tmp_path):
    for item in open_source(SourceConfig(data=str(BOX / "emoji-64-00000.tar"))).items[:100]:
        (tmp_path / f"{item.key}.webp").write_bytes(item.picture.read())
    assert check(tmp_path, size=64, holdout=0.2)["findings"] == []


@pytest.mark.slow
def test_none_of_the_data_in_the_box_gives_a_finding():
    report = check(BOX, size=64, holdout=0.2)
    assert report["findings"] == []
    assert report["pictures"] == 5038


def test_reading_processes_change_nothing(tmp_path):
    write_case(next(case for case in CASES if case.name == "truncated-jpeg"), tmp_path / "set")
    assert check(tmp_path / "set", workers=2) == check(tmp_path / "set")


def test_text_for_people_and_json_for_programs(tmp_path, run):
    write_clean(tmp_path / "set")
    for number in range(7):
        (tmp_path / f"set/bad{number}.png").write_text(f"hello {number}")
    done = run("check", tmp_path / "set", "--size", 32)
    assert done.returncode == 3
    text = done.stdout.decode()
    line = "error: not a picture (7): bad0.png, bad1.png, bad2.png, bad3.png, bad4.png and 2 more\n"
    assert line in text
    assert text.startswith(f"15 pictures in {tmp_path / 'set'}: 7 error(s), 0 warning(s)\n")
    assert done.stderr.decode().splitlines()[-1].startswith("error: 7 error(s) in ")
    report = json.loads(run("check", tmp_path / "set", "--size", 32, "--json").stdout)
    assert report["schema_version"] == 1
    assert report["findings"][0]["count"] == len(report["findings"][0]["found"]) == 7
    assert report["facts"]["formats"] == {"PNG": 8}


class Page(HTMLParser):
    """Tags, and all text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.sources = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_what_is_wrong_and_runs_nothing(tmp_path):
    name = '<script>alert("1")</script>'.replace("/", "-")
    write_clean(tmp_path / "set")
    (tmp_path / f"set/{name}.png").write_bytes(encoded(corpus.GREY.resize((400, 200)), "PNG"))
    (tmp_path / f"set/{name}.txt").write_text("<b onclick=x()>caption</b> & more")
    (tmp_path / "set/zero.png").write_bytes(b"")
    out = tmp_path / "report.html"
    check(tmp_path / "set", out=out)
    page = Page(out.read_text(encoding="utf-8"))
    assert not {"script", "b onclick", "link", "iframe"} & set(page.tags)
    assert name in page.text
    assert "<b onclick=x()>caption</b> & more" in page.text
    assert "cannot be shown" in page.text
    assert "prefers-color-scheme: dark" in page.text
    assert page.sources
    for source in page.sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert max(image.size) <= 96
            image.load()
    sizes = {
        Image.open(io.BytesIO(base64.b64decode(s.partition(",")[2]))).size for s in page.sources
    }
    assert (96, 48) in sizes


def test_a_page_shows_at_most_twenty_of_a_kind(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.png").write_bytes(
            encoded(clean_picture(number).resize((8, 8)), "PNG")
        )
    out = tmp_path / "report.html"
    report = check(tmp_path, out=out)
    assert report["findings"][0]["count"] == 30
    page = Page(out.read_text())
    assert page.tags.count("img") == 20
    assert "and 10 more" in page.text


def test_a_set_is_compared_with_another(tmp_path, run):
    write_clean(tmp_path / "train")
    (tmp_path / "val").mkdir()
    new = encoded(clean_picture(50), "PNG")
    (tmp_path / "val/new.png").write_bytes(new)
    (tmp_path / "val/new-too.png").write_bytes(new)
    (tmp_path / "val/old.png").write_bytes((tmp_path / "train/3.png").read_bytes())
    (tmp_path / "val/seen.jpg").write_bytes(encoded(clean_picture(5, 128), "JPEG", quality=90))
    report = check(tmp_path / "train", against=str(tmp_path / "val"))
    assert found(report) == {
        ("leak: exact duplicate", "error"): ["old.png"],
        ("leak: near duplicate", "warning"): ["seen.jpg"],
    }
    assert report["facts"]["parts"] == {"training": 8, "the other set": 4}
    assert run("check", tmp_path / "train", "--against", tmp_path / "gone").returncode == 3


def test_a_class_that_is_too_small_or_outweighed(tmp_path):
    for name, count in (("many", 130), ("few", 6), ("two", 2)):
        (tmp_path / name).mkdir()
        for number in range(count):
            picture = clean_picture(1000 * count + number)
            picture.save(tmp_path / name / f"{number}.png")
    report = check(tmp_path)
    assert found(report) == {
        ("small class", "warning"): ["two"],
        ("unbalanced classes", "warning"): ["few", "two"],
    }
    assert report["facts"]["classes"] == {"few": 6, "many": 130, "two": 2}


def test_captions_are_measured(tmp_path):
    write_clean(tmp_path / "set")
    for number in range(8):
        (tmp_path / f"set/{number}.txt").write_text("x" * (301 if number == 7 else 10 + number))
    facts = check(tmp_path / "set")["facts"]["captions"]
    assert facts == {
        "count": 8,
        "characters": {"min": 10, "median": 13.5, "max": 301},
        "longer_than_300": 1,
    }


def test_values_outside_the_range_are_told(tmp_path):
    values = np.linspace(0, 300, 32 * 32, dtype=np.float32).reshape(32, 32)
    np.save(tmp_path / "a.npy", values)
    report = check(tmp_path, channels=1, range=(0.0, 255.0))
    assert list(found(report)) == [("values outside --range", "warning")]


def test_a_mask_does_not_count_as_missing_pixels(tmp_path):
    write_clean(tmp_path / "set")
    mask = Image.new("L", (32, 32), 255)
    mask.paste(0, (0, 0, 8, 8))
    mask.save(tmp_path / "set/0.mask.png")
    assert check(tmp_path / "set")["findings"] == []
    Image.new("L", (16, 16), 255).save(tmp_path / "set/1.mask.png")
    assert found(check(tmp_path / "set")) == {("bad mask", "error"): ["1.png"]}


def test_a_folder_without_pictures_is_an_error(tmp_path, run):
    (tmp_path / "set").mkdir()
    done = run("check", tmp_path / "set")
    assert done.returncode == 3
    assert b"error: no pictures (1)" in done.stdout
    assert run("check", tmp_path / "set", "--range", "1,0").returncode == 2


def test_close_hashes_are_all_found():
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 1 << 63, 300, dtype=np.uint64)
    flips = [sum(1 << int(b) for b in generator.choice(64, 1 + n % 5, False)) for n in range(100)]
    near = hashes[:100] ^ np.array(flips, dtype=np.uint64)
    everything = np.concatenate([hashes, near])
    distances = np.bitwise_count(everything[:, None] ^ everything[None, :])
    expected = {(int(i), int(j)) for i, j in np.argwhere(distances <= 3) if i < j}
    assert set(similarity.close_pairs(everything)) == expected
    assert len(expected) == 60


@pytest.mark.parametrize(
    ("kind", "options", "side"),
    [("JPEG", {"quality": 85}, 256), ("WEBP", {"quality": 80}, 256), ("PNG", {}, 96)],
)
def test_another_encoding_or_size_looks_the_same(kind, options, side):
    recognised = 0
    for number in range(20):
        original = similarity.small_version(
            decode_picture(
                encoded(clean_picture(number, 192), "PNG"), "", PreprocessingConfig(size=SIZE)
            )
        )
        data = encoded(clean_picture(number, 192).resize((side, side)), kind, **options)
        copy = similarity.small_version(decode_picture(data, "", PreprocessingConfig(size=SIZE)))
        close = similarity.perceptual_hash(original) ^ similarity.perceptual_hash(copy)
        recognised += similarity.same_picture(original, copy) and close.bit_count() <= 3
        other = similarity.small_version(
            decode_picture(
                encoded(clean_picture(number + 50), "PNG"), "", PreprocessingConfig(size=SIZE)
            )
        )
        assert not similarity.same_picture(original, other)
    assert recognised >= 18


def test_a_mark_in_one_place_is_another_picture():
    picture = clean_picture(0, 128)
    marked = picture.copy()
    marked.paste((255, 255, 255), (60, 60, 72, 72))
    both = [
        similarity.small_version(
            decode_picture(encoded(p, "PNG"), "", PreprocessingConfig(size=SIZE))
        )
        for p in (picture, marked)
    ]
    assert not similarity.same_picture(*both)


def test_split_writes_what_training_holds_back(pictures, tmp_path, run):
    out = tmp_path / "lists"
    done = run("split", pictures, "--holdout", 0.4, "--out", out)
    assert (done.returncode, done.stdout.decode()) == (0, f"{out}\n")
    parts = split(open_source(SourceConfig(data=pictures)).items, 0.4)
    for name, items in (("training", parts.training), ("held-back", parts.held_back)):
        text = (out / f"{name}.txt").read_text(encoding="utf-8")
        assert text == "".join(f"{item.key}\n" for item in items)
        assert items
    assert sorted(path.name for path in out.iterdir()) == ["held-back.txt", "training.txt"]
    report = json.loads(run("split", pictures, "--holdout", 0.4, "--out", out, "--json").stdout)
    assert report["training"]["pictures"] + report["held_back"]["pictures"] == 12
    assert report["held_back"]["pictures"] == len(parts.held_back)
    for name in ("circle", "square"):
        assert report["training"]["classes"][name] + report["held_back"]["classes"][name] == 6


def test_split_keeps_groups_together(tmp_path):
    (tmp_path / "set").mkdir()
    for patient in range(20):
        for number in range(3):
            data = encoded(clean_picture(3 * patient + number), "PNG")
            (tmp_path / f"set/p{patient}-{number}.png").write_bytes(data)
    config = SplitConfig(
        data=str(tmp_path / "set"), holdout=0.4, group_by="^p[0-9]+", out=tmp_path / "out"
    )
    report = ldmkit.split(config)
    keys = [
        {key.partition("-")[0] for key in (tmp_path / f"out/{name}.txt").read_text().split()}
        for name in ("training", "held-back")
    ]
    assert not keys[0] & keys[1]
    assert report["training"]["groups"] == len(keys[0])
    assert report["held_back"]["pictures"] == 3 * len(keys[1]) > 0


def test_split_refuses_what_it_cannot_write_down(tmp_path):
    write_clean(tmp_path / "set")
    config = SplitConfig(data=str(tmp_path / "set"), holdout=0.5, out=tmp_path / "out")
    with pytest.raises(DataError, match="keeps none of the 8 pictures out"):
        ldmkit.split(config.model_copy(update={"holdout": 1e-9}))
    for name in ("a\nb.png", os.fsdecode(b"a\xff.png")):
        (tmp_path / "set" / name).write_bytes(b"")
        with pytest.raises(DataError, match="line break or is not UTF-8"):
            ldmkit.split(config)
        (tmp_path / "set" / name).unlink()
    assert not (tmp_path / "out").exists()
