"""What every kind of condition promises, on a latent set made here: null, order, use, round trip, errors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

import ldmkit
from conftest import SIZE, ae_config, diffusion_config
from ldmkit import terminal
from ldmkit.assembly import (
    build_diffusion,
    conditions_of,
    load_autoencoder,
    load_diffusion,
    save_diffusion,
)
from ldmkit.assembly import diffusion_config as model_config
from ldmkit.autoencoder_configs import AutoencoderLossConfig, DiscriminatorConfig
from ldmkit.conditioning.condition import Condition, replaced
from ldmkit.conditioning.frozen_image import embedded_pictures, read_shown
from ldmkit.conditioning.frozen_text import embedded
from ldmkit.conditioning.kinds import KINDS, readers_of, values_of
from ldmkit.conditioning.mask import fill_hole, mask_values
from ldmkit.configs import TrainDiffusionConfig
from ldmkit.data.images import read_images
from ldmkit.data.latent_set import LatentSet
from ldmkit.data.sources import open_source
from ldmkit.data_configs import EncodeConfig, SourceConfig
from ldmkit.decode_configs import DecodeConfig
from ldmkit.diffusion_configs import UNetConfig
from ldmkit.errors import DataError
from ldmkit.facts import DiffusionFacts
from ldmkit.generation_configs import SampleConfig
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.torchvision_import import import_torchvision

COUNT, TOWER = 24, "tiny-for-conditions"
NAMES = ("blue", "green", "red")
GROUNDS = ((250, 250, 250), (20, 20, 20))
UNET = UNetConfig(
    channels=16,
    multipliers=(1,),
    residual_blocks=1,
    attention_factors=(1,),
    head_channels=8,
    norm_groups=4,
    context_channels=16,
)
SETTINGS: dict[str, dict[str, Any]] = {
    "text": {
        "vocabulary": "own",
        "vocabulary_size": 300,
        "length": 12,
        "depth": 1,
        "heads": 2,
        "head_width": 8,
    },
    "layout": {"depth": 1, "heads": 2, "head_width": 8, "objects": 2, "vocabulary": 90},
    "image": {"hidden": 8},
}
"""Of the networks, small."""
FROZEN = {"embedded-text", "embedded-image"}
"""What a tower has to embed before a model can be told it."""


class World(NamedTuple):
    """Pictures, what is known of them, and their latents."""

    root: Path
    data: Path
    latents: LatentSet
    ae: Path
    weights: Path

    def lines(self) -> list[dict[str, Any]]:
        return [
            json.loads(line) for line in (self.data / "metadata.jsonl").read_text().splitlines()
        ]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A text and an image tower of random weights."""
    folder = tmp_path_factory.mktemp("tower")
    import_torchvision()
    import open_clip

    vision = {"image_size": 8, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    (folder / f"{TOWER}.json").write_text(
        json.dumps({"embed_dim": 12, "vision_cfg": vision, "text_cfg": text})
    )
    open_clip.add_model_config(folder)
    torch.manual_seed(4)
    model = open_clip.create_model(TOWER, pretrained=None, load_weights=False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)  # what differs between texts shows
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / "tower.safetensors")
    return folder / "tower.safetensors"


def draw_pictures(root: Path) -> Path:
    """A square of three colours at four places, on white or black; all of it is known."""
    data = root / "data"
    data.mkdir()
    (root / "maps").mkdir()
    lines = []
    for number in range(COUNT):
        colour, place = number % 3, number // 3 % 4
        ground = number // 12
        x, y = 2 + 14 * (place % 2), 2 + 14 * (place // 2)
        box = [x, y, x + 13, y + 13]
        name = f"{number:02d}.png"
        image, classes = (
            Image.new("RGB", (SIZE, SIZE), GROUNDS[ground]),
            Image.new("L", (SIZE, SIZE)),
        )
        ImageDraw.Draw(image).rectangle(box, fill=NAMES[colour])
        ImageDraw.Draw(classes).rectangle(box, fill=colour + 1)
        image.save(data / name)
        classes.save(root / "maps" / name)
        where = f"{['upper', 'lower'][place // 2]} {['left', 'right'][place % 2]}"
        line = {"file_name": name, "label": NAMES[colour], "lightness": ground * 2.0 - place}
        line["text"] = f"{NAMES[colour]} {where} on {['white', 'black'][ground]}"
        line["objects"] = {"bbox": [[x, y, 14, 14]], "categories": [NAMES[colour]]}
        lines.append(json.dumps(line))
    (data / "metadata.jsonl").write_text("\n".join(lines))
    return data


@pytest.fixture(scope="module")
def world(tmp_path_factory, weights) -> World:
    terminal.be_quiet(True)
    root = tmp_path_factory.mktemp("world")
    data = draw_pictures(root)
    plain = {
        "loss": AutoencoderLossConfig(perceptual="none"),
        "disc": DiscriminatorConfig(weight=0),
    }
    ae = ldmkit.train_ae(ae_config(data, root / "ae", steps=1, **plain))
    asked = {"labelmaps": root / "maps", "lowres": 2, "scalars": ("lightness",), "holes": "boxes"}
    asked |= {
        "text_encoder": TOWER,
        "text_weights": weights,
        "text_output": "pooled",
        "image_encoder": TOWER,
        "image_weights": weights,
        "shard_size": 10,
        "dtype": "float32",
    }
    out = ldmkit.encode(
        EncodeConfig.model_validate({"data": str(data), "ae": ae, "out": root / "latents"} | asked)
    )
    assert out is not None
    return World(root, data, LatentSet(out), ae, weights)


def training(world: World, *kinds: str, **changes: Any) -> TrainDiffusionConfig:
    settings = {
        "condition": kinds,
        "unet": UNET,
        "parameterization": "x0",
        **{name: SETTINGS[name] for name in kinds if name in SETTINGS},
    }
    return diffusion_config(world.latents.directory, world.root / "ldm", **(settings | changes))


def fresh(world: World, *kinds: str) -> tuple[LatentDiffusion, dict[str, Tensor]]:
    """A model that is told these, and the values of the whole set."""
    config = training(world, *kinds)
    torch.manual_seed(0)
    model = build_diffusion(model_config(config, world.latents))
    model.set_whitening(world.latents.manifest.whitening)
    for kind, conditioner in model.conditioners.items():
        KINDS[kind].start(conditioner, world.latents)
    readers = readers_of(model.config.conditions, config.options_of, world.latents)
    values = values_of(readers, np.arange(COUNT), torch.Generator().manual_seed(1))
    return model, model.received(values)


def config_of(world: World, kind: str) -> Any:
    return conditions_of(training(world, kind), world.latents)[0]


def assert_alike(one: Condition, other: Condition) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert torch.allclose(a, b, atol=1e-5)


def rows_of(condition: Condition, rows: Tensor) -> Condition:
    return Condition(*(None if part is None else part[rows] for part in condition))


@pytest.mark.parametrize("kind", KINDS)
def test_the_null_is_what_dropped_rows_get(world, kind):
    model, values = fresh(world, kind)
    empty = model.empty(values)
    drop = torch.arange(COUNT) % 3 == 0
    mixed = model.condition({kind: replaced(values[kind], empty[kind], drop)})
    null = model.condition(empty)
    assert_alike(rows_of(mixed, drop), rows_of(null, drop))
    assert_alike(rows_of(mixed, ~drop), rows_of(model.condition(values), ~drop))
    for part in null:  # it says nothing: the same for all
        assert part is None or torch.allclose(part, part[:1].expand_as(part), atol=1e-5)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.silence is not None])
def test_who_says_nothing_gets_the_null(world, kind):
    model, _ = fresh(world, kind)
    config = config_of(world, kind)
    if kind == "embedded-text":
        said = embedded(config, [KINDS[kind].silence], world.weights)
    elif kind == "embedded-image":
        said = embedded_pictures(config, [None], None)
    else:
        said = KINDS[kind].row(config, KINDS[kind].silence)[None]
    null = model.empty({kind: said})
    assert_alike(model.condition({kind: said}), model.condition(null))


@pytest.mark.parametrize("kind", KINDS)
def test_permuting_the_batch_permutes_the_result(world, kind):
    model, values = fresh(world, kind)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(2))
    turned = model.condition({kind: values[kind][order]})
    assert_alike(turned, rows_of(model.condition(values), order))


@pytest.mark.parametrize("kind", KINDS)
def test_the_condition_matters(world, kind):
    """A model that has learnt for a moment denoises better with the right condition than another's."""
    model, values = fresh(world, kind)
    latents = world.latents.read(range(COUNT)).mean.float()
    latents = (latents - latents.mean(0)) / latents.std()  # what tells them apart, as large as 1
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def loss(values: dict[str, Tensor], rows: Tensor, generator: torch.Generator) -> Tensor:
        sigma = 1.0 + 4.0 * torch.rand(len(rows), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        noisy = latents[rows] + sigma.view(-1, 1, 1, 1) * noise
        told = model.condition({name: value[rows] for name, value in values.items()})
        return (model.denoise(noisy, sigma, told) - latents[rows]).square().mean()

    for _ in range(100 if kind in FROZEN else 60):  # a frozen tower says it faintly
        rows = torch.randint(COUNT, (16,), generator=generator)
        optimizer.zero_grad()
        loss(values, rows, generator).backward()
        optimizer.step()
    wrong = {kind: values[kind].roll(7, 0)}  # another colour, place and, of most, ground
    everything = torch.arange(COUNT).repeat(2)
    with torch.no_grad():
        right, other = (
            float(loss(told, everything, torch.Generator().manual_seed(4)))
            for told in (values, wrong)
        )
    assert right < 0.97 * other


def as_typed(world: World, kind: str, number: int, scratch: Path) -> Any:
    """What a user would say of one picture."""
    line = world.lines()[number]
    if kind in ("lowres", "image"):
        pixels = world.latents.rows("lowres", [number])[0].movedim(0, 2).numpy()
        Image.fromarray(pixels).save(scratch / "small.png")
        return str(scratch / "small.png")
    (box,) = line["objects"]["bbox"]
    return {
        "class": line["label"],
        "text": line["text"],
        "layout": [{"label": line["label"], "box": [side / SIZE for side in box]}],
        "labelmap": str(world.root / "maps" / line["file_name"]),
        "scalars": {"lightness": line["lightness"]},
    }[kind]


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {*FROZEN, "mask"}))
def test_what_a_set_holds_is_what_a_user_would_say(world, kind, tmp_path):
    _, values = fresh(world, kind)
    for number in (0, 7, 23):  # of three shards
        row = KINDS[kind].row(config_of(world, kind), as_typed(world, kind, number, tmp_path))
        assert torch.allclose(row.float(), values[kind][number].float(), atol=1e-5)


def test_embedded_captions_of_a_set_are_those_of_the_tower(world):
    _, values = fresh(world, "embedded-text")
    texts = [line["text"] for line in world.lines()]
    found = embedded(config_of(world, "embedded-text"), texts, world.weights)
    assert torch.allclose(found, values["embedded-text"], atol=2e-3)


def test_embedded_pictures_of_a_set_are_those_of_the_tower(world):
    model, values = fresh(world, "embedded-image")
    config = config_of(world, "embedded-image")
    files = [world.data / line["file_name"] for line in world.lines()]
    shown = [read_shown(config, file) for file in files]
    found = embedded_pictures(config, [shown[0], None, *shown[1:]], world.weights)
    assert torch.allclose(found[[0, *range(2, COUNT + 1)]], values["embedded-image"], atol=2e-3)
    assert not found[1].any()
    assert not model.empty(values)["embedded-image"].any(), "the null is zeros"


def test_holes_of_a_set_are_those_of_its_pictures(world):
    model, values = fresh(world, "mask")
    autoencoder = load_autoencoder(world.ae)
    images = read_images(
        open_source(SourceConfig(data=str(world.data))).items,
        ae_config(world.data, world.root).preprocessing,
    )
    holes = world.latents.rows("hole", range(COUNT)).bool()
    assert 0.01 <= holes.float().mean() <= 0.6
    with torch.no_grad():
        masked = autoencoder.encode(fill_hole(images, holes, "ldm")).mean
    expected = model.received({"mask": mask_values(masked, holes)})
    assert (values["mask"] - expected["mask"]).norm() <= 0.01 * expected["mask"].norm()


def save_model(world: World, path: Path, *kinds: str) -> Path:
    model, _ = fresh(world, *kinds)
    manifest = world.latents.manifest
    facts = DiffusionFacts(
        fingerprint="",
        autoencoder=manifest.recipe["autoencoder"],
        latent_shape=manifest.latent_shape,
        whitening=manifest.whitening,
        trained={},
        versions={},
    )
    save_diffusion(path, model, facts)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_file_is_told_the_same(world, kind, tmp_path):
    model, values = fresh(world, kind)
    again = load_diffusion(save_model(world, tmp_path / "model.safetensors", kind))
    assert again.config == model.config
    assert_alike(again.condition(values), model.condition(values))
    assert_alike(again.condition(again.empty(values)), model.condition(model.empty(values)))


def test_only_the_hole_is_painted_where_a_set_keeps_its_pictures(world, tmp_path):
    latents = ldmkit.encode(
        EncodeConfig(
            data=str(world.data),
            ae=world.ae,
            out=tmp_path / "kept",
            holes="boxes",
            keep_pictures=True,
            dtype="float32",
        )
    )
    model = save_model(world, tmp_path / "model.safetensors", "mask")
    samples, out = tmp_path / "samples.safetensors", tmp_path / "out"
    config = SampleConfig(model=model, like=latents, num=3, steps=1, out=samples)
    ldmkit.sample(config)
    ldmkit.decode(DecodeConfig(samples=samples, ae=world.ae, out=out))
    kept = LatentSet(tmp_path / "kept")
    painted = [np.asarray(Image.open(path)) for path in sorted(out.glob("0*.png"))]
    assert len(painted) == 3
    for number, found in enumerate(painted):
        picture = kept.rows("image", [number])[0].movedim(0, 2).numpy()
        hole = kept.rows("hole", [number])[0].bool().numpy()
        assert np.array_equal(found[~hole], picture[~hole])
        assert not np.array_equal(found[hole], picture[hole])


def test_previews_show_the_boxes_that_they_were_told(world, tmp_path, monkeypatch):
    from ldmkit.recipes import train_diffusion as recipe

    config = training(world, "layout", preview_steps=1)
    model, _ = fresh(world, "layout")
    readers = readers_of(model.config.conditions, config.options_of, world.latents)
    data = recipe.Data(world.latents, [np.arange(COUNT)], readers, None)
    drawn = recipe.preview(model, load_autoencoder(world.ae), data, config)
    monkeypatch.setattr(recipe, "draw_boxes", lambda pixels, boxes, names: pixels)
    plain = recipe.preview(model, load_autoencoder(world.ae), data, config)
    changed = (drawn != plain).any(1)
    for picture, index in enumerate(
        world.latents.in_turns(np.arange(COUNT)).tolist()[: len(plain)]
    ):
        _, x0, y0, *_ = (world.latents.boxes(index)[0] * (SIZE - 1)).astype(int)
        assert changed[picture, y0 : y0 + 2, x0 : x0 + 2].any(), "the corner of its first box"
        assert not changed[picture].all()


def grey(size: int, value: int = 0, mode: str = "L") -> Callable[[Path], str]:
    def write(scratch: Path) -> str:
        Image.new(mode, (size, size), value).save(scratch / "given.png")
        return str(scratch / "given.png")

    return write


BAD: list[tuple[str, Any, str]] = [
    ("class", "purple", "'purple' is no class; known are 0 blue, 1 green, 2 red"),
    ("class", 3, "'3' is no class"),
    ("class", -2, "is no class"),
    ("text", 7, "a caption must be text"),
    ("text", "a" * 20_000, "caption"),
    ("layout", [{"label": "red", "box": [0.5, 0.5, 0.6, 0.2]}], "does not lie within a picture"),
    ("layout", [{"label": "red", "box": [0.5, 0.5, 0.0, 0.2]}], "has no area"),
    ("layout", [{"label": "mauve", "box": [0.1, 0.1, 0.2, 0.2]}], "is no class"),
    ("layout", [{"label": "red", "box": [0.1, 0.1, "x", 0.2]}], "not four numbers"),
    ("layout", {"label": "red"}, "boxes are a list"),
    ("layout", "red", "layout is no JSON"),
    ("labelmap", grey(SIZE, 9), "the class 9 at x = 0, y = 0: classes are 0 to 3"),
    ("labelmap", grey(16), "16 x 16 pixels; the model takes 32 x 32"),
    ("labelmap", grey(30), "30 x 30 pixels; the model takes 32 x 32"),
    ("labelmap", grey(SIZE, 0, "RGB"), "a label map is a grey or palette picture"),
    ("labelmap", "nowhere.png", "nowhere.png is not there"),
    ("lowres", grey(8, 0, "RGB"), "8 x 8 pixels; the model takes 16 x 16"),
    ("lowres", "nowhere.png", "nowhere.png is not there"),
    ("mask", "hole.png", "encode with --holes given, then --like SET"),
    ("scalars", {"weight": 1}, "'weight' is no scalar of this model; it knows lightness"),
    ("scalars", {"lightness": "bright"}, "which is not a number"),
    ("scalars", {"lightness": 1e999}, "give a finite number"),
    ("scalars", 3, "lightness"),
    ("image", "nowhere.png", "nowhere.png is not there"),
    ("embedded-image", "nowhere.png", "nowhere.png is not there"),
    ("image", lambda scratch: grey(16)(scratch) and str(scratch), "is not there"),
]


@pytest.mark.parametrize(("kind", "value", "message"), BAD)
def test_a_bad_value_is_one_sentence(world, kind, value, message, tmp_path, run):
    model = save_model(world, tmp_path / "model.safetensors", kind)
    value = value(tmp_path) if callable(value) else value
    lines = tmp_path / "asked.jsonl"
    lines.write_text(json.dumps({kind: value}))
    done = run("sample", model, "--conditions", lines, "-o", tmp_path / "out.safetensors")
    text = done.stderr.decode()
    assert (done.returncode, len(text.strip().splitlines())) == (3, 1), text
    assert message in text
    assert str(lines) in text
    assert not (tmp_path / "out.safetensors").exists()


def test_every_kind_that_a_user_can_say_has_a_bad_value():
    assert {kind for kind, _, _ in BAD} == set(KINDS) - {"embedded-text"}


def test_what_is_typed_wrongly_is_a_matter_of_usage(world, tmp_path, run):
    model = save_model(world, tmp_path / "model.safetensors", "class")
    embedding = save_model(world, tmp_path / "embedding.safetensors", "embedded-text")
    shown = save_model(world, tmp_path / "shown.safetensors", "embedded-image")
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"image": str(world.data / "00.png")}))
    out = ("-o", tmp_path / "out.safetensors")
    for arguments, message in (
        ((model, "--label", "purple"), "'purple' is no class"),
        ((model, "--prompt", "a dog"), "was trained without text"),
        ((embedding, "--prompt", "a dog"), "--text-weights"),
        ((shown, "--conditions", lines), "--image-weights"),
    ):
        done = run("sample", *arguments, *out)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr.decode()


def other_set(
    world: World, root: Path, change: Callable[[list[dict[str, Any]]], None], **asked: Any
):
    """The latents of the same pictures, with something else said of them."""
    data = root / "data"
    data.mkdir()
    lines = world.lines()[:4]
    change(lines)
    for line in lines:
        (data / line["file_name"]).write_bytes((world.data / line["file_name"]).read_bytes())
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = {"data": str(data), "ae": world.ae, "out": root / "latents"} | asked
    out = ldmkit.encode(EncodeConfig.model_validate(settings))
    assert out is not None
    return LatentSet(out)


def without_caption(lines: list[dict[str, Any]]) -> None:
    lines[1]["text"] = ""


def without_anything(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        for name in ("text", "label", "objects"):
            del line[name]


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_without_the_condition_is_one_sentence(world, kind, tmp_path):
    bare = other_set(world, tmp_path, without_anything)
    with pytest.raises(DataError, match=r"has (no|none)") as caught:
        model_config(training(world, kind), bare)
    assert str(bare.directory) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_values_in_the_data_are_one_sentence(world, tmp_path):
    silent = other_set(world, tmp_path, without_caption)
    config = training(world, "text")
    with pytest.raises(
        DataError, match=r"1 of 4 latents .* have no caption, the first of them 01.png"
    ):
        readers_of(conditions_of(config, silent), config.options_of, silent)
    few = training(world, "labelmap", labelmap={"classes": 2})
    readers = readers_of(conditions_of(few, world.latents), few.options_of, world.latents)
    with pytest.raises(DataError, match=r"has id [23], and the model knows 2 classes"):
        values_of(readers, np.arange(COUNT), torch.Generator())
    holes = tmp_path / "holes"
    holes.mkdir()
    for line in world.lines():
        Image.new("L", (16, 16), 255).save(holes / line["file_name"])
    asked = {"holes": "given", "hole_masks": holes}
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="16 x 16 pixels and its picture 32 x 32"):
        other_set(world, tmp_path / "other", lambda lines: None, **asked)


def test_a_set_of_another_size_is_one_sentence(world, tmp_path, run):
    model = save_model(world, tmp_path / "model.safetensors", "lowres")
    small = other_set(world, tmp_path, lambda lines: None, size=16, lowres=2)
    done = run("sample", model, "--like", small.directory, "-o", tmp_path / "out.safetensors")
    assert done.returncode == 3
    assert b"has latents of (4, 4, 4); the samples are to be (4, 8, 8)" in done.stderr


def test_several_conditions_stand_beside_each_other(world):
    model, values = fresh(world, *KINDS)
    together = model.condition(values)
    parts = {kind: fresh(world, kind) for kind in KINDS}
    channels = sum(one.config.conditions[0].channels for one, _ in parts.values())
    assert together.channels is not None
    assert together.channels.shape[1] == channels
    silent = model.empty(values)
    for kind in KINDS:  # each may be left out by itself, and changes its own part alone
        less = model.condition(values | {kind: silent[kind]})
        changed = [
            a is not None and b is not None and not torch.allclose(a, b, atol=1e-4)
            for a, b in zip(together, less, strict=True)
        ]
        assert any(changed), kind
