"""Holes: what random ones cover, and how a user's mask is read."""

import numpy as np
import pytest

from ldmkit.data.masks import HOLES, LEAST, MIXTURE, MOST, parse_mask, random_hole


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("kind", HOLES)
@pytest.mark.parametrize("size", [(8, 8), (32, 32), (96, 64), (20, 300)])
def test_holes_cover_1_to_60_percent(kind, size):
    shares = []
    for seed in range(60):
        hole = random_hole(rng(seed), size[0], size[1], {kind: 1.0})
        assert hole.shape == size
        assert hole.dtype == np.bool_
        shares.append(hole.mean())
    assert min(shares) >= LEAST
    assert max(shares) <= MOST
    assert len(set(shares)) > 1 or kind == "half"


def test_a_hole_is_a_function_of_the_draw():
    holes = [random_hole(rng(seed), 64, 64) for seed in range(30)]
    for seed, hole in enumerate(holes):
        assert np.array_equal(hole, random_hole(rng(seed), 64, 64))
    assert len({hole.tobytes() for hole in holes}) > 25  # of halves there are four


def test_halves_and_margins_lie_at_all_sides():
    halves = {random_hole(rng(seed), 16, 24, {"half": 1.0}).tobytes() for seed in range(40)}
    expected = np.zeros((4, 16, 24), dtype=bool)
    expected[0, :8] = expected[1, 8:] = expected[2, :, :12] = expected[3, :, 12:] = True
    assert halves == {hole.tobytes() for hole in expected}
    windows = 0
    for seed in range(100):
        known = ~random_hole(rng(seed), 40, 60, {"margin": 1.0})
        rows, columns = known.any(1), known.any(0)
        assert known.sum() == rows.sum() * columns.sum()  # one rectangle is kept
        assert 0.35 <= known.mean() <= 0.95
        windows += not rows.all() and not columns.all()
    assert 8 <= windows <= 35  # one in five


def test_strokes_are_as_wide_as_said():
    """No stroke is narrower than 5/256 of the side: every hole survives an erosion by half of that."""
    for seed in range(20):
        hole = random_hole(rng(seed), 256, 256, {"strokes": 1.0})
        inner = (
            hole[1:-1, 1:-1] & hole[:-2, 1:-1] & hole[2:, 1:-1] & hole[1:-1, :-2] & hole[1:-1, 2:]
        )
        assert inner.sum() > 0.4 * hole.sum()


def test_the_mixture_is_drawn_as_stated():
    assert sum(MIXTURE.values()) == pytest.approx(1.0)
    assert set(MIXTURE) == set(HOLES)
    draw, count = rng(0), 1500
    halves = sum(
        random_hole(draw, 16, 16, {"half": 0.25, "boxes": 0.75}).mean() == 0.5 for _ in range(count)
    )
    assert halves / count == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize(
    ("size", "mixture", "message"),
    [
        ((7, 64), None, "64 x 7 pixels is too small"),
        ((64, 64), {"clouds": 1.0}, "no holes called clouds: take strokes, boxes"),
        ((64, 64), {"half": 0.5}, "with the sum 1"),
        ((64, 64), {"half": 1.5, "boxes": -0.5}, "with the sum 1"),
        ((64, 64), {}, "with the sum 1"),
    ],
)
def test_what_cannot_be_drawn_is_said(size, mixture, message):
    with pytest.raises(ValueError, match=message):
        random_hole(rng(0), size[0], size[1], mixture)


def test_a_users_mask_is_what_is_brighter_than_half():
    grey = np.array([[0, 127], [128, 255]], dtype=np.uint8)
    expected = np.array([[False, False], [True, True]])
    for raw in (
        grey,
        grey[:, :, None],
        np.repeat(grey[:, :, None], 3, axis=2),
        grey.astype(np.uint16) * 257,
        grey.astype(np.float32) / 255,
        expected,
    ):
        assert np.array_equal(parse_mask(raw, (2, 2)), expected)
    red = np.zeros((2, 2, 3), np.uint8)
    red[:, :, 0] = 255
    assert not parse_mask(red, (2, 2)).any()  # a third of white


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (np.zeros((2, 3), np.uint8), "mask has 3 x 2 pixels and its picture 2 x 2"),
        (np.zeros((2, 2, 4), np.uint8), r"grey or RGB, and this one has the shape \[2, 2, 4\]"),
        (np.zeros(2, np.uint8), "grey or RGB"),
        (np.full((2, 2), 255.0), "outside of 0 to 1"),
        (np.full((2, 2), np.nan), "outside of 0 to 1"),
        (np.zeros((2, 2), np.int64), "int64 numbers"),
    ],
)
def test_what_is_no_mask_is_said(raw, message):
    with pytest.raises(ValueError, match=message):
        parse_mask(raw, (2, 2))
