import shutil
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.images import split, training_batches
from ldmkit.data.order import generator_for, indices_of_step, is_held_back, seed_for
from ldmkit.data.sources import open_source
from ldmkit.errors import DataError


@given(st.integers(1, 40), st.integers(1, 16), st.integers(0, 2**70))
def test_each_epoch_sees_every_sample_once(count, batch_size, seed):
    steps = 3 * count  # three epochs end on a step boundary
    seen = [
        place
        for step in range(steps)
        for place in indices_of_step(step, count=count, batch_size=batch_size, seed=seed)
    ]
    assert [position for _, position in seen] == list(range(steps * batch_size))
    for epoch in range(0, len(seen), count):
        assert Counter(index for index, _ in seen[epoch : epoch + count]) == Counter(range(count))


def test_epochs_and_seeds_differ():
    def order(step, seed):
        return [index for index, _ in indices_of_step(step, count=50, batch_size=50, seed=seed)]

    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)


def test_places_in_the_seed_tree_are_apart():
    seeds = {
        seed_for(seed, *place)
        for seed in (0, 1)
        for place in [(), (0,), (1,), (0, 0), (0, 1), (1, 0)]
    }
    assert len(seeds) == 12
    assert torch.equal(
        torch.randn(3, generator=generator_for(1, 2)), torch.randn(3, generator=generator_for(1, 2))
    )


def test_the_share_held_back_is_the_share_asked_for():
    held = sum(is_held_back(f"picture-{number}", 0.2) for number in range(5000))
    assert 0.18 < held / 5000 < 0.22
    assert not any(is_held_back(f"picture-{number}", 0.0) for number in range(100))
    small = {n for n in range(1000) if is_held_back(f"{n}", 0.1)}
    assert small < {n for n in range(1000) if is_held_back(f"{n}", 0.2)}


def test_batches_do_not_depend_on_workers_or_where_one_starts(pictures):
    items = open_source(pictures).items
    config = PreprocessingConfig(size=16, crop="random", flip=True)

    def batches(start, workers, count):
        stream = training_batches(items, config, batch_size=5, seed=3, start=start, workers=workers)
        return [next(stream) for _ in range(count)]

    whole = batches(0, 0, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], batches(4, 0, 2), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole, batches(0, 1, 6), strict=True))
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_picture_is_named_whichever_process_reads_it(pictures, tmp_path, workers):
    shutil.copytree(pictures, tmp_path / "data")
    (tmp_path / "data/circle/3.png").write_text("hello")
    items = open_source(tmp_path / "data").items
    config = PreprocessingConfig(size=16)
    batches = training_batches(items, config, batch_size=12, seed=0, start=0, workers=workers)
    with pytest.raises(DataError, match=r"^\S+circle/3.png is not a picture$"):
        next(batches)


def test_split_divides_by_key(pictures):
    items = open_source(pictures).items
    parts = split(items, 0.4)
    assert sorted(parts.training + parts.held_back) == sorted(items)
    assert parts.held_back
