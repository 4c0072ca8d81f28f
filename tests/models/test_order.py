"""The order of samples is a pure function of (seed, stream, epoch), whatever the cuts in which it is read."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.order import BLOCKS_IN_MEMORY, LABELED_STREAM, UNLABELED_STREAM, SampleOrder, sample_rng

SHARDS = (5, 0, 7, 3, 1, 8, 4)  # one is empty: all its images were rejected
TOTAL = sum(SHARDS)

shard_lists = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


def order(shards: tuple[int, ...] = SHARDS, seed: int = 0, stream: int = LABELED_STREAM, block: int = 2) -> SampleOrder:
    return SampleOrder(shards, seed, stream, block)


@given(shard_lists, st.integers(1, 14), st.integers(0, 5), st.integers(0, 2**40))
def test_every_epoch_visits_each_row_once(shards: list[int], block: int, epoch: int, seed: int) -> None:
    subject = SampleOrder(shards, seed, UNLABELED_STREAM, block)
    rows = subject.rows(epoch * sum(shards), sum(shards))
    assert rows.dtype == np.int64
    assert sorted(rows) == list(range(sum(shards)))


@given(shard_lists, st.integers(1, 14), st.integers(0, 100), st.lists(st.integers(0, 30), max_size=8))
def test_any_cut_gives_the_same_stream(shards: list[int], block: int, start: int, counts: list[int]) -> None:
    whole = SampleOrder(shards, 3, LABELED_STREAM, block).rows(start, sum(counts))
    cut, position, pieces = SampleOrder(shards, 3, LABELED_STREAM, block), start, [np.zeros(0, np.int64)]
    for count in counts:
        pieces.append(cut.rows(position, count))
        position += count
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


@given(st.lists(st.integers(0, 40 * TOTAL), min_size=1, max_size=30))
def test_the_row_at_a_position_does_not_depend_on_what_was_read_before(positions: list[int]) -> None:
    used = order()
    assert [used.rows(p, 1)[0] for p in positions] == [order().rows(p, 1)[0] for p in positions]


def test_epochs_differ() -> None:
    epochs = {tuple(order().rows(number * TOTAL, TOTAL)) for number in range(20)}
    assert len(epochs) == 20


@pytest.mark.parametrize("other", [order(seed=1), order(stream=UNLABELED_STREAM)], ids=["seed", "stream"])
def test_the_order_depends_on_seed_and_stream(other: SampleOrder) -> None:
    assert list(other.rows(0, TOTAL)) != list(order().rows(0, TOTAL))


def test_samples_are_shuffled_within_blocks_of_consecutive_shuffled_shards() -> None:
    shards, block = [10] * 12, 3
    rows = SampleOrder(shards, 0, LABELED_STREAM, block).rows(0, 120)
    blocks = [{int(row) // 10 for row in rows[start : start + 30]} for start in range(0, 120, 30)]
    assert [len(found) for found in blocks] == [3, 3, 3, 3]  # a block never touches a fourth shard
    assert set().union(*blocks) == set(range(12))
    assert blocks != [{0, 1, 2}, {3, 4, 5}, {6, 7, 8}, {9, 10, 11}], "the shards were not shuffled"
    first = [int(row) // 10 for row in rows[:30]]
    assert first != sorted(first, key=first.index), "the samples of a block come shard by shard"


def test_a_block_of_all_shards_shuffles_the_whole_set() -> None:
    rows = SampleOrder([1] * 1000, 0, LABELED_STREAM, 1000).rows(0, 1000)
    distance = np.abs(rows - np.arange(1000)).mean()
    assert 300 < distance < 370  # 1000 / 3 for a uniform permutation


def test_a_data_set_of_300_million_images_needs_no_array_of_its_rows() -> None:
    shards = [10_000] * 30_000
    tracemalloc.start()
    subject = SampleOrder(shards, 0, UNLABELED_STREAM, 16)
    far = 299_990_000
    rows = subject.rows(far, 20_000)  # into the next epoch
    for epoch in range(3 * BLOCKS_IN_MEMORY):  # what is kept is bounded
        subject.rows(epoch * 300_000_000, 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(np.unique(rows)) > 19_000
    assert peak < 64 << 20, f"{peak / 2**20:.0f} MiB; all rows would take 2,289 MiB"


def test_the_noise_of_a_sample_depends_on_seed_stream_and_position_alone() -> None:
    draws = {
        place: tuple(sample_rng(*place).integers(0, 2**62, 4))
        for place in [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1), (1, 0, 1)]
    }
    assert len(set(draws.values())) == len(draws)
    assert tuple(sample_rng(0, 1, 0).integers(0, 2**62, 4)) == draws[0, 1, 0]
