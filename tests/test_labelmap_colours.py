"""Label maps that are RGB pictures: tables of colours, from data to samples."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ldmkit
from conftest import SIZE, diffusion_config, draw_picture
from ldmkit.assembly import conditions_of
from ldmkit.condition_configs import LabelMapCondition
from ldmkit.conditioning.kinds import readers_of
from ldmkit.data.colour_tables import read_colour_table
from ldmkit.data.items import Span
from ldmkit.data.labelmaps import ColourMap, read_labelmap
from ldmkit.data.latent_set import LatentSet
from ldmkit.data_configs import CheckConfig, EncodeConfig
from ldmkit.errors import DataError
from ldmkit.facts import Manifest
from ldmkit.generation_configs import SampleConfig
from ldmkit.label_names import ClassColour, class_names_of
from ldmkit.requests import asked_of

ROAD, CAR, SKY, VOID = (128, 64, 128), (0, 0, 142), (70, 130, 180), (0, 0, 0)
TABLE = (
    ClassColour(colour=ROAD, id=0, name="road"),
    ClassColour(colour=CAR, id=2, name="car"),
    ClassColour(colour=SKY, id=1, name="sky"),
    ClassColour(colour=VOID, id=255, name="void"),
)
PALETTE = np.array([ROAD, SKY, CAR], np.uint8)
IDS = np.add.outer(np.arange(SIZE), np.arange(SIZE)) // 8 % 3


def write_table(path: Path) -> Path:
    lines = [f"{' '.join(map(str, one.colour))},{one.id},{one.name}" for one in TABLE]
    path.write_text("\n".join(["colour,id,name", *lines]))
    return path


def painted(number: int) -> np.ndarray:
    """Ids of one map, its first rows not labelled."""
    ids = np.roll(IDS, number, axis=1)
    return np.where(np.arange(SIZE)[:, None] < number, 255, ids)


def save_map(path: Path, ids: np.ndarray) -> None:
    colours = np.where((ids == 255)[..., None], np.uint8(0), PALETTE[np.where(ids == 255, 0, ids)])
    Image.fromarray(colours).save(path)


@pytest.fixture(scope="module")
def config(pipeline, tmp_path_factory) -> EncodeConfig:
    """Four pictures with RGB maps."""
    root = tmp_path_factory.mktemp("colours")
    (root / "data").mkdir()
    (root / "maps").mkdir()
    for number in range(4):
        draw_picture("circle", number).save(root / "data" / f"{number}.png")
        save_map(root / "maps" / f"{number}.png", painted(number))
    settings = {"data": root / "data", "ae": pipeline.ae, "out": root / "latents"}
    settings |= {"labelmaps": root / "maps", "workers": 0}
    return EncodeConfig.model_validate(
        settings | {"labelmap_colours": write_table(root / "table.csv")}
    )


@pytest.fixture(scope="module")
def latents(config) -> LatentSet:
    out = ldmkit.encode(config)
    assert out is not None
    return LatentSet(out)


# tables


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "colour,id,name\n#804080,0,road\n#00008E,2,car\n70 130 180,1,sky\n#000,255,"),
        ("a.csv", 'id,red,green,blue,name\n0,128,64,128,road\n2,0,0,142,"car"\n1,70,130,180,sky'),
        ("a.csv", 'color,class,name\n"(128, 64, 128)",0,road\n"[0;0;142]",2,car\n#4682b4,1,sky'),
        ("a.json", '{"#804080": {"id": 0, "name": "road"}, "0,0,142": {"id": 2, "name": "car"}}'),
        ("a.json", '[{"colour": [128, 64, 128], "id": 0, "name": "road"}]'),
    ],
)
def test_tables_are_read_in_every_form(tmp_path, name, text):
    text = text.replace("\n#000,255,", "\n#000000,255,void")
    (tmp_path / name).write_text(text)
    found = read_colour_table(tmp_path / name)
    assert set(found) <= set(TABLE)
    assert len(found) == len(re.findall(r"road|car|sky|void", text))


def test_a_number_alone_is_a_class_without_a_name(tmp_path):
    (tmp_path / "a.json").write_text('{"#804080": 0, "#00008E": 2, "#00008F": 2}')
    found = read_colour_table(tmp_path / "a.json")
    assert [one.id for one in found] == [0, 2, 2]
    assert class_names_of(found) == ("0", "1", "2")
    assert class_names_of(TABLE) == ("road", "sky", "car")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "colour,id\n#80408,0\n", r"a.csv, line 2 has no colour; a valid .csv begins"),
        ("a.csv", "colour,id\n300 0 0,0\n", "line 2 has no colour"),
        ("a.csv", "colour,id\n#804080,256\n", "line 2 has no class id from 0 to 255"),
        ("a.csv", "colour,name\n#804080,a\n", "line 2 has no class id"),
        (
            "a.csv",
            "colour,id\n#804080,1\n#804080,2\n",
            r"line 3: the colour \(128, 64, 128\) means",
        ),
        (
            "a.csv",
            "colour,id,name\n#804080,1,a\n#804081,1,b\n",
            "the class 1 is called 'a' and 'b'",
        ),
        ("a.csv", "colour,id\n", "has no colours"),
        ("a.csv", "colour,id\n#804080\n", "has 1 fields and the first line 2"),
        ("a.json", "[1]", "is no table of colours"),
        ("a.json", "{", "is no JSON"),
        ("a.json", '[{"colour": [1, 2], "id": 0}]', "a.json, entry 1 has no colour"),
        ("a.json", '[{"colour": [1, 2, true], "id": 0}]', "entry 1 has no colour"),
        ("a.txt", "", "is no table of colours by its name"),
    ],
)
def test_bad_tables_are_one_sentence(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_colour_table(tmp_path / name)
    with pytest.raises(DataError, match="cannot read"):
        read_colour_table(tmp_path / "none.json")


# maps


def test_maps_of_colours_and_of_ids_read_alike(tmp_path):
    ids = painted(3)
    save_map(tmp_path / "rgb.png", ids)
    Image.open(tmp_path / "rgb.png").convert("RGBA").save(tmp_path / "rgba.png")
    Image.fromarray(ids.astype(np.uint8)).save(tmp_path / "grey.png")
    indexed = Image.fromarray(ids.astype(np.uint8))
    indexed.putpalette(bytes(range(256)) * 3)
    indexed.save(tmp_path / "palette.png")
    np.save(tmp_path / "ids.npy", ids)
    for name in ("rgb.png", "rgba.png", "grey.png", "palette.png", "ids.npy"):
        file = tmp_path / name
        coded = ColourMap(Span(str(file), 0, file.stat().st_size), TABLE)
        assert np.array_equal(read_labelmap(coded, (SIZE, SIZE)).numpy(), ids), name
        assert coded.size == file.stat().st_size


def test_transparent_maps_are_refused(tmp_path):
    Image.new("RGBA", (4, 4), (*ROAD, 128)).save(tmp_path / "a.png")
    blob = Span(str(tmp_path / "a.png"), 0, (tmp_path / "a.png").stat().st_size)
    with pytest.raises(DataError, match="transparent in places"):
        read_labelmap(ColourMap(blob, TABLE), None)
    Image.new("RGB", (4, 4), ROAD).save(tmp_path / "a.png")
    blob = blob._replace(size=(tmp_path / "a.png").stat().st_size)
    with pytest.raises(DataError, match="or an RGB picture with a table of colours"):
        read_labelmap(blob, None)


# from data to samples


def test_a_set_holds_ids_names_and_colours(config, latents):
    manifest = latents.manifest
    assert manifest.labelmap_colours == TABLE
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    found = latents.rows("labelmap", range(4)).numpy()
    assert np.array_equal(found, np.stack([painted(number) for number in range(4)]))
    before = (latents.directory / "manifest.json").read_bytes()
    ldmkit.encode(config)
    assert (latents.directory / "manifest.json").read_bytes() == before


def test_another_table_is_another_set(config, latents, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text(write_table(table).read_text().replace("sky", "air"))
    with pytest.raises(DataError, match="made with another labelmap_colours"):
        ldmkit.encode(config.model_copy(update={"labelmap_colours": table}))


def test_a_colour_in_no_table_is_one_sentence_with_its_place(config, run, tmp_path):
    (tmp_path / "maps").mkdir()
    for number in range(4):
        save_map(tmp_path / "maps" / f"{number}.png", painted(number))
    with Image.open(tmp_path / "maps" / "2.png") as image:
        image.putpixel((5, 7), (1, 2, 3))
        image.save(tmp_path / "maps" / "2.png")
    options = ["--labelmaps", tmp_path / "maps", "--labelmap-colours", config.labelmap_colours]
    done = run("encode", config.data, "--ae", config.ae, "--out", tmp_path / "out", *options)
    assert done.returncode == 3
    assert b"maps/2.png: the label map has the colour (1, 2, 3) at x = 5, y = 7" in done.stderr
    changes = {"labelmaps": tmp_path / "maps", "labelmap_colours": config.labelmap_colours}
    report = ldmkit.check(
        CheckConfig.model_validate({"data": config.data, "size": SIZE, **changes})
    )
    (finding,) = [one for one in report["findings"] if one["kind"] == "bad label map"]
    assert "(1, 2, 3) at x = 5, y = 7" in finding["found"][0]["text"]


def test_a_table_without_maps_is_refused(config):
    with pytest.raises(DataError, match="no picture has a label map; give their folder"):
        ldmkit.encode(config.model_copy(update={"labelmaps": None}))


def test_samples_are_told_maps_in_the_colours_of_training(latents, tmp_path):
    settings = {"steps": 1, "sample_every": 1, "preview_steps": 1, "condition": "labelmap"}
    training = diffusion_config(latents.directory, tmp_path / "ldm", **settings)
    (told,) = conditions_of(training, latents)
    assert told == LabelMapCondition(classes=3, stages=2, colours=TABLE)
    ldm = ldmkit.train_diffusion(training)
    model = ldmkit.load_diffusion(ldm).config
    assert model.conditions == (told,)
    read = readers_of([told], training.options_of, latents)["labelmap"]
    stored = read(np.arange(2), torch.Generator())
    names = []
    for number in range(2):
        save_map(tmp_path / f"{number}.png", painted(number))
        names.append(json.dumps({"labelmap": str(tmp_path / f"{number}.png")}))
    (tmp_path / "told.jsonl").write_text("\n".join(names))
    config = SampleConfig(model=ldm, conditions=tmp_path / "told.jsonl")
    assert torch.equal(asked_of(config, model, (4, 8, 8), None).values([0, 1])["labelmap"], stored)
    with Image.open(tmp_path / "1.png") as image:
        image.putpixel((0, 9), (9, 9, 9))
        image.save(tmp_path / "1.png")
    with pytest.raises(DataError, match=r"told.jsonl, line 2: .*1.png: .*\(9, 9, 9\) at x = 0, y"):
        asked_of(config, model, (4, 8, 8), None)


def test_a_model_without_a_table_has_none_in_its_file():
    plain = LabelMapCondition(classes=3, stages=2)
    assert plain.model_dump() == {"kind": "labelmap", "mapped": 3, "classes": 3, "stages": 2}
    assert LabelMapCondition.model_validate(plain.model_dump()) == plain
