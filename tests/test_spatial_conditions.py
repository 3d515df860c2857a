"""Conditions that are pictures: label maps, low-resolution pictures, masks."""

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldmkit.conditioning.condition import replaced
from ldmkit.conditioning.labelmap import LabelMapConditioner, class_shares, parse_labelmap
from ldmkit.conditioning.lowres import LowResConditioner, augmented, parse_lowres
from ldmkit.conditioning.mask import (
    MaskConditioner,
    blended,
    fill_hole,
    mask_values,
    to_latent_size,
)
from ldmkit.data.masks import random_hole
from ldmkit.diffusion.schedule import build_schedule
from ldmkit.diffusion_configs import ScheduleConfig

CLASSES = 7


def holes(count: int, height: int, width: int) -> torch.Tensor:
    drawn = [random_hole(np.random.default_rng(seed), height, width) for seed in range(count)]
    return torch.from_numpy(np.stack(drawn))


def conditioner(name: str) -> tuple[Any, torch.Tensor]:
    """A conditioner and values for a batch of four, as a data set would give them."""
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    if name == "labelmap":
        maps = torch.randint(0, CLASSES + 1, (4, 16, 24), generator=draw)
        return LabelMapConditioner(CLASSES, 3, 2), maps
    if name == "lowres":
        pictures, noise = torch.randn(2, 4, 3, 4, 6, generator=draw).clamp(-1, 1)
        levels = torch.tensor([0.0, 0.2, 0.7, 1.0])
        return LowResConditioner(3, 32, ratio=4, factor=4), augmented(pictures, levels, noise)
    latents = torch.randn(4, 4, 4, 6, generator=draw)
    return MaskConditioner(4, "ldm" if name == "ldm" else "sd"), mask_values(
        latents, holes(4, 16, 24)
    )


NAMES = ("labelmap", "lowres", "ldm", "sd")


@pytest.mark.parametrize("name", NAMES)
def test_dropped_rows_are_the_null(name):
    model, values = conditioner(name)
    nothing = model.empty(values)
    assert nothing.shape == values.shape
    assert nothing.dtype == values.dtype
    drop = torch.tensor([True, False, True, False])
    mixed, told, silent = model(replaced(values, nothing, drop)), model(values), model(nothing)
    for one, if_told, if_not in zip(mixed, told, silent, strict=True):
        assert (one is None) == (if_told is None) == (if_not is None)
        if one is not None:
            assert torch.allclose(one[drop], if_not[drop], atol=1e-6)
            assert torch.allclose(one[~drop], if_told[~drop], atol=1e-6)
    assert mixed.channels.shape == (4, model.channels, 4, 6)
    # it says nothing: the same for every row, and other than any row that says something
    null = model(nothing).channels
    assert torch.allclose(null[:1].expand_as(null), null)
    for row in range(4):
        assert not torch.allclose(null[row], model(values).channels[row], atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_rows_go_their_own_way(name):
    model, values = conditioner(name)
    whole = model(values)
    order = torch.tensor([2, 0, 3, 1])
    turned = model(values[order])
    alone = model(values[1:2])
    for ways in zip(whole, turned, alone, strict=True):
        if ways[0] is not None:
            assert torch.allclose(ways[0][order], ways[1], atol=1e-6)
            assert torch.allclose(ways[0][1:2], ways[2], atol=1e-6)


@pytest.mark.parametrize("stages", [0, 1, 2, 3])
def test_counting_is_the_bilinear_halving_of_one_hot(stages):
    """The published `SpatialRescaler`: n bilinear halvings, then a 1x1 convolution without bias."""
    maps = torch.randint(0, CLASSES + 1, (2, 16, 24), generator=torch.Generator().manual_seed(1))
    one_hot = F.one_hot(maps, CLASSES + 1)[..., :CLASSES].movedim(3, 1).float()
    for _ in range(stages):
        one_hot = F.interpolate(one_hot, scale_factor=0.5, mode="bilinear")
    assert torch.allclose(class_shares(maps, CLASSES, stages), one_hot, atol=1e-6)
    torch.manual_seed(0)
    model = LabelMapConditioner(CLASSES, 3, stages)
    channels = model(maps).channels
    assert channels is not None
    expected = F.conv2d(one_hot, model.mapper.weight)
    assert torch.allclose(channels, expected, atol=1e-6)
    (ours,) = torch.autograd.grad(channels.square().sum(), model.mapper.weight)
    (theirs,) = torch.autograd.grad(expected.square().sum(), model.mapper.weight)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_unknown_pixel_has_no_channel():
    model, values = conditioner("labelmap")
    null = model(model.empty(values)).channels
    assert torch.equal(null, torch.zeros_like(null))
    with pytest.raises(ValueError, match="24 x 18 pixels cannot be halved 2 times"):
        model(torch.zeros(1, 18, 24, dtype=torch.int64))


def test_label_maps_are_read_from_ids_and_colours():
    ids = np.array([[0, 1, 6], [255, 2, 3]], dtype=np.uint8)
    row = parse_labelmap(ids, CLASSES, (2, 3))
    assert row.tolist() == [[0, 1, 6], [CLASSES, 2, 3]]
    assert row.dtype == torch.int64
    assert parse_labelmap(ids, 256, (2, 3), ignore=())[1, 0] == 255
    colours = {
        (0, 0, 0): 0,
        (255, 0, 0): 1,
        (0, 128, 7): 6,
        (1, 1, 1): 255,
        (9, 9, 9): 2,
        (0, 0, 255): 3,
    }
    painted = np.array(
        [[(0, 0, 0), (255, 0, 0), (0, 128, 7)], [(1, 1, 1), (9, 9, 9), (0, 0, 255)]], dtype=np.uint8
    )
    assert torch.equal(parse_labelmap(painted, CLASSES, (2, 3), colours=colours), row)


@pytest.mark.parametrize(
    ("raw", "colours", "message"),
    [
        (
            np.array([[0, 1], [7, 0]]),
            None,
            "class 7 at x = 0, y = 1: classes are 0 to 6, 255 = unknown",
        ),
        (np.array([[0, -1], [0, 0]]), None, "class -1 at x = 1, y = 0"),
        (np.zeros((2, 3), np.uint8), None, "label map has 3 x 2 pixels and its picture 2 x 2"),
        (np.zeros((2, 2)), None, "holds whole numbers"),
        (np.zeros((2, 2, 3), np.uint8), None, "holds whole numbers"),
        (np.zeros((2, 2), np.uint8), {(0, 0, 0): 0}, "8-bit RGB"),
        (np.zeros((2, 2, 3), np.uint8), {}, "table of colours is empty"),
        (np.full((2, 2, 3), 4, np.uint8), {(0, 0, 0): 0}, r"colour \(4, 4, 4\) at x = 0, y = 0"),
        (np.zeros((2, 2, 3), np.uint8), {(0, 0, 0): 9}, "class 9 at x = 0, y = 0"),
    ],
)
def test_what_is_no_label_map_is_said(raw, colours, message):
    with pytest.raises(ValueError, match=message):
        parse_labelmap(raw, CLASSES, (2, 2), colours=colours)


def test_noise_follows_the_cosine_schedule():
    pictures = torch.rand(5, 3, 4, 4) * 2 - 1
    noise = torch.randn(5, 3, 4, 4)
    levels = torch.tensor([0.0, 0.1, 0.35, 0.64, 1.0])
    values = augmented(pictures, levels, noise)
    assert torch.equal(values[0, :3], pictures[0])
    assert torch.allclose(values[4, :3], noise[4], atol=1e-6)
    assert torch.equal(values[:, 3], levels.view(-1, 1, 1).expand(5, 4, 4))
    schedule = build_schedule(ScheduleConfig(kind="cosine"), "v")
    for row, level in enumerate(levels[1:4].tolist(), start=1):
        # step t of the discrete schedule is the level (t + 1) / T
        sigma = float(schedule.sigma_at(torch.tensor([level - 0.0005], dtype=torch.float64)))
        expected = (pictures[row] + sigma * noise[row]) / (1 + sigma**2) ** 0.5
        assert torch.allclose(values[row, :3], expected, atol=1e-3)
    with pytest.raises(ValueError, match="not all from 0 to 1"):
        augmented(pictures, levels + 0.1, noise)


def test_the_upscalers_highest_level_is_what_the_page_says():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    theirs = float((1 - betas).cumprod(0)[350])
    ours = augmented(torch.ones(1, 1, 1, 1), torch.tensor([0.64]), torch.zeros(1, 1, 1, 1))[0, 0]
    assert float(ours) ** 2 == pytest.approx(theirs, abs=0.01)


def test_the_level_is_told_and_the_picture_is_passed_on():
    model, values = conditioner("lowres")
    told = model(values)
    assert torch.equal(told.channels, values[:, :3])
    assert told.vector.shape == (4, 32)
    louder = values.clone()
    louder[:, 3] = 0.5
    assert (model(louder).vector - told.vector).abs().amax(1).min() > 1e-3
    assert torch.equal(model(louder).channels, told.channels)


@pytest.mark.parametrize(
    ("ratio", "factor", "size"), [(8, 4, (8, 12)), (2, 4, (2, 3)), (4, 8, (2, 3)), (4, 1, (16, 24))]
)
def test_other_sizes_are_resized_to_the_latents(ratio, factor, size):
    ramp = torch.linspace(-1, 1, 6).expand(1, 1, 4, 6)
    values = augmented(ramp, torch.zeros(1), torch.zeros_like(ramp))
    channels = LowResConditioner(1, 32, ratio, factor)(values).channels
    assert channels is not None
    assert channels.shape == (1, 1, *size)
    assert float(channels.mean()) == pytest.approx(0.0, abs=1e-6)
    assert (channels.diff(dim=3) >= -1e-6).all()


def test_low_resolution_pictures_are_read():
    pixels = torch.tensor([[[0, 255]], [[51, 102]], [[204, 153]]], dtype=torch.uint8)
    row = parse_lowres(pixels, 3, (1, 2), level=0.25)
    assert torch.allclose(row[:3], pixels / 127.5 - 1)
    assert row[3].tolist() == [[0.25, 0.25]]
    assert torch.equal(parse_lowres(row[:3], 3), torch.cat([row[:3], torch.zeros(1, 1, 2)]))
    for raw, channels, size, level, message in (
        (row[:3], 1, None, 0.0, "has 3 channels and the model takes 1"),
        (row[:3], 3, (2, 2), 0.0, "has 2 x 1 pixels: give one of 2 x 2"),
        (row[:3] * 1.1, 3, None, 0.0, r"outside of \[-1, 1\]"),
        (row[:3] * torch.nan, 3, None, 0.0, r"outside of \[-1, 1\]"),
        (row[:3], 3, None, 1.5, "noise level 1.5"),
        (row[:3], 3, None, float("nan"), "noise level nan"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_lowres(raw, channels, size, level)


def images(count: int, size: int) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(2)) * 2 - 1


def test_channels_equal_those_of_diffusers(diffusers):
    """The pipeline's own functions, from its source: its module wants packages that we do not need."""
    package = importlib.util.find_spec("diffusers")
    assert package is not None
    assert package.origin is not None
    name = "pipelines/stable_diffusion/pipeline_stable_diffusion_inpaint.py"
    nodes = list(ast.walk(ast.parse((Path(package.origin).parent / name).read_text())))
    names = ("prepare_mask_latents", "_encode_vae_image", "retrieve_latents")
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef) and n.name in names]
    assert len(functions) == 3
    assert "masked_image = init_image * (mask_condition < 0.5)" in {
        ast.unparse(n) for n in nodes if isinstance(n, ast.Assign)
    }
    joined = [
        n
        for n in nodes
        if isinstance(n, ast.Assign) and "masked_image_latents], dim=1)" in ast.unparse(n)
    ]
    assert len(joined) == 1
    theirs: dict[str, Any] = {"torch": torch}
    exec("from __future__ import annotations\n" + "\n".join(map(ast.unparse, functions)), theirs)

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()
    pipeline = SimpleNamespace(vae=vae, vae_scale_factor=2)
    pipeline._encode_vae_image = lambda image, generator: theirs["_encode_vae_image"](
        pipeline, image, generator
    )
    image, mask = images(2, 32), holes(2, 32, 32)
    masked = image * (mask[:, None].float() < 0.5)
    with torch.no_grad():
        small, latents = theirs["prepare_mask_latents"](
            pipeline, mask[:, None].float(), masked, 2, 32, 32, torch.float32, torch.device("cpu"),
            torch.Generator().manual_seed(7), False,
        )  # fmt: skip
        noisy = torch.randn(2, 4, 16, 16)
        scope: dict[str, Any] = {
            "torch": torch,
            "latent_model_input": noisy,
            "mask": small,
            "masked_image_latents": latents,
        }
        exec(ast.unparse(joined[0]), scope)

        filled = fill_hole(image, mask, "sd")
        assert torch.equal(filled, masked)
        drawn = vae.encode(filled).latent_dist.sample(torch.Generator().manual_seed(7))
        values = mask_values(drawn * vae.config.scaling_factor, mask)
        channels = MaskConditioner(4, "sd")(values).channels
    assert channels is not None
    assert torch.equal(torch.cat([noisy, channels], dim=1), scope["latent_model_input"])


def test_channels_equal_those_of_the_papers_code():
    """`scripts/inpaint.py`: make_batch, then c = encode(masked), cat(c, nearest(mask))."""
    image, mask = images(2, 32), holes(2, 32, 32)
    encode = torch.nn.Conv2d(3, 3, 4, stride=4)  # whatever makes latents of a picture
    shares, binary = (image + 1) / 2, mask[:, None].float()
    masked = (1 - binary) * shares * 2.0 - 1.0
    with torch.no_grad():
        c = encode(masked)
        cc = F.interpolate(binary * 2.0 - 1.0, size=c.shape[-2:])
        expected = torch.cat((c, cc), dim=1)
        filled = fill_hole(image, mask, "ldm")
        assert torch.allclose(filled, masked, atol=1e-6)
        channels = MaskConditioner(3, "ldm")(mask_values(encode(filled), mask)).channels
    assert channels is not None
    assert torch.allclose(channels, expected, atol=1e-5)


def test_masks_at_the_latents_size():
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, :4, 4:] = True
    assert to_latent_size(mask, 2, 2).tolist() == [[[False, True], [False, False]]]
    small = to_latent_size(mask, 2, 2)
    assert torch.equal(to_latent_size(small, 2, 2), small)
    latents = torch.randn(1, 4, 2, 2)
    assert torch.equal(mask_values(latents, mask), mask_values(latents, small))


@pytest.mark.parametrize("feather", [0, 1, 5])
def test_what_lies_outside_of_the_hole_stays(feather):
    picture, generated = images(2, 32), -images(2, 32) * 0.5
    mask = holes(2, 32, 32)
    result = blended(picture, generated, mask, feather)
    inside = mask[:, None].expand_as(picture)
    assert torch.equal(result[inside], generated[inside])
    near = F.max_pool2d(mask[:, None].float(), 2 * feather + 1, stride=1, padding=feather) > 0
    outside = ~near.expand_as(picture)
    assert torch.equal(result[outside], picture[outside])
    rim = near.expand_as(picture) & ~inside
    assert bool(rim.any()) == (feather > 0)
    assert not torch.isclose(result[rim], picture[rim], atol=1e-5).any()
    assert not torch.isclose(result[rim], generated[rim], atol=1e-5).any()


def test_the_rim_falls_evenly():
    mask = torch.zeros(1, 5, 12, dtype=torch.bool)
    mask[:, :, :4] = True
    result = blended(torch.zeros(1, 1, 5, 12), torch.ones(1, 1, 5, 12), mask, 3)
    expected = torch.tensor([1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0, 0])
    assert torch.equal(result[0, 0], expected.expand(5, 12))


def test_sizes_that_differ_are_said():
    with pytest.raises(ValueError, match="mask has 16 x 16 pixels and its picture 32 x 32"):
        fill_hole(images(1, 32), holes(1, 16, 16), "sd")
    with pytest.raises(ValueError, match="mask has 32 x 32 pixels and its picture 16 x 16"):
        blended(images(1, 16), images(1, 16), holes(1, 32, 32))
    with pytest.raises(ValueError, match="rim of -1 pixels"):
        blended(images(1, 32), images(1, 32), holes(1, 32, 32), -1)
