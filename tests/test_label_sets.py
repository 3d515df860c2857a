"""Several label sets at once, from the columns of a table to samples; one set stays as it was."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import ldmkit
from conftest import diffusion_config, draw_picture
from ldmkit.assembly import build_diffusion, conditions_of
from ldmkit.assembly import diffusion_config as model_config
from ldmkit.condition_configs import ClassCondition, ConditioningConfig
from ldmkit.conditioning.classes import ClassConditioner
from ldmkit.conditioning.kinds import KINDS, readers_of
from ldmkit.configs import InspectConfig
from ldmkit.data.latent_set import LatentSet
from ldmkit.data.sources import open_source
from ldmkit.data_configs import CheckConfig, EncodeConfig, SourceConfig
from ldmkit.diffusion_step import draw_batch
from ldmkit.errors import DataError, UsageError
from ldmkit.generation_configs import SampleConfig
from ldmkit.interop.class_tables import told_of
from ldmkit.label_names import LabelSet
from ldmkit.manifest import read_manifest, write_manifest
from ldmkit.modelfile import load
from ldmkit.recipes.inspect import as_text
from ldmkit.requests import asked_of

KIND, STYLE = ("cat", "dog"), ("flat", "oil", "photo")
SETS = (LabelSet(name="kind", classes=KIND), LabelSet(name="style", classes=STYLE))
ROWS = [(number % 2, number % 3) for number in range(12)]
ROWS[4] = (0, -1)


class World(NamedTuple):
    """Pictures with two labels each, their latents, and a model that is told both."""

    data: Path
    latents: Path
    ldm: Path


def words(row: tuple[int, int]) -> dict[str, str]:
    return {"kind": KIND[row[0]], "style": STYLE[row[1]] if row[1] >= 0 else ""}


def folder(root: Path, rows: list[dict[str, str]], first: int = 0) -> Path:
    root.mkdir(exist_ok=True)
    lines = []
    for number, row in enumerate(rows, start=first):
        draw_picture("circle", number).save(root / f"{number:02d}.png")
        lines.append(json.dumps({"file_name": f"{number:02d}.png", **row}))
    with (root / "metadata.jsonl").open("a") as file:
        file.write("\n".join(lines) + "\n")
    return root


def training(latents: Path, out: Path, **changes: Any):
    config = diffusion_config(latents, out, steps=1, sample_every=1, **changes)
    return config.model_copy(update={"preview_steps": 1})


@pytest.fixture(scope="module")
def world(pipeline, tmp_path_factory) -> World:
    root = tmp_path_factory.mktemp("sets")
    data = folder(root / "data", [words(row) for row in ROWS])
    settings = {"data": data, "ae": pipeline.ae, "out": root / "latents", "shard_size": 5}
    config = EncodeConfig.model_validate(settings | {"label_column": "kind,style"})
    latents = ldmkit.encode(config)
    assert latents is not None
    return World(data, latents, ldmkit.train_diffusion(training(latents, root / "ldm")))


def asked(world: World, **settings: Any) -> torch.Tensor:
    config = SampleConfig(model=world.ldm, **settings)
    model = ldmkit.load_diffusion(world.ldm).config
    found = asked_of(config, model, (4, 8, 8), None)
    return found.values(range(len(found.said)))["class"]


# data


def test_further_sets_are_stored_beside_the_first(world):
    manifest, latents = read_manifest(world.latents), LatentSet(world.latents)
    assert manifest.label_sets == SETS
    assert manifest.class_names == KIND
    assert manifest.recipe["labels"] == ["kind", "style"]
    assert torch.equal(latents.rows("labels", range(12)), torch.tensor(ROWS))
    assert latents.labels.tolist() == [kind for kind, _ in ROWS]
    assert np.array_equal(latents.labels_of_sets, np.array(ROWS))


def test_every_form_with_columns_has_them(tmp_path):
    (tmp_path / "csv").mkdir()
    (tmp_path / "parquet").mkdir()
    for number in range(3):
        draw_picture("square", number).save(tmp_path / "csv" / f"{number}.png")
    lines = ["file_name,style,kind", "0.png,oil,1", "1.png,flat,0", "2.png,,1"]
    (tmp_path / "csv" / "metadata.csv").write_text("\n".join(lines))
    pictures = [(tmp_path / "csv" / f"{number}.png").read_bytes() for number in range(3)]
    columns = {"image": pictures, "style": ["oil", "flat", None], "kind": [1, 0, 1]}
    pq.write_table(pa.table(columns), tmp_path / "parquet" / "a.parquet")
    for form in ("csv", "parquet"):
        config = SourceConfig.model_validate(
            {"data": tmp_path / form, "label_column": ["kind", "style"]}
        )
        source = open_source(config)
        assert [item.labels for item in source.items] == [(1, 1), (0, 0), (1, -1)]
        assert [item.label for item in source.items] == [1, 0, 1]
        assert [one.classes for one in source.label_sets] == [("0", "1"), ("flat", "oil")]
        plain = open_source(config.model_copy(update={"label_column": ("style",)}))
        assert plain.class_names == ("flat", "oil")
        assert [item.label for item in plain.items] == [1, 0, -1]
        assert plain.label_sets == ()
        assert plain.items[0].labels == ()
        with pytest.raises(DataError, match=r"no column kin \(--label-column\); did you mean kind"):
            open_source(config.model_copy(update={"label_column": ("style", "kin")}))


def test_added_pictures_continue_every_set(world, pipeline, tmp_path):
    data = folder(tmp_path / "data", [words(row) for row in ROWS[:4]])
    settings = {"data": data, "ae": pipeline.ae, "out": tmp_path / "latents"}
    config = EncodeConfig.model_validate(settings | {"label_column": ("kind", "style")})
    ldmkit.encode(config)
    folder(data, [{"kind": "ant", "style": "oil"}, {"kind": "dog", "style": "ink"}], first=4)
    out = ldmkit.encode(config.model_copy(update={"add": True}))
    assert out is not None
    sets = {one.name: one.classes for one in read_manifest(out).label_sets}
    assert sets == {"kind": (*KIND, "ant"), "style": (*STYLE, "ink")}
    assert LatentSet(out).labels_of_sets[4:].tolist() == [[2, 1], [1, 3]]
    for columns in (("style", "kind"), ("kind",)):
        with pytest.raises(DataError, match="made with another"):
            ldmkit.encode(config.model_copy(update={"label_column": columns}))


def test_a_changed_label_of_a_further_set_is_noticed(pipeline, tmp_path):
    data = folder(tmp_path / "data", [words(row) for row in ROWS[:4]])
    settings = {"data": data, "ae": pipeline.ae, "out": tmp_path / "latents"}
    config = EncodeConfig.model_validate(settings | {"label_column": "kind,style"})
    ldmkit.encode(config)
    table = data / "metadata.jsonl"
    table.write_text(table.read_text().replace('"photo"', '"flat"'))
    with pytest.raises(DataError, match="have changed"):
        ldmkit.encode(config)


def test_damaged_labels_of_a_further_set_are_refused(world, tmp_path):
    manifest = read_manifest(world.latents)
    (tmp_path / "latents").mkdir()
    for entry in manifest.shards:
        (tmp_path / "latents" / entry.name).symlink_to(world.latents / entry.name)
    fewer = (SETS[0], SETS[1].model_copy(update={"classes": STYLE[:2]}))
    changed = manifest.model_copy(update={"label_sets": fewer})
    write_manifest(tmp_path / "latents", changed)
    with pytest.raises(DataError, match="labels beyond its 2 classes"):
        LatentSet(tmp_path / "latents")


def test_check_counts_the_classes_of_every_set(world):
    config = {"data": world.data, "size": 32, "label_column": "kind,style"}
    report = ldmkit.check(CheckConfig.model_validate(config))
    counts = report["facts"]["classes"]
    assert counts == {
        "kind=cat": 6,
        "kind=dog": 6,
        "style=flat": 4,
        "style=oil": 3,
        "style=photo": 4,
    }
    (unlabelled,) = [one for one in report["findings"] if one["kind"] == "no label"]
    assert unlabelled["count"] == 1


# model


def test_a_model_is_told_all_sets_or_those_asked_for(world, tmp_path):
    (told,) = ldmkit.load_diffusion(world.ldm).config.conditions
    assert told == ClassCondition(names=KIND, sets=SETS)
    latents = LatentSet(world.latents)
    config = training(world.latents, tmp_path, classes={"sets": "style"})
    (style,) = conditions_of(config, latents)
    assert style == ClassCondition(names=STYLE, sets=SETS[1:])
    read = readers_of([style], config.options_of, latents)["class"]
    values = read(np.arange(12), torch.Generator())
    assert values[:, 0].tolist() == [style for _, style in ROWS]
    for one, tokens in ((style, 1), (told, 2)):
        model = build_diffusion(
            model_config(config, latents).model_copy(update={"conditions": (one,)})
        )
        conditioner = model.conditioners["class"]
        assert isinstance(conditioner, ClassConditioner)
        found = conditioner(torch.zeros(3, tokens, dtype=torch.int64)).tokens
        assert found is not None
        assert found.shape == (3, tokens, 16)
    with pytest.raises(DataError, match=r"--classes.sets hue: .* has the label sets kind, style"):
        conditions_of(training(world.latents, tmp_path, classes={"sets": "hue"}), latents)


def test_other_classes_than_the_models_are_refused(world):
    latents, options = LatentSet(world.latents), ConditioningConfig().options_of
    for sets in ((SETS[0], SETS[1].model_copy(update={"classes": ("a", "b", "c")})), SETS[::-1]):
        other = ClassCondition(names=sets[0].classes, sets=sets)
        if sets == SETS[::-1]:  # in another order they are the same sets
            values = readers_of([other], options, latents)["class"](np.arange(3), torch.Generator())
            assert values.tolist() == [[b, a] for a, b in ROWS[:3]]
        else:
            with pytest.raises(DataError, match="other classes than the model"):
                readers_of([other], options, latents)


def test_sets_are_dropped_together_and_each_alone(world, tmp_path):
    latents = LatentSet(world.latents)
    model = ldmkit.load_diffusion(world.ldm)
    rows = np.resize(np.arange(4), 4000)
    labels = torch.tensor([(0, 1)] * 4000)

    def share(together: float, alone: float) -> torch.Tensor:
        options = {"dropout": together, "set_dropout": alone}
        config = training(world.latents, tmp_path, classes=options)
        draw = torch.Generator().manual_seed(0)
        part = draw_batch(model, latents.read(rows), {"class": labels}, draw, config)
        missing = part.values["class"] < 0
        return torch.cat([missing.float().mean(0), missing.all(1).float().mean()[None]])

    assert share(0.0, 0.0).tolist() == [0.0, 0.0, 0.0]
    assert share(0.25, 0.0) == pytest.approx([0.25] * 3, abs=0.03)
    alone, both = 0.25 + 0.75 * 0.4, 0.25 + 0.75 * 0.16
    assert share(0.25, 0.4) == pytest.approx([alone, alone, both], abs=0.03)


def test_files_of_one_set_are_what_they_were(pipeline):
    page = json.loads((pipeline.latents / "manifest.json").read_text())
    assert page.keys().isdisjoint({"label_sets", "labelmap_colours"})
    assert "labels" not in page["columns"]
    assert "labels" not in page["recipe"]
    header, _ = load(pipeline.ldm, kind="diffusion")
    assert header.config["conditions"] == [
        {"kind": "class", "names": ["circle", "square"], "way": "tokens"}
    ]
    latents = LatentSet(pipeline.latents)
    assert latents.labels_of_sets.tolist() == [[label] for label in latents.labels]


# samples


def test_sets_are_named_by_options_lines_and_columns(world, tmp_path):
    rows = [[1, 2], [0, -1], [-1, 0], [-1, -1]]
    (tmp_path / "a.jsonl").write_text(
        '{"class": {"kind": "dog", "style": "photo"}}\n{"class": {"kind": 0}}\n'
        '{"class": {"kind": "none", "style": "FLAT"}}\n{"class": "none"}\n'
    )
    (tmp_path / "b.jsonl").write_text(
        '{"kind": "dog", "style": 2}\n{"class": {"kind": "cat"}, "style": null}\n'
        '{"style": "flat"}\n{}\n'
    )
    (tmp_path / "c.csv").write_text(
        'class,kind,style\n,dog,photo\n"{""kind"": ""cat""}",,\n,none,flat\nnone,,\n'
    )
    for name in ("a.jsonl", "b.jsonl", "c.csv"):
        assert asked(world, conditions=tmp_path / name).tolist() == rows, name
    assert asked(world, num=1, label=("kind=dog", "style=photo")).tolist() == [[1, 2]]
    turns = asked(world, num=4, label=("kind=dog", "style=oil", "kind=cat")).tolist()
    assert turns == [[1, 1], [0, 1], [1, 1], [0, 1]]
    assert asked(world, num=1, label=("style=none", "kind=1")).tolist() == [[1, -1]]
    assert asked(world, num=1, label=("none",)).tolist() == [[-1, -1]]
    everything = [[kind, style] for kind in range(2) for style in range(3)]
    assert asked(world, num=7).tolist() == [*everything, everything[0]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("dog",), r"--label dog: 'dog' names no label set .*: write \"kind=cat\", in JSON"),
        (("kind=dog", "flat"), r"name the label set of each class: write"),
        (("hue=red",), r"'hue=red' names no label set of this model \(kind, style\)"),
        (("style=dog",), r"style: 'dog' is no class; known are 0 flat, 1 oil"),
    ],
)
def test_what_is_said_wrongly_is_one_sentence(world, labels, message):
    with pytest.raises(UsageError, match=message):
        asked(world, label=labels)


def test_a_line_with_an_unknown_set_is_named(world, tmp_path):
    lines = {
        '{"class": {"hue": "red"}}': "'hue' is no label set of this model; it has kind, style",
        '{"class": "dog"}': "'dog' names no label set",
        '{"class": "dog", "style": "oil"}': "'dog' names no label set, and others are named",
    }
    for line, message in lines.items():
        (tmp_path / "a.jsonl").write_text(line)
        with pytest.raises(DataError, match=f"a.jsonl, line 1: {message}"):
            asked(world, conditions=tmp_path / "a.jsonl")


def test_one_named_set_is_told_with_or_without_its_name():
    config = ClassCondition(names=STYLE, sets=SETS[1:])
    for value in ("oil", {"style": "oil"}, 1):
        assert KINDS["class"].row(config, value).tolist() == [1]
    unnamed = ClassCondition(names=("a", "style=b"))
    assert KINDS["class"].row(unnamed, "style=b").tolist() == [1]


def test_commands_carry_the_sets_from_data_to_samples(run, world, tmp_path):
    out = tmp_path / "samples.safetensors"
    options = ["--label", "kind=cat", "--label", "style=flat", "--steps", "2", "-o", out]
    done = run("sample", world.ldm, "--num", "2", *options)
    assert done.returncode == 0, done.stderr
    _, tensors = load(out, kind="samples")
    assert bytes(tensors["told.bytes"].numpy()).decode() == '{"class": "cat flat"}' * 2
    done = run("sample", world.ldm, "--label", "flat", "-o", out)
    assert done.returncode == 2
    assert b"names no label set" in done.stderr
    text = as_text(ldmkit.inspect(InspectConfig(path=world.latents)))
    assert "classes: ['flat', 'oil', 'photo']" in text
    text = as_text(ldmkit.inspect(InspectConfig(path=world.ldm)))
    assert "classes: ['flat', 'oil', 'photo']" in text


def test_models_of_several_sets_are_not_exported(world):
    with pytest.raises(DataError, match=r"several label sets \(kind, style\)"):
        told_of(ldmkit.load_diffusion(world.ldm), "m.safetensors")
