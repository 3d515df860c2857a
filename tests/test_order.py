import shutil
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data import order
from ldmkit.data.images import split, training_batches
from ldmkit.data.order import (
    bucketed_indices_of_step,
    generator_for,
    indices_of_step,
    is_held_back,
    seed_for,
)
from ldmkit.data.sources import open_source
from ldmkit.data_configs import SourceConfig
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


@given(st.integers(1, 40), st.integers(1, 100), st.integers(0, 2**70), st.integers(0, 10**9))
def test_the_order_is_the_one_of_the_first_version(count, batch_size, seed, step):
    def former(position):
        epoch = np.random.default_rng(seed_for(seed, position // count)).permutation(count)
        return int(epoch[position % count]), position

    positions = range(step * batch_size, (step + 1) * batch_size)
    places = indices_of_step(step, count=count, batch_size=batch_size, seed=seed)
    assert places == [former(position) for position in positions]
    assert all(type(index) is int for index, _ in places)


def test_an_epoch_of_a_million_is_shuffled_once():
    indices_of_step(0, count=1_000_000, batch_size=64, seed=7)
    start = time.perf_counter()
    for step in range(1000):
        indices_of_step(step, count=1_000_000, batch_size=64, seed=7)
    assert time.perf_counter() - start < 1.0  # to shuffle takes 0.02 s


buckets = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)


@given(buckets, st.integers(1, 7), st.integers(0, 2**70))
def test_buckets_are_each_seen_whole_in_every_epoch(counts, batch_size, seed):
    batches = sum(-(-count // batch_size) for count in counts)
    for epoch in range(2):
        seen = [Counter() for _ in counts]
        for step in range(epoch * batches, (epoch + 1) * batches):
            bucket, places = bucketed_indices_of_step(
                step, counts=counts, batch_size=batch_size, seed=seed
            )
            assert [p for _, p in places] == list(range(step * batch_size, (step + 1) * batch_size))
            assert all(0 <= index < counts[bucket] for index, _ in places)
            seen[bucket].update(index for index, _ in places)
        for count, drawn in zip(counts, seen, strict=True):
            assert set(drawn) == set(range(count))
            assert sum(drawn.values()) == -(-count // batch_size) * batch_size
            # none is seen much more often than another
            assert not drawn or max(drawn.values()) - min(drawn.values()) <= 1


@given(buckets, st.integers(1, 7), st.integers(0, 2**70), st.integers(0, 60))
def test_a_step_of_buckets_does_not_depend_on_those_before(counts, batch_size, seed, step):
    def places(step):
        return bucketed_indices_of_step(step, counts=counts, batch_size=batch_size, seed=seed)

    order._bucketed_epoch.cache_clear()
    alone = places(step)
    order._bucketed_epoch.cache_clear()
    assert [places(number) for number in range(step + 1)][step] == alone


def test_buckets_are_mixed_and_seeds_differ():
    def run(seed, first):
        steps = [
            bucketed_indices_of_step(step, counts=[40, 40], batch_size=4, seed=seed)
            for step in range(first, first + 20)
        ]
        return [(bucket, [index for index, _ in places]) for bucket, places in steps]

    assert run(0, 0) != run(0, 20)
    assert run(0, 0) != run(1, 0)
    owners = [bucket for bucket, _ in run(0, 0)]
    assert owners != sorted(owners)
    with pytest.raises(ValueError, match="no samples"):
        bucketed_indices_of_step(0, counts=[0, 0], batch_size=4, seed=0)


def test_epochs_and_seeds_differ():
    def drawn(step, seed):
        return [index for index, _ in indices_of_step(step, count=50, batch_size=50, seed=seed)]

    assert drawn(0, 0) != drawn(1, 0)
    assert drawn(0, 0) != drawn(0, 1)


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
    items = open_source(SourceConfig(data=pictures)).items
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
    items = open_source(SourceConfig(data=tmp_path / "data")).items
    config = PreprocessingConfig(size=16)
    batches = training_batches(items, config, batch_size=12, seed=0, start=0, workers=workers)
    with pytest.raises(DataError, match=r"^\S+circle/3.png is not a picture$"):
        next(batches)


def test_split_divides_by_key(pictures):
    items = open_source(SourceConfig(data=pictures)).items
    parts = split(items, 0.4)
    assert sorted(parts.training + parts.held_back) == sorted(items)
    assert parts.held_back
