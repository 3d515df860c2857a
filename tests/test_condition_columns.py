"""Columns that conditions need: scalars, embedded captions, holes; and reading any column at random."""

import io
import json
import math
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

import ldmkit
from conftest import SIZE, draw_picture
from ldmkit.assembly import autoencoder_facts, preprocessing_of
from ldmkit.conditioning.mask import Convention, fill_hole
from ldmkit.conditioning.text_tower import encode_texts, load_tower
from ldmkit.configs import STREAM
from ldmkit.container import read_header, read_messages
from ldmkit.data.images import read_images
from ldmkit.data.items import Box, Item, Span
from ldmkit.data.latent_set import LatentSet
from ldmkit.data.latents import box_columns, items_digest, text_columns
from ldmkit.data.masks import LEAST, MOST
from ldmkit.data.sources import open_source, scan_source
from ldmkit.data_configs import CheckConfig, EncodeConfig, SourceConfig
from ldmkit.digests import file_digest
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import Manifest, ShardEntry, Whitening
from ldmkit.manifest import read_manifest, write_manifest
from ldmkit.modelfile import load, save
from ldmkit.torchvision_import import import_torchvision

NAN = math.nan
ROWS = [
    {"age": 31, "dose": 0.5, "text": "a red circle"},
    {"age": "47.5", "dose": None, "text": "a green circle\nround"},
    {"age": "", "dose": 1e-3, "text": ""},
    {"age": -2, "dose": NAN, "text": "a red circle"},
    {"dose": 3, "text": "a purple circle"},
]
SCALARS = [(31.0, 0.5), (47.5, NAN), (NAN, 1e-3), (-2.0, NAN), (NAN, 3.0)]
TINY = "tiny-for-columns"


def png(number):
    buffer = io.BytesIO()
    draw_picture("circle", number).save(buffer, "PNG")
    return buffer.getvalue()


def folder(root, rows=ROWS):
    """Pictures 0.png ... and the table that describes them."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(len(rows)):
        (root / f"{number}.png").write_bytes(png(number))
    lines = [json.dumps({"file_name": f"{i}.png"} | row) for i, row in enumerate(rows)]
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


def csv(root):
    folder(root)
    (root / "metadata.jsonl").unlink()
    values = [[row.get("age"), row.get("dose")] for row in ROWS]
    text = [",".join("" if x is None else str(x) for x in pair) for pair in values]
    lines = [f"{number}.png,{line}" for number, line in enumerate(text)]
    (root / "metadata.csv").write_text("\n".join(["file_name,age,dose", *lines]))
    return root


def columns():
    ages = [float(row["age"]) if row.get("age") not in (None, "") else None for row in ROWS]
    return {"age": ages, "dose": [row["dose"] for row in ROWS]}


def metadata_parquet(root):
    folder(root)
    (root / "metadata.jsonl").unlink()
    names = [f"{number}.png" for number in range(len(ROWS))]
    pq.write_table(pa.table({"file_name": names} | columns()), root / "metadata.parquet")
    return root


def parquet(root):
    root.mkdir()
    bytes_ = [png(number) for number in range(len(ROWS))]
    pq.write_table(pa.table({"image": bytes_} | columns()), root / "a.parquet", row_group_size=2)
    return root


def tar(root):
    root.mkdir()
    with tarfile.open(root / "a.tar", "w") as file:
        for number, row in enumerate(ROWS):
            for name, data in (
                (f"{number}.png", png(number)),
                (f"{number}.json", json.dumps(row).encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return root


@pytest.fixture
def config(pipeline, tmp_path):
    return EncodeConfig(
        data=pipeline.data, ae=pipeline.ae, out=tmp_path / "latents", shard_size=5, batch_size=4
    )


def encoded(config, **changes):
    out = ldmkit.encode(EncodeConfig.model_validate(config.model_dump() | changes))
    assert out is not None
    return out


def contents(directory):
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def tensors_of(out, number=0):
    return load(out / f"{number:05d}.safetensors", kind="latents")[1]


# scalars


@pytest.mark.parametrize("form", [folder, csv, metadata_parquet, parquet, tar])
def test_scalars_come_from_every_form_that_has_them(tmp_path, form):
    source = open_source(
        SourceConfig.model_validate({"data": form(tmp_path / "d"), "scalars": "age,dose"})
    )
    assert source.scalar_names == ("age", "dose")
    found = np.array([item.scalars for item in source.items])
    assert np.array_equal(found, np.array(SCALARS), equal_nan=True)
    turned = SourceConfig.model_validate({"data": tmp_path / "d", "scalars": ["dose", "age"]})
    assert scan_source(turned).items[0].scalars == (0.5, 31.0)
    assert open_source(SourceConfig(data=str(tmp_path / "d"))).items[0].scalars == ()


@pytest.mark.parametrize("form", [folder, parquet, tar])
def test_a_scalar_that_is_nowhere_is_one_sentence_with_the_nearest_name(tmp_path, form):
    config = SourceConfig.model_validate({"data": form(tmp_path / "d"), "scalars": "age,doses"})
    with pytest.raises(DataError, match=r"no column doses \(--scalars\); did you mean dose\?"):
        open_source(config)


@pytest.mark.parametrize(
    "value", ["old", True, [1], "1e99", 1e39, -1e39, "inf", "2024_01", 10**400, {"a": 1}]
)
@pytest.mark.parametrize("suffix", ["jsonl", "tar"])
def test_what_is_no_number_is_a_fault_of_that_picture(tmp_path, monkeypatch, value, suffix):
    rows = [*ROWS[:2], {"age": value}, ROWS[3]]
    monkeypatch.setitem(globals(), "ROWS", rows)
    data = folder(tmp_path / "d", rows) if suffix == "jsonl" else tar(tmp_path / "d")
    source = scan_source(SourceConfig.model_validate({"data": data, "scalars": "age"}))
    assert len(source.items) == 3
    (problem,) = [problem for problem in source.problems if problem.severity == "error"]
    assert "age is" in problem.text
    assert ("line 3" if suffix == "jsonl" else "a.tar/2.json") in problem.text


def test_a_form_without_scalars_says_which_have_them(pictures):
    with pytest.raises(UsageError, match="--scalars is for --format metadata or parquet or webd"):
        scan_source(SourceConfig.model_validate({"data": pictures, "scalars": "age"}))
    for bad in ("age,age", "", "age,,dose", [""]):
        with pytest.raises(ValueError, match="names that differ"):
            SourceConfig.model_validate({"data": pictures, "scalars": bad})


def test_scalars_are_stored_and_a_changed_one_is_noticed(config, tmp_path):
    data = folder(tmp_path / "data")
    out = encoded(config, data=data, scalars="age,dose", shard_size=2, views=2)
    manifest = read_manifest(out)
    assert manifest.scalar_names == ("age", "dose")
    assert manifest.columns[-1] == "scalars"
    found = LatentSet(out).rows("scalars", range(10))
    expected = torch.tensor(SCALARS, dtype=torch.float32).repeat_interleave(2, 0)
    assert found.dtype == torch.float32
    assert torch.equal(found.nan_to_num(9e9), expected.nan_to_num(9e9))
    before = contents(out)
    encoded(config, data=data, scalars="age,dose", shard_size=2, views=2)
    assert contents(out) == before
    with pytest.raises(DataError, match=r"another scalars \(\['age', 'dose'\], now \['dose'"):
        encoded(config, data=data, scalars="dose,age", shard_size=2, views=2)
    with pytest.raises(DataError, match="another columns"):
        encoded(config, data=data, shard_size=2, views=2)
    folder(data, [ROWS[0] | {"age": 32}, *ROWS[1:]])
    with pytest.raises(DataError, match="have changed"):
        encoded(config, data=data, scalars="age,dose", shard_size=2, views=2)


def test_digests_and_manifests_of_sets_without_such_columns_stay(pipeline):
    item = Item("a.png", Span("x/a.png", 0, 7), 1, "a cat")
    assert items_digest([item]) == (  # of `["a.png", 7, 1, "a cat", "", [], null, null]`
        "1bbcc653db83e683a0029ce085e2259b960c44a08e63c146377e3e901895c6c6"
    )
    changed = [
        item._replace(scalars=(1.0,)),
        item._replace(scalars=(NAN,)),
        item._replace(hole=Span("m/a.png", 0, 5)),
        item._replace(hole=Span("m/a.png", 0, 6)),
    ]
    assert len({items_digest([other]) for other in [item, *changed]}) == 5
    page = json.loads((pipeline.latents / "manifest.json").read_text())
    assert "scalar_names" not in page
    assert page["recipe"].keys().isdisjoint({"scalars", "text", "holes"})


def test_check_counts_scalars_that_are_missing(tmp_path):
    report = ldmkit.check(
        CheckConfig.model_validate(
            {"data": folder(tmp_path / "d"), "size": SIZE, "scalars": "age,dose"}
        )
    )
    found = {finding["kind"]: finding for finding in report["findings"]}
    assert found["missing age"]["severity"] == "warning"
    assert [entry["name"] for entry in found["missing age"]["found"]] == ["2.png", "4.png"]
    assert found["missing dose"]["count"] == 2
    assert report["facts"]["scalars"]["age"] == {"missing": 2, "min": -2, "median": 31, "max": 47.5}


def test_the_command_takes_names_with_commas_between_them(run, pipeline, tmp_path):
    out = tmp_path / "latents"
    done = run(
        *("encode", folder(tmp_path / "d"), "--ae", pipeline.ae, "--out", out),
        *("--scalars", "age,dose", "--holes", "boxes", "--hole-fill", "grey"),
    )
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(out)
    assert manifest.scalar_names == ("age", "dose")
    assert manifest.recipe["holes"] == {"kind": "boxes", "fill": "grey", "seed": 0}


# text


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small random tower that open_clip knows by name."""
    import_torchvision()
    import open_clip

    folder = tmp_path_factory.mktemp("tower")
    vision = {"image_size": 8, "layers": 1, "width": 8, "head_width": 4, "patch_size": 8}
    text = {"width": 16, "heads": 2, "layers": 3, "context_length": 20}
    (folder / f"{TINY}.json").write_text(
        json.dumps({"embed_dim": 12, "vision_cfg": vision, "text_cfg": text})
    )
    open_clip.add_model_config(folder)
    torch.manual_seed(4)
    model = open_clip.create_model(TINY, pretrained=None, load_weights=False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / "tower.safetensors")
    return folder / "tower.safetensors"


@pytest.mark.parametrize("output", ["last", "penultimate", "pooled"])
def test_captions_are_embedded_by_their_first_line(config, tmp_path, weights, output):
    asked = {"text_encoder": TINY, "text_weights": weights, "text_output": output, "views": 2}
    data = folder(tmp_path / "data")
    out = encoded(config, data=data, shard_size=3, **asked)
    tower = load_tower(TINY, weights, output, option="--text-weights")
    lines = ["a red circle", "a green circle", "", "a red circle", "a purple circle"]
    wanted = encode_texts(tower, [line for line in lines for _ in range(2)], 1)
    latents = LatentSet(out)
    found = latents.rows("text", range(10))
    assert found.dtype == torch.float16
    assert found.shape == wanted.shape
    assert torch.allclose(found.float(), wanted, atol=2e-3, rtol=2e-3)
    assert not torch.equal(found[0], found[2])
    assert torch.equal(latents.empty_text(), found[4])
    for number in range(2):
        assert torch.equal(tensors_of(out, number)["text.empty"], latents.empty_text())
    assert read_manifest(out).recipe["text"] == {
        "encoder": TINY,
        "output": output,
        "pad_with_end": False,
        "fingerprint": tower.fingerprint,
    }
    padded = asked | {"text_pad_with_end": True}
    with pytest.raises(DataError, match=r"another text.pad_with_end \(False, now True\)"):
        encoded(config, data=data, shard_size=3, **padded)


def test_captions_that_cannot_be_embedded_are_one_sentence(config, tmp_path, weights):
    asked = {"text_encoder": TINY, "text_weights": weights}
    with pytest.raises(DataError, match=r"no picture of .* has one"):
        encoded(config, **asked)
    long = folder(tmp_path / "long", [{"text": "a"}, {"text": "a" * 10_001}])
    with pytest.raises(DataError, match=r"caption of .*1\.png cannot be .* 10,001 characters"):
        encoded(config, data=long, **asked)
    data = folder(tmp_path / "data")
    with pytest.raises(UsageError, match=r"needs its weights: .*--text-weights"):
        encoded(config, data=data, text_encoder="ViT-H-14")
    with pytest.raises(DataError, match=r"there is no file .*nowhere"):
        encoded(config, data=data, text_encoder=TINY, text_weights=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="for --text-encoder"):
        encoded(config, data=data, text_weights=weights)
    assert not config.out.exists()


# holes


def test_a_hole_is_filled_and_encoded(config, pipeline):
    items = open_source(SourceConfig(data=pipeline.data)).items
    images = read_images(items, preprocessing_of(autoencoder_facts(pipeline.ae), None))
    model = ldmkit.load_autoencoder(pipeline.ae)
    plain = LatentSet(pipeline.latents).read(range(12))
    masked = {}
    conventions: dict[str, Convention] = {"black": "ldm", "grey": "sd"}
    for fill, convention in conventions.items():
        out = encoded(config, holes="mixed", hole_fill=fill, force=True)
        latents = LatentSet(out)
        hole = latents.rows("hole", range(12))
        assert hole.dtype == torch.uint8
        assert hole.shape == (12, SIZE, SIZE)
        shares = hole.float().mean((1, 2))
        assert ((shares >= LEAST) & (shares <= MOST)).all()
        assert len({one.numpy().tobytes() for one in hole}) > 8  # of halves there are four
        masked[fill] = latents.rows("masked", range(12))
        wanted = model.encode(fill_hole(images, hole.bool(), convention)).mean
        assert masked[fill].dtype == torch.float16
        assert (masked[fill].float() - wanted).norm() <= 0.01 * wanted.norm()
        assert torch.equal(latents.read(range(12)).mean, plain.mean)
        assert latents.manifest.columns[-2:] == ("hole", "masked")
    assert not torch.equal(masked["black"], masked["grey"])


@pytest.mark.filterwarnings("ignore:This DataLoader")
def test_sharing_the_work_does_not_change_a_byte(config, weights, tmp_path):
    asked = {
        "data": folder(tmp_path / "data", [*ROWS, *ROWS]),
        "scalars": "age",
        "holes": "mixed",
        "views": 2,
        "seed": 3,
        "shard_size": 4,
        "text_encoder": TINY,
        "text_weights": weights,
    }
    whole = contents(encoded(config, **asked, out=tmp_path / "one"))
    assert contents(encoded(config, **asked, out=tmp_path / "two", workers=2)) == whole
    for job in ("2/2", "1/2"):
        out = encoded(config, **asked, jobs=job)
    assert contents(out) == whole
    stream = io.BytesIO()
    ldmkit.encode(
        EncodeConfig.model_validate(config.model_dump() | asked | {"out": STREAM}), stream
    )
    stream.seek(0)
    blocks = [block for _, block in read_messages(stream, "stream")]
    assert blocks[:-1] == [whole[name] for name in sorted(whole) if name != "manifest.json"]

    holes = tensors_of(tmp_path / "one")["hole"]
    assert not torch.equal(holes[0], holes[1])  # each view has its own
    small = encoded(config, **(asked | {"shard_size": 3, "views": 1}), out=tmp_path / "three")
    assert torch.equal(tensors_of(small)["hole"], holes[:6:2])  # a function of key, view and seed
    other = encoded(config, **(asked | {"seed": 4}), out=tmp_path / "four")
    assert not torch.equal(tensors_of(other)["hole"], holes)


def hole_masks(root, count=5):
    """Left upper quarter white; of the second as numbers."""
    root.mkdir()
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[: SIZE // 2, : SIZE // 2] = 255
    for number in range(count):
        Image.fromarray(mask).save(root / f"{number}.png")
    (root / "1.png").unlink()
    np.save(root / "1.npy", mask > 0)
    return torch.from_numpy(mask // 255)


def test_holes_may_be_given(config, tmp_path):
    data = folder(tmp_path / "data")
    mask = hole_masks(tmp_path / "masks")
    wide = np.zeros((SIZE, 2 * SIZE, 3), np.uint8)
    wide[:, SIZE:] = 255
    Image.fromarray(255 - wide).save(data / "2.png")
    Image.fromarray(wide).save(tmp_path / "masks/2.png")
    asked = {"data": data, "holes": "given", "hole_masks": tmp_path / "masks"}
    hole = LatentSet(encoded(config, **asked)).rows("hole", range(5))
    assert torch.equal(hole[[0, 1, 3, 4]], mask.expand(4, -1, -1))
    assert torch.equal(hole[2], torch.arange(SIZE).ge(SIZE // 2).byte().expand(SIZE, -1))  # cut
    assert "seed" not in read_manifest(config.out).recipe["holes"]
    views = encoded(config, **asked, views=4, view_flip=True, view_zoom=1.0, out=tmp_path / "views")
    found = tensors_of(views)["hole"]
    rows = [*found[:8], *found[12:]]  # not of the wide picture, whose crops differ
    mirrored = [torch.equal(one, mask.flip(1)) for one in rows]
    assert any(mirrored)
    for one, is_mirrored in zip(rows, mirrored, strict=True):
        assert is_mirrored or torch.equal(one, mask)

    (tmp_path / "masks/3.png").unlink()
    with pytest.raises(DataError, match=r"has no hole mask: .*3\.png or \.npy is needed"):
        encoded(config, **asked)
    Image.new("L", (5, SIZE)).save(tmp_path / "masks/3.png")
    with pytest.raises(DataError, match=r"masks/3\.png cannot be used: the mask has 5 x 32 pixels"):
        encoded(config, **asked, force=True)
    report = ldmkit.check(
        CheckConfig.model_validate({"data": data, "hole_masks": tmp_path / "masks", "size": SIZE})
    )
    assert "bad hole mask" in {finding["kind"] for finding in report["findings"]}


def test_holes_are_asked_for_as_a_whole(config, pictures):
    for bad, words in (
        ({"holes": "given"}, "go together"),
        ({"hole_masks": pictures}, "go together"),
        ({"holes": "boxes", "hole_masks": pictures}, "go together"),
        ({"hole_fill": "grey"}, "colour of --holes"),
    ):
        with pytest.raises(ValueError, match=words):
            encoded(config, **bad)
    with pytest.raises(UsageError, match=r"--hole-masks .* would count as pictures"):
        encoded(config, holes="given", hole_masks=pictures / "circle")
    with pytest.raises(UsageError, match="needs sides of 8 pixels, and pictures have 4"):
        encoded(config, holes="boxes", size=4)


# reading


WIDE, HIGH = (2, 3, 4), (2, 4, 3)
BOXES = [
    (Box(1, 0.0, 0.1, 0.5, 1.0), Box(0, 0.2, 0.2, 0.3, 0.4)),
    (),
    (Box(2, 0.0, 0.0, 1.0, 1.0),),
]
COLUMNS = (
    *("mean", "std", "key", "label", "caption", "group", "view", "boxes", "labelmap"),
    *("mask", "lowres", "scalars", "text", "hole", "masked"),
)


def tensors(count, shape, number, dtype=torch.float16):
    """Every column there is, told apart by random values."""
    draw = torch.Generator().manual_seed(number)
    _, high, wide = shape
    pixels = (count, 4 * high, 4 * wide)

    def classes(size):
        return torch.randint(0, 255, size, generator=draw, dtype=torch.uint8)

    boxes = [BOXES[(number + row) % 3] for row in range(count)]
    texts = [f"{number}: \N{SNOWMAN}{'x' * row}" if row else "" for row in range(count)]
    return {
        "mean": torch.randn(count, *shape, generator=draw).to(dtype),
        "std": torch.rand(count, *shape, generator=draw).to(dtype),
        "label": torch.full((count,), -1),
        "view": torch.arange(count),
        **text_columns("key", [f"{number}/{row}" for row in range(count)]),
        **text_columns("caption", texts),
        **text_columns("group", [""] * count),
        **box_columns(boxes),
        "labelmap": classes(pixels),
        "mask": classes(pixels),
        "lowres": classes((count, 3, high, wide)),
        "scalars": torch.randn(count, 2, generator=draw),
        "text": torch.randn(count, 3, 5, generator=draw).half(),
        "text.empty": torch.ones(3, 5).half(),
        "hole": classes(pixels),
        "masked": torch.randn(count, *shape, generator=draw).to(dtype),
    }


def write_set(root, shards):
    root.mkdir(exist_ok=True)
    entries, start = [], 0
    for number, shard in enumerate(shards):
        path = root / f"{number:05d}.safetensors"
        save(path, shard, kind="latents", config={}, facts={"fingerprint": ""})
        count = len(shard["key.offsets"]) - 1
        entry = ShardEntry(
            name=path.name,
            start=start,
            stop=start + count,
            count=count,
            bytes=path.stat().st_size,
            sha256=file_digest(path),
            shape=tuple(shard["mean"].shape[1:]) if "mean" in shard else None,
        )
        entries.append(entry)
        start += count
    manifest = Manifest(
        format="ldmkit.latents/1",
        recipe={"autoencoder": "0" * 64},
        items="",
        count=start,
        latent_shape=WIDE,
        columns=COLUMNS,
        class_names=(),
        scalar_names=("age", "dose"),
        whitening=Whitening(mean=(0.0, 0.0), std=(1.0, 1.0)),
        shards=tuple(entries),
        skipped=(),
        converted={},
        versions={},
    )
    write_manifest(root, manifest)
    return root


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_column_is_read_at_random_as_it_is_stored(tmp_path, dtype):
    shards = [tensors(count, WIDE, n, dtype) for n, count in enumerate((4, 0, 3))]
    latents = LatentSet(write_set(tmp_path, shards))
    order = [6, 0, 3, 4, 0]
    fixed = [name for name in COLUMNS if name in shards[0]]
    assert len(fixed) == 11
    for name in fixed:
        whole = torch.cat([shard[name] for shard in shards])
        found = latents.rows(name, np.array(order))
        assert found.dtype == whole.dtype
        assert torch.equal(found, whole[order])
        found.zero_()
        assert torch.equal(latents.rows(name, order), whole[order])
    for name in ("key", "caption", "group"):
        assert [latents.text(name, index) for index in range(7)] == list(latents.texts(name))
    assert latents.text("key", 4) == "2/0"
    assert latents.text("caption", 6) == "2: \N{SNOWMAN}xx"
    assert latents.text("caption", 4) == ""
    for index, expected in enumerate([*(BOXES[n % 3] for n in range(4)), *BOXES[2:], *BOXES[:2]]):
        found = latents.boxes(index)
        assert found.dtype == np.float32
        assert np.array_equal(found, np.array(expected, np.float32).reshape(-1, 5))
    assert torch.equal(latents.empty_text(), torch.ones(3, 5).half())


def test_what_is_not_there_is_refused(tmp_path):
    shards = [tensors(2, WIDE, 0), tensors(2, HIGH, 1)]
    latents = LatentSet(write_set(tmp_path, shards))
    for call in (
        lambda index: latents.rows("scalars", [index]),
        lambda index: latents.text("key", index),
        latents.boxes,
    ):
        for index in (4, -1):
            with pytest.raises(IndexError, match="0 to 3"):
                call(index)
    with pytest.raises(ValueError, match="hole of one shape"):
        latents.rows("hole", [1, 2])
    assert latents.rows("scalars", [1, 2]).shape == (2, 2)
    with pytest.raises(ValueError, match="no sample"):
        latents.rows("hole", [])
    for name in ("caption", "boxes", "depth"):
        with pytest.raises(DataError, match=f"no column {name}; its columns are mean, std"):
            latents.rows(name, [0])
    with pytest.raises(DataError, match="no column hole;"):
        latents.text("hole", 0)


def test_a_plain_set_has_no_such_columns(pipeline):
    latents = LatentSet(pipeline.latents)
    assert latents.text("key", 11) == "square/5.png"
    assert latents.rows("label", [11, 0]).tolist() == [1, 0]
    for call in (
        lambda: latents.rows("hole", [0]),
        lambda: latents.boxes(0),
        latents.empty_text,
    ):
        with pytest.raises(DataError, match="has no column"):
            call()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, None) for name in COLUMNS if name in tensors(1, WIDE, 0)),
        ("view", lambda x: x.int()),
        ("hole", lambda x: x[:-1]),
        ("mask", lambda x: x.bool()),
        ("labelmap", lambda x: x[:, 0]),
        ("scalars", lambda x: x[:, :1]),
        ("scalars", lambda x: x.double()),
        ("masked", lambda x: x[:, :, 1:]),
        ("text", lambda x: x.float()),
        ("text.empty", None),
        ("text.empty", lambda x: x[:1]),
        ("lowres", lambda x: x[0]),
        ("key.bytes", None),
        ("caption.offsets", lambda x: x[1:]),
        ("boxes.values", lambda x: x[:, :4]),
        ("boxes.values", lambda x: x.flatten()),
        ("boxes.offsets", lambda x: x.int()),
    ],
)
def test_a_column_that_is_not_as_it_must_be_is_named_when_a_set_is_opened(tmp_path, name, change):
    shards = [tensors(3, WIDE, 0), tensors(3, WIDE, 1)]
    LatentSet(write_set(tmp_path / "whole", shards))
    former = shards[1].pop(name)
    if change is not None:
        shards[1][name] = change(former).contiguous()
    column = name.partition(".")[0]
    words = f"no column {column} that" if column not in ("mean", "label") else "does not hold what"
    with pytest.raises(DataError, match=rf"00001.safetensors.* {words}"):
        LatentSet(write_set(tmp_path / "set", shards))


@pytest.mark.parametrize(
    ("name", "bad"), [("key", -1), ("key", 10**9), ("boxes", 10**9), ("key", 0)]
)
def test_offsets_that_lead_elsewhere_are_damage(tmp_path, name, bad):
    shard = tensors(3, WIDE, 0)
    shard[f"{name}.offsets"][2] = bad
    latents = LatentSet(write_set(tmp_path, [shard]))
    with pytest.raises(DataError, match=rf"damaged \(column {name}\)"):
        latents.text(name, 1) if name == "key" else latents.boxes(1)
    assert latents.text("caption", 1)


def test_damaged_bytes_of_any_column_are_found(tmp_path):
    root = write_set(tmp_path, [tensors(3, WIDE, 0)])
    path = root / "00000.safetensors"
    header = read_header(path)
    data = bytearray(path.read_bytes())
    data[header.payload_start + header.tensors["masked"].start] ^= 4
    path.write_bytes(data)
    latents = LatentSet(root)
    with pytest.raises(DataError, match="is damaged"):
        latents.wait_until_verified()
    for call in (
        lambda: latents.rows("masked", [0]),
        lambda: latents.text("key", 0),
        lambda: latents.boxes(0),
    ):
        with pytest.raises(DataError, match="is damaged"):
            call()
