"""Boxes as ids against numbers computed by hand, and the transformer over them against torch's."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ldmkit.conditioning.box_lists import boxes_of_json, draw_boxes
from ldmkit.conditioning.layout import (
    PAPER,
    WHOLE,
    LayoutConditioner,
    LayoutFormat,
    boxes_of_layout,
    boxes_of_rows,
    corner_id,
    corner_waves,
    layout_of_boxes,
    shuffled_objects,
)
from ldmkit.conditioning.token_transformer import TokenTransformer
from ldmkit.data.former_set import written_shard
from ldmkit.data.items import Box, Item, Source, Span
from ldmkit.data.latent_set import LatentSet
from ldmkit.data.latents import (
    Row,
    box_columns,
    build_manifest,
    moments_of,
    shard_name,
    shard_tensors,
)
from ldmkit.facts import ShardFacts
from ldmkit.manifest import write_manifest
from ldmkit.modelfile import save

SMALL = LayoutFormat(3, 30)  # a grid of 5 x 5 points, 29 means none
NAMES = ("Cat", "dog", "7")


@st.composite
def boxes(draw, most=30):
    edges = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)
    count = draw(st.integers(0, most))
    found = []
    for _ in range(count):
        (x0, x1), (y0, y1) = draw(edges), draw(edges)
        found.append(Box(draw(st.integers(0, 8190)), x0, y0, x1, y1))
    return found


def test_the_papers_format_has_92_ids():
    assert (PAPER.length, PAPER.none, PAPER.sections) == (92, 8191, 90)
    assert SMALL == (3, 30)
    assert (SMALL.length, SMALL.none, SMALL.sections) == (11, 29, 5)


def test_ids_equal_those_computed_by_hand():
    found = layout_of_boxes([Box(17, 0.25, 0.5, 0.75, 1.0), Box(3, 0.0, 0.0, 1.0, 0.1)])
    # 0.25 * 89 = 22.25, 0.5 * 89 = 44.5 (half to even, as the paper's code), 0.75 * 89 = 66.75
    first = [17, 44 * 90 + 22, 89 * 90 + 67]
    second = [3, 0, 9 * 90 + 89]  # 0.1 * 89 = 8.9
    assert found.ids.tolist() == [*first, *second, *[8191] * 84, 0, 89 * 90 + 89]
    assert found.ids.dtype == torch.int64
    assert found.dropped == 0
    cropped = layout_of_boxes([], SMALL, crop=(0.25, 0.0, 1.0, 0.5))
    assert cropped.ids.tolist() == [29] * 9 + [1, 14]


def test_a_corner_is_row_times_sections_plus_column():
    assert corner_id(0.0, 0.0, 90) == 0
    assert corner_id(1.0, 0.0, 90) == 89
    assert corner_id(0.0, 1.0, 90) == 8010
    assert corner_id(1.0, 1.0, 90) == 8099


@given(boxes())
def test_boxes_come_back_within_half_a_cell(given_boxes):
    back, crop = boxes_of_layout(layout_of_boxes(given_boxes).ids)
    assert crop == WHOLE
    assert [box.category for box in back] == [box.category for box in given_boxes]
    for box, other in zip(back, given_boxes, strict=True):
        assert max(abs(a - b) for a, b in zip(box[1:], other[1:], strict=True)) <= 0.5 / 89 + 1e-9


@given(boxes(most=30))
def test_what_came_back_stays_as_it_is(given_boxes):
    ids = layout_of_boxes(given_boxes).ids
    again = layout_of_boxes(boxes_of_layout(ids)[0]).ids
    assert torch.equal(ids, again)


def test_the_largest_stay_in_their_order():
    sides = (0.1, 0.5, 0.3, 0.9, 0.3)
    found = layout_of_boxes([Box(n, 0.0, 0.0, s, s) for n, s in enumerate(sides)], SMALL)
    assert found.dropped == 2
    assert [box.category for box in boxes_of_layout(found.ids, SMALL)[0]] == [1, 2, 3]


def test_shuffling_keeps_objects_whole_and_the_rest_in_place(generator):
    rows = [[Box(n, 0.0, 0.0, 0.1 * (n + 1), 1.0) for n in range(count)] for count in (0, 1, 7, 30)]
    values = torch.stack([layout_of_boxes(row).ids for row in rows])
    moved = shuffled_objects(values, generator)
    for before, after in zip(values, moved, strict=True):
        assert torch.equal(after[-2:], before[-2:])
        assert sorted(after[:-2].view(30, 3).tolist()) == sorted(before[:-2].view(30, 3).tolist())
        count = int((before[:-2:3] != 8191).sum())
        assert (after[: 3 * count] != 8191).all()
    assert not torch.equal(moved[3], values[3])
    again = shuffled_objects(values, torch.Generator().manual_seed(0))
    assert torch.equal(moved, again)


def test_every_place_is_as_likely(generator):
    row = layout_of_boxes([Box(n, 0.0, 0.0, 1.0, 1.0) for n in range(3)], SMALL).ids
    first = shuffled_objects(row.repeat(6000, 1), generator, SMALL)[:, 0]
    shares = torch.bincount(first, minlength=3) / 6000
    assert (shares - 1 / 3).abs().max() < 0.02


def test_boxes_of_a_latent_set_come_back():
    stored = (Box(1, 0.0, 0.25, 0.5, 1.0), Box(0, 0.5, 0.5, 0.75, 0.75))
    columns = box_columns([(), stored])
    low, high = columns["boxes.offsets"].tolist()[1:]
    assert boxes_of_rows(columns["boxes.values"][low:high], 2) == stored


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([2.0, 0.0, 0.0, 1.0, 1.0], "class 2, and there are 2"),
        ([0.5, 0.0, 0.0, 1.0, 1.0], r"class 0\.5"),
        ([math.nan, 0.0, 0.0, 1.0, 1.0], "class nan"),
        ([0.0, 0.5, 0.0, 0.5, 1.0], "none in shares"),
        ([0.0, 0.0, 0.0, 1.5, 1.0], "none in shares"),
        ([0.0, 0.0, math.nan, 1.0, 1.0], "none in shares"),
    ],
)
def test_bad_rows_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        boxes_of_rows(torch.tensor([row]), 2)


def test_json_in_shares_and_in_pixels():
    objects = [{"label": "DOG", "box": [0.25, 0.5, 0.5, 0.25]}, {"label": 0, "box": [0, 0, 1, 1]}]
    expected = (Box(1, 0.25, 0.5, 0.75, 0.75), Box(0, 0.0, 0.0, 1.0, 1.0))
    assert boxes_of_json(objects, NAMES) == expected
    pixels = [{"label": "dog", "box": [10, 10, 20, 5]}, {"label": "cat", "box": [0, 0, 40, 20.001]}]
    assert boxes_of_json(pixels, NAMES, (40, 20)) == expected
    assert boxes_of_json([], NAMES) == ()
    assert boxes_of_json([{"label": "7", "box": [0, 0, 1, 1]}], NAMES)[0].category == 2


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"label": "dog"}, "boxes are a list"),
        ([[0, 0, 1, 1]], "box 1 must have"),
        ([{"label": "dog"}], "box 1 must have"),
        ([{"label": "dog", "box": [0, 0, 1, 1], "score": 1}], "nothing else"),
        ([{"label": "bird", "box": [0, 0, 1, 1]}], "'bird' is no class; known are 0 Cat, 1 dog"),
        ([{"label": 3, "box": [0, 0, 1, 1]}], "'3' is no class"),
        ([{"label": True, "box": [0, 0, 1, 1]}], "'True' is no class"),
        ([{"label": "none", "box": [0, 0, 1, 1]}], "has no class"),
        ([{"label": "dog", "box": [0, 0, 1]}], "not four numbers"),
        ([{"label": "dog", "box": [0, 0, 1, "1"]}], "not four numbers"),
        ([{"label": "dog", "box": [0, 0, 1, math.inf]}], "not four numbers"),
        ([{"label": "dog", "box": [0, 0, 0, 1]}], "no area: its width is 0"),
        ([{"label": "dog", "box": [0.5, 0.5, 0.6, 0.1]}], "does not lie within"),
        ([{"label": "dog", "box": [10, 10, 20, 5]}], "give the picture's size"),
        ([{"label": "dog", "box": [1.0, 0.0, 0.0005, 0.5]}], "outside the picture"),
    ],
)
def test_bad_json_is_one_sentence(objects, message):
    with pytest.raises(ValueError, match=message) as raised:
        boxes_of_json(objects, NAMES)
    assert "\n" not in str(raised.value)


def test_a_class_without_a_token_and_foreign_ids_are_refused():
    with pytest.raises(ValueError, match="class 29 has no token"):
        layout_of_boxes([Box(29, 0.0, 0.0, 1.0, 1.0)], SMALL)
    with pytest.raises(ValueError, match="11"):
        boxes_of_layout(torch.zeros(92, dtype=torch.int64), SMALL)
    with pytest.raises(ValueError, match="not a class and two corners"):
        boxes_of_layout(torch.tensor([1, 0, 25, *[29] * 6, 0, 24]), SMALL)
    for objects, vocabulary in ((0, 30), (3, 25), (3, 3)):
        with pytest.raises(ValueError, match="no square number"):
            LayoutConditioner(8, objects=objects, vocabulary=vocabulary, depth=1)


@pytest.mark.parametrize(("sections", "width"), [(2, 8), (10, 128), (90, 30)])
def test_near_corners_begin_alike(sections, width):
    waves = corner_waves(sections, width)
    assert waves.shape == (sections**2, width)
    assert torch.allclose(waves.square().sum(1), torch.full((sections**2,), 4.0 * (width // 4)))
    alike = (waves @ waves.T).view(sections, sections, sections, sections)[0, 0]
    x, y = (corner_id(*place, sections) for place in ((1.0, 0.0), (0.0, 1.0)))
    assert alike[0, 0] > alike[0, 1] > alike[-1, -1]
    assert torch.allclose(alike, alike.T, atol=1e-3)  # x and y count alike
    assert len({tuple(row) for row in waves[[0, x, y]].tolist()}) == 3


def test_embeddings_begin_as_large_as_what_blocks_add_to():
    model = LayoutConditioner(16, depth=1, heads=2, head_width=8)
    parts = (model.encoder.token_embedding, model.encoder.position_embedding)
    assert all(part.weight.std() > 0.9 for part in parts)


def test_drawing_changes_the_outline_and_nothing_else():
    pictures = torch.zeros(2, 3, 40, 60, dtype=torch.uint8)
    drawn = draw_boxes(pictures, [[Box(0, 0.0, 0.0, 1.0, 1.0)], []], [" "])
    assert not pictures.any()
    assert not drawn[1].any()
    edge = torch.ones(40, 60, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    assert (drawn[0, 0][edge] == 255).all()
    assert not drawn[0][:, ~edge].any()
    named = draw_boxes(pictures, [[Box(0, 0.0, 0.0, 1.0, 1.0)], []], ["cat"])
    assert named[0][:, ~edge].any()
    with pytest.raises(ValueError, match="2 pictures and 1 lists"):
        draw_boxes(pictures, [[]], [])


def test_the_papers_transformer_has_its_size():
    with torch.device("meta"):
        conditioner = LayoutConditioner(512)
    # the published 58,858,496 are with an output layer of 8192, which nothing uses
    count = sum(parameter.numel() for parameter in conditioner.parameters())
    assert count == 58_858_496 - (512 * 8192 + 8192)


def test_the_transformer_equals_torchs():
    width, heads = 24, 3
    encoder = TokenTransformer(30, 11, width, depth=2, heads=heads, head_width=width // heads)
    layer = nn.TransformerEncoderLayer(
        *(width, heads, 4 * width),
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    reference = nn.TransformerEncoder(
        layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False
    )
    renamed = {}
    for name, value in encoder.state_dict().items():
        for ours, theirs in {
            "blocks": "layers",
            "attention.to_out": "self_attn.out_proj",
            "expand": "linear1",
            "contract": "linear2",
            "norm": "norm",
        }.items():
            name = name.replace(ours, theirs)
        renamed[name] = value + torch.rand_like(value)  # norms are ones and zeros at first
    back = dict(zip(encoder.state_dict(), renamed.values(), strict=True))
    encoder.load_state_dict(back)
    tokens, positions = (renamed.pop(f"{kind}_embedding.weight") for kind in ("token", "position"))
    for number in range(2):
        parts = [renamed.pop(f"layers.{number}.attention.to_{name}.weight") for name in "qkv"]
        renamed[f"layers.{number}.self_attn.in_proj_weight"] = torch.cat(parts)
        renamed[f"layers.{number}.self_attn.in_proj_bias"] = torch.zeros(3 * width)
    reference.load_state_dict(renamed)
    ids = torch.randint(30, (4, 11), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(encoder(ids), reference(tokens[ids] + positions), atol=1e-5)


def test_boxes_are_counted_without_reading_them(tmp_path):
    generator = np.random.default_rng(0)
    counts = [0, 3, 1, 40, 2, 0, 0]
    recipe = {"autoencoder": "a" * 64}
    written = []
    for number, rows in enumerate((counts[:4], counts[4:])):
        boxes = [[Box(0, 0.1, 0.1, 0.5, 0.6)] * count for count in rows]
        keys = [str(generator.integers(1 << 40)) for _ in rows]
        items = [Item(key, Span("a", 0, 1)) for key in keys]
        mean = torch.zeros(len(rows), 1, 2, 2)
        table = [Row(item, 0, ()) for item in items]
        facts = ShardFacts(
            fingerprint="",
            recipe=recipe,
            items="",
            start=0,
            stop=len(rows),
            skipped=(),
            converted={},
            moments=moments_of(mean, None),
        )
        path = tmp_path / shard_name(number)
        tensors = shard_tensors(mean, None, table, box_columns(boxes))
        save(path, tensors, kind="latents", config={}, facts=facts.model_dump(mode="json"))
        written.append(written_shard(path, recipe))
    source = Source([], (), ("thing",))
    write_manifest(tmp_path, build_manifest(recipe, source, (1, 2, 2), written))
    latents = LatentSet(tmp_path)
    assert latents.box_counts().tolist() == counts
    assert [len(latents.boxes(index)) for index in range(len(counts))] == counts
